"""Schedules and rankings: every clip gets its turns, few pairs find the best one, failures judge nobody."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pytest

from vrthinker import InputError
from vrthinker.ranking.comparisons import CODES, Comparison
from vrthinker.ranking.ranking import Ranking, rank_group
from vrthinker.ranking.schedules import SCHEDULES, Pairs, number_of_pairs, usual_budget
from vrthinker.world.groups import GroupTruth, sample_group
from vrthinker.world.truth_reader import count, look_at_hints
from vrthinker.world.world import PRESETS, judgments_from_counts

Judge = Callable[[int, int], int | None]


def by_quality(quality: list[float]) -> Judge:
    """A judge that is always right about the clips' qualities."""
    return lambda i, j: 0 if quality[i] == quality[j] else 1 if quality[i] > quality[j] else 2


def ranked(n: int, judge: Judge, **options: object) -> tuple[Ranking, list[Pairs]]:
    """Ranks a group by a judge of one dimension for all, and tells the rounds."""
    rounds: list[Pairs] = []

    def compare(pairs: Pairs) -> Iterator[Comparison]:
        rounds.append(pairs)
        for i, j in reversed(pairs):  # as they finish
            value = judge(i, j)
            yield Comparison(i, j, None if value is None else dict.fromkeys(CODES, value), "broken")

    return rank_group(n, compare, **options), rounds  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [2, 3, 7, 8])
def test_no_pair_is_compared_twice_and_places_are_balanced(schedule: str, n: int) -> None:
    rng = np.random.default_rng(n)
    quality = list(rng.permutation(n))
    for seed in range(5):
        budget = number_of_pairs(n) if schedule != "all" else None
        ranking, _ = ranked(n, by_quality(quality), schedule=schedule, seed=seed, budget=budget)
        pairs = [(one.first, one.second) for one in ranking.comparisons]
        assert {frozenset(pair) for pair in pairs} == set(map(frozenset, combinations(range(n), 2)))
        assert len(pairs) == number_of_pairs(n)
        firsts, seconds = Counter(i for i, _ in pairs), Counter(j for _, j in pairs)
        most = 1 if schedule == "all" else 2
        assert all(abs(firsts[clip] - seconds[clip]) <= most for clip in range(n))
        assert [quality[clip] for clip in ranking.order] == sorted(quality, reverse=True)
        again, _ = ranked(n, by_quality(quality), schedule=schedule, seed=seed, budget=budget)
        assert again == ranking


def test_the_usual_budgets_of_eight_clips() -> None:
    assert [usual_budget(name, 8) for name in ("all", "swiss", "knockout")] == [28, 12, 9]
    assert usual_budget("knockout", 3) == 2
    with pytest.raises(InputError, match="schedule: got 'elo', allowed: all, swiss, knockout"):
        usual_budget("elo", 8)


def by_truth(group: GroupTruth) -> Judge:
    """A judge that knows every planted defect."""
    return lambda i, j: int(judgments_from_counts(group.clips[i].counts, group.clips[j].counts).OA)


def by_looks(group: GroupTruth) -> Judge:
    """What the oracle sees of two clips in two calls, which is not always the whole truth."""
    config = PRESETS["medium"]

    def judge(i: int, j: int) -> int:
        pair = group.pair(i, j)
        return int(count(pair, look_at_hints(pair, config, 2)).OA)

    return judge


def test_the_best_of_eight_is_found_with_a_third_of_the_pairs() -> None:
    found = Counter[str]()
    for index in range(100):
        group = sample_group(PRESETS["medium"], 1, index, 8)
        for name, judge in (("truth", by_truth(group)), ("two calls", by_looks(group))):
            ranking, _ = ranked(8, judge, schedule="knockout", seed=index)
            assert len(ranking.comparisons) == 9
            found[name] += ranking.best in group.best
    assert found["truth"] == 100
    assert found["two calls"] >= 95


def test_planted_strengths_of_a_noisy_judge_are_recovered() -> None:
    rng = np.random.default_rng(5)
    planted = np.linspace(2, -2, 24)

    def judge(i: int, j: int) -> int:
        d = planted[i] - planted[j]
        weights = np.exp([-0.5, d / 2, -d / 2])
        return int(rng.choice(3, p=weights / weights.sum()))

    ranking, _ = ranked(24, judge)
    fitted = {standing.clip: standing.strengths["OA"] for standing in ranking.standings}
    values = [strength.value for clip in range(24) if (strength := fitted[clip]) is not None]
    assert np.corrcoef(values, planted)[0, 1] > 0.9
    inside = [s.low <= planted[clip] <= s.high for clip, s in fitted.items() if s is not None]
    assert sum(inside) >= 21
    assert ranking.standings[0].clip in (0, 1, 2, 3)
    swiss, rounds = ranked(24, judge, schedule="swiss")
    assert [len(pairs) for pairs in rounds] == [12] * 5
    assert swiss.best in range(6)


def test_failures_are_counted_and_judge_nobody() -> None:
    quality = [1.0, 3.0, 2.0, 0.0]
    right = by_quality(quality)
    ranking, _ = ranked(4, lambda i, j: None if 3 in (i, j) else right(i, j))
    assert ranking.order == (1, 2, 0)
    last = ranking.standings[-1]
    assert (last.clip, last.rank, last.failed) == (3, None, 3)
    assert last.strengths["OA"] is None
    assert last.scores["OA"].win_rate is None
    assert len(ranking.failures) == 3
    assert "failed=3" in repr(ranking)
    told = ranking.as_json()
    assert told["best"] == 2
    assert told["standings"][-1]["OA"]["strength"] is None
    assert [one["reason"] for one in told["comparisons"] if one["judgment"] is None] == ["broken"] * 3
    nothing, _ = ranked(3, lambda i, j: None, schedule="knockout")
    assert nothing.best is None
    assert nothing.order == ()


def test_equals_share_a_rank_and_are_rivals() -> None:
    ranking, _ = ranked(4, by_quality([1, 1, 0, 0]))
    assert [standing.rank for standing in ranking.standings] == [1, 1, 3, 3]
    assert 1 in ranking.rivals
    score = ranking.standings[0].scores["OA"]
    assert (score.wins, score.ties, score.losses, score.win_rate) == (2, 1, 0, 2.5 / 3)


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (1, {}, "clips: got 1, allowed: 2 to 256"),
        (4, {"budget": 7}, "budget: got 7 pairs, allowed: 1 to 6"),
        (4, {"budget": 0}, "budget: got 0 pairs"),
        (4, {"schedule": "x"}, "schedule: got 'x'"),
        (4, {"seed": -1}, "seed: got -1"),
    ],
)
def test_what_cannot_be_is_refused(n: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        ranked(n, by_quality([0.0] * n), **options)


def test_a_comparison_of_another_pair_is_refused() -> None:
    with pytest.raises(InputError, match="allowed: one for each pair of the round"):
        rank_group(3, lambda pairs: [Comparison(0, 1, {"OA": 1})])
    with pytest.raises(InputError, match="two different ones"):
        Comparison(1, 1, {"OA": 1})
    with pytest.raises(InputError, match="got OA=3"):
        Comparison(0, 1, {"OA": 3})
    with pytest.raises(InputError, match="neither a judgment nor a reason"):
        Comparison(0, 1, None)
