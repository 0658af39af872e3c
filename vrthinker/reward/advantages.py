"""Advantages: the rewards of a batch of groups, each relative to its own group.

Groups are named by an explicit id, never found by their captions or by a fixed size, so that two groups with
one caption stay two, and groups may differ in size. The op `vrthinker.kernels.group_advantage` computes all
of them in one call.

Invariant: a failed episode has no advantage (None) and does not count in its group. A group without a signal
gets exactly 0.

Source: method section 5, stage 3.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from vrthinker.errors import InputError, one_line
from vrthinker.kernels.group_advantage.op import group_advantage
from vrthinker.kernels.group_advantage.reference import MAX_REWARD
from vrthinker.reward.settings import AdvantageSettings, ScaledAdvantage


@dataclass(frozen=True)
class Advantages:
    """The advantages of a batch.

    Attributes:
        values: Group id -> one advantage per episode, in order; None for a failed episode.
        dead: The groups without a signal: fewer than two valid episodes, or all their rewards equal. Their
            advantages are exactly 0.
        short: The groups with fewer than two valid episodes. Each of them is dead too.
        metrics: `advantage/dead_groups` and `advantage/short_groups`, as shares of the groups; `reward/mean`,
            the mean reward of the valid episodes; `reward/group_std`, the mean of the groups' standard
            deviations (ddof 1) over groups that are not short. Metrics of nothing are left out.
    """

    values: Mapping[str, tuple[float | None, ...]]
    dead: frozenset[str]
    short: frozenset[str]
    metrics: Mapping[str, float]


def advantages(
    settings: AdvantageSettings,
    rewards: Mapping[str, Sequence[float | None]],
    *,
    device: torch.device | str = "cpu",
) -> Advantages:
    """Computes the advantages of a batch of groups, in double precision.

    Args:
        settings: The kind of advantage.
        rewards: Group id -> the reward of each of its episodes; None for a failed episode.
        device: The device that computes them. With `VRTHINKER_KERNELS=cuda` it has to be a GPU.

    Raises:
        InputError: A reward is not finite or beyond 1e38 in size, or the version that `VRTHINKER_KERNELS`
            names cannot run on the device.
    """
    flat = [_checked(group, place, r) for group, of in rewards.items() for place, r in enumerate(of)]
    sizes = [len(of_group) for of_group in rewards.values()]
    scaled = settings if isinstance(settings, ScaledAdvantage) else None
    result = group_advantage(
        torch.tensor([math.nan if r is None else r for r in flat], dtype=torch.float64, device=device),
        torch.tensor([0, *sizes], device=device).cumsum(0),
        valid=torch.tensor([r is not None for r in flat], dtype=torch.bool, device=device),
        method=settings.kind,
        ddof=1 if scaled is None else scaled.ddof,
        eps=None if scaled is None else scaled.eps,
        check=True,
    )
    computed = iter(result.advantages.tolist())
    values = {
        group: tuple(
            None if r is None else value
            for r, value in zip(of_group, islice(computed, len(of_group)), strict=True)
        )
        for group, of_group in rewards.items()
    }
    dead = [group for group, flag in zip(rewards, result.zero_variance.tolist(), strict=True) if flag]
    valid = {group: [r for r in of_group if r is not None] for group, of_group in rewards.items()}
    short = [group for group, of_group in valid.items() if len(of_group) < 2]
    return Advantages(values, frozenset(dead), frozenset(short), _metrics(valid, len(dead), len(short)))


def _checked(group: str, place: int, reward: float | None) -> float | None:
    if reward is None or abs(reward) <= MAX_REWARD:
        return reward
    raise InputError(
        f"rewards of group {one_line(repr(group))}: episode {place + 1}: got {reward}, allowed: a number "
        "within -1e38 to 1e38, or None for a failed episode"
    )


def _metrics(valid: Mapping[str, Sequence[float]], dead: int, short: int) -> dict[str, float]:
    metrics = {}
    if valid:
        metrics["advantage/dead_groups"] = dead / len(valid)
        metrics["advantage/short_groups"] = short / len(valid)
    if rewards := [reward for of_group in valid.values() for reward in of_group]:
        metrics["reward/mean"] = statistics.fmean(rewards)
    if deviations := [statistics.stdev(of_group) for of_group in valid.values() if len(of_group) > 1]:
        metrics["reward/group_std"] = statistics.fmean(deviations)
    return metrics
