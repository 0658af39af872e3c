"""Both orders, votes and first answers: verdicts by hand, and early stops that never change one."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_judges import CODES, labelled_pair

from vrthinker.data.pairs import Pair
from vrthinker.errors import InputError
from vrthinker.evals.protocols import (
    Protocol,
    check_ids,
    combined,
    item_of_presentations,
    mean_of_orders,
    presentations,
    vote,
    votes_needed,
    waves,
)
from vrthinker.evals.summary import summarise
from vrthinker.records.eval_items import EvalItem
from vrthinker.records.verdicts import VerdictRecord


def four(label: int) -> dict[str, int]:
    return dict.fromkeys(CODES, label)


def record(name: str, judgment: dict[str, int] | None, **changes: Any) -> VerdictRecord:
    usual = {
        "id": name,
        "judgment": judgment,
        "confidence": None,
        "rounds": 2,
        "tool_calls": 1,
        "frames_seen": [1, 5],
        "stop_reason": "answered" if judgment else "unparseable",
        "reason": None if judgment else "no answer",
        "well_formed": True,
        "latency_seconds": 1.0,
        "prompt_tokens": 10,
        "sampled_tokens": 4,
        "seed": 0,
        "model": "m",
    }
    return VerdictRecord.model_validate({**usual, **changes})


def judged(pairs: list[Pair], protocol: Protocol, judge: Any) -> list[EvalItem]:
    """The items when a function of a presentation is the judge."""
    records: dict[str, VerdictRecord] = {}
    for todo in waves(pairs, protocol, records):
        for one in todo:
            records[one.id] = record(one.id, judge(one))
    return [item_of_presentations(pair, protocol, records) for pair in pairs]


def test_both_orders_tell_a_habit_from_a_judgment() -> None:
    pairs = [labelled_pair(n, n % 3) for n in range(12)]
    both = Protocol(both_orders=True)
    first = summarise(judged(pairs, both, lambda pair: four(1)))
    assert first["orders"] == {
        "items": 12,
        "judged_in_both": 12,
        "consistent": 0.0,
        "always_first": 1.0,
        "always_second": 0.0,
        "tie_in_both": 0.0,
    }
    assert first["measures"]["all"]["oa/tau"]["value"] == pytest.approx(4 / 12), "its mean is a tie"
    assert first["items"] == first["measures"]["all"]["oa/tau"]["n"] == 12, "a pair counts once"
    assert first["cost"]["episodes"]["mean"] == 2.0

    oracle = summarise(judged(pairs, both, lambda pair: four(pair.labels["OA"])))
    assert oracle["orders"]["consistent"] == 1.0
    assert oracle["measures"]["all"]["oa/tau"]["value"] == 1.0
    tie = summarise(judged(pairs, both, lambda pair: four(0)))
    assert (tie["orders"]["consistent"], tie["orders"]["tie_in_both"]) == (1.0, 1.0)


def test_a_pair_that_fails_in_one_order_has_no_verdict() -> None:
    pairs = [labelled_pair(n, 1) for n in range(2)]
    items = judged(
        pairs, Protocol(both_orders=True), lambda p: None if p.id == "p0#2,1" else four(p.labels["OA"])
    )
    assert [item.status.value for item in items] == ["unparsed", "judged"]
    assert items[0].reason == "unparseable: no answer"
    assert items[0].orders == (four(1), None)
    summary = summarise(items)
    assert summary["measures"]["all"]["oa/tau"]["value"] == 0.5
    assert (summary["orders"]["items"], summary["orders"]["judged_in_both"]) == (2, 1)


def test_notes_of_both_orders_name_the_videos_of_the_pair() -> None:
    pair, both = labelled_pair(0, 1), Protocol(both_orders=True)
    first, second = (one.id for one in presentations(pair, both))
    records = {
        first: record(first, four(1), notes=["video 2 has transparent pixels"]),
        second: record(second, four(2), notes=["video 1 has transparent pixels"], frames_seen=[2, 9]),
    }
    combined_record, _ = combined(pair, both, records)
    assert combined_record is not None
    assert combined_record.notes == ["video 2 has transparent pixels"]
    assert combined_record.frames_seen == [1, 5], "the other order's numbers are those of swapped clips"


def test_the_mean_of_two_orders() -> None:
    wanted = {(1, 1): 1, (1, 2): 0, (1, 0): 1, (0, 0): 0, (0, 2): 2, (2, 2): 2}
    for (a, b), mean in wanted.items():
        for pair in ((a, b), (b, a)):
            assert mean_of_orders(*map(four, pair)) == four(mean)
    assert mean_of_orders(None, four(1)) is None


def test_the_verdict_of_votes() -> None:
    assert vote([four(1), four(1), four(2)], 3) == four(1)
    assert vote([four(1), four(2)], 2) == four(0), "equally many say either"
    assert vote([four(1), four(2), four(0)], 3) == four(0)
    assert vote([four(2), None, None], 3) is None
    assert vote([four(2), four(2), None], 3) == four(2)
    assert vote([four(2), None], 2) is None, "half of them is not more than half"


VOTES = st.lists(
    st.one_of(st.none(), st.fixed_dictionaries({code: st.integers(0, 2) for code in CODES})),
    min_size=1,
    max_size=9,
)


@given(VOTES)
def test_stopping_early_never_changes_the_verdict(votes: list[dict[str, int] | None]) -> None:
    most, cast = len(votes), 0
    while needed := votes_needed(votes[:cast], most):
        assert cast + needed <= most
        cast += needed
    assert vote(votes[:cast], most) == vote(votes, most)


@given(VOTES, st.randoms(use_true_random=False))
def test_it_stops_only_when_nothing_can_change(
    votes: list[dict[str, int] | None], rng: random.Random
) -> None:
    """After the last vote that was asked for, every way to go on gives the same verdict; before, two do."""
    most = len(votes) + 2
    if votes_needed(votes, most) == 0:
        for _ in range(20):
            rest = [rng.choice([None, *map(four, (0, 1, 2))]) for _ in range(2)]
            assert vote([*votes, *rest], most) == vote(votes, most)


def test_unanimous_votes_stop_at_the_first_majority() -> None:
    pairs = [labelled_pair(0, 1)]
    items = judged(pairs, Protocol(votes=7), lambda pair: four(1))
    assert items[0].cost.episodes == 4
    assert (items[0].judgment, items[0].agreement) == (four(1), 1.0)
    split = judged(pairs, Protocol(votes=7), lambda p: four(1 if p.id in ("p0", "p0#3", "p0#5") else 2))
    assert split[0].cost.episodes == 7
    assert split[0].judgment == four(2)
    assert split[0].agreement == pytest.approx(4 / 7)
    calibration = summarise([*items, split[0].model_copy(update={"id": "other"})])["calibration"]
    assert calibration["agreement"]["error"] == pytest.approx(4 / 7 / 2)


def test_presentations_have_ids_of_their_own_and_one_that_is_taken_is_refused() -> None:
    pair = labelled_pair(0, 1)
    ids = [one.id for one in presentations(pair, Protocol(votes=3))]
    assert ids == ["p0", "p0#2", "p0#3"]
    swapped = presentations(pair, Protocol(both_orders=True))[1]
    assert (swapped.video_1, swapped.labels) == (pair.video_2, {"OA": 2})
    taken = pair.model_copy(update={"id": "p0#2"})
    check_ids([pair, taken], Protocol())
    with pytest.raises(InputError, match="p0#2"):
        check_ids([pair, taken], Protocol(votes=2))


def test_protocols_say_what_departs_from_the_default() -> None:
    assert Protocol().as_json() == {}
    assert Protocol(votes=5, redundant=True).as_json() == {"votes": 5, "redundant": True}
    for wrong in ({"votes": 0}, {"votes": 65}, {"votes": 3, "both_orders": True}):
        with pytest.raises(InputError, match="votes"):
            Protocol(**wrong)
