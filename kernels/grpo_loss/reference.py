"""The specification of `grpo_loss`: the clipped policy loss with a KL term, over packed episodes.

For a learned token (`loss_mask` true) with advantage A, in float32:

    ratio = exp(policy - old)
    loss  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_weight * k3
    k3    = expm1(d) - d, with d = ref - policy

k3 is computed in double from the float32 d, and rounded. Near the reference policy, where most tokens are,
it is about d^2 / 2, and a difference in float32 would lose it: d = 3e-4 would give 0 or 1.2e-7, but k3 is
4.5e-8. The other versions use a power series there. In every version k3 is never negative, and its relative
error is a few times that of float32.

The loss of the batch is `scale * sum(weight * loss)` over the learned tokens:

| aggregation | weight | 1 / scale |
|---|---|---|
| `token_mean` | 1 | learned tokens |
| `episode_mean` | 1 / learned tokens of the token's episode | episodes with a learned token |
| `fixed_length` | 1 | episodes * fixed_length |

An episode without a learned token has no mean, and `episode_mean` does not count it. `fixed_length` counts
every episode, because its divisor must not depend on anything that was sampled. `normalizer` replaces the
first factor of 1 / scale, the number of tokens or of episodes. A batch without learned tokens has loss 0.
Tokens that are not learned are never used, whatever they hold (NaN, infinity). If a logprob or the advantage
of a learned token is not finite, its loss and its gradient are NaN, even where clipping would hide it (an
infinite ratio with A > 0 is clipped to a finite loss). With `kl_weight` 0, `ref` is no part of the loss and
shows in `kl/ref` only.

Source: Shao et al., DeepSeekMath (arXiv 2402.03300), eq. 3 and 4; `fixed_length`: Liu et al., Understanding
R1-Zero-Like Training (arXiv 2503.20783); two clip bounds: Yu et al., DAPO (arXiv 2503.14476).
"""

from __future__ import annotations

from typing import Literal

import torch

Aggregation = Literal["token_mean", "episode_mean", "fixed_length"]

METRICS = ("ratio/mean", "ratio/max", "clip/low", "clip/high", "clip/total", "kl/ref")
"""The names of the entries of the metrics vector, in order."""


def grpo_loss_reference(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    episode_offsets: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.01,
    aggregation: Aggregation = "episode_mean",
    fixed_length: int | None = None,
    normalizer: float | None = None,
    kl_dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, differentiable by autograd. The arguments are those of `op.grpo_loss`, unchecked.

    `kl_dtype` is the precision in which k3 is computed. Only float64 is the specification; float32 is for
    benchmarks, as the faster way that a trainer would take.

    Returns:
        The loss (float32 scalar), the tokens' losses (float32 `[tokens]`, 0 for tokens that are not learned,
        without gradient), and the metrics (float32 `[6]`, in the order of `METRICS`, without gradient;
        `kl/ref` is 0 without `ref_logprobs`).
    """
    policy, old, ref, advantage = _learned(
        policy_logprobs, old_logprobs, ref_logprobs, advantages, loss_mask, episode_offsets
    )
    ratio = torch.exp(policy - old)
    clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    token_loss = -torch.minimum(ratio * advantage, clipped * advantage)
    k3 = torch.zeros_like(ratio)
    if ref is not None:
        gap = (ref - policy).to(kl_dtype)
        k3 = (torch.expm1(gap) - gap).float()
        if kl_weight != 0:
            token_loss = token_loss + kl_weight * k3
    # A summand of the policy's logprob, so that autograd's gradient is NaN too.
    token_loss = token_loss + policy * _zero_or_nan(policy, old, ref if kl_weight != 0 else None, advantage)
    token_loss = torch.where(loss_mask, token_loss, 0)
    weight, scale = weights_and_scale(loss_mask, episode_offsets, aggregation, fixed_length, normalizer)
    loss = (weight * token_loss).sum() * scale

    with torch.no_grad():
        low = loss_mask & (ratio < 1 - clip_low) & (advantage < 0)
        high = loss_mask & (ratio > 1 + clip_high) & (advantage > 0)
        tokens = loss_mask.sum()
        sums = torch.stack([torch.where(loss_mask, ratio, 0).sum(), low.sum(), high.sum(), k3.sum()])
        mean, low_share, high_share, kl = (sums / tokens.clamp(min=1)).unbind()
        largest = torch.cat([torch.where(loss_mask, ratio, 0), ratio.new_zeros(1)]).max()
        # Without tokens, the ratios are 1 and nothing is clipped.
        mean, largest = (torch.where(tokens == 0, 1.0, value) for value in (mean, largest))
        metrics = torch.stack([mean, largest, low_share, high_share, low_share + high_share, kl])
    return loss, token_loss.detach(), metrics


def grpo_gradient_reference(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    episode_offsets: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
) -> torch.Tensor:
    """The gradient of every token's own loss with respect to its policy logprob, in closed form.

    Inside the clip range (bounds included) the gradient is `-ratio * A`. Outside, it depends on the smaller
    of the two products: it is `-ratio * A` if that is the unclipped one, 0 if that is the clipped one, and
    half of `-ratio * A` if they are equal in float32 (autograd's convention for `torch.minimum`). The KL term
    adds `-kl_weight * expm1(ref - policy)`. This equals autograd's gradient of `grpo_loss_reference`, except
    for a clipped token of finite logprobs whose ratio overflows: the gradient is 0 here, and 0 * infinity =
    NaN there.

    Returns:
        The gradient, float32 `[tokens]`, 0 for tokens that are not learned.
    """
    policy, old, ref, advantage = _learned(
        policy_logprobs, old_logprobs, ref_logprobs, advantages, loss_mask, episode_offsets
    )
    ratio = torch.exp(policy - old)
    clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    gradient = -ratio * advantage
    outside = ~((ratio >= 1 - clip_low) & (ratio <= 1 + clip_high))
    gradient = torch.where(outside & (ratio * advantage == clipped * advantage), gradient / 2, gradient)
    gradient = torch.where(outside & (ratio * advantage > clipped * advantage), 0, gradient)
    if ref is not None and kl_weight != 0:
        gradient = gradient - kl_weight * torch.expm1(ref - policy)
    gradient = gradient + _zero_or_nan(policy, old, ref if kl_weight != 0 else None, advantage)
    return torch.where(loss_mask, gradient, 0)


def weights_and_scale(
    loss_mask: torch.Tensor,
    episode_offsets: torch.Tensor,
    aggregation: Aggregation,
    fixed_length: int | None,
    normalizer: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token's weight (float32 `[tokens]`, 0 for unlearned tokens) and the scale (float32 scalar)."""
    episodes = episode_offsets.numel() - 1
    weight = loss_mask.float()
    if aggregation == "token_mean":
        count = weight.sum()
    elif aggregation == "episode_mean":
        learned = weight.new_zeros(max(episodes, 1))
        of_token = _episode_of_token(episode_offsets, weight.numel())
        learned = learned.index_add(0, of_token, weight)
        weight = weight / learned.clamp(min=1)[of_token]
        count = (learned > 0).sum()
    else:
        count = weight.new_tensor(episodes)
    if normalizer is not None:
        count = weight.new_tensor(normalizer)
    divisor = count.double() * (fixed_length if aggregation == "fixed_length" and fixed_length else 1)
    return weight, torch.where(divisor > 0, 1 / divisor, 0).float()


def _episode_of_token(episode_offsets: torch.Tensor, tokens: int) -> torch.Tensor:
    """The number of episodes that end at or before each token, int64 `[tokens]`."""
    positions = torch.arange(tokens, device=episode_offsets.device)
    ended = torch.bucketize(positions, episode_offsets[1:].contiguous(), right=True)
    return ended.clamp(max=max(episode_offsets.numel() - 2, 0))


def _learned(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    episode_offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The three logprobs and the advantages per token in float32, 0 for unlearned tokens."""
    if advantages.numel() != loss_mask.numel():
        advantages = advantages[_episode_of_token(episode_offsets, loss_mask.numel())]
    return (
        torch.where(loss_mask, policy_logprobs.float(), 0),
        torch.where(loss_mask, old_logprobs.float(), 0),
        None if ref_logprobs is None else torch.where(loss_mask, ref_logprobs.float(), 0),
        torch.where(loss_mask, advantages, 0),
    )


def _zero_or_nan(*columns: torch.Tensor | None) -> torch.Tensor:
    """0 where all columns are finite, NaN elsewhere, float32 `[tokens]`."""
    finite = torch.stack([column.isfinite() for column in columns if column is not None]).all(0)
    return torch.where(finite, 0.0, torch.nan)
