"""One judge for many threads: every call is answered, with its own result, or ends with a reason."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import numpy as np
import pytest
from clips import make_clip
from quick_judge import make_quick_judge

from vrthinker import Clip, EngineError, Judge, VideoError
from vrthinker.data.pairs import Pair
from vrthinker.engine.base import Message, RoundRequest, RoundResult, TextSegment
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.errors import InputError
from vrthinker.judge_threads import JudgeThreads, Turn
from vrthinker.verdict import Verdict

PATIENCE_SECONDS = 120.0
"""Far more than anything here takes on a busy machine: a test that waits this long has failed."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return make_clip(folder / "a.mp4", 9, size=(56, 84)), make_clip(folder / "b.mp4", 7, size=(56, 84))


def number_in(messages: Sequence[Message]) -> int:
    """The number in the caption, which every judgment here follows from."""
    text = "".join(s.text for m in messages for s in m.segments if isinstance(s, TextSegment))
    return int(text.partition("Caption: call ")[2].split()[0])


def labels_of(number: int) -> dict[str, int]:
    return {code: number // 3**place % 3 for place, code in enumerate(("TA", "VQ", "MQ", "OA"))}


def answers_by_caption(index: int, number: int, messages: Sequence[Message]) -> str:
    """Half of the calls look again first, so that episodes end in another order than they began."""
    call = number_in(messages)
    if call % 2 and number == 1:
        return (
            "<snapshot>x</snapshot><think>y</think><recommend answer>TA=1, VQ=1, MQ=1, OA=1, CF=1"
            '</recommend answer><tool_call>{"name": "select_frames", "arguments": '
            '{"target_frames": [2]}}</tool_call>'
        )
    said = ", ".join(f"{code}={label}" for code, label in labels_of(call).items())
    return f"<snapshot>x</snapshot><think>y</think><answer>{said}</answer>"


class CountingEngine(ScriptedEngine):
    """Counts how many sessions were open at most, and who called."""

    def __init__(self) -> None:
        super().__init__(answers_by_caption, max_sessions=8, collect_at_most=3)
        self.most, self.threads = 0, set[int]()

    def submit(self, request: RoundRequest) -> None:
        super().submit(request)
        self.seen.clear()  # nothing is kept for assertions here
        self.most = max(self.most, self.open_sessions)
        self.threads.add(threading.get_ident())


def labels(verdict: Verdict) -> dict[str, int] | None:
    return verdict.judgments and verdict.judgments.as_dict()


@pytest.mark.parametrize("calls", [160, pytest.param(1000, marks=pytest.mark.slow)])
def test_calls_of_32_threads_get_their_own_verdicts(clips: tuple[Path, Path], calls: int) -> None:
    engine = CountingEngine()
    with Judge(engine) as judge, ThreadPoolExecutor(32) as pool:

        def call(number: int) -> Verdict:
            if number % 3:
                return judge(f"call {number} .", *clips)
            return judge.submit(f"call {number} .", *clips, id=str(number)).result(PATIENCE_SECONDS)

        verdicts = list(pool.map(call, range(calls)))
        assert [labels(verdict) for verdict in verdicts] == [labels_of(number) for number in range(calls)]
        assert all(v.trajectory.prompt == f"call {n} ." for n, v in enumerate(verdicts))
        assert [v.trajectory.id for v in verdicts[::3]] == [str(n) for n in range(0, calls, 3)]
        assert 1 < engine.most <= 8, "in batches, within the engine's room"
        alone = judge("call 7 .", *clips)
        assert (labels(alone), alone.rounds) == (labels(verdicts[7]), verdicts[7].rounds)
        assert engine.open_sessions == 0


def test_real_rounds_are_those_of_single_calls(tmp_path: Path, clips: tuple[Path, Path]) -> None:
    with Judge.from_pretrained(make_quick_judge(tmp_path / "m"), temperature=1.0, batch_size=4) as judge:
        singles = [judge("a dog", *clips, seed=seed) for seed in range(4)]
        futures = [judge.submit("a dog", *clips, seed=seed) for seed in range(4)]
        for single, future in zip(singles, futures, strict=True):
            batched = future.result(PATIENCE_SECONDS)
            assert batched.judgments == single.judgments
            rounds = [[r.token_ids for r in v.trajectory.rounds] for v in (single, batched)]
            assert rounds[0] == rounds[1]


class HangingEngine(ScriptedEngine):
    """Never finishes the rounds of captions with a 13; with `blocks`, `collect` does not even come back."""

    def __init__(self, *, blocks: bool = False) -> None:
        super().__init__(answers_by_caption, max_sessions=4)
        self._blocks = blocks
        self._hung: list[RoundResult] = []
        self.released = threading.Event()
        self.entered = threading.Event()

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        if self._blocks:
            self.entered.set()
            self.released.wait(PATIENCE_SECONDS)
        hung = {seen.session for seen in self.seen if number_in(seen.context.messages) == 13}
        ready = [result for result in self._finished if result.session not in hung]
        self._finished = [result for result in self._finished if result.session in hung]
        for result in ready:
            self._sessions.end_round(result.session)
        if not ready and self._finished:
            time.sleep(0.01 if timeout_seconds is None else timeout_seconds)
        return ready


def reason_of(future: Future[Verdict]) -> str:
    error = future.exception(PATIENCE_SECONDS)
    assert isinstance(error, EngineError)
    return str(error)


def test_a_round_that_hangs_times_out_alone(clips: tuple[Path, Path]) -> None:
    engine = HangingEngine()
    with Judge(engine) as judge:
        hung = judge.submit("call 13 .", *clips, time_limit_seconds=0.3)
        others = [judge.submit(f"call {n} .", *clips, time_limit_seconds=PATIENCE_SECONDS) for n in range(10)]
        assert [labels(f.result(PATIENCE_SECONDS)) for f in others] == [labels_of(n) for n in range(10)]
        assert reason_of(hung) == "no verdict within 0.3 s: the call was given up"
        with pytest.raises(EngineError, match="no verdict within"):
            judge("call 13 .", *clips, time_limit_seconds=0.2)
        assert labels(judge("call 5 .", *clips)) == labels_of(5)
        assert engine.open_sessions == 0, "the rounds that hang were dropped"


def test_an_engine_that_does_not_come_back_takes_nobody_with_it(
    clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vrthinker.judge_threads._CLOSE_SECONDS", 0.1)
    engine = HangingEngine(blocks=True)
    judge = Judge(engine)
    futures = [judge.submit(f"call {n} .", *clips, time_limit_seconds=0.3) for n in range(6)]
    unlimited = judge.submit("call 7 .", *clips)
    assert engine.entered.wait(PATIENCE_SECONDS)
    for future in futures:
        assert "no verdict within" in reason_of(future)
    assert not unlimited.done()
    judge.close()
    assert "the judge was closed" in reason_of(unlimited)
    assert "does not come back" in caplog.text
    with pytest.raises(EngineError, match="closed"):
        judge.submit("call 1 .", *clips)
    engine.released.set()


def test_closing_ends_what_is_under_way(clips: tuple[Path, Path]) -> None:
    engine = HangingEngine()
    judge = Judge(engine)
    futures = [judge.submit("call 13 .", *clips) for _ in range(9)]
    judge.close()
    assert {reason_of(future) for future in futures} == {"the judge was closed before there was a verdict"}
    assert engine.open_sessions == 0


def test_a_full_queue_makes_callers_wait(clips: tuple[Path, Path]) -> None:
    engine = HangingEngine(blocks=True)
    with Judge(engine) as judge:
        threads: JudgeThreads[Verdict] = JudgeThreads(judge._runner, Turn(), queue_size=2)

        def offer(number: int, limit: float | None) -> Future[Verdict]:
            items = judge._items.of_call("p", f"call {number} .", *clips, None, 0, both_orders=False)
            return threads.submit(items, judge._read, time_limit_seconds=limit)

        first = [offer(0, None)]
        assert engine.entered.wait(PATIENCE_SECONDS)
        first += [offer(n, None) for n in (1, 2)]
        late = [offer(n, 0.1) for n in (3, 4, 5)]
        assert all("no verdict within" in reason_of(future) for future in late)
        assert len(threads._waiting) == 2
        engine.released.set()
        assert [labels(f.result(PATIENCE_SECONDS)) for f in first] == [labels_of(n) for n in range(3)]
        assert threads.close()


def test_await_judges_side_by_side_and_a_cancelled_task_is_dropped(clips: tuple[Path, Path]) -> None:
    engine = HangingEngine()
    judge = Judge(engine)

    async def main() -> list[Verdict]:
        hung = asyncio.create_task(judge.ajudge("call 13 .", *clips))
        verdicts = await asyncio.gather(*(judge.ajudge(f"call {n} .", *clips) for n in range(12)))
        hung.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hung
        with pytest.raises(EngineError, match="no verdict within"):
            await judge.ajudge("call 13 .", *clips, time_limit_seconds=0.1)
        return verdicts

    with judge:
        assert [labels(v) for v in asyncio.run(main())] == [labels_of(n) for n in range(12)]
        assert labels(judge("call 3 .", *clips)) == labels_of(3)
        eventually(lambda: engine.open_sessions == 0)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_errors_are_those_of_single_calls(clips: tuple[Path, Path], tmp_path: Path) -> None:
    with Judge(CountingEngine()) as judge:
        future = judge.submit("call 1 .", clips[0], tmp_path / "missing.mp4")
        with pytest.raises(VideoError, match=r"missing\.mp4"):
            future.result(PATIENCE_SECONDS)
        with pytest.raises(InputError, match="caption"):
            judge.submit(None, *clips)  # type: ignore[arg-type]
        for limit in (0, -1.0, float("nan"), float("-inf")):
            with pytest.raises(InputError, match=f"time_limit_seconds: got {limit:g}, allowed: above 0"):
                judge.submit("call 1 .", *clips, time_limit_seconds=limit)


def test_a_run_in_the_middle_refuses_its_own_thread_and_lets_others_wait(
    clips: tuple[Path, Path],
) -> None:
    pairs = [Pair(id=str(n), prompt=f"call {n} .", video_1=clips[0], video_2=clips[1]) for n in range(3)]
    with Judge(CountingEngine()) as judge, ThreadPoolExecutor(1) as pool:
        run = judge.judge_pairs(pairs)
        next(run)
        with pytest.raises(EngineError, match="in the middle of another run"):
            judge("call 1 .", *clips)
        with pytest.raises(EngineError, match="in the middle of another run"):
            judge.submit("call 1 .", *clips)
        other = pool.submit(judge, "call 8 .", *clips)
        rest = list(run)
        assert len(rest) == 2
        assert labels(other.result(PATIENCE_SECONDS)) == labels_of(8)
        assert len(list(judge.judge_pairs(pairs))) == 3


def test_tuples_are_pairs_and_every_pair_comes_with_its_verdict(
    clips: tuple[Path, Path], tmp_path: Path
) -> None:
    with Judge(CountingEngine()) as judge:
        tuples = [(f"call {n} .", *clips) for n in range(5)] + [("call 5 .", clips[0], tmp_path / "none.mp4")]
        judged = {done.id: done for done in judge.judge_pairs(tuples)}
        assert sorted(judged) == ["0", "1", "2", "3", "4", "5"]
        for number in range(5):
            verdict = judged[str(number)].verdict
            assert verdict is not None
            assert labels(verdict) == labels_of(number)
        assert judged["5"].verdict is None
        assert "none.mp4" in str(judged["5"].error)
        (refused,) = judge.judge_pairs([("a dog", clips[0])])  # type: ignore[list-item]
        assert "got 2 values" in str(refused.error)


def test_a_clips_memory_is_free_as_soon_as_its_verdict_is_there() -> None:
    gc.collect()
    gc.disable()  # nothing may wait for the collector, or a training loop's clips pile up
    try:
        with Judge(CountingEngine()) as judge:
            for call in (judge, lambda *a: judge.submit(*a).result(PATIENCE_SECONDS)):
                array = np.zeros((6, 56, 84, 3), np.uint8)
                kept = weakref.ref(array)
                clip = Clip.from_array(array, fps=8)
                del array
                assert labels(call("call 5 .", clip, clip)) == labels_of(5)
                del clip
                eventually(lambda kept=kept: kept() is None)  # type: ignore[misc]
    finally:
        gc.enable()


@contextmanager
def named_threads() -> Iterator[Callable[[], set[str]]]:
    before = set(threading.enumerate())
    yield lambda: {t.name for t in threading.enumerate() if t not in before}


def test_threads_end_when_there_is_nothing_to_do(
    clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vrthinker.judge_threads._IDLE_SECONDS", 0.05)
    judge = Judge(CountingEngine())
    with named_threads() as running:
        judge("call 1 .", *clips)
        assert "vrthinker-judge" not in running(), "a single call runs in its own thread"
        judge.submit("call 1 .", *clips, time_limit_seconds=1.5).result(PATIENCE_SECONDS)
        eventually(lambda: not running() & {"vrthinker-judge", "vrthinker-limits"})
        judge.submit("call 1 .", *clips).result(PATIENCE_SECONDS)
    judge.close()


def test_a_thread_is_not_taken_for_one_that_has_ended(
    clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Systems give the number of a thread that has ended to a new one.
    monkeypatch.setattr(threading, "get_ident", lambda: 1)
    turn = Turn()
    ended = threading.Thread(target=turn.take)
    ended.start()
    ended.join(PATIENCE_SECONDS)
    assert not turn.is_mine
    assert not turn.take(0), "another thread has it: it is waited for, and not refused"
    monkeypatch.undo()

    pairs = [Pair(id=str(n), prompt=f"call {n} .", video_1=clips[0], video_2=clips[1]) for n in range(3)]
    with Judge(CountingEngine()) as judge:
        run = judge.judge_pairs(pairs)
        first = threading.Thread(target=next, args=(run,))
        first.start()
        first.join(PATIENCE_SECONDS)
        waiting = judge.submit("call 5 .", *clips)  # its worker may well get the number of `first`
        assert len(list(run)) == 2
        assert labels(waiting.result(PATIENCE_SECONDS)) == labels_of(5)


def test_a_worker_that_fails_ends_its_calls_and_the_next_call_starts_another(
    clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Judge(CountingEngine()) as judge:
        with monkeypatch.context() as broken:

            def take(timeout_seconds: float = -1) -> bool:
                raise EngineError("this should not happen")

            broken.setattr(judge._turn, "take", take)
            future = judge.submit("call 1 .", *clips)
            assert "this should not happen" in reason_of(future)
            assert "starts another one" in caplog.text
        assert labels(judge.submit("call 5 .", *clips).result(PATIENCE_SECONDS)) == labels_of(5)


def test_a_call_may_be_submitted_again_from_its_callback(clips: tuple[Path, Path]) -> None:
    """While one thread ends a late call, the worker looks at it: neither waits for the other."""
    again = list[Future[Verdict]]()
    looked, resubmitted = threading.Event(), threading.Event()
    with Judge(HangingEngine()) as judge:

        def submit_again(future: Future[Verdict]) -> None:
            looked.set()
            again.append(judge.submit("call 5 .", *clips))
            resubmitted.set()

        run = judge.judge_pairs([Pair(id="1", prompt="call 2 .", video_1=clips[0], video_2=clips[1])] * 2)
        next(run)  # so that what follows waits in the queue
        begun = Future[bool]()
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(judge.submit, "call 13 .", *clips).result(PATIENCE_SECONDS)
        late.add_done_callback(submit_again)
        (call,) = judge._threads._waiting
        with judge._threads._changed:  # as the worker does when it takes a call
            ending = threading.Thread(target=call.give_up, args=("late",), daemon=True)
            ending.start()
            assert looked.wait(PATIENCE_SECONDS)
            threading.Thread(target=lambda: begun.set_result(call.begin()), daemon=True).start()
            assert begun.result(20) is False, "the callback does not hold what the worker needs"
        assert resubmitted.wait(PATIENCE_SECONDS)
        list(run)
        assert labels(again[0].result(PATIENCE_SECONDS)) == labels_of(5)


def test_callbacks_of_any_end_may_submit_as_long_as_there_is_room(clips: tuple[Path, Path]) -> None:
    judge = Judge(HangingEngine())
    judge._threads._queue_size = 3
    again, errors = list[Future[Verdict]](), list[EngineError]()

    def submit_four(_: Future[Verdict]) -> None:
        for _ in range(4):
            try:
                again.append(judge.submit("call 5 .", *clips))
            except EngineError as error:
                errors.append(error)

    with judge:
        for caption, limit in (("call 4 .", None), ("call 13 .", 0.05)):
            again.clear()
            errors.clear()
            future = judge.submit(caption, *clips, time_limit_seconds=limit)
            future.add_done_callback(submit_four)
            wait([future], PATIENCE_SECONDS)
            eventually(lambda: len(again) + len(errors) == 4)
            assert again
            assert all("while 3 calls wait, allowed: when there is room" in str(error) for error in errors)
            assert {labels(f.result(PATIENCE_SECONDS)) == labels_of(5) for f in again} == {True}


def test_who_waits_for_a_cancelled_future_learns_of_it(clips: tuple[Path, Path]) -> None:
    engine = HangingEngine(blocks=True)
    judge = Judge(engine)
    with ThreadPoolExecutor(1) as pool:
        direct = pool.submit(judge, "call 4 .", *clips)
        assert engine.entered.wait(PATIENCE_SECONDS)
        first, second = (judge.submit("call 1 .", *clips) for _ in range(2))
        assert first.cancel()
        engine.released.set()
        assert wait([first], 20).done == {first}, "told when it would have been its turn"
        assert labels(second.result(PATIENCE_SECONDS)) == labels_of(1)
        assert labels(direct.result(PATIENCE_SECONDS)) == labels_of(4)

    run = judge.judge_pairs([Pair(id="1", prompt="call 2 .", video_1=clips[0], video_2=clips[1])] * 2)
    next(run)
    with ThreadPoolExecutor(1) as pool:
        queued = pool.submit(judge.submit, "call 1 .", *clips).result(PATIENCE_SECONDS)
        assert queued.cancel()
        judge.close()
        assert wait([queued], 20).done == {queued}, "told when the judge is closed"


def test_an_infinite_limit_is_none_and_others_keep_theirs(clips: tuple[Path, Path]) -> None:
    endless = float("inf")
    with Judge(HangingEngine()) as judge:
        unlimited = judge.submit("call 13 .", *clips, time_limit_seconds=endless)
        time.sleep(0.05)  # the thread that watches limits waits for this one alone
        assert judge._threads._watchdog is not None
        limited = judge.submit("call 13 .", *clips, time_limit_seconds=0.05)
        assert isinstance(limited.exception(20), EngineError)
        assert not unlimited.done()

    engine = HangingEngine(blocks=True)
    judge = Judge(engine)
    judge._threads._queue_size = 1
    with judge, ThreadPoolExecutor(1) as pool:
        judge.submit("call 1 .", *clips)
        assert engine.entered.wait(PATIENCE_SECONDS)
        judge.submit("call 1 .", *clips)
        waiting = pool.submit(judge, "call 5 .", *clips, time_limit_seconds=endless)
        time.sleep(0.05)
        engine.released.set()
        assert labels(waiting.result(PATIENCE_SECONDS)) == labels_of(5)


def test_a_limit_counts_from_the_call_however_often_it_is_offered(clips: tuple[Path, Path]) -> None:
    engine = HangingEngine(blocks=True)
    judge = Judge(engine)
    judge._threads._queue_size = 0

    async def main() -> None:
        call = asyncio.create_task(judge.ajudge("call 5 .", *clips, time_limit_seconds=PATIENCE_SECONDS))
        await asyncio.sleep(0)
        latest = time.monotonic() + PATIENCE_SECONDS
        await asyncio.sleep(0.1)
        judge._threads._queue_size = 1
        assert await asyncio.to_thread(engine.entered.wait, PATIENCE_SECONDS)
        assert judge._threads._deadlines[0][0] <= latest
        engine.released.set()
        assert labels(await call) == labels_of(5)

    with judge:
        asyncio.run(main())


class WitnessEngine(HangingEngine):
    """Notes how many sessions were open when it was shut down."""

    def __init__(self, *, blocks: bool = True) -> None:
        super().__init__(blocks=blocks)
        self.open_at_shutdown = list[int]()

    def shutdown(self) -> None:
        self.open_at_shutdown.append(self.open_sessions)
        super().shutdown()


@pytest.mark.parametrize("many", [False, True])
def test_closing_waits_for_a_run_of_another_thread(clips: tuple[Path, Path], many: bool) -> None:
    engine = WitnessEngine()
    judge = Judge(engine)

    def run() -> Verdict | None:
        if many:
            return next(iter([done.verdict for done in judge.judge_pairs([("call 5 .", *clips)])]))
        return judge("call 5 .", *clips)

    with ThreadPoolExecutor(2) as pool:
        direct = pool.submit(run)
        assert engine.entered.wait(PATIENCE_SECONDS)
        closing = pool.submit(judge.close)
        eventually(lambda: judge._closed)
        time.sleep(0.05)
        assert not engine.open_at_shutdown
        engine.released.set()
        closing.result(PATIENCE_SECONDS)
        verdict = direct.result(PATIENCE_SECONDS)
    assert verdict is not None
    assert labels(verdict) == labels_of(5)
    assert engine.open_at_shutdown == [0]


def test_an_engine_that_another_thread_still_uses_is_left_to_it(
    clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vrthinker.judge_threads._CLOSE_SECONDS", 0.1)
    engine = WitnessEngine()
    judge = Judge(engine)
    with ThreadPoolExecutor(2) as pool:
        direct = pool.submit(judge, "call 5 .", *clips)
        assert engine.entered.wait(PATIENCE_SECONDS)
        waiting = pool.submit(list, judge.judge_pairs([("call 5 .", *clips)]))
        judge.close()
        assert "scripted is not shut down: another thread" in caplog.text
        assert not engine.open_at_shutdown
        engine.released.set()
        assert labels(direct.result(PATIENCE_SECONDS)) == labels_of(5)
        with pytest.raises(EngineError, match="the judge is closed"):
            waiting.result(PATIENCE_SECONDS)
    judge.close()
    assert engine.open_at_shutdown == [0], "a second close makes up for the first"


def test_a_direct_call_of_a_judge_that_is_closed_meanwhile_says_so(
    clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = WitnessEngine(blocks=False)
    judge = Judge(engine)
    make_items = judge._items.of_call

    def close_after(*args: Any, **options: Any) -> Any:
        items = make_items(*args, **options)
        judge.close()
        return items

    monkeypatch.setattr(judge._items, "of_call", close_after)
    with pytest.raises(EngineError, match="the judge is closed; make another one"):
        judge("call 5 .", *clips)
    assert not engine.seen, "it had not begun yet"

    engine = WitnessEngine(blocks=False)
    judge = Judge(engine)
    monkeypatch.setattr(engine, "collect", lambda timeout_seconds=None: judge.close() or [])
    with pytest.raises(EngineError, match="the judge was closed before there was a verdict"):
        judge("call 5 .", *clips)
    assert engine.open_at_shutdown == [1], "who closes in the middle of an own run does not wait for it"
