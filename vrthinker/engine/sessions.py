"""The bookkeeping of sessions that every engine shares: which sessions are open, and what each may do next.

A request that breaks the protocol of `vrthinker.engine.base` is refused with an `EngineError`, in the same
words for every engine, and changes nothing. Invariants: ids count up from 0 and are never used twice, so a
late result of a closed session cannot pass for one of an open session; a round is under way from
`begin_round` until `end_round`, when `collect` hands out its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from vrthinker.engine.base import Session
from vrthinker.errors import EngineError

State = TypeVar("State")
"""What an engine stores for one open session."""


@dataclass
class _Entry(Generic[State]):
    state: State
    rounds: int = 0
    under_way: bool = False


class SessionTable(Generic[State]):
    """The sessions of one engine.

    `table[session]` is what the engine stores for an open session, and `len(table)` is the number of open
    sessions. A session that is closed or was never opened is refused wherever an open one is needed, and so
    is everything but `end_round`, `close` and `shut_down` once the engine is shut down.

    Args:
        max_sessions: The number of sessions that may be open at once.
        name: The engine's name, put in front of every error message; empty for messages without one.
    """

    def __init__(self, max_sessions: int, *, name: str = "") -> None:
        self.max_sessions = max_sessions
        self._prefix = f"{name}: " if name else ""
        self._entries: dict[int, _Entry[State]] = {}
        self._next_id = 0
        self._is_shut_down = False

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, session: Session) -> State:
        return self._entry(session).state

    @property
    def open_sessions(self) -> list[Session]:
        """The open sessions, in the order in which they were opened."""
        return [Session(number) for number in self._entries]

    @property
    def rounds_under_way(self) -> int:
        """The number of open sessions that have a round under way."""
        return sum(entry.under_way for entry in self._entries.values())

    def rounds(self, session: Session) -> int:
        """The number of rounds that a session has begun."""
        return self._entry(session).rounds

    def add(self, state: State) -> Session:
        """Opens a session that the engine stores this state for.

        Raises:
            EngineError: `max_sessions` are open, or the engine is shut down.
        """
        self._check_running()
        self._check_room(1)
        session = Session(self._next_id)
        self._next_id += 1
        self._entries[session.id] = _Entry(state)
        return session

    def check_fork(self, session: Session, copies: int) -> State:
        """Returns the state of a session that is to be copied `copies` times.

        Raises:
            EngineError: The session is not open or has begun a round, or there is no room for the copies.
        """
        entry = self._entry(session)
        if entry.rounds:
            raise self._refusal(
                f"session {session.id}: got a fork after the first round was submitted, allowed: before it; "
                "open a new session"
            )
        self._check_room(copies)
        return entry.state

    def check_submit(self, session: Session) -> State:
        """Returns the state of a session that a round is submitted to.

        The engine then checks what else it asks of a request, and calls `begin_round` once it accepts it.

        Raises:
            EngineError: The session is not open, or it has a round under way.
        """
        entry = self._entry(session)
        if entry.under_way:
            raise self._refusal(
                f"session {session.id}: got a second round while one is under way, allowed: one at a time; "
                "collect that one first"
            )
        return entry.state

    def begin_round(self, session: Session) -> None:
        """Notes that the next round of a session is under way."""
        self.check_submit(session)
        entry = self._entries[session.id]
        entry.rounds += 1
        entry.under_way = True

    def end_round(self, session: Session) -> State | None:
        """Notes that `collect` hands out a round; returns the state, or None if the session was closed."""
        entry = self._entries.get(session.id)
        if entry is None:
            return None
        entry.under_way = False
        return entry.state

    def close(self, session: Session) -> State | None:
        """Closes a session; returns the state to be freed, or None if the session was closed before.

        Raises:
            EngineError: The session was never opened here.
        """
        entry = self._entries.pop(session.id, None)
        if entry is not None:
            return entry.state
        if not self._was_opened(session):
            raise self._not_open(session)
        return None

    def check_update_weights(self) -> None:
        """Checks that weights may be replaced now.

        Raises:
            EngineError: Sessions are open, or the engine is shut down.
        """
        self._check_running()
        if self._entries:
            raise self._refusal(
                f"update_weights: got open sessions {sorted(self._entries)}, allowed: none; close them first"
            )

    def shut_down(self) -> None:
        """Closes every session and ends the use of the engine. Shutting down twice is harmless."""
        self._entries.clear()
        self._is_shut_down = True

    def _entry(self, session: Session) -> _Entry[State]:
        self._check_running()
        if session.id not in self._entries:
            raise self._not_open(session)
        return self._entries[session.id]

    def _check_running(self) -> None:
        if self._is_shut_down:
            raise self._refusal("the engine is shut down, allowed now: collect, close; make a new engine")

    def _check_room(self, more: int) -> None:
        wanted = len(self._entries) + more
        if wanted > self.max_sessions:
            raise self._refusal(
                f"max_sessions: got {wanted} sessions open at once, allowed: at most {self.max_sessions}; "
                "close some first"
            )

    def _was_opened(self, session: Session) -> bool:
        return 0 <= session.id < self._next_id

    def _not_open(self, session: Session) -> EngineError:
        what = "is closed" if self._was_opened(session) else "was never opened"
        return self._refusal(f"session {session.id} {what}, allowed: sessions that are open; open one")

    def _refusal(self, message: str) -> EngineError:
        return EngineError(self._prefix + message)
