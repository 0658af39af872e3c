"""Clips of later items are opened while the engine writes, within a budget of bytes; waits are counted."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from episode.conftest import MakeItem
from episode.test_grammar import ANSWER, HEAD

from vrthinker.engine.base import RoundResult
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode import runner as runner_module
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.runner import EpisodeRunner, decode_threads
from vrthinker.errors import VideoError
from vrthinker.video.workspace import Workspace

DONE = HEAD + ANSWER
PATIENCE_SECONDS = 60


class Opened:
    """Counts the workspaces that items opened, and lets a test wait for a number of them."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def items(self, make_item: MakeItem, n: int, *, broken: tuple[int, ...] = ()) -> list[EpisodeItem]:
        return [self._counting(make_item(str(index)), index in broken) for index in range(n)]

    def _counting(self, item: EpisodeItem, is_broken: bool) -> EpisodeItem:
        def open_workspace() -> Workspace:
            workspace = item.open_workspace()
            with self._changed:
                self.count += 1
                self._changed.notify_all()
            if is_broken:
                raise VideoError("a.mp4", "breaks")
            return workspace

        return replace(item, open_workspace=open_workspace)

    def wait_for(self, count: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.count >= count, PATIENCE_SECONDS)


def first_bytes(item: EpisodeItem) -> int:
    workspace = item.open_workspace()
    sizes = [workspace.frame(number).size for number in workspace.initial_frames(8)]
    return sum(height * width * 3 for height, width in sizes)


class Watching(ScriptedEngine):
    """Notes at each look how many items were opened and how many sessions were."""

    def __init__(self, opened: Opened, wait_for: int = 0) -> None:
        super().__init__(lambda *_: DONE, max_sessions=1)
        self.opened, self.wait_for = opened, wait_for
        self.sessions = 0
        self.ahead: list[int] = []

    def open(self, *arguments: object, **options: object) -> object:  # type: ignore[override]
        self.sessions += 1
        return super().open(*arguments, **options)  # type: ignore[arg-type]

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        # The loop may be asked to look up before it writes, so that it can take what was opened.
        if timeout_seconds is not None and self.opened.count < self.sessions + self.wait_for:
            self.opened.wait_for(min(self.sessions + 1, self.sessions + self.wait_for))
            self.ahead.append(self.opened.count - self.sessions)
            return []
        self.ahead.append(self.opened.count - self.sessions)
        return super().collect(timeout_seconds)


def test_the_next_clips_are_opened_while_the_engine_writes(make_item: MakeItem) -> None:
    opened = Opened()
    engine = Watching(opened, wait_for=1)
    items = opened.items(make_item, 6)
    budget = 2 * first_bytes(items[0]) + 1
    opened.count = 0
    finished = list(EpisodeRunner(engine).run(iter(items), ahead_bytes=budget))
    assert sorted(f.item.id for f in finished) == [str(index) for index in range(6)]
    assert all(f.trajectory is not None and f.trajectory.outcome.judgments is not None for f in finished)
    assert 1 <= max(engine.ahead) <= 2, "some are opened ahead, and no more than the budget holds"
    assert opened.count == 6


def test_small_clips_are_not_taken_by_the_thousand(make_item: MakeItem) -> None:
    opened = Opened()
    engine = Watching(opened, wait_for=1)
    items = opened.items(make_item, 12)
    opened.count = 0
    assert len(list(EpisodeRunner(engine).run(iter(items), ahead_bytes=1 << 40))) == 12
    assert 1 <= max(engine.ahead) <= max(decode_threads(), engine.max_sessions)


def test_without_a_budget_an_item_is_taken_when_there_is_a_session(make_item: MakeItem) -> None:
    opened = Opened()
    engine = Watching(opened)
    taken: list[str] = []

    def items() -> object:
        for item in opened.items(make_item, 4):
            taken.append(item.id)
            assert len(taken) <= engine.sessions + 1
            yield item

    assert len(list(EpisodeRunner(engine).run(items()))) == 4  # type: ignore[arg-type]
    assert set(engine.ahead) == {0}


def test_a_budget_below_one_item_opens_nothing_ahead(make_item: MakeItem) -> None:
    opened = Opened()
    engine = Watching(opened)
    items = opened.items(make_item, 4)
    assert len(list(EpisodeRunner(engine).run(iter(items), ahead_bytes=1000))) == 4
    assert set(engine.ahead) == {0}


def test_an_item_that_cannot_be_opened_ahead_fails_alone(make_item: MakeItem) -> None:
    opened = Opened()
    items = opened.items(make_item, 5, broken=(1, 2, 4))
    finished = list(EpisodeRunner(Watching(opened)).run(iter(items), ahead_bytes=1 << 30))
    assert {f.item.id for f in finished if f.error is not None} == {"1", "2", "4"}
    assert {f.item.id for f in finished if f.trajectory is not None} == {"0", "3"}


def test_groups_are_opened_ahead_too(make_item: MakeItem) -> None:
    opened = Opened()
    engine = ScriptedEngine(lambda *_: DONE, max_sessions=3)
    items = [replace(item, group_seeds=(1, 2, 3)) for item in opened.items(make_item, 4)]
    finished = list(EpisodeRunner(engine).run(iter(items), ahead_bytes=1 << 30))
    assert len(finished) == 12
    assert engine.open_sessions == 0


def test_waiting_for_pixels_is_counted_and_the_callers_time_is_not(
    make_item: MakeItem, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(runner_module.time, "monotonic", lambda: float(next(clock)))
    runner = EpisodeRunner(ScriptedEngine(lambda *_: DONE, max_sessions=1))
    assert runner.statistics.pixel_wait_share is None
    for _ in runner.run([make_item("0")]):
        for _ in range(1000):
            next(clock)
    statistics = runner.statistics
    # Every measured wait takes a tick or more of this clock, which whoever asks for the time moves on.
    assert statistics.pixel_wait_seconds >= 1
    assert statistics.writing_seconds >= 1
    assert statistics.pixel_wait_seconds + statistics.writing_seconds < 1000
    share = statistics.pixel_wait_share
    assert share is not None
    assert 0 < share < 1


def test_there_is_a_decoding_thread_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 2), (2, 2), (16, 16), (192, 32)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        assert decode_threads() == threads
