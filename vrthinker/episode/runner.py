"""The loop that runs episodes on an engine and yields trajectories.

Episodes advance independently: as soon as an episode's round is read and its frames are decoded, its next
round is submitted, while others are still being written. Clips are opened and frames decoded in threads, so
that the engine does not wait for pixels while it has work. With `ahead_bytes`, clips of later items are
opened and their first frames decoded while all sessions are taken, up to so many bytes of frames.
`RunStatistics` says how long the engine had nothing to write because pixels were missing.

A failure of any kind ends only its own episode. It is returned as a trajectory without judgments, or as the
error that kept the item from starting. Unexpected errors are also logged with their traceback. Only an error
of the iterable of items, or a request to stop, ends the run.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from vrthinker.engine.base import Engine, Message, RoundRequest, RoundResult, Session
from vrthinker.episode.episode import Episode, EpisodeItem
from vrthinker.episode.probabilities import LABELS
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.tools.base import FramesShown
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.trajectory import StopReason, Trajectory, stop_reason_of
from vrthinker.errors import EngineError, InputError, UnexpectedError, VRThinkerError, as_reason

_logger = logging.getLogger(__name__)

_LEAST_DECODE_THREADS, _MOST_DECODE_THREADS = 2, 32
_LOOK_UP_SECONDS = 0.01
_CHANNELS = 3


def decode_threads() -> int:
    """The number of clips that are decoded side by side: the cores that this process may use, within bounds.

    Each clip is decoded by one thread.
    """
    return min(max(_LEAST_DECODE_THREADS, len(os.sched_getaffinity(0))), _MOST_DECODE_THREADS)


@dataclass
class RunStatistics:
    """How the time of runs was spent. Time that the caller takes between two results counts nowhere.

    Attributes:
        writing_seconds: The time in which the engine had a round to write.
        pixel_wait_seconds: The time in which it had none, because every episode waited for a clip to be
            opened or for frames to be decoded.
    """

    writing_seconds: float = 0.0
    pixel_wait_seconds: float = 0.0

    @property
    def pixel_wait_share(self) -> float | None:
        """The share of the time in which the engine waited for pixels; None before anything was run."""
        total = self.writing_seconds + self.pixel_wait_seconds
        return self.pixel_wait_seconds / total if total > 0 else None


@dataclass(frozen=True)
class Finished:
    """The result of one episode: a trajectory, or the error that kept it from starting.

    `item` is the item of the single episode. In a group, it has the member's seed.
    """

    item: EpisodeItem
    trajectory: Trajectory | None
    error: VRThinkerError | None = None


class EpisodeRunner:
    """Runs episodes on an engine.

    Args:
        engine: The engine that writes the rounds.
        settings: The limits, the window and the sampling.
        templates: The prompts; the package's by default.
        tools: The tool registry; `select_frames` by default.
        concurrency: The most episodes in progress at once; the engine's `max_sessions` by default.
        decode_ahead: Whether frames are decoded before the engine is shown them. If False, for an engine that
            reads no pixels, nothing is decoded, and a damaged frame is not noticed.
        probabilities: Whether outcomes have the probabilities of the final answer's labels.

    Attributes:
        statistics: How the time of all runs so far was spent.
    """

    def __init__(
        self,
        engine: Engine,
        settings: EpisodeSettings | None = None,
        *,
        templates: PromptTemplates | None = None,
        tools: ToolRegistry | None = None,
        concurrency: int | None = None,
        decode_ahead: bool = True,
        probabilities: bool = False,
    ) -> None:
        self.engine = engine
        self.decode_ahead = decode_ahead
        self.watch = LABELS if probabilities else ()
        self.settings = settings or EpisodeSettings()
        self.templates = templates or PromptTemplates.load()
        self.tools = tools or ToolRegistry()
        self.concurrency = min(concurrency or engine.max_sessions, engine.max_sessions)
        self.statistics = RunStatistics()
        self._busy = False

    def run(self, items: Iterable[EpisodeItem | None], *, ahead_bytes: int = 0) -> Iterator[Finished]:
        """Yields items as they finish (not in order). Items are taken when there is room for them.

        Closing the generator early closes its sessions.

        Args:
            items: The items. None among them means that there is none at the moment: those under way go on,
                and the next one is asked for a moment later.
            ahead_bytes: The most bytes of decoded first frames of items that wait for a session. 0 takes an
                item only when there is a session for it. Give no more than a part of the frame cache's size,
                or the frames are gone when their session begins.
        """
        if self._busy:
            raise EngineError(
                "the judge is in the middle of another run; finish or close that one first, or use two"
            )
        self._busy = True
        loop = _Loop(self, iter(items), ahead_bytes)
        try:
            yield from loop.run()
        finally:
            self._busy = False
            loop.shut_down()

    def run_one(self, item: EpisodeItem) -> Trajectory:
        """Runs a single episode.

        Raises:
            InputError: The item cannot be judged (bad clip, caption, template).
            EngineError: The engine refused the session.
        """
        if item.n_episodes != 1:
            raise InputError(
                f"item {item.id!r}: got {item.n_episodes} episodes, wanted 1; `run` takes groups"
            )
        (finished,) = self.run([item])
        if finished.trajectory is None:
            assert finished.error is not None
            raise finished.error
        return finished.trajectory


_Opened = tuple[list[Episode], tuple[Message, ...]]
"""The episodes of an item, and their first input."""


class _Loop:
    """The state of one `run`: the episodes that are being opened, decoded or written."""

    def __init__(self, runner: EpisodeRunner, items: Iterator[EpisodeItem | None], ahead_bytes: int) -> None:
        self.runner, self.items, self.ahead_bytes = runner, items, ahead_bytes
        self.threads = decode_threads()
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="vrthinker-decode")
        self.opening: dict[Future[_Opened], EpisodeItem] = {}
        self.ready: deque[tuple[Future[_Opened], EpisodeItem, int]] = deque()  # opened; bytes of first frames
        self.ready_bytes = self.largest_bytes = 0
        self.waiting: EpisodeItem | None = None  # a group that there is no room for yet
        self.decoding: dict[Future[None], tuple[Session, Episode]] = {}
        self.writing: dict[int, tuple[Session, Episode]] = {}
        self.sessions: dict[int, Session] = {}
        self.exhausted = False
        self.is_live = False  # items may come, or be given up, while the engine is at work

    @property
    def active(self) -> int:
        return len(self.decoding) + len(self.writing)

    @property
    def under_way(self) -> int:
        opening = sum(item.n_episodes for item in self.opening.values())
        return opening + sum(item.n_episodes for _, item, _ in self.ready) + self.active

    def run(self) -> Iterator[Finished]:
        while True:
            yield from self._start_ready()
            yield from self._take_items()
            yield from self._drop_given_up()
            yield from self._advance_decodes(block=not self.writing)
            if self.writing:
                # While frames are decoded, the loop checks now and then whether an episode can join the
                # batch.
                timeout = _LOOK_UP_SECONDS if self.opening or self.decoding or self.is_live else None
                yield from self._collect(timeout)
            elif not self.under_way and self.exhausted and self.waiting is None:
                return

    def _collect(self, timeout: float | None) -> Iterator[Finished]:
        try:
            begun = time.monotonic()
            try:
                results = self.runner.engine.collect(timeout)
            finally:
                self.runner.statistics.writing_seconds += time.monotonic() - begun
            if not results and timeout is None:
                raise EngineError(f"{self.runner.engine.name}: lost {len(self.writing)} rounds")
        except BaseException as error:  # any error ends the episodes that wait for the engine
            reason = _reason_of(error, f"{len(self.writing)} rounds under way")
            for session, episode in list(self.writing.values()):
                del self.writing[session.id]
                yield self._failed(session, episode, reason)
            return
        for result in results:
            yield from self._read(result)

    def _take_items(self) -> Iterator[Finished]:
        most = self.runner.concurrency
        while self.waiting is not None or (not self.exhausted and self._may_take(1)):
            item = self.waiting
            if item is None:
                try:
                    item = next(self.items)
                except StopIteration:
                    self.exhausted = True
                    return
                if item is None:
                    self.is_live = True
                    return
                self.is_live = self.is_live or item.given_up is not None
            if not 1 <= item.n_episodes <= most:
                error = InputError(
                    f"item {item.id!r}: group_seeds: got {item.n_episodes}, allowed: 1 to {most}, the "
                    "episodes that run at once"
                )
                self.waiting = None
                yield from (Finished(member, None, error) for member in item.members() or [item])
                continue
            if not self._may_take(item.n_episodes):
                self.waiting = item
                return
            self.waiting = None
            self.opening[self.pool.submit(self._open, item)] = item

    def _drop_given_up(self) -> Iterator[Finished]:
        for session, episode in [*self.writing.values()] if self.is_live else ():
            reason = _given_up(episode.item)
            if reason is not None:
                del self.writing[session.id]
                yield self._failed(session, episode, EngineError(reason))

    def _may_take(self, n_episodes: int) -> bool:
        """Whether there will be sessions for an item once it is opened, or it may be opened ahead of them.

        What an item's frames take is known when it is open. Until then it counts as the largest one so far.
        """
        if self.under_way + n_episodes <= self.runner.concurrency:
            return True
        if len(self.opening) >= self.threads:
            return False
        # Small clips would otherwise be taken by the thousand, from other processes that share the work.
        if len(self.opening) + len(self.ready) >= max(self.threads, self.runner.concurrency):
            return False
        coming_bytes = (len(self.opening) + 1) * self.largest_bytes
        return 0 < self.ready_bytes + coming_bytes <= self.ahead_bytes

    def _start_ready(self) -> Iterator[Finished]:
        """Starts items that were opened ahead, as far as there are sessions for them."""
        while self.ready and self.active + self.ready[0][1].n_episodes <= self.runner.concurrency:
            opened, item, n_bytes = self.ready.popleft()
            self.ready_bytes -= n_bytes
            yield from self._start(opened, item)

    def _open(self, item: EpisodeItem) -> _Opened:
        runner = self.runner
        workspace = item.open_workspace()
        episodes = [
            Episode(
                member,
                workspace,
                runner.settings,
                runner.templates,
                runner.tools,
                runner.engine.name,
                runner.engine.policy_version,
                runner.watch,
            )
            for member in item.members()
        ]
        first_input = episodes[0].first_input(decode=runner.decode_ahead)
        for episode in episodes[1:]:
            episode.first_input(decode=False)
        return episodes, first_input

    def _advance_decodes(self, *, block: bool) -> Iterator[Finished]:
        """Submits episodes whose frames are decoded. With `block`, waits until there is one."""
        waiting: list[Future[Any]] = [*self.opening, *self.decoding]
        longest = _LOOK_UP_SECONDS if self.is_live else None
        begun = time.monotonic()
        done, _ = wait(waiting, timeout=longest if block else 0, return_when=FIRST_COMPLETED)
        if block and not waiting and self.is_live and not self.exhausted:
            time.sleep(_LOOK_UP_SECONDS)  # there is nothing at the moment; the next item is asked for later
        if block and waiting:
            self.runner.statistics.pixel_wait_seconds += time.monotonic() - begun
        for opened in [future for future in self.opening if future in done]:
            item, n_bytes = self.opening.pop(opened), _first_bytes(opened)
            self.largest_bytes = max(self.largest_bytes, n_bytes)
            self.ready_bytes += n_bytes
            self.ready.append((opened, item, n_bytes))
        yield from self._start_ready()
        for decoded in [future for future in self.decoding if future in done]:
            session, episode = self.decoding.pop(decoded)
            error = decoded.exception()
            if error is None:
                yield from self._next_round(session, episode)
            else:
                yield self._failed(
                    session, episode, _reason_of(error, f"item {episode.item.id!r}"), decoding=True
                )

    def _start(self, opened: Future[_Opened], item: EpisodeItem) -> Iterator[Finished]:
        engine, members = self.runner.engine, item.members()
        sessions: list[Session] = []
        try:
            episodes, first_input = opened.result()
            if (reason_to_stop := _given_up(item)) is not None:
                raise EngineError(reason_to_stop)
            memory = self.runner.settings.memory
            sessions.append(engine.open(first_input, seed=members[0].seed, memory=memory))
            if len(members) > 1:
                # The first input is computed once, here. The other members get copies.
                sessions += engine.fork(sessions[0], [member.seed for member in members[1:]])
        except BaseException as error:
            reason = _reason_of(error, f"item {item.id!r}")
            for session in sessions:
                self._close(session)
            yield from (Finished(member, None, reason) for member in members)
            return
        self.sessions.update({session.id: session for session in sessions})
        for session, episode in zip(sessions, episodes, strict=True):
            yield from self._submit(session, episode)

    def _read(self, result: RoundResult) -> Iterator[Finished]:
        session, episode = self.writing.pop(result.session.id, (None, None))
        if session is None or episode is None:
            _logger.error("%s: a result of a session that writes no round", self.runner.engine.name)
            return
        try:
            shown = episode.receive(result)
        except BaseException as error:
            yield self._failed(session, episode, _reason_of(error, f"item {episode.item.id!r}"))
            return
        if episode.outcome is not None:
            yield self._finish(session, episode)
        elif shown and self.runner.decode_ahead:
            self.decoding[self.pool.submit(_decode, episode, shown)] = (session, episode)
        else:
            yield from self._next_round(session, episode)

    def _next_round(self, session: Session, episode: Episode) -> Iterator[Finished]:
        try:
            episode.show_outcome()
        except BaseException as error:
            yield self._failed(session, episode, _reason_of(error, f"item {episode.item.id!r}"))
        else:
            yield from self._submit(session, episode)

    def _submit(self, session: Session, episode: Episode) -> Iterator[Finished]:
        try:
            entry, new, limits = episode.enter_round()
            self.runner.engine.submit(RoundRequest(session, new, entry.expired, limits))
        except BaseException as error:
            yield self._failed(session, episode, _reason_of(error, f"item {episode.item.id!r}"))
        else:
            self.writing[session.id] = (session, episode)

    def _failed(
        self, session: Session, episode: Episode, error: VRThinkerError, *, decoding: bool = False
    ) -> Finished:
        """Ends an episode without a verdict. With `decoding`, the video is to blame."""
        stop = stop_reason_of(error)
        if decoding and stop not in (StopReason.MACHINE_ERROR, StopReason.INTERNAL_ERROR):
            stop = StopReason.VIDEO_ERROR
        episode.fail(stop, str(error))
        return self._finish(session, episode)

    def _finish(self, session: Session, episode: Episode) -> Finished:
        self._close(self.sessions.pop(session.id))
        try:
            return Finished(episode.item, episode.trajectory())
        except BaseException as error:
            return Finished(episode.item, None, _reason_of(error, f"item {episode.item.id!r}"))

    def _close(self, session: Session) -> None:
        try:
            self.runner.engine.close(session)
        except BaseException as error:
            _reason_of(error, f"closing session {session.id}")

    def shut_down(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        for session in self.sessions.values():
            self._close(session)


def _given_up(item: EpisodeItem) -> str | None:
    return None if item.given_up is None else item.given_up()


def _first_bytes(opened: Future[_Opened]) -> int:
    """The bytes of the frames of an item's first input; 0 if it could not be opened."""
    if opened.exception() is not None:
        return 0
    frames = [frame for message in opened.result()[1] for frame in message.frames]
    return sum(frame.size[0] * frame.size[1] * _CHANNELS for frame in frames)


def _decode(episode: Episode, shown: list[FramesShown]) -> None:
    for outcome in shown:
        episode.workspace.prefetch(outcome.frame_numbers, outcome.view)


def _reason_of(error: BaseException, during: str) -> VRThinkerError:
    """The error as one line. An unexpected error is logged with its traceback."""
    reason = as_reason(error)
    if isinstance(reason, UnexpectedError):
        _logger.error("%s: %s", during, reason, exc_info=error)
    return reason
