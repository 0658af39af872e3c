"""What a tool call is answered with: the frames that the model asked for, or others with the same budget.

Comparing them tells whether asking is worth anything: a model that judges as well from random frames has
gained by seeing more, not by choosing. Every way sees the same prompt and the same schema, and shows as many
frames as were asked for; only which ones differs.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolOutcome
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.tools.select_frames import SelectFrames, SelectFramesArguments


class Retrieval(enum.StrEnum):
    """Who picks the retrieved frames."""

    OWN = "own"
    """The model."""
    RANDOM = "random"
    """Chance: frames not shown before, half of them from each video as long as it has such."""
    UNIFORM = "uniform"
    """A grid that gets finer with every call, over both videos."""
    NONE = "none"
    """Nobody: the judgment of the first round counts."""


class _OtherFrames(SelectFrames, ABC):
    """`select_frames` that shows other frames than those asked for; bad calls fail as they always do."""

    def run(self, arguments: SelectFramesArguments, context: ToolContext) -> ToolOutcome:
        """Executes a call whose arguments are valid."""
        outcome = super().run(arguments, context)
        if not isinstance(outcome, FramesShown):
            return outcome
        asked = len(outcome.frame_numbers)
        videos = (
            range(1, context.n_frames_1 + 1),
            range(context.n_frames_1 + 1, context.n_frames + 1),
        )
        fresh = [len(self.fresh(numbers, context)) for numbers in videos]
        shares = _shares(asked, fresh, [len(numbers) for numbers in videos])
        chosen: list[int] = []
        for numbers, share in zip(videos, shares, strict=True):
            chosen += self.pick(numbers, share, context) if share else []
        return FramesShown(tuple(sorted(chosen)))

    def fresh(self, numbers: Sequence[int], context: ToolContext) -> Sequence[int]:
        """Those frames of one video that are to be shown before the others."""
        return numbers

    @abstractmethod
    def pick(self, numbers: Sequence[int], count: int, context: ToolContext) -> list[int]:
        """Picks so many distinct frames of one video, which has as many."""


class RandomFrames(_OtherFrames):
    """Shows random frames; those that were shown before only when there are no others left."""

    def fresh(self, numbers: Sequence[int], context: ToolContext) -> Sequence[int]:
        """Frames of one video that were not shown before."""
        return [number for number in numbers if number not in context.shown]

    def pick(self, numbers: Sequence[int], count: int, context: ToolContext) -> list[int]:
        """Picks frames of one video; equal episodes' seeds pick equally."""
        new = list(self.fresh(numbers, context))
        rng = np.random.default_rng([context.seed & 0xFFFF_FFFF_FFFF_FFFF, context.call_number, numbers[0]])
        if count > len(new):
            seen = [number for number in numbers if number in context.shown]
            return new + [int(n) for n in rng.choice(seen, count - len(new), replace=False)]
        return [int(n) for n in rng.choice(new, count, replace=False)]


class UniformFrames(_OtherFrames):
    """Shows evenly spaced frames; each call's grid lies between the frames of those before."""

    def pick(self, numbers: Sequence[int], count: int, context: ToolContext) -> list[int]:
        """Picks frames of one video."""
        offset = _van_der_corput(context.call_number)
        return [numbers[int((i + offset) * len(numbers) / count)] for i in range(count)]


def _shares(asked: int, fresh: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """How many frames each video shows: half of them, but new ones before a half, and never fewer in all."""
    halves = (asked - asked // 2, asked // 2)
    shares = [0, 0]
    for limits in (tuple(map(min, halves, fresh)), fresh, tuple(map(min, halves, lengths)), lengths):
        for video, limit in enumerate(limits):
            shares[video] += max(0, min(limit - shares[video], asked - sum(shares)))
    return shares


def _van_der_corput(index: int) -> float:
    """1/2, 1/4, 3/4, 1/8, 5/8, ...: each number as far from the earlier ones as can be."""
    value, step = 0.0, 0.5
    while index:
        value += step * (index % 2)
        index, step = index // 2, step / 2
    return value


def tools_for(retrieval: Retrieval) -> ToolRegistry:
    """The registry to run episodes with. `NONE` is read off episodes of `OWN`."""
    tool: SelectFrames = {
        Retrieval.RANDOM: RandomFrames,
        Retrieval.UNIFORM: UniformFrames,
    }.get(retrieval, SelectFrames)()
    return ToolRegistry([tool])
