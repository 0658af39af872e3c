"""The visibility record against the sentence it implements, drawn by hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.visibility import ShownFrame, VisibilityRecord, WindowMemory

OUTCOMES = st.lists(st.lists(st.integers(1, 12), max_size=4, unique=True), min_size=1, max_size=8)


def test_outcome_k_is_live_in_the_p_rounds_after_it() -> None:
    record = VisibilityRecord(WindowMemory(1))
    assert record.show(0, [1, 5]) == (ShownFrame(0, 1), ShownFrame(0, 5))
    assert record.enter().frame_numbers == (1, 5)
    record.show(1, [3])
    assert record.enter().frame_numbers == (1, 3, 5)
    record.show(2, [4])
    third = record.enter()
    assert third.frame_numbers == (1, 4, 5)
    assert third.expired == (ShownFrame(1, 3),)


@given(outcomes=OUTCOMES, window=st.one_of(st.none(), st.integers(0, 4)))
def test_every_round_sees_the_first_input_and_the_last_p_outcomes(
    outcomes: list[list[int]], window: int | None
) -> None:
    record = VisibilityRecord(WindowMemory(window))
    before: set[ShownFrame] = set()
    for index, numbers in enumerate(outcomes):
        seen_next = record.show(index, numbers)
        entry = record.enter()
        p = len(outcomes) if window is None else window
        wanted = [
            ShownFrame(k, number)
            for k in range(index + 1)
            if k == 0 or entry.round_number - p <= k
            for number in outcomes[k]
        ]
        assert list(entry.live) == wanted
        assert set(entry.expired) == before - set(wanted)
        assert set(seen_next) == {shown for shown in wanted if shown.outcome == index}
        before = set(wanted)
    assert [entry.round_number for entry in record.rounds] == list(range(1, len(outcomes) + 1))


def test_a_frame_shown_twice_expires_once_each() -> None:
    record = VisibilityRecord(WindowMemory(1))
    record.show(0, [2])
    record.enter()
    record.show(1, [2])
    assert record.enter().live == (ShownFrame(0, 2), ShownFrame(1, 2))
    record.show(2, [2])
    entry = record.enter()
    assert entry.expired == (ShownFrame(1, 2),)
    assert entry.live == (ShownFrame(0, 2), ShownFrame(2, 2))


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="got -1"):
        WindowMemory(-1)
    record = VisibilityRecord(WindowMemory(1))
    with pytest.raises(ValueError, match="expected 0"):
        record.show(1, [1])
    record.show(0, [1])
    with pytest.raises(ValueError, match="picture twice"):
        record.show(0, [1])
    assert record.show(0, [2]) == (ShownFrame(0, 2),), "an outcome may come in parts"
    with pytest.raises(ValueError, match="picture twice"):
        record.show(0, [3, 3])
