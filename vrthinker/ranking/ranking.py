"""The ranking of a group of clips: who was compared with whom, and what follows from it.

The order is that of the overall strengths (`davidson.py`). A clip without a judged comparison has neither a
strength nor a rank. The strengths of all four dimensions come with 95 % intervals. Win rates and counts stand
beside them, because a win rate depends on whom a clip happened to meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vrthinker.errors import InputError
from vrthinker.ranking.comparisons import CODES, Comparison, Score, tally
from vrthinker.ranking.davidson import Strengths, fit_strengths
from vrthinker.ranking.schedules import SCHEDULES, Pairs, number_of_pairs, usual_budget

Compare = Callable[[Pairs], Iterable[Comparison]]
"""A function that compares the pairs of a round, in any order. It gives one comparison for each."""
MAX_CLIPS = 256
"""The most clips of a group. All pairs of them are 32,640."""


@dataclass(frozen=True)
class Strength:
    """A clip's strength in one dimension (a log-odds, 0 is the group's mean) and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Standing:
    """One clip's place in its group.

    Attributes:
        clip: The 0-based place of the clip in the group that was given.
        rank: 1 for the best. Equals share a rank. None without a judged comparison.
        strengths: Dimension code -> strength; None without a judged comparison.
        scores: Dimension code -> wins, ties and losses.
        failed: The number of its comparisons that failed.
    """

    clip: int
    rank: int | None
    strengths: Mapping[str, Strength | None]
    scores: Mapping[str, Score]
    failed: int


@dataclass(frozen=True, repr=False)
class Ranking:
    """A ranked group.

    Attributes:
        standings: The clips, the best first. Those without a rank come last.
        comparisons: The comparisons, in the order of the schedule.
        schedule: The name of the schedule.
        rivals: The clips whose overall strength is not clearly below the best one's, at 95 %.
    """

    standings: tuple[Standing, ...]
    comparisons: tuple[Comparison, ...]
    schedule: str
    rivals: tuple[int, ...]

    def __repr__(self) -> str:
        order = ", ".join(str(standing.clip) for standing in self.standings if standing.rank is not None)
        failed = f", failed={len(self.failures)}" if self.failures else ""
        pairs = f"{len(self.comparisons)} of {number_of_pairs(len(self.standings))}"
        return f"Ranking(order=[{order}], schedule={self.schedule}, pairs={pairs}{failed})"

    @property
    def best(self) -> int | None:
        """The clip with the highest overall strength (best of n); None if no comparison was judged."""
        first = self.standings[0]
        return None if first.rank is None else first.clip

    @property
    def order(self) -> tuple[int, ...]:
        """The clips that have a rank, the best first."""
        return tuple(standing.clip for standing in self.standings if standing.rank is not None)

    @property
    def consistency(self) -> float | None:
        """The share of pairs whose two orders gave the same overall verdict, of those where both gave one.

        None if no pair has two, because one order was judged or the others failed.
        """
        known = [one.consistent for one in self.comparisons if one.consistent is not None]
        return sum(known) / len(known) if known else None

    @property
    def failures(self) -> tuple[Comparison, ...]:
        """The comparisons without a judgment."""
        return tuple(one for one in self.comparisons if one.judgment is None)

    def as_json(self) -> dict[str, Any]:
        """The ranking as JSON values. Clips have their 1-based numbers there."""
        return {
            "best": None if self.best is None else self.best + 1,
            "not_clearly_worse": [clip + 1 for clip in self.rivals],
            "schedule": self.schedule,
            "pairs": len(self.comparisons),
            "all_pairs": number_of_pairs(len(self.standings)),
            "consistency": self.consistency,
            "standings": [_standing_json(standing) for standing in self.standings],
            "comparisons": [
                {
                    "video_1": one.first + 1,
                    "video_2": one.second + 1,
                    "judgment": None if one.judgment is None else dict(one.judgment),
                    "reason": one.reason,
                    "probabilities": None if one.probabilities is None else one.probabilities.model_dump(),
                    "consistent": one.consistent,
                }
                for one in self.comparisons
            ],
        }


def rank_group(
    n_clips: int, compare: Compare, *, schedule: str = "all", budget: int | None = None, seed: int = 0
) -> Ranking:
    """Compares pairs of a group as a schedule says, and ranks the group.

    Args:
        n_clips: The number of clips, 2 to `MAX_CLIPS`.
        compare: The function that compares the pairs of a round.
        schedule: The name of the schedule (`schedules.SCHEDULES`).
        budget: The most pairs that are compared; `usual_budget` by default.
        seed: The seed of the schedule's draws, not negative.

    Raises:
        InputError: A number is out of range, the schedule is unknown, or `compare` gave other pairs.
    """
    if not 2 <= n_clips <= MAX_CLIPS:
        raise InputError(f"clips: got {n_clips}, allowed: 2 to {MAX_CLIPS}")
    usual = usual_budget(schedule, n_clips)
    every = number_of_pairs(n_clips)
    if budget is not None and not 1 <= budget <= every:
        raise InputError(f"budget: got {budget} pairs, allowed: 1 to {every}, all pairs of {n_clips} clips")
    if seed < 0:
        raise InputError(f"seed: got {seed}, allowed: 0 and above")
    left = usual if budget is None else budget
    rounds = SCHEDULES[schedule](n_clips, np.random.default_rng([seed, n_clips]))
    comparisons: list[Comparison] = []
    pairs = next(rounds, None)
    while pairs and left:
        played = _in_their_order(pairs[:left], compare(pairs[:left]))
        comparisons += played
        left -= len(played)
        try:
            pairs = rounds.send(played)
        except StopIteration:
            break
    rounds.close()
    return standings_of(n_clips, comparisons, schedule)


def standings_of(n_clips: int, comparisons: Sequence[Comparison], schedule: str) -> Ranking:
    """Ranks a group by comparisons that were made."""
    results = {code: tally(n_clips, comparisons, code) for code in CODES}
    fits = {code: fit_strengths(*counts) for code, counts in results.items()}
    scores = {
        code: [
            Score(int(wins[clip].sum()), int(ties[clip].sum()), int(wins[:, clip].sum()))
            for clip in range(n_clips)
        ]
        for code, (wins, ties) in results.items()
    }
    overall = fits["OA"].values.round(9)
    ranked = [clip for clip in range(n_clips) if scores["OA"][clip].win_rate is not None]
    ranked.sort(key=lambda clip: (-overall[clip], clip))
    others = [clip for clip in range(n_clips) if clip not in ranked]
    failed = [
        sum(one.judgment is None and clip in (one.first, one.second) for one in comparisons)
        for clip in range(n_clips)
    ]
    return Ranking(
        standings=tuple(
            Standing(
                clip=clip,
                rank=1 + int(np.sum(overall[ranked] > overall[clip])) if clip in ranked else None,
                strengths={code: _strength(fits[code], scores[code][clip], clip) for code in CODES},
                scores={code: scores[code][clip] for code in CODES},
                failed=failed[clip],
            )
            for clip in (*ranked, *others)
        ),
        comparisons=tuple(comparisons),
        schedule=schedule,
        rivals=tuple(clip for clip in ranked[1:] if not fits["OA"].is_above(ranked[0], clip)),
    )


def _strength(fit: Strengths, score: Score, clip: int) -> Strength | None:
    return None if score.win_rate is None else Strength(float(fit.values[clip]), *fit.interval(clip))


def _in_their_order(pairs: Pairs, comparisons: Iterable[Comparison]) -> list[Comparison]:
    """The comparisons in the order of the pairs, so that what follows does not depend on who was first."""
    by_pair = {(one.first, one.second): one for one in comparisons}
    if by_pair.keys() != set(pairs):
        raise InputError(
            f"comparisons: got {sorted(by_pair)}, allowed: one for each pair of the round, {sorted(pairs)}"
        )
    return [by_pair[pair] for pair in pairs]


def _standing_json(standing: Standing) -> dict[str, Any]:
    dimensions = {}
    for code in CODES:
        score, strength = standing.scores[code], standing.strengths[code]
        dimensions[code] = {
            "wins": score.wins,
            "ties": score.ties,
            "losses": score.losses,
            "win_rate": score.win_rate,
            "strength": None if strength is None else strength.value,
            "low": None if strength is None else strength.low,
            "high": None if strength is None else strength.high,
        }
    return {"clip": standing.clip + 1, "rank": standing.rank, **dimensions, "failed": standing.failed}
