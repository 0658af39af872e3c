"""The scripted engine: exact contexts, and an error for every breach of the protocol."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.engine.base import (
    Choice,
    Engine,
    FinishReason,
    FrameSegment,
    Free,
    Message,
    RoundLimits,
    RoundRequest,
    Session,
    TextSegment,
    write_rounds,
)
from vrthinker.engine.scripted import ScriptedEngine, fits_form
from vrthinker.errors import EngineError
from vrthinker.visibility import ShownFrame, VisibilityRecord, WindowMemory


def frame(outcome: int, number: int) -> FrameSegment:
    pixels = np.full((28, 28, 3), number % 256, np.uint8)
    return FrameSegment(ShownFrame(outcome, number), ("a.mp4", number, 28, 28), (28, 28), lambda: pixels)


def shows(outcome: int, numbers: list[int]) -> Message:
    parts = [part for n in numbers for part in (TextSegment(f"Frame {n}: "), frame(outcome, n))]
    return Message("user", tuple(parts))


TASK = (Message("system", (TextSegment("Judge."),)), shows(0, [1, 5]))


def one_round(engine: ScriptedEngine, session: Session, **request) -> str:
    return write_rounds(engine, [RoundRequest(session, **request)])[0].text


def test_contexts_are_kept_exactly():
    engine = ScriptedEngine([["first", "second", "third"]])
    session = engine.open(TASK, seed=7)
    assert one_round(engine, session) == "first"
    assert one_round(engine, session, new=(shows(1, [2, 5]),)) == "second"
    text = one_round(engine, session, new=(shows(2, [3]),), expired=(ShownFrame(1, 2), ShownFrame(1, 5)))
    assert text == "third"
    labels = Message("user", (TextSegment("Frame 2: "), TextSegment("Frame 5: ")))
    assert engine.seen[0].turns == TASK
    assert engine.seen[1].turns == (*TASK, "first", shows(1, [2, 5]))
    assert engine.seen[2].turns == (*TASK, "first", labels, "second", shows(2, [3]))
    assert engine.seen[2].live == (ShownFrame(0, 1), ShownFrame(0, 5), ShownFrame(2, 3))
    assert [(seen.round_number, seen.seed) for seen in engine.seen] == [(1, 7), (2, 7), (3, 7)]
    assert isinstance(engine, Engine)


def test_a_result_is_plain_text_without_token_ids():
    engine = ScriptedEngine([["text"]])
    (result,) = write_rounds(engine, [RoundRequest(engine.open(TASK))])
    assert (result.text, result.finish_reason) == ("text", FinishReason.STOP)
    assert (result.token_ids, result.logprobs, result.error) == (None, None, None)
    assert engine.collect() == []


def test_a_function_sees_session_round_and_live_messages():
    calls = []

    def script(index, number, messages):
        calls.append((index, number, [m.role for m in messages], sum(len(m.frames) for m in messages)))
        return f"{index}/{number}"

    engine = ScriptedEngine(script)
    one, two = engine.open(TASK), engine.open(TASK)
    results = write_rounds(engine, [RoundRequest(two), RoundRequest(one)])
    assert [r.text for r in results] == ["1/1", "0/1"]
    one_round(engine, one, new=(shows(1, [9]),), expired=(ShownFrame(0, 1),))
    assert calls == [
        (1, 1, ["system", "user"], 2),
        (0, 1, ["system", "user"], 2),
        (0, 2, ["system", "user", "user"], 2),
    ]


def test_forks_are_copies_with_seeds_of_their_own():
    engine = ScriptedEngine(lambda index, number, messages: str(index))
    origin = engine.open(TASK)
    forks = engine.fork(origin, [4, 5])
    assert len({session.id for session in (origin, *forks)}) == 3
    write_rounds(engine, [RoundRequest(session) for session in forks])
    assert [(seen.seed, seen.turns) for seen in engine.seen] == [(4, TASK), (5, TASK)]


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda s: RoundRequest(s, expired=(ShownFrame(0, 2),)), "not live"),
        (lambda s: RoundRequest(s, expired=(ShownFrame(0, 1), ShownFrame(0, 1))), "not live"),
        (lambda s: RoundRequest(s, new=(shows(0, [1]),)), "live already"),
        (lambda s: RoundRequest(s, new=(shows(1, [7, 7]),)), "live already"),
        (lambda s: RoundRequest(s, new=(Message("user", ("bare text",)),)), "holds str"),
        (lambda s: RoundRequest(s, limits=RoundLimits(form=(Choice(("yes", "no")),))), "does not fit"),
    ],
)
def test_breaches_raise_and_change_nothing(request_of, message):
    engine = ScriptedEngine([["text"]])
    session = engine.open(TASK)
    with pytest.raises(EngineError, match=message):
        engine.submit(request_of(session))
    assert engine.seen == []
    assert one_round(engine, session) == "text"
    assert engine.seen[0].turns == TASK


def test_a_second_round_that_is_refused_changes_nothing():
    engine = ScriptedEngine([["first", "second"]])
    session = engine.open(TASK)
    engine.submit(RoundRequest(session))
    with pytest.raises(EngineError, match="under way"):
        engine.submit(RoundRequest(session))
    assert [result.text for result in engine.collect()] == ["first"]
    assert one_round(engine, session) == "second"
    assert [seen.round_number for seen in engine.seen] == [1, 2]


def test_a_script_that_ends_is_an_error():
    engine = ScriptedEngine([["only"]])
    session = engine.open(TASK)
    one_round(engine, session)
    with pytest.raises(EngineError, match="no text for session 0, round 2"):
        engine.submit(RoundRequest(session))
    with pytest.raises(EngineError, match="no text for session 1, round 1"):
        engine.submit(RoundRequest(engine.open(TASK)))


def test_closing_frees_room_and_drops_what_was_not_collected():
    engine = ScriptedEngine(lambda *_: "x", max_sessions=1)
    session = engine.open(TASK)
    engine.submit(RoundRequest(session))
    engine.close(session)
    assert engine.collect() == []
    assert engine.open_sessions == 0
    tensors = iter([("w", None)])
    engine.update_weights(tensors, 3)
    assert engine.policy_version == 3
    assert list(tensors) == [], "they were read to their end"
    engine.submit(RoundRequest(engine.open(TASK)))
    engine.shutdown()
    assert engine.collect() == []
    assert engine.open_sessions == 0


def test_rounds_can_finish_out_of_order():
    engine = ScriptedEngine(lambda index, *_: str(index), collect_at_most=1)
    sessions = [engine.open(TASK) for _ in range(3)]
    for session in sessions:
        engine.submit(RoundRequest(session))
    assert [[r.text for r in engine.collect()] for _ in range(4)] == [["2"], ["1"], ["0"], []]
    results = write_rounds(engine, [RoundRequest(session) for session in sessions])
    assert [result.session for result in results] == sessions


def test_guided_texts_must_fit_their_form():
    form = (Choice(("TA=",)), Choice(("0,", "1,")), Free(8), Choice(("</answer>",)))
    assert fits_form("TA=1, whatever</answer>", form)
    assert fits_form("TA=0,</answer>", form)
    assert not fits_form("TA=2,</answer>", form)
    assert not fits_form("TA=1,</answer> and more", form)
    assert not fits_form("TA=1,", form)
    branching = (Choice(("a:", "b:"), then=((Choice(("1",)),), (Choice(("2",)), Free(3)))), Choice((".",)))
    assert fits_form("a:1.", branching)
    assert fits_form("b:2xyz.", branching)
    assert not fits_form("a:2.", branching)
    assert not fits_form("b:1.", branching)
    engine = ScriptedEngine([["TA=1,</answer>"]])
    assert one_round(engine, engine.open(TASK), limits=RoundLimits(form=form)) == "TA=1,</answer>"


@given(
    window=st.one_of(st.none(), st.integers(0, 3)),
    asked=st.lists(st.lists(st.integers(1, 6), max_size=4, unique=True), max_size=6),
)
def test_live_contexts_follow_the_visibility_record(window, asked):
    engine = ScriptedEngine(lambda index, number, messages: f"round {number}")
    record = VisibilityRecord(WindowMemory(window))
    session = engine.open([shows(0, [f.frame_number for f in record.show(0, [1, 2])])])
    entry = record.enter()
    write_rounds(engine, [RoundRequest(session)])
    for outcome, numbers in enumerate(asked, start=1):
        shown = record.show(outcome, numbers)
        entry = record.enter()
        new = shows(outcome, [f.frame_number for f in shown])
        write_rounds(engine, [RoundRequest(session, (new,), entry.expired)])
        assert engine.seen[-1].live == entry.live
    assert [seen.live for seen in engine.seen] == [rounds.live for rounds in record.rounds]
