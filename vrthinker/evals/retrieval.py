"""The frames that a tool call is answered with: those that the model requested, or as many others.

The comparison tells whether it matters which frames the model requests. If a model judges as well from random
frames, it has gained by seeing more frames, not by choosing them. All ways use the same prompt and the same
schema, and answer a call with as many frames as it requested. They only differ in which frames they show. The
totals of two ways may differ nevertheless: a model that saw other frames goes on with other requests.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolError, ToolErrorKind, ToolOutcome
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.tools.select_frames import SelectFrames, SelectFramesArguments


class Retrieval(enum.StrEnum):
    """The way in which retrieved frames are picked."""

    OWN = "own"
    """The model picks them."""
    RANDOM = "random"
    """They are random frames that were not shown before, half of them from each video if possible."""
    UNIFORM = "uniform"
    """They lie on a grid over both videos, which gets finer with every call."""
    NONE = "none"
    """There are none: the judgment of the first round counts."""


class _OtherFrames(SelectFrames, ABC):
    """A `select_frames` that shows other frames than those requested. Bad calls fail as usual."""

    def run(self, arguments: SelectFramesArguments, context: ToolContext) -> ToolOutcome:
        """Executes a call whose arguments are valid."""
        outcome = super().run(arguments, replace(context, in_round=frozenset()))
        if not isinstance(outcome, FramesShown):
            return outcome
        asked = len(outcome.frame_numbers)
        # A round shows no frame twice, so that the frames of its earlier calls are left out.
        videos = tuple(
            [number for number in numbers if number not in context.in_round]
            for numbers in (
                range(1, context.n_frames_1 + 1),
                range(context.n_frames_1 + 1, context.n_frames + 1),
            )
        )
        if not any(videos):
            return ToolError(ToolErrorKind.SHOWN_BEFORE, "the calls before this one show every frame.")
        fresh = [len(self.fresh(numbers, context)) for numbers in videos]
        shares = _shares(asked, fresh, [len(numbers) for numbers in videos])
        chosen: list[int] = []
        for numbers, share in zip(videos, shares, strict=True):
            chosen += self.pick(numbers, share, context) if share else []
        return FramesShown(tuple(sorted(chosen)), note=outcome.note)

    def fresh(self, numbers: Sequence[int], context: ToolContext) -> Sequence[int]:
        """The frames of one video that are shown in preference to the others."""
        return numbers

    @abstractmethod
    def pick(self, numbers: Sequence[int], count: int, context: ToolContext) -> list[int]:
        """Picks `count` distinct frames of one video."""


class RandomFrames(_OtherFrames):
    """Shows random frames. Frames that were shown before are repeated only if there are no others left."""

    def fresh(self, numbers: Sequence[int], context: ToolContext) -> Sequence[int]:
        """The frames of one video that were not shown before."""
        return [number for number in numbers if number not in context.shown]

    def pick(self, numbers: Sequence[int], count: int, context: ToolContext) -> list[int]:
        """Picks frames of one video. The picks depend on the episode's seed."""
        new = list(self.fresh(numbers, context))
        rng = np.random.default_rng([context.seed & 0xFFFF_FFFF_FFFF_FFFF, context.call_number, numbers[0]])
        if count > len(new):
            seen = [number for number in numbers if number in context.shown]
            return new + [int(n) for n in rng.choice(seen, count - len(new), replace=False)]
        return [int(n) for n in rng.choice(new, count, replace=False)]


class UniformFrames(_OtherFrames):
    """Shows evenly spaced frames. Each call's grid lies between the frames of earlier calls."""

    def pick(self, numbers: Sequence[int], count: int, context: ToolContext) -> list[int]:
        """Picks frames of one video."""
        offset = _van_der_corput(context.call_number)
        return [numbers[int((i + offset) * len(numbers) / count)] for i in range(count)]


def _shares(asked: int, fresh: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The number of frames of each video: a half, but more if the other video has fewer new frames."""
    halves = (asked - asked // 2, asked // 2)
    shares = [0, 0]
    for limits in (tuple(map(min, halves, fresh)), fresh, tuple(map(min, halves, lengths)), lengths):
        for video, limit in enumerate(limits):
            shares[video] += max(0, min(limit - shares[video], asked - sum(shares)))
    return shares


def _van_der_corput(index: int) -> float:
    """The sequence 1/2, 1/4, 3/4, 1/8, 5/8, ..., in which numbers are far from earlier ones."""
    value, step = 0.0, 0.5
    while index:
        value += step * (index % 2)
        index, step = index // 2, step / 2
    return value


def tools_for(retrieval: Retrieval) -> ToolRegistry:
    """The registry to run episodes with. `NONE` needs no run: it is scored from the episodes of `OWN`."""
    tool: SelectFrames = {
        Retrieval.RANDOM: RandomFrames,
        Retrieval.UNIFORM: UniformFrames,
    }.get(retrieval, SelectFrames)()
    return ToolRegistry([tool])
