"""Calls of a judge from many threads, batched into one running loop.

An engine belongs to one thread. Here that is a worker thread. It takes calls from a bounded queue into one
run of the judge's `EpisodeRunner`, so that calls which come while others are under way join their batch. A
caller gets a future.

Invariants:

- Every future ends: with its result, with the error that kept an episode from one, by its time limit, or by
  `close`. The time limit holds even while the engine does not come back from a call, because another thread
  watches it.
- The episodes of a call that has ended are dropped as soon as the engine comes back. Other calls go on.
- A future gets the result of its own call: episodes are matched by the identity of their items.
- At most `queue_size` calls wait. Whoever offers one more waits for room.
- The worker holds the runner only while calls are under way, and threads end when nothing is left to do, so
  that a judge that nobody needs any more can be freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.runner import EpisodeRunner, Finished
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import EngineError, VRThinkerError, as_reason

_CLOSE_SECONDS = 10.0
"""How long `close` waits for the worker. An engine that hangs longer is left to its thread."""
_IDLE_SECONDS = 1.0
_LOOK_UP_SECONDS = 0.05
_CLOSED = "the judge is closed; make another one, or close it later"

Result = TypeVar("Result")


class Turn:
    """Who may use a judge's runner: one run at a time.

    A thread that wants the turn while another thread has it waits. A thread that wants it in the middle of a
    run of its own could only wait for itself, and is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def check(self) -> None:
        """Refuses a thread that has the turn.

        Raises:
            EngineError: This thread is in the middle of a run.
        """
        if self._owner == threading.get_ident():
            raise EngineError(
                "the judge is in the middle of another run; finish or close that one first, or use two"
            )

    def take(self, timeout_seconds: float = -1) -> bool:
        """Takes the turn, after waiting for it (-1: as long as it takes; 0: not at all).

        Raises:
            EngineError: This thread is in the middle of a run.
        """
        self.check()
        taken = self._lock.acquire(timeout=timeout_seconds)
        if taken:
            self._owner = threading.get_ident()
        return taken

    def give_back(self) -> None:
        """Gives the turn back. Any thread may do that, because any thread may close a generator."""
        self._owner = None
        self._lock.release()


@dataclass(eq=False)
class _Call(Generic[Result]):
    """One call: its episodes, and the future of what they say together."""

    items: tuple[EpisodeItem, ...]
    read: Callable[[Sequence[Trajectory]], Result]
    future: Future[Result] = field(default_factory=Future)
    given_up: str | None = None
    trajectories: dict[int, Trajectory] = field(default_factory=dict)
    left: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.items = tuple(replace(item, given_up=lambda: self.given_up) for item in self.items)
        self.left = len(self.items)

    def begin(self) -> bool:
        """Whether the call is still wanted. From here on its caller cannot cancel the future."""
        with self._lock:
            return not self.future.done() and self.future.set_running_or_notify_cancel()

    def give_up(self, reason: str) -> None:
        """Ends the future with a reason, unless it has ended."""
        with self._lock:
            if not self.future.done():
                self.given_up = reason
                self._end(EngineError(reason))

    def take(self, finished: Finished) -> None:
        """Takes the end of one of the episodes."""
        with self._lock:
            self.left -= 1
            if not self.future.done():
                self._take(finished)
            if not self.left:
                self.forget()

    def forget(self) -> None:
        """Lets go of the items, which know this call: their clips would stay until the collector runs."""
        self.items = ()
        self.trajectories.clear()

    def _take(self, finished: Finished) -> None:
        if finished.trajectory is None:
            self.given_up = "another episode of the same call could not start"
            self._end(finished.error or EngineError("an episode ended without a result"))
            return
        self.trajectories[id(finished.item)] = finished.trajectory
        if self.left:
            return
        try:
            result = self.read([self.trajectories[id(item)] for item in self.items])
        except Exception as error:
            self._end(as_reason(error))
            return
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(result)

    def _end(self, error: VRThinkerError) -> None:
        with contextlib.suppress(InvalidStateError):  # its caller cancelled it just now
            self.future.set_exception(error)


class JudgeThreads(Generic[Result]):
    """Runs calls of a judge in a thread of its own.

    Args:
        runner: The judge's runner.
        turn: The judge's turn, which the worker takes while it runs calls.
        queue_size: The most calls that wait.
    """

    def __init__(self, runner: EpisodeRunner, turn: Turn, *, queue_size: int = 256) -> None:
        self._runner, self._turn, self._queue_size = runner, turn, queue_size
        self._changed = threading.Condition()
        self._waiting: deque[_Call[Result]] = deque()
        self._under_way: dict[int, _Call[Result]] = {}
        self._deadlines: list[tuple[float, int, float, _Call[Result]]] = []
        self._numbers = itertools.count()
        self._closed = False
        self._worker: threading.Thread | None = None
        self._watchdog: threading.Thread | None = None

    def submit(
        self,
        items: Sequence[EpisodeItem],
        read: Callable[[Sequence[Trajectory]], Result],
        *,
        time_limit_seconds: float | None = None,
    ) -> Future[Result]:
        """Queues a call and returns its future. While the queue is full, this waits.

        Args:
            items: The items of the call, one episode each.
            read: A function that makes the result of the call's trajectories.
            time_limit_seconds: The longest time until the future ends, counted from now.

        Raises:
            EngineError: The judge is closed, or this thread is in the middle of a run of it.
        """
        call = _Call(tuple(items), read)
        self._offer(call, time_limit_seconds, block=True)
        return call.future

    def run(
        self,
        items: Sequence[EpisodeItem],
        read: Callable[[Sequence[Trajectory]], Result],
        *,
        time_limit_seconds: float | None = None,
    ) -> Result:
        """Does what `submit` does, and waits. A caller that is interrupted gives the call up."""
        call = _Call(tuple(items), read)
        self._offer(call, time_limit_seconds, block=True)
        try:
            return call.future.result()
        finally:
            call.give_up("its caller was interrupted")

    async def arun(
        self,
        items: Sequence[EpisodeItem],
        read: Callable[[Sequence[Trajectory]], Result],
        *,
        time_limit_seconds: float | None = None,
    ) -> Result:
        """Does what `run` does without blocking the event loop. A cancelled task gives the call up."""
        call = _Call(tuple(items), read)
        started = time.monotonic()
        try:
            while not self._offer(call, time_limit_seconds, block=False):
                await asyncio.sleep(_LOOK_UP_SECONDS)
                if time_limit_seconds is not None and time.monotonic() - started > time_limit_seconds:
                    call.give_up(_late(time_limit_seconds))
                    break
            return await asyncio.wrap_future(call.future)
        finally:
            call.give_up("its caller was cancelled")

    def close(self) -> bool:
        """Ends every call with a reason. Returns whether the worker has come to its end too."""
        with self._changed:
            self._closed = True
            waiting, under_way = list(self._waiting), list(self._under_way.values())
            self._waiting.clear()
            self._changed.notify_all()
            worker = self._worker
        for call in (*waiting, *under_way):
            call.give_up("the judge was closed before there was a verdict")
        for call in waiting:
            call.forget()
        if worker is None or worker is threading.current_thread():
            return True
        worker.join(_CLOSE_SECONDS)
        return not worker.is_alive()

    def _offer(self, call: _Call[Result], limit: float | None, *, block: bool) -> bool:
        """Puts a call into the queue; False if there is no room and it shall not block."""
        self._turn.check()
        if limit is not None and not limit > 0:
            raise EngineError(f"time_limit_seconds: got {limit:g}, allowed: above 0, or None")
        deadline = None if limit is None else time.monotonic() + limit
        with self._changed:
            while len(self._waiting) >= self._queue_size and not self._closed:
                if not block:
                    return False
                left = None if deadline is None else deadline - time.monotonic()
                if limit is not None and left is not None and left <= 0:
                    call.give_up(_late(limit))
                    return True
                self._changed.wait(left)
            if self._closed:
                raise EngineError(_CLOSED)
            self._waiting.append(call)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="vrthinker-judge", daemon=True)
                self._worker.start()
            if deadline is not None and limit is not None:
                self._watch_out(deadline, limit, call)
            self._changed.notify_all()
        return True

    def _watch_out(self, deadline: float, limit: float, call: _Call[Result]) -> None:
        if len(self._deadlines) > 2 * (len(self._waiting) + len(self._under_way)) + 64:
            # Calls that have ended hold their results, and must not stay here until their time is over.
            self._deadlines = [entry for entry in self._deadlines if not entry[-1].future.done()]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline, next(self._numbers), limit, call))
        if self._watchdog is None:
            self._watchdog = threading.Thread(target=self._watch, name="vrthinker-limits", daemon=True)
            self._watchdog.start()

    def _watch(self) -> None:
        """Ends calls whose time is over, until there are none with a limit."""
        while True:
            with self._changed:
                while self._deadlines and self._deadlines[0][-1].future.done():
                    heapq.heappop(self._deadlines)
                if not self._deadlines:
                    self._watchdog = None
                    return
                deadline, _, limit, call = self._deadlines[0]
                left = deadline - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
            call.give_up(_late(limit))  # outside the lock: this runs the future's callbacks

    def _work(self) -> None:
        """Runs calls until there are none for a while."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed, _IDLE_SECONDS)
                if self._closed or not self._waiting:
                    self._worker = None
                    return
            if not self._turn.take(_LOOK_UP_SECONDS):
                continue
            try:
                for finished in self._runner.run(self._items()):
                    with self._changed:
                        call = self._under_way.pop(id(finished.item))
                    call.take(finished)
            except BaseException as error:  # whatever happens here, nobody must wait for ever
                reason = str(as_reason(error))
                with self._changed:
                    calls = list(self._under_way.values())
                    self._under_way.clear()
                for call in calls:
                    call.give_up(reason)
                    call.forget()
            finally:
                self._turn.give_back()

    def _items(self) -> Iterator[EpisodeItem | None]:
        """The items of waiting calls; None while there are none but others are under way."""
        while True:
            with self._changed:
                call = self._waiting.popleft() if self._waiting else None
                self._changed.notify_all()  # there is room
                if call is not None and call.begin():
                    self._under_way.update({id(item): call for item in call.items})
                elif call is not None:
                    call.forget()
                    continue
                elif not self._under_way or self._closed:
                    return
            if call is None:
                yield None
            else:
                yield from call.items


def _late(limit: float) -> str:
    return f"no verdict within {limit:g} s: the call was given up"
