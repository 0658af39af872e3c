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
- At most `queue_size` calls wait. Whoever offers one more waits for room; a callback in one of the threads
  here, which would wait for itself, is refused.
- Futures end outside every lock, because that runs their callbacks, which may offer calls.
- The worker holds the runner only while calls are under way, and threads end when nothing is left to do, so
  that a judge that nobody needs any more can be freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
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
from vrthinker.errors import EngineError, InputError, VRThinkerError, as_reason

_logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0
"""How long `close` waits for other threads. An engine that hangs longer is left to its thread."""
_IDLE_SECONDS = 1.0
_LOOK_UP_SECONDS = 0.05
_LONGEST_WAIT_SECONDS = 3600.0
"""The longest that a thread waits at once: what waits refuses times that are too long, such as infinity."""
CLOSED = "the judge is closed; make another one, or close it later"
CLOSED_MEANWHILE = "the judge was closed before there was a verdict"

Result = TypeVar("Result")


class Turn:
    """Who may use a judge's runner: one run at a time.

    A thread that wants the turn while another thread has it waits. A thread that wants it in the middle of a
    run of its own could only wait for itself, and is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Not the thread's number: a thread that has ended leaves its number to a new one.
        self._owner: threading.Thread | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this thread has the turn."""
        return self._owner is threading.current_thread()

    def check(self) -> None:
        """Refuses a thread that has the turn.

        Raises:
            EngineError: This thread is in the middle of a run.
        """
        if self.is_mine:
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
            self._owner = threading.current_thread()
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
    time_limit_seconds: float | None = None
    future: Future[Result] = field(default_factory=Future)
    given_up: str | None = None
    deadline: float | None = None
    trajectories: dict[int, Trajectory] = field(default_factory=dict)
    left: int = 0
    _begun: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        limit = self.time_limit_seconds
        if limit is not None and not limit > 0:
            raise InputError(f"time_limit_seconds: got {limit:g}, allowed: above 0, or None for no limit")
        self.deadline = None if limit is None else time.monotonic() + limit
        self.items = tuple(replace(item, given_up=lambda: self.given_up) for item in self.items)
        self.left = len(self.items)

    @property
    def seconds_left(self) -> float | None:
        """The time until the deadline, which may be over; None if there is none."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def begin(self) -> bool:
        """Whether the call is still wanted. From here on its caller cannot cancel the future."""
        with self._lock:
            if self.given_up is not None or self._begun:
                return False
            self._begun = True
            return self.future.set_running_or_notify_cancel()

    def tell_cancelled(self) -> None:
        """Tells whoever waits for the future if its caller cancelled it; `begin` does that too."""
        with self._lock:
            if self.future.cancelled() and not self._begun:
                self._begun = True
                self.future.set_running_or_notify_cancel()

    def give_up(self, reason: str) -> None:
        """Ends the future with a reason, unless it has ended."""
        with self._lock:
            if self.given_up is not None or self.future.done():
                return
            self.given_up = reason
        self._end(EngineError(reason))

    def give_up_late(self) -> None:
        """Ends the future because the time is over."""
        self.give_up(f"no verdict within {self.time_limit_seconds:g} s: the call was given up")

    def take(self, finished: Finished) -> None:
        """Takes the end of one of the episodes. Only the thread that runs them calls this."""
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
            with self._lock:
                self.given_up = self.given_up or "another episode of the same call could not start"
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
        try:
            self.future.set_exception(error)
        except InvalidStateError:  # it ended just now, perhaps because its caller cancelled it
            self.tell_cancelled()


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
        self._deadlines: list[tuple[float, int, _Call[Result]]] = []
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
            InputError: The time limit cannot be used.
            EngineError: The judge is closed, or this thread is in the middle of a run of it, or the queue is
                full and this is a callback in one of the judge's own threads, which makes the room.
        """
        call = _Call(tuple(items), read, time_limit_seconds)
        if threading.current_thread() is not self._worker:  # there, this is a callback of a call that ended
            self._turn.check()
        self._offer(call, block=True)
        return call.future

    def run(
        self,
        items: Sequence[EpisodeItem],
        read: Callable[[Sequence[Trajectory]], Result],
        *,
        time_limit_seconds: float | None = None,
    ) -> Result:
        """Does what `submit` does, and waits. A caller that is interrupted gives the call up."""
        call = _Call(tuple(items), read, time_limit_seconds)
        self._turn.check()
        self._offer(call, block=True)
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
        call = _Call(tuple(items), read, time_limit_seconds)
        self._turn.check()
        try:
            while not self._offer(call, block=False):
                left = call.seconds_left
                await asyncio.sleep(_LOOK_UP_SECONDS if left is None else min(left, _LOOK_UP_SECONDS))
            return await asyncio.wrap_future(call.future)
        finally:
            call.give_up("its caller was cancelled")

    def close(self, shut_down: Callable[[], None] = lambda: None) -> bool:
        """Ends every call with a reason, then calls `shut_down` when no other thread uses the runner.

        Returns:
            Whether that was so in time. If not, `shut_down` was not called.
        """
        deadline = time.monotonic() + _CLOSE_SECONDS
        with self._changed:
            self._closed = True
            waiting, under_way = list(self._waiting), list(self._under_way.values())
            self._waiting.clear()
            self._changed.notify_all()
            worker = self._worker
        for call in (*waiting, *under_way):
            call.give_up(CLOSED_MEANWHILE)
        for call in waiting:
            call.tell_cancelled()
            call.forget()
        if self._turn.is_mine:  # in the middle of a run of this thread, which has itself to blame
            shut_down()
            return True
        if worker is not None:
            worker.join(_CLOSE_SECONDS)
            if worker.is_alive():
                return False
        if not self._turn.take(max(0.0, deadline - time.monotonic())):
            return False
        try:
            shut_down()
        finally:
            self._turn.give_back()
        return True

    def _offer(self, call: _Call[Result], *, block: bool) -> bool:
        """Puts a call into the queue, or ends it late; False if there is no room and it shall not block."""
        with self._changed:
            while len(self._waiting) >= self._queue_size and not self._closed:
                left = call.seconds_left
                if left is not None and left <= 0:
                    call.give_up_late()
                    return True
                if not block:
                    return False
                if threading.current_thread() in (self._worker, self._watchdog):
                    raise EngineError(
                        f"got a call from a callback while {self._queue_size} calls wait, allowed: when "
                        "there is room, which a callback cannot wait for; submit it from another thread"
                    )
                self._changed.wait(_at_once(left))
            if self._closed:
                raise EngineError(CLOSED)
            if self._worker is None:
                worker = threading.Thread(target=self._work, name="vrthinker-judge", daemon=True)
                worker.start()
                self._worker = worker
            if call.deadline is not None:
                self._watch_out(call.deadline, call)
            self._waiting.append(call)
            self._changed.notify_all()
        return True

    def _watch_out(self, deadline: float, call: _Call[Result]) -> None:
        if len(self._deadlines) > 2 * (len(self._waiting) + len(self._under_way)) + 64:
            # Calls that have ended hold their results, and must not stay here until their time is over.
            self._deadlines = [entry for entry in self._deadlines if not entry[-1].future.done()]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline, next(self._numbers), call))
        if self._watchdog is None:
            watchdog = threading.Thread(target=self._watch, name="vrthinker-limits", daemon=True)
            watchdog.start()
            self._watchdog = watchdog

    def _watch(self) -> None:
        """Ends calls whose time is over, until there are none with a limit."""
        while True:
            with self._changed:
                while self._deadlines and self._deadlines[0][-1].future.done():
                    heapq.heappop(self._deadlines)
                if not self._deadlines:
                    self._watchdog = None
                    return
                deadline, _, call = self._deadlines[0]
                left = deadline - time.monotonic()
                if left > 0:
                    self._changed.wait(_at_once(left))
                    continue
                heapq.heappop(self._deadlines)
            try:
                call.give_up_late()
            except BaseException:  # a callback wants to stop, but other calls have their limits too
                _logger.exception("a callback of a call that was given up failed")

    def _work(self) -> None:
        """Runs calls until there are none for a while."""
        try:
            while self._wait_for_calls():
                if self._turn.take(_LOOK_UP_SECONDS):
                    try:
                        self._run_calls()
                    finally:
                        self._turn.give_back()
        except BaseException as error:  # whatever happens here, nobody must wait for ever
            _logger.exception("the thread that runs a judge's calls failed; the next call starts another one")
            with self._changed:
                self._worker = None
                waiting, under_way = list(self._waiting), list(self._under_way.values())
                self._waiting.clear()
                self._under_way.clear()
                self._changed.notify_all()
            for call in (*waiting, *under_way):
                call.give_up(
                    f"the thread that runs the judge's calls failed: {type(error).__name__}: {error}"
                )
                call.tell_cancelled()
                call.forget()

    def _wait_for_calls(self) -> bool:
        """Waits for calls for a while. Without any, the worker ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, _IDLE_SECONDS)
            if self._waiting and not self._closed:
                return True
            self._worker = None
            return False

    def _run_calls(self) -> None:
        """Runs calls until none are under way."""
        try:
            for finished in self._runner.run(self._items()):
                with self._changed:
                    call = self._under_way.pop(id(finished.item))
                call.take(finished)
        except BaseException as error:
            reason = str(as_reason(error))
            with self._changed:
                calls = list(self._under_way.values())
                self._under_way.clear()
            for call in calls:
                call.give_up(reason)
                call.forget()

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


def _at_once(seconds: float | None) -> float | None:
    return None if seconds is None else min(seconds, _LONGEST_WAIT_SECONDS)
