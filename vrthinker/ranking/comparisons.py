"""One judged pair of a group, and what a group's pairs add up to for each clip.

A clip is named by its 0-based place in the group. A comparison is the judgment of two clips in the order in
which they were shown. A comparison that failed has no judgment and a reason. It is counted, but it never
counts for or against a clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vrthinker.episode.dimensions import Dimension, Preference
from vrthinker.episode.probabilities import Probabilities
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError

CODES = tuple(dimension.value for dimension in Dimension)
"""The codes of the dimensions."""

CountArray = npt.NDArray[np.int64]


@dataclass(frozen=True, repr=False)
class Comparison:
    """The judgment of one pair of clips.

    Attributes:
        first: The clip that was shown as video 1.
        second: The clip that was shown as video 2.
        judgment: Dimension code -> 0 (tie), 1 (the first clip is better) or 2; None if the comparison failed.
        reason: The reason why there is no judgment; None if there is one.
        trajectory: The record of the episode, if it is kept.
        other_order: The record of the second episode, in which the clips changed places, if both orders were
            judged and it is kept. Then `judgment` and `probabilities` are those of both.
        probabilities: How likely the judge finds each label; None if that is not known.
        consistent: Whether both orders gave the same overall verdict; None if only one was judged, or one of
            them gave none.

    Raises:
        InputError: A clip is compared with itself, a code or a preference is unknown, or there is neither a
            judgment nor a reason.
    """

    first: int
    second: int
    judgment: Mapping[str, int] | None
    reason: str | None = None
    trajectory: Trajectory | None = None
    other_order: Trajectory | None = None
    probabilities: Probabilities | None = None
    consistent: bool | None = None

    def __post_init__(self) -> None:
        if self.first == self.second or min(self.first, self.second) < 0:
            raise InputError(
                f"comparison: got clips {self.first} and {self.second}, allowed: two different ones"
            )
        if self.judgment is None and not self.reason:
            raise InputError(f"comparison {self.name}: got neither a judgment nor a reason, allowed: one")
        for code, value in (self.judgment or {}).items():
            if code not in CODES or value not in tuple(Preference):
                raise InputError(
                    f"comparison {self.name}: got {code}={value!r}, allowed: {', '.join(CODES)} = 0, 1, 2"
                )

    def __repr__(self) -> str:
        """One line, without the trajectory."""
        told = (
            self.reason if self.judgment is None else ", ".join(f"{c}={v}" for c, v in self.judgment.items())
        )
        return f"Comparison({self.name}: {told})"

    @property
    def name(self) -> str:
        """The 1-based numbers of both clips in the order in which they were shown, such as "3-1"."""
        return pair_name(self.first, self.second)

    def preferred(self, code: str) -> int | None:
        """The clip that is better in a dimension; None for a tie, a failure, or an unjudged dimension."""
        value = None if self.judgment is None else self.judgment.get(code)
        return (
            self.first
            if value == Preference.VIDEO_1
            else self.second
            if value == Preference.VIDEO_2
            else None
        )


@dataclass(frozen=True)
class Score:
    """How often a clip was better, tied and worse in one dimension."""

    wins: int
    ties: int
    losses: int

    @property
    def win_rate(self) -> float | None:
        """The share of wins, where a tie counts half; None without a judged comparison."""
        judged = self.wins + self.ties + self.losses
        return (self.wins + self.ties / 2) / judged if judged else None


def pair_name(first: int, second: int) -> str:
    """The name of a pair of clips: their 1-based numbers, the one that is shown as video 1 first."""
    return f"{first + 1}-{second + 1}"


def tally(n_clips: int, comparisons: Iterable[Comparison], code: str) -> tuple[CountArray, CountArray]:
    """The results of a group in one dimension.

    Args:
        n_clips: The number of clips.
        comparisons: The comparisons. Failures, and judgments without this dimension, are left out.
        code: The code of the dimension.

    Returns:
        wins, int64 `[n_clips, n_clips]`: how often the clip of the row was better than that of the column;
        and ties, int64 `[n_clips, n_clips]`, symmetric.
    """
    wins = np.zeros((n_clips, n_clips), np.int64)
    ties = np.zeros_like(wins)
    for one in comparisons:
        if one.judgment is None or code not in one.judgment:
            continue
        better = one.preferred(code)
        if better is None:
            ties[one.first, one.second] += 1
            ties[one.second, one.first] += 1
        else:
            wins[better, one.second if better == one.first else one.first] += 1
    return wins, ties
