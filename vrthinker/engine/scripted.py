"""An engine that writes given texts, for tests of the runner, the memory and the tools.

It is strict where real engines may be lenient. Invariant: a session's context is exactly a `LiveContext`. A
request that breaks the protocol (expiring a frame that is not live, showing the same showing twice, two
rounds under way, a session that is closed or was never opened) raises `EngineError` at once and changes
nothing, so that a faulty runner cannot pass a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vrthinker.engine.base import (
    Choice,
    Engine,
    FinishReason,
    Form,
    Message,
    RoundRequest,
    RoundResult,
    Session,
)
from vrthinker.engine.context import LiveContext, Turn
from vrthinker.engine.sessions import SessionTable
from vrthinker.errors import EngineError
from vrthinker.visibility import MemoryMode, ShownFrame

Script = Callable[[int, int, Sequence[Message]], str] | Sequence[Sequence[str]]
"""A function of (session index, round number, live messages), or one sequence of round texts per session."""


@dataclass(frozen=True)
class SeenRound:
    """The context that one round was written from, kept for assertions.

    Attributes:
        session: The session that the round belongs to.
        round_number: The round's number in its session, from 1.
        request: The request, as it was submitted.
        context: The live context, without expired frames. A message stays in it even if all its frames
            expired.
        seed: The session's seed.
    """

    session: Session
    round_number: int
    request: RoundRequest
    context: LiveContext
    seed: int

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The messages and the session's own texts, in order."""
        return self.context.turns

    @property
    def live(self) -> tuple[ShownFrame, ...]:
        """The showings that the round could see, in order."""
        return self.context.live


@dataclass
class _State:
    seed: int
    context: LiveContext


class ScriptedEngine(Engine):
    """Implements `vrthinker.engine.base.Engine` with given texts.

    Sessions are counted in the order in which they were opened or forked (a fork's sessions follow each
    other; the session that was forked keeps its own index). Texts longer than `RoundLimits.max_tokens`
    are not cut: the script has no tokens, and `token_ids` is None.

    Attributes:
        seen: Every round so far, in the order in which it was submitted.
    """

    def __init__(
        self,
        script: Script,
        *,
        max_sessions: int = 64,
        collect_at_most: int | None = None,
        name: str = "scripted",
    ) -> None:
        """Makes the engine.

        Args:
            script: The texts to write. In a guided round the text must fit the form.
            max_sessions: The number of sessions that may be open at once.
            collect_at_most: The most rounds that one `collect` returns, the latest submitted first, so that
                a runner meets rounds that finish out of order. None returns all, in order.
            name: The engine's name in records and error messages.
        """
        self._script = script
        self._name = name
        self._collect_at_most = collect_at_most
        self._sessions: SessionTable[_State] = SessionTable(max_sessions, name=name)
        self._finished: list[RoundResult] = []
        self._policy_version = 0
        self.seen: list[SeenRound] = []

    @property
    def name(self) -> str:
        """The engine's name in records and error messages."""
        return self._name

    @property
    def policy_version(self) -> int:
        """The version that the last `update_weights` gave; 0 before."""
        return self._policy_version

    @property
    def max_sessions(self) -> int:
        """The number of sessions that may be open at once."""
        return self._sessions.max_sessions

    @property
    def open_sessions(self) -> int:
        """The number of open sessions: 0 after a runner has cleaned up."""
        return len(self._sessions)

    def open(self, messages: Sequence[Message], *, seed: int = 0, memory: MemoryMode = "rerender") -> Session:
        """Starts a session. `memory` has no effect: the same showings are live under every mode.

        Raises:
            EngineError: `max_sessions` are open, the engine is shut down, or a showing appears twice.
        """
        return self._sessions.add(_State(seed, LiveContext().extended(messages)))

    def fork(self, session: Session, seeds: Sequence[int]) -> list[Session]:
        """Copies a session that has written nothing yet, once per seed.

        Raises:
            EngineError: The session is not open or has begun, or there is no room.
        """
        state = self._sessions.check_fork(session, len(seeds))
        return [self.open(state.context.messages, seed=seed) for seed in seeds]

    def submit(self, request: RoundRequest) -> None:
        """Writes a round from the script, which `collect` then returns.

        Raises:
            EngineError: The request breaks the protocol, or the script has no text for it.
        """
        state = self._sessions.check_submit(request.session)
        context = state.context.entered(request)
        number = self._sessions.rounds(request.session) + 1
        text = self._text(request.session.id, number, context.messages)
        if request.limits.form is not None and not fits_form(text, request.limits.form):
            raise EngineError(f"{self._name}: round {number}'s text does not fit the form: {text!r}")
        self.seen.append(SeenRound(request.session, number, request, context, state.seed))
        self._sessions.begin_round(request.session)
        state.context = context.written(text)
        self._finished.append(RoundResult(request.session, text, FinishReason.STOP))

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        """Returns finished rounds; an empty list when nothing is under way."""
        if self._collect_at_most is None:
            results, self._finished = self._finished, []
        else:
            cut = max(0, len(self._finished) - self._collect_at_most)
            results, self._finished = self._finished[cut:][::-1], self._finished[:cut]
        for result in results:
            self._sessions.end_round(result.session)
        return results

    def close(self, session: Session) -> None:
        """Forgets a session and its uncollected round. Closing twice is harmless.

        Raises:
            EngineError: The session was never opened here.
        """
        self._sessions.close(session)
        self._finished = [result for result in self._finished if result.session != session]

    def shutdown(self) -> None:
        """Closes every session."""
        self._sessions.shut_down()
        self._finished.clear()

    def update_weights(
        self, named_tensors: Iterable[tuple[str, Any]] | Mapping[str, Any], policy_version: int
    ) -> None:
        """Takes the version and reads all tensors, which a script has no use for.

        Raises:
            EngineError: A session is open, or the engine is shut down.
        """
        self._sessions.check_update_weights()
        for _ in named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors:
            pass
        self._policy_version = policy_version

    def _text(self, index: int, number: int, context: tuple[Message, ...]) -> str:
        if callable(self._script):
            return self._script(index, number, context)
        if index >= len(self._script) or number > len(self._script[index]):
            raise EngineError(f"{self._name}: the script has no text for session {index}, round {number}")
        return self._script[index][number - 1]


def fits_form(text: str, form: Form) -> bool:
    """Whether a guided round could have written `text`. Free parts match any text, even an empty one."""
    return len(text) in _ends(text, {0}, form)


def _ends(text: str, starts: set[int], form: Form) -> set[int]:
    """The indices of `text` at which the form can end if it begins at one of `starts`."""
    for part in form:
        if isinstance(part, Choice):
            ends: set[int] = set()
            for option, after in zip(part.options, part.then or ((),) * len(part.options), strict=True):
                picked = {start + len(option) for start in starts if text.startswith(option, start)}
                ends |= _ends(text, picked, after)
            starts = ends
        elif starts:
            starts = set(range(min(starts), len(text) + 1))
    return starts
