"""What a round's words are about: the frames that it was shown, and the gaps between the first frames.

A judge names a frame by its place among those that its message showed, and a gap by the number of the first
frame that looks into it. Here these names become frame numbers, and words for people.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from vrthinker.episode.trajectory import RoundRecord, Trajectory
from vrthinker.world.reading import ReadFrame
from vrthinker.world.truth_reader import probes
from vrthinker.world.words import Found, defect_words
from vrthinker.world.world import Hint


def new_frames(record: RoundRecord) -> list[int]:
    """The numbers of the frames that a round was the first to see, as the call before it showed them."""
    return [shown.frame_number for shown in record.live if shown.outcome == record.round_number - 1]


class SeenFrames:
    """The frames that an episode has shown up to a round, and the gaps between those of its first input.

    Args:
        trajectory: The episode.
        span: The value of `WorldConfig.span[0]`, which says how densely to look into a gap.

    Attributes:
        new: The frames that the round was the first to see, in the order in which they were shown.
        first: The frames of the first input, in the order in which they were shown.
        starts: The frames of the first input, ascending. Each has a gap behind it.
        gaps: The name of each gap -> the frame in front of it.
        shown: All frames up to the round.
    """

    def __init__(self, trajectory: Trajectory, span: float) -> None:
        self._n_frames_1, self._n_frames, self._span = trajectory.n_frames_1, trajectory.n_frames, span
        self.new: list[int] = []
        self.first: list[int] = []
        self.starts: list[int] = []
        self.gaps: dict[int, int] = {}
        self.shown: set[int] = set()

    def enter(self, record: RoundRecord) -> None:
        """Goes on to the next round."""
        self.new = new_frames(record)
        self.shown.update(self.new)
        if record.round_number == 1:
            self.first, self.starts = self.new, sorted(self.new)
            self.gaps = {self.gap_name(start): start for start in self.starts}

    # Frames

    def number(self, name: int) -> int | None:
        """The frame that has this name in the round; None if none has it."""
        return self.new[name - 1] if 0 < name <= len(self.new) else None

    def video(self, number: int) -> int:
        """The video that a frame is of: 1 or 2."""
        return 1 if number <= self._n_frames_1 else 2

    def told(self, name: int) -> str:
        """A frame of the round for people."""
        shown_by = "first input" if self.new is self.first else "call"
        number = self.number(name)
        if number is None:
            return f"a frame no. {name} of the {shown_by}, which has {len(self.new)}"
        return f"frame {number} ({_ordinal(name)} of the {shown_by})"

    def listed(self, events: Iterable[Found]) -> str:
        """Events for people."""
        told = []
        for name, defects in events:
            number = self.number(name)
            frame = f"no. {name}" if number is None else f"{number} ({_ordinal(name)})"
            told.append(frame + defect_words(defects))
        return "; ".join(told) or "nothing"

    # Gaps

    def gap_of(self, number: int) -> int:
        """The first-input frame at or before a frame; events of one gap are one event."""
        before = bisect_right(self.starts, number)
        return self.starts[before - 1] if before else number

    def gap_name(self, start: int) -> int:
        """The name of the gap behind a frame of the first input; the frame's own number if it is empty."""
        return min(self.probes(start), default=start)

    def starts_of(self, names: Iterable[int]) -> list[int]:
        """The frames in front of the gaps with these names. Names of no gap are left out."""
        return [start for start in map(self.gaps.get, names) if start is not None]

    def probes(self, gap: int) -> list[int]:
        """The frame numbers that look into the gap behind a frame of the first input."""
        ends = (self._n_frames_1 + 1, self._n_frames + 1)
        following = bisect_right(self.starts, gap)
        next_start = self.starts[following] if following < len(self.starts) else ends[1]
        end = min(next_start, ends[gap > self._n_frames_1])
        return list(probes((gap, end), self._span))

    def marks(self, frames: Iterable[ReadFrame]) -> dict[int, tuple[int, Hint]]:
        """The gaps that hints mark: the frame in front of each -> the hint, behind its frame's name."""
        marks: dict[int, tuple[int, Hint]] = {}
        for frame in frames:
            number = self.number(frame.name)
            if number is None:
                continue
            before = [n for n in self.starts if n < number and self.video(n) == self.video(number)]
            for hint, named in frame.hints:
                by_place = before[-1] if hint is Hint.SPEED and before else number
                gap = by_place if named is None else self.gaps.get(named)
                if gap is not None:
                    marks.setdefault(gap, (frame.name, hint))
        return marks

    def told_gap(self, gap: int) -> str:
        """A frame in front of a gap for people."""
        return f"{gap} ({_ordinal(self.first.index(gap) + 1)})"

    def told_gaps(self, names: Iterable[int]) -> str:
        """Gaps for people, by their names."""
        starts = [(name, self.gaps.get(name)) for name in names]
        told = [f"no. {name}" if start is None else self.told_gap(start) for name, start in starts]
        return ", ".join(told) or "nothing"


def _ordinal(name: int) -> str:
    ending = "th" if 10 < name % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(name % 10, "th")
    return f"{name}{ending}"
