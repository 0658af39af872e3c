"""Which pairs of a group are compared, in which order: schedules by name.

A schedule is a generator. It yields a round of pairs that do not depend on each other, is sent their
comparisons, and yields the next round. A pair is (clip shown as video 1, clip shown as video 2). No two clips
are compared twice.

Invariant: what a schedule yields depends only on the number of clips, its seed and the comparisons that it
was sent. So a run that was killed goes on to the same pairs.

- `all`: every pair. Each clip is shown as video 1 as often as as video 2, or once more or less.
- `swiss`: in each round every clip meets one with about as many wins. It ranks all clips.
- `knockout`: the better clip of a pair goes on, until one is left. Further pairs then compare the strongest
  clip with the strongest ones that it has not met. It finds the best clip with the fewest pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np

from vrthinker.errors import InputError
from vrthinker.ranking.comparisons import Comparison, tally
from vrthinker.ranking.davidson import fit_strengths

Pairs = list[tuple[int, int]]
Rounds = Generator[Pairs, Sequence[Comparison], None]
_DECIDES = "OA"
"""The dimension whose results decide which clips go on."""


def all_pairs(n_clips: int, rng: np.random.Generator) -> Rounds:
    """Every pair, in one round."""
    seats = [int(clip) for clip in rng.permutation(n_clips)]
    pairs = []
    for place in range(n_clips):
        # Around a table, everybody is shown first beside the half of the others that sit to the left.
        for distance in range(1, n_clips // 2 + 1):
            if 2 * distance == n_clips and place >= distance:
                continue
            pairs.append((seats[place], seats[(place + distance) % n_clips]))
    yield [pairs[index] for index in rng.permutation(len(pairs))]


def swiss(n_clips: int, rng: np.random.Generator) -> Rounds:
    """Rounds of pairs of clips with about as many wins each, until no pair is left."""
    group = _Group(n_clips, rng)
    while pairs := group.neighbours():
        group.add((yield group.in_order(pairs)))


def knockout(n_clips: int, rng: np.random.Generator) -> Rounds:
    """The better clip of a pair goes on; then the strongest one meets those that it has not met."""
    group = _Group(n_clips, rng)
    left = group.by_strength()
    while len(left) > 1:
        pairs = list(zip(left[::2], left[1::2], strict=False))
        group.add((yield group.in_order(pairs)))
        waits = left[2 * len(pairs) :]
        left = [group.goes_on(*pair) for pair in pairs] + waits
    while (pair := group.strongest_unmet()) is not None:
        group.add((yield group.in_order([pair])))


class _Group:
    """What a schedule knows of its group."""

    def __init__(self, n_clips: int, rng: np.random.Generator) -> None:
        self._n_clips = n_clips
        self._drawn = {int(clip): place for place, clip in enumerate(rng.permutation(n_clips))}
        self._comparisons: list[Comparison] = []
        self._met: set[frozenset[int]] = set()
        self._lead = [0] * n_clips  # times shown as video 1 minus times shown as video 2

    def add(self, comparisons: Sequence[Comparison]) -> None:
        """Takes the comparisons of a round."""
        self._comparisons += comparisons

    def in_order(self, pairs: Pairs) -> Pairs:
        """The pairs, with the clip as video 1 that was it less often."""
        ordered = []
        for one, other in pairs:
            self._met.add(frozenset((one, other)))
            key = {clip: (self._lead[clip], self._drawn[clip]) for clip in (one, other)}
            first, second = (one, other) if key[one] < key[other] else (other, one)
            self._lead[first] += 1
            self._lead[second] -= 1
            ordered.append((first, second))
        return ordered

    def by_strength(self) -> list[int]:
        """All clips, the strongest first. Equals stand in the order that was drawn."""
        if not self._comparisons:
            return sorted(range(self._n_clips), key=self._drawn.__getitem__)
        strengths = fit_strengths(*tally(self._n_clips, self._comparisons, _DECIDES)).values.round(9)
        return sorted(range(self._n_clips), key=lambda clip: (-strengths[clip], self._drawn[clip]))

    def goes_on(self, one: int, other: int) -> int:
        """The better clip of a pair; after a tie or a failure the one that is stronger so far."""
        for comparison in reversed(self._comparisons):
            if {comparison.first, comparison.second} == {one, other}:
                better = comparison.preferred(_DECIDES)
                if better is not None:
                    return better
        order = self.by_strength()
        return min(one, other, key=order.index)

    def neighbours(self) -> Pairs:
        """Pairs of neighbours by wins that have not met; the stronger clips choose first."""
        wins, ties = tally(self._n_clips, self._comparisons, _DECIDES)
        points = 2 * wins.sum(axis=1) + ties.sum(axis=1)
        left = sorted(self.by_strength(), key=lambda clip: -points[clip])
        pairs = []
        while left:
            one = left.pop(0)
            other = next((clip for clip in left if frozenset((one, clip)) not in self._met), None)
            if other is not None:
                left.remove(other)
                pairs.append((one, other))
        return pairs

    def strongest_unmet(self) -> tuple[int, int] | None:
        """The pair of the strongest clips that have not met; None if all have."""
        order = self.by_strength()
        pairs = ((a, b) for place, a in enumerate(order) for b in order[place + 1 :])
        return next((pair for pair in pairs if frozenset(pair) not in self._met), None)


SCHEDULES: dict[str, Callable[[int, np.random.Generator], Rounds]] = {
    "all": all_pairs,
    "swiss": swiss,
    "knockout": knockout,
}
"""The schedules by name."""


def number_of_pairs(n_clips: int) -> int:
    """The number of all pairs of a group."""
    return n_clips * (n_clips - 1) // 2


def usual_budget(schedule: str, n_clips: int) -> int:
    """The number of pairs that a schedule compares if nothing else is asked for.

    `all` compares all pairs, `swiss` as many rounds as a knockout would take, and `knockout` a third of all
    pairs, but at least one less than there are clips (28 pairs of 8 clips: 28, 12 and 9).

    Raises:
        InputError: There is no such schedule.
    """
    every = number_of_pairs(n_clips)
    if schedule not in SCHEDULES:
        raise InputError(f"schedule: got {schedule!r}, allowed: {', '.join(SCHEDULES)}")
    if schedule == "all":
        return every
    if schedule == "swiss":
        return min(every, (n_clips - 1).bit_length() * (n_clips // 2))
    return max(n_clips - 1, every // 3)
