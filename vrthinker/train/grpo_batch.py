"""A step's episodes as packs, and the loss of a pack (method section 5).

Invariant: an episode counts once in the loss of a step, in however many packs its tokens are. Every process
has all packs of a step and computes its own share of them (`own_packs`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vrthinker.engine.hf.markup import Markup
from vrthinker.errors import InputError
from vrthinker.kernels.grpo_loss.op import grpo_loss
from vrthinker.policy.packing import Pack, pack_group
from vrthinker.reward.advantages import Advantages
from vrthinker.train.grpo_settings import LossSettings
from vrthinker.train.loop.ranks import Ranks
from vrthinker.train.rollouts import Group, iter_valid


@dataclasses.dataclass(frozen=True)
class PackedEpisodes:
    """A pack with what its loss needs besides the policy.

    Attributes:
        pack: The pack.
        advantages: The advantage of each of the pack's trajectories.
        lengths: The number of sampled tokens of each trajectory in all packs together.
        sampler: The sampler's log-probabilities, float32 `[sampled]`, the trajectories one after the other.
    """

    pack: Pack
    advantages: tuple[float, ...]
    lengths: tuple[int, ...]
    sampler: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """The packs of one step.

    Attributes:
        packs: The packs.
        n_episodes: The number of episodes with sampled tokens.
        n_tokens: The number of their sampled tokens.
        old: The old policy's log-probabilities, in the form of `PackedEpisodes.sampler`, for this process's
            packs, by the packs' numbers. Empty in the first step of a refresh, whose policy is the old one.
    """

    packs: list[PackedEpisodes]
    n_episodes: int
    n_tokens: int
    old: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def n_known(self) -> int:
        """The number of sampled tokens whose log-probability the sampler gave."""
        return sum(int((~packed.sampler.isnan()).sum()) for packed in self.packs)


def pack_batch(
    groups: Sequence[Group],
    compared: Advantages,
    markup: Markup,
    factor: tuple[int, int],
    *,
    memory: str,
    max_tokens: int | None,
) -> Batch:
    """Packs the groups of a step. An episode counts once, in however many packs its tokens are.

    Raises:
        InputError: An episode was sampled under another memory mode, or is not one that can be trained.
    """
    packs: list[PackedEpisodes] = []
    n_episodes = n_tokens = 0
    for group in groups:
        members = list(iter_valid(group))
        for _, trajectory in members:
            if trajectory.settings.memory != memory:
                raise InputError(
                    f"trajectory {trajectory.id!r}: memory: got {trajectory.settings.memory!r}, allowed in "
                    f"this run: {memory!r}, under which the policy is trained"
                )
        if not members:
            continue
        found = pack_group([t for _, t in members], markup, factor, max_tokens=max_tokens)
        sampler = [_sampler_logprobs(t.rounds) for _, t in members]
        used = [0] * len(members)
        for pack in found:
            parts = []
            for member, indices in zip(pack.trajectories, pack.sampled, strict=True):
                parts.append(sampler[member][used[member] : used[member] + len(indices)])
                used[member] += len(indices)
            values = [compared.values[group.id][members[number][0]] for number in pack.trajectories]
            packs.append(
                PackedEpisodes(
                    pack,
                    tuple(0.0 if value is None else value for value in values),
                    tuple(len(sampler[number]) for number in pack.trajectories),
                    torch.from_numpy(np.concatenate(parts)),
                )
            )
        n_episodes += sum(len(logprobs) > 0 for logprobs in sampler)
        n_tokens += sum(map(len, sampler))
    return Batch(packs, n_episodes, n_tokens)


def _sampler_logprobs(rounds: Sequence[Any]) -> np.ndarray:
    """The sampler's log-probabilities of an episode; NaN where an engine gives none."""
    values: list[float] = []
    for record in rounds:
        values += record.logprobs or [float("nan")] * len(record.token_ids or ())
    return np.array(values, np.float32)


def packed_loss(
    settings: LossSettings,
    packed: PackedEpisodes,
    batch: Batch,
    policy: Sequence[torch.Tensor],
    old: torch.Tensor,
    ref: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """A pack's part of a step's loss.

    Every episode is one call of the op, normalised by the episode's tokens in all packs, so that an episode
    whose tokens are in several packs counts as one that is in a single pack.

    Args:
        settings: The settings of the loss.
        packed: The pack.
        batch: The step's packs, for the normalisers.
        policy: The policy's log-probabilities of each trajectory, with gradient, `[sampled]`.
        old: The old policy's, `[sampled of all]`.
        ref: The reference's; None without one.

    Returns:
        The loss, the metrics as sums that add up to means over the step's tokens, and the largest ratio.
    """
    losses, sums, largest = [], dict[str, torch.Tensor](), []
    start = 0
    for logprobs, advantage, length in zip(policy, packed.advantages, packed.lengths, strict=True):
        count = len(logprobs)
        end = start + count
        if count == 0:
            continue
        device = logprobs.device
        value = torch.full((count,), advantage, dtype=torch.float32, device=device)
        if settings.importance_cap is not None:
            weight = (old[start:end] - packed.sampler[start:end].to(device)).exp()
            value = value * weight.clamp(max=settings.importance_cap)
        normalizer = {
            "episode_mean": length * batch.n_episodes,
            "token_mean": batch.n_tokens,
            "fixed_length": batch.n_episodes * (settings.fixed_length or 1),
        }[settings.aggregation]
        result = grpo_loss(
            logprobs,
            old[start:end],
            None if ref is None else ref[start:end],
            value,
            torch.ones(count, dtype=torch.bool, device=device),
            torch.tensor([0, count], device=device),
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            kl_weight=settings.kl_weight,
            aggregation="token_mean",
            normalizer=float(normalizer),
        )
        losses.append(result.loss)
        largest.append(result.metrics["ratio/max"])
        for name, mean in result.metrics.items():
            if name != "ratio/max":
                sums[name] = sums.get(name, torch.zeros((), device=device)) + mean * (count / batch.n_tokens)
        start = end
    return torch.stack(losses).sum(), sums, torch.stack(largest).max()


def drift(packed: PackedEpisodes, old: torch.Tensor) -> torch.Tensor:
    """How far the training forward is from the sampler, in nats per token.

    Args:
        packed: The pack.
        old: The old policy's log-probabilities, `[sampled of all]`.

    Returns:
        The absolute differences, `[sampled of all]`; 0 where the sampler gave nothing.
    """
    return (old - packed.sampler.to(old.device)).abs().nan_to_num(nan=0.0)


def own_packs(batch: Batch, ranks: Ranks) -> list[tuple[int, bool]]:
    """A process's packs of a step, equally many for every process.

    Returns:
        The packs' numbers in `batch.packs`, and whether each counts; one that does not only fills up.
    """
    own = []
    for first in range(0, len(batch.packs), ranks.size):
        is_there = first + ranks.rank < len(batch.packs)
        own.append((first + ranks.rank if is_there else first, is_there))
    return own


def dealt(groups: Sequence[Group], steps: int) -> list[list[Group]]:
    """The groups of each step, as evenly as possible. With fewer groups than steps, groups come again."""
    shares = [list(groups[step::steps]) for step in range(steps)]
    return [share or [groups[step % len(groups)]] for step, share in enumerate(shares)]
