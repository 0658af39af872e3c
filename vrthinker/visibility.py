"""The record of what the model could see in each round.

This module alone decides visibility. The runner's next prompt, the engine's cache, the training mask and the
report's film strip all read this record, so that they cannot disagree. It imports nothing else of the
package.

Rounds count from 1. *Outcome* 0 is the first input X and never expires. Outcome k (k >= 1) is what the tool
answered to round k. Under a window of p rounds, outcome k is live in rounds k+1 ... k+p (method section 3,
"active for a preset number of rounds p"; the paper's formulas differ by one in two places, and this follows
its text).

A frame that is shown twice has two showings: when one expires, the other stays. That is why all code here
uses `ShownFrame` and never bare frame numbers. A showing has a view: the whole frame, or a region of it,
which is another picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

MemoryMode = Literal["rerender", "evict", "renumber"]
"""How expired frames are removed from the context (method section 3, docs/memory.md). `rerender`: the
context is written anew without them. `evict`: their rows in the KV cache are freed; other tokens keep their
keys, values and positions. `renumber`: like `evict`, but the other keys are rotated to contiguous positions
(inference only)."""


class Region(NamedTuple):
    """A rectangle of a frame, in pixels of the clip as it is displayed.

    Attributes:
        top: The first row.
        left: The first column.
        bottom: The row after the last row.
        right: The column after the last column.
    """

    top: int
    left: int
    bottom: int
    right: int


class ShownFrame(NamedTuple):
    """One showing of one frame.

    Attributes:
        outcome: The number of the outcome: 0 for the first input, k for the tool outcome of round k.
        frame_number: The 1-based number of the frame in the workspace.
        view: The region that is shown; None for the whole frame.
    """

    outcome: int
    frame_number: int
    view: Region | None = None

    @property
    def order(self) -> tuple[int, int, tuple[int, ...]]:
        """A key to sort showings by; a whole frame comes before its regions."""
        return self.outcome, self.frame_number, self.view or ()


@dataclass(frozen=True)
class WindowMemory:
    """The sliding visual memory (method section 3).

    Attributes:
        rounds: The window p: the number of rounds for which a tool outcome's frames stay live. `None` keeps
            them all, 0 never shows a retrieved frame (an ablation).
    """

    rounds: int | None = 1

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 0:
            raise ValueError(f"window: got {self.rounds}, allowed: 0, 1, 2, ... or None for no limit")

    def hidden_from(self, outcome: int) -> int | None:
        """The first round from which the frames of `outcome` are hidden; None if they never are."""
        return None if outcome == 0 or self.rounds is None else outcome + self.rounds + 1

    def is_live(self, outcome: int, round_number: int) -> bool:
        """Whether the frames of `outcome` are live while round `round_number` is written."""
        hidden_from = self.hidden_from(outcome)
        return outcome < round_number and (hidden_from is None or round_number < hidden_from)


@dataclass(frozen=True)
class RoundVisibility:
    """The showings that were live while one round was written.

    Attributes:
        round_number: The 1-based number of the round.
        live: The showings that the round could see, in the order in which they were shown.
        expired: The showings that were live in the previous round and expired before this one.
    """

    round_number: int
    live: tuple[ShownFrame, ...]
    expired: tuple[ShownFrame, ...]

    @property
    def frame_numbers(self) -> tuple[int, ...]:
        """The distinct frame numbers that were live, ascending."""
        return tuple(sorted({shown.frame_number for shown in self.live}))


@dataclass
class VisibilityRecord:
    """The record of one episode: `show` adds an outcome's frames, `enter` opens a round, `rounds` has all."""

    window: WindowMemory
    rounds: list[RoundVisibility] = field(default_factory=list)
    _shown: list[ShownFrame] = field(default_factory=list)

    def show(
        self, outcome: int, frame_numbers: Iterable[int], view: Region | None = None
    ) -> tuple[ShownFrame, ...]:
        """Adds an outcome's frames and returns those that the next round will see.

        An outcome may be shown in parts, if a round called tools several times.

        Under p = 0 a retrieved frame is recorded but never seen, so the result is empty.

        Args:
            outcome: The number of the outcome: 0 for the first input, k for the tool outcome of round k.
            frame_numbers: The numbers of the frames in the workspace.
            view: The region of each frame that is shown; None for whole frames.

        Raises:
            ValueError: The outcome is not the one that follows the rounds entered so far, or it shows a
                picture twice.
        """
        if outcome != len(self.rounds):
            raise ValueError(f"outcome: got {outcome}, expected {len(self.rounds)} (rounds entered so far)")
        shown = tuple(ShownFrame(outcome, number, view) for number in frame_numbers)
        before = {showing for showing in reversed(self._shown) if showing.outcome == outcome}
        if len(before.union(shown)) < len(before) + len(shown):
            raise ValueError(f"outcome {outcome}: got a picture twice, each may be shown once")
        self._shown.extend(shown)
        return shown if self.window.is_live(outcome, outcome + 1) else ()

    def enter(self) -> RoundVisibility:
        """Opens the next round and returns the showings that it sees and those that expired before it."""
        number = len(self.rounds) + 1
        live = tuple(shown for shown in self._shown if self.window.is_live(shown.outcome, number))
        before = self.rounds[-1].live if self.rounds else ()
        still = set(live)
        entry = RoundVisibility(number, live, tuple(shown for shown in before if shown not in still))
        self.rounds.append(entry)
        return entry
