"""Microbenchmark of `group_advantage`: its versions and other implementations, side by side.

The competitors are the reference (and `torch.compile` of it), a Python loop over groups as trainers write it,
and vectorised torch that does the same ragged, masked job with as few operations as possible. Each competitor
has to find the group and the episode of every element from the offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from vrthinker.kernels.group_advantage.op import group_advantage
from vrthinker.kernels.group_advantage.reference import group_advantage_reference
from vrthinker.kernels.measure import Comparison, why_not_compiled

RTOL, ATOL = 1e-5, 1e-6
"""Tolerances for the torch versions, which sum in fp32 and have one more division."""


@dataclass(frozen=True)
class Case:
    """One case to measure."""

    episodes: int
    ragged: bool = False
    method: str = "grpo"
    mean_tokens: int | None = None

    @property
    def name(self) -> str:
        """The case in words."""
        groups = "ragged groups, a tenth invalid" if self.ragged else "groups of 8"
        tokens = "" if self.mean_tokens is None else f", broadcast to about {self.mean_tokens} tokens each"
        return f"{self.episodes} episodes, {groups}, {self.method}{tokens}"


CASES = (
    Case(512),
    Case(4096),
    Case(4096, ragged=True),
    Case(4096, method="batch_std"),
    Case(4096, method="reinforce_plus_plus"),
    Case(8192, ragged=True, mean_tokens=400),
)


@dataclass(frozen=True)
class _Data:
    rewards: torch.Tensor
    group_offsets: torch.Tensor
    valid: torch.Tensor | None
    token_offsets: torch.Tensor | None
    n_tokens: int


def comparisons(device: str, seed: int) -> Iterator[Callable[[], Comparison]]:
    """Yields a function per case (see `vrthinker.kernels.measure`)."""
    for case in CASES:
        yield partial(comparison, case, device, seed)


def comparison(case: Case, device: str, seed: int, *, compiled: bool = True) -> Comparison:
    """One case with fresh random data.

    Args:
        case: The case to measure.
        device: The device, `cpu` or `cuda`.
        seed: The seed of the data.
        compiled: Whether `torch.compile` of the reference takes part (it takes seconds to compile).
    """
    data = _make(case, device, seed)
    options: dict[str, Any] = {
        "valid": data.valid,
        "method": case.method,
        "token_offsets": data.token_offsets,
    }

    def reference() -> torch.Tensor:
        return group_advantage_reference(data.rewards, data.group_offsets, n_tokens=data.n_tokens, **options)[
            0
        ]

    def ours() -> torch.Tensor:
        n_tokens = None if data.token_offsets is None else data.n_tokens
        return group_advantage(data.rewards, data.group_offsets, n_tokens=n_tokens, **options).advantages

    competitors: dict[str, Callable[[], torch.Tensor]] = {"reference": reference}
    if compiled and why_not_compiled(device) is None:
        graph = torch.compile(group_advantage_reference, fullgraph=True)
        competitors["torch.compile of the reference"] = lambda: graph(
            data.rewards, data.group_offsets, n_tokens=data.n_tokens, **options
        )[0]
    if case.method == "grpo":
        competitors["Python loop over groups"] = partial(_loop, data)
    competitors["vectorised torch"] = partial(_vectorised, data, case.method)
    competitors["group_advantage"] = ours

    def check() -> None:
        wanted = reference()
        for name, run in competitors.items():
            if not torch.allclose(run(), wanted, rtol=RTOL, atol=ATOL):
                raise RuntimeError(f"{name} differs from the reference")

    read = [data.rewards, data.group_offsets, data.valid, data.token_offsets]
    written = data.n_tokens if data.token_offsets is not None else case.episodes
    return Comparison(
        op="group_advantage",
        case=case.name,
        bytes_moved=sum(t.nbytes for t in read if t is not None) + 4 * written,
        competitors=competitors,
        check=check,
        facts={
            "episodes": case.episodes,
            "groups": data.group_offsets.shape[0] - 1,
            "tokens": data.n_tokens,
            "method": case.method,
            "without_torch_compile": why_not_compiled(device),
        },
    )


def _make(case: Case, device: str, seed: int) -> _Data:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(case.episodes, generator=generator)
    valid = None
    offsets = torch.arange(0, case.episodes + 1, 8)
    if case.ragged:
        # Each group has 6 to 10 episodes; the last group has the rest.
        sizes = torch.randint(6, 11, (case.episodes // 6,), generator=generator).cumsum(0)
        sizes = sizes[sizes < case.episodes - 6]
        offsets = torch.cat([torch.tensor([0]), sizes, torch.tensor([case.episodes])])
        valid = torch.rand(case.episodes, generator=generator) >= 0.1
    token_offsets, n_tokens = None, 0
    if case.mean_tokens is not None:
        lengths = torch.randint(1, 2 * case.mean_tokens, (case.episodes,), generator=generator)
        token_offsets = torch.cat([torch.tensor([0]), lengths.cumsum(0)])
        n_tokens = int(token_offsets[-1])
        token_offsets = token_offsets.to(device)
    return _Data(
        rewards.to(device),
        offsets.to(device),
        None if valid is None else valid.to(device),
        token_offsets,
        n_tokens,
    )


def _loop(data: _Data) -> torch.Tensor:
    """Computes group by group, as trainers do that keep a dict of lists per prompt."""
    advantages = torch.zeros_like(data.rewards)
    bounds = data.group_offsets.tolist()
    for start, end in pairwise(bounds):
        group_rewards = data.rewards[start:end]
        counted = group_rewards if data.valid is None else group_rewards[data.valid[start:end]]
        if counted.numel() < 2:
            continue
        scaled = (group_rewards - counted.mean()) / (counted.std() + 1e-6)
        advantages[start:end] = (
            scaled if data.valid is None else torch.where(data.valid[start:end], scaled, 0.0)
        )
    return _to_tokens(advantages, data)


def _vectorised(data: _Data, method: str) -> torch.Tensor:
    """Computes all groups at once, with `index_add_`: one pass for the mean, one for the deviation."""
    sizes = data.group_offsets.diff()
    groups = sizes.shape[0]
    group = torch.repeat_interleave(sizes, output_size=data.rewards.shape[0])
    weights = torch.ones_like(data.rewards) if data.valid is None else data.valid.to(data.rewards.dtype)
    rewards = data.rewards if data.valid is None else torch.where(data.valid, data.rewards, 0.0)
    n = rewards.new_zeros(groups).index_add_(0, group, weights)
    mean = rewards.new_zeros(groups).index_add_(0, group, rewards) / n.clamp(min=1)
    deviation = (rewards - mean[group]) * weights
    if method == "batch_std":
        advantages = deviation / (data.rewards.std() + 1e-6)
    elif method == "reinforce_plus_plus":
        advantages = deviation / ((deviation**2).sum() / (weights.sum() - 1) + 1e-8).sqrt()
    else:
        variance = rewards.new_zeros(groups).index_add_(0, group, deviation**2) / (n - 1).clamp(min=1)
        advantages = deviation / (variance.sqrt() + 1e-6)[group]
    return _to_tokens(advantages, data)


def _to_tokens(advantages: torch.Tensor, data: _Data) -> torch.Tensor:
    if data.token_offsets is None:
        return advantages
    lengths = data.token_offsets.diff()
    return torch.repeat_interleave(advantages, lengths, output_size=data.n_tokens)
