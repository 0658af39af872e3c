"""The specification of `group_advantage`, in plain torch: converts rewards of grouped episodes to advantages.

Invariants:
- An invalid episode (its reward is null) is not part of its group's statistics and gets 0. Its reward may be
  NaN.
- A group without signal (fewer than two valid episodes, or all their rewards equal) gets exactly 0 and is
  marked. Groups of one episode and empty groups are such groups.
- Bad values (a valid reward that is NaN, infinite or beyond 1e38 in size; an offset out of place) are counted
  in the status and never trained on silently. A bad reward makes its group NaN, or under
  `batch_std` and `reinforce_plus_plus` every group that has a signal. A bad offset makes everything NaN.

Statistics are computed in double precision in two passes, and only the result is rounded to the rewards'
dtype. Other versions may sum in another order. They agree up to the rounding of the result, and nearly always
bit for bit.

Source: method, section 5, stage 3: A_i = (s_i - mean) / (std + 1e-6) within the group. The sample standard
deviation (ddof 1) is TRL's and verl's. `dr_grpo` is Dr. GRPO's (no std), `rloo` is leave-one-out. The last
two take the group's mean and the batch's std. `batch_std` is TRL's `scale_rewards="batch"`: the std of the
rewards themselves, which also holds what the groups differ by. `reinforce_plus_plus` is REINFORCE++ with the
group's mean as its baseline (Hu et al., arXiv 2501.03262) as verl has it: the std of the rewards minus their
group's mean, with eps added to the variance. Here every episode counts once, in verl as often as it has
tokens. For episodes of one token both are the same.
"""

from __future__ import annotations

import torch

METHODS = ("grpo", "dr_grpo", "rloo", "batch_std", "reinforce_plus_plus")
MAX_REWARD = 1e38


def default_eps(method: str) -> float:
    """The eps of a method where none is given. It is added to a std, and under REINFORCE++ to a variance."""
    return 1e-8 if method == "reinforce_plus_plus" else 1e-6


def group_advantage_reference(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    method: str = "grpo",
    ddof: int = 1,
    eps: float | None = None,
    token_offsets: torch.Tensor | None = None,
    n_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises rewards within their groups. `op.group_advantage` explains the arguments.

    Returns:
        The advantages in the rewards' dtype (`[episodes]`, or `[n_tokens]` if `token_offsets` are given),
        whether each group has no signal (bool `[groups]`), and the number of bad values (int32 `[1]`).
    """
    eps = default_eps(method) if eps is None else eps
    episodes, groups = rewards.shape[0], group_offsets.shape[0] - 1
    exact = rewards.to(torch.float64)
    group_ends = group_offsets[1:].contiguous()
    episode_index = torch.arange(episodes, device=rewards.device)
    group = torch.searchsorted(group_ends, episode_index, right=True).clamp(max=max(groups - 1, 0))

    is_valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    is_bad = is_valid & ~(exact.abs() <= MAX_REWARD)
    counts = is_valid & ~is_bad

    def per_group(values: torch.Tensor) -> torch.Tensor:
        kept = torch.where(counts, values, 0.0)
        return exact.new_zeros(groups).index_add_(0, group, kept)

    n = per_group(torch.ones_like(exact))
    total = per_group(exact)
    deviation = exact - (total / n.clamp(min=1))[group]
    lowest = exact.new_full((groups,), torch.inf)
    lowest.scatter_reduce_(0, group, torch.where(counts, exact, torch.inf), "amin")
    highest = exact.new_full((groups,), -torch.inf)
    highest.scatter_reduce_(0, group, torch.where(counts, exact, -torch.inf), "amax")
    poisoned = torch.zeros_like(lowest).index_add_(0, group, is_bad.double()) > 0
    zero_variance = ~(lowest < highest) & ~poisoned

    if method == "grpo":
        variance = per_group(deviation**2) / (n - ddof).clamp(min=1)
        advantages = deviation / (variance.sqrt() + eps)[group]
    elif method == "dr_grpo":
        advantages = deviation
    elif method == "rloo":
        others = (total[group] - exact) / (n - 1)[group]
        advantages = exact - others
    else:
        batch_n = counts.sum()
        if method == "batch_std":
            batch_mean = torch.where(counts, exact, 0.0).sum() / batch_n.clamp(min=1)
            squares = torch.where(counts, (exact - batch_mean) ** 2, 0.0).sum()
        else:
            squares = torch.where(counts & ~zero_variance[group], deviation**2, 0.0).sum()
        variance = squares / (batch_n - ddof).clamp(min=1)
        scale = variance.sqrt() + eps if method == "batch_std" else (variance + eps).sqrt()
        advantages = deviation / torch.where(is_bad.any(), torch.nan, scale)

    bad_offsets = _bad_group_offsets(group_offsets, episodes)
    if token_offsets is not None:
        bad_offsets = bad_offsets + _bad_token_offsets(token_offsets, n_tokens)
    advantages = torch.where(zero_variance[group], 0.0, advantages)
    advantages = torch.where(poisoned[group], torch.nan, advantages)
    advantages = torch.where(is_valid, advantages, 0.0).to(rewards.dtype)
    if token_offsets is not None:
        # Position p belongs to the last episode that begins at or before it; there is a 0 at both ends.
        padded = torch.nn.functional.pad(advantages, (1, 1))
        positions = torch.arange(n_tokens, device=rewards.device)
        advantages = padded[torch.searchsorted(token_offsets.contiguous(), positions, right=True)]
    advantages = torch.where(bad_offsets > 0, torch.nan, advantages)
    status = (is_bad.sum() + bad_offsets).to(torch.int32).reshape(1)
    return advantages, zero_variance, status


def _bad_group_offsets(offsets: torch.Tensor, episodes: int) -> torch.Tensor:
    """The number of bad offsets. Offsets must ascend from 0 to `episodes`."""
    bad = (offsets < 0) | (offsets > episodes)
    bad[1:] |= offsets[1:] < offsets[:-1]
    bad[0] |= offsets[0] != 0
    bad[-1] |= offsets[-1] != episodes
    return bad.sum()


def _bad_token_offsets(offsets: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """The number of bad offsets. Offsets must ascend within [0, n_tokens], but need not reach its ends."""
    bad = (offsets < 0) | (offsets > n_tokens)
    bad[1:] |= offsets[1:] < offsets[:-1]
    return bad.sum()
