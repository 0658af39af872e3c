"""The bookkeeping that all engines share, by itself, and that all engines refuse in its words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from world.test_oracle import FIRST, HANDMADE, handmade_truths, shows

from vrthinker.engine.base import Engine, Message, RoundLimits, RoundRequest, Session, TextSegment
from vrthinker.engine.endpoint.engine import EndpointEngine
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.hf.tiny import make_tiny
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.engine.sessions import SessionTable
from vrthinker.errors import EngineError
from vrthinker.world.oracle import OracleEngine
from vrthinker.world.world import PairTruth

FULL = "max_sessions: got 4 sessions open at once, allowed: at most 3; close some first"
SECOND = "got a second round while one is under way, allowed: one at a time; collect that one first"
LATE = "got a fork after the first round was submitted, allowed: before it; open a new session"
CLOSED = "is closed, allowed: sessions that are open; open one"
UNKNOWN = "was never opened, allowed: sessions that are open; open one"
WEIGHTS = "allowed: none; close them first"
OVER = "the engine is shut down, allowed now: collect, close; make a new engine"

FRESH, WRITING, WRITTEN, GONE, STRANGE = map(Session, (2, 1, 3, 0, 9))


def table() -> SessionTable[str]:
    """A full table of three: a session that is fresh, one that is writing, and one that has written."""
    table: SessionTable[str] = SessionTable(3)
    closed = table.add("gone")
    writing, fresh = table.add("writing"), table.add("fresh")
    table.close(closed)
    written = table.add("written")
    assert (closed, writing, fresh, written) == (GONE, WRITING, FRESH, WRITTEN)
    for session in (writing, written):
        table.begin_round(session)
    table.end_round(written)
    return table


Misuse = Callable[[SessionTable[str]], object]


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda t: t.add("more"), FULL),
        (lambda t: t.check_fork(FRESH, 1), FULL),
        (lambda t: t.check_fork(FRESH, 8), FULL.replace("4", "11")),
        (lambda t: t.check_fork(WRITING, 0), f"session 1: {LATE}"),
        (lambda t: t.check_fork(WRITTEN, 0), f"session 3: {LATE}"),
        (lambda t: t.check_submit(WRITING), f"session 1: {SECOND}"),
        (lambda t: t.begin_round(WRITING), f"session 1: {SECOND}"),
        (lambda t: t[GONE], f"session 0 {CLOSED}"),
        (lambda t: t.rounds(GONE), f"session 0 {CLOSED}"),
        (lambda t: t.check_submit(GONE), f"session 0 {CLOSED}"),
        (lambda t: t.check_fork(GONE, 1), f"session 0 {CLOSED}"),
        (lambda t: t[STRANGE], f"session 9 {UNKNOWN}"),
        (lambda t: t.check_submit(STRANGE), f"session 9 {UNKNOWN}"),
        (lambda t: t.close(STRANGE), f"session 9 {UNKNOWN}"),
        (lambda t: t.close(Session(-1)), f"session -1 {UNKNOWN}"),
        (lambda t: t.check_update_weights(), f"update_weights: got open sessions [1, 2, 3], {WEIGHTS}"),
    ],
)
def test_a_refusal_says_why_and_changes_nothing(misuse: Misuse, message: str) -> None:
    refusing, untouched = table(), table()
    with pytest.raises(EngineError) as caught:
        misuse(refusing)
    assert str(caught.value) == message
    assert vars(refusing) == vars(untouched)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda t: t.add("more"),
        lambda t: t[FRESH],
        lambda t: t.check_fork(FRESH, 0),
        lambda t: t.check_submit(STRANGE),
        lambda t: t.begin_round(FRESH),
        lambda t: t.check_update_weights(),
    ],
)
def test_a_table_that_is_shut_down_is_of_no_use(misuse: Misuse) -> None:
    over = table()
    over.shut_down()
    over.shut_down()
    with pytest.raises(EngineError) as caught:
        misuse(over)
    assert str(caught.value) == OVER
    assert (len(over), over.open_sessions, over.rounds_under_way) == (0, [], 0)
    assert over.close(FRESH) is over.end_round(WRITING) is None


def test_rounds_are_counted_from_their_beginning_and_under_way_until_their_end() -> None:
    sessions = table()
    assert [sessions.rounds(session) for session in (FRESH, WRITING, WRITTEN)] == [0, 1, 1]
    assert sessions.rounds_under_way == 1
    assert sessions.end_round(WRITING) == "writing"
    assert sessions.check_submit(WRITING) == "writing"
    sessions.begin_round(WRITING)
    assert (sessions.rounds(WRITING), sessions.rounds_under_way) == (2, 1)


def test_closing_hands_the_state_back_once_and_makes_room() -> None:
    sessions = table()
    assert sessions.close(WRITING) == "writing"
    assert sessions.close(WRITING) is None
    assert sessions.end_round(WRITING) is None, "its late result is void"
    assert sessions.rounds_under_way == 0
    assert sessions.add("next") == Session(4), "an id is never used twice"
    assert sessions.open_sessions == [FRESH, WRITTEN, Session(4)]
    for session in sessions.open_sessions:
        sessions.close(session)
    sessions.check_update_weights()


# The engines

ENGINES = {"scripted": ScriptedEngine, "oracle": OracleEngine, "endpoint": EndpointEngine, "hf": HFEngine}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    match request.param:
        case "scripted":
            made: Engine = ScriptedEngine(lambda *_: "text", max_sessions=3)
        case "oracle":
            made = OracleEngine(handmade_truths(PairTruth.model_validate(HANDMADE)), max_sessions=3)
        case "endpoint":  # nobody listens there: its rounds fail, which is no refusal
            made = EndpointEngine("http://127.0.0.1:9", "judge", max_sessions=3, max_retries=0)
        case _:
            made = HFEngine(make_tiny(tmp_path / "tiny", "qwen2.5-vl"), device="cpu", max_sessions=3)
    yield made
    made.shutdown()


def test_every_engine_refuses_in_the_same_words(engine: Engine) -> None:
    prefix = "" if isinstance(engine, HFEngine) else f"{engine.name}: "
    messages = [Message("user", (TextSegment("Judge."),))]
    if isinstance(engine, OracleEngine):
        messages.append(shows(PairTruth.model_validate(HANDMADE), FIRST))

    def submit(session: Session) -> None:
        engine.submit(RoundRequest(session, limits=RoundLimits(max_tokens=1)))

    def refuses(message: str, misuse: Callable[..., object], *arguments: object) -> None:
        if misuse == engine.update_weights and isinstance(engine, EndpointEngine):
            return  # an endpoint's weights can never be replaced, and it says that
        with pytest.raises(EngineError) as caught:
            misuse(*arguments)
        assert str(caught.value) == prefix + message

    gone, session = engine.open(messages), engine.open(messages)
    refuses(FULL, engine.fork, session, [1, 2])
    engine.open(messages)  # the fork that was refused took no room
    refuses(FULL, engine.open, messages)
    engine.close(gone)
    engine.close(gone)
    refuses(f"session {gone.id} {CLOSED}", submit, gone)
    refuses(f"session {gone.id} {CLOSED}", engine.fork, gone, [1])
    refuses(f"session 9 {UNKNOWN}", submit, STRANGE)
    refuses(f"session 9 {UNKNOWN}", engine.close, STRANGE)
    submit(session)
    refuses(f"session {session.id}: {SECOND}", submit, session)
    refuses(f"session {session.id}: {LATE}", engine.fork, session, [1])
    assert [result.session for result in engine.collect()] == [session]
    refuses(f"session {session.id}: {LATE}", engine.fork, session, [1])
    refuses(f"update_weights: got open sessions [1, 2], {WEIGHTS}", engine.update_weights, {}, 1)
    assert engine.policy_version == 0
    engine.shutdown()
    engine.shutdown()
    engine.close(session)
    assert engine.collect() == []
    refuses(OVER, engine.open, messages)
    refuses(OVER, engine.fork, session, [1])
    refuses(OVER, submit, session)
    refuses(OVER, engine.update_weights, {}, 1)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_says_that_it_is_one_and_takes_no_body_from_the_protocol(name: str) -> None:
    """The protocol's bodies do nothing: an engine that left one out would seem to obey it."""
    kind = ENGINES[name]
    assert Engine in kind.__mro__
    public = [member for member in vars(Engine) if not member.startswith("_")]
    assert "shutdown" in public
    assert [member for member in public if getattr(kind, member) is getattr(Engine, member)] == []
