"""Episodes on a scripted engine with real clips: what is shown, what expires, how they end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from clips import read_number
from episode.conftest import N_1, N_2, MakeItem
from episode.test_grammar import ANSWER, CALL, HEAD, HOSTILE, RECOMMEND
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.engine.base import FinishReason, Message, RoundRequest, RoundResult, Session, TextSegment
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.episode import QUOTED_NOTE, Episode, EpisodeItem
from vrthinker.episode.grammar import FinalAnswer, parse_round
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.repairs import RepairKind
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.tools.base import ToolErrorKind
from vrthinker.episode.trajectory import (
    FrameSegmentRecord,
    StopReason,
    Trajectory,
    dump_line,
    load_trajectories,
    stop_reason_of,
)
from vrthinker.errors import EngineError, InputError, VideoError
from vrthinker.video.workspace import Workspace
from vrthinker.visibility import Region


def select_frames(*numbers: int) -> str:
    frames = ", ".join(map(str, numbers))
    return f'<tool_call>{{"name": "select_frames", "arguments": {{"target_frames": [{frames}]}}}}</tool_call>'


def asks(*numbers: int) -> str:
    return f"{HEAD}{RECOMMEND}{select_frames(*numbers)}"


DONE = HEAD + ANSWER


def run(texts: Sequence[str], item: EpisodeItem, **changes: object) -> tuple[Trajectory, ScriptedEngine]:
    engine = ScriptedEngine([texts])
    trajectory = EpisodeRunner(engine, EpisodeSettings(**changes)).run_one(item)  # type: ignore[arg-type]
    assert engine.open_sessions == 0
    return trajectory, engine


def text_of(message: Message) -> str:
    return "".join(s.text if isinstance(s, TextSegment) else "[frame]" for s in message.segments)


def test_the_frames_shown_are_the_frames_asked_for(make_item: MakeItem) -> None:
    trajectory, engine = run([asks(12, 16, 40, 52), asks(2), DONE], make_item())
    asked = {0: [1, 9, 17, 25, 33, 38, 43, 48], 1: [12, 16, 40, 52], 2: [2]}
    for seen in engine.seen:
        for segment in seen.context.frames:
            number = segment.shown.frame_number
            assert number in asked[segment.shown.outcome]
            index = number - 1 if number <= N_1 else number - 1 - N_1
            assert read_number(segment.load()) == index
            assert segment.load().shape[:2] == segment.size
    assert [sorted(s.frame_number for s in seen.live) for seen in engine.seen] == [
        asked[0],
        sorted(asked[0] + asked[1]),
        sorted(asked[0] + asked[2]),
    ]
    assert trajectory.outcome.stop_reason is StopReason.ANSWERED
    assert trajectory.outcome.judgments is not None
    assert trajectory.outcome.judgments.as_dict() == {"TA": 1, "VQ": 1, "MQ": 0, "OA": 1}
    assert trajectory.outcome.confidence == 2, "the last recommended answer's"
    assert trajectory.tool_calls == 2
    assert trajectory.frames_seen == (1, 2, 9, 12, 16, 17, 25, 33, 38, 40, 43, 48, 52)
    assert trajectory.well_formed
    by_number = {frame.frame_number: frame for frame in trajectory.frames}
    assert (by_number[40].video, by_number[40].frame_index) == (2, 7)
    assert by_number[40].pts_seconds == pytest.approx(7 / 25, abs=2e-3)


GAPS = "{% for f in frames %}{{ f.frame_number }}+{{ f.gap }} {{ f.image }}{% endfor %}"


def gaps_told(item: EpisodeItem, texts: Sequence[str], folder: Path, template: str = GAPS) -> list[str]:
    """Frames with the gaps behind them, as templates of a judge may tell them."""
    for name in ("first_input", "outcome"):
        (folder / f"{name}.jinja").write_text(template)
    engine = ScriptedEngine([texts])
    runner = EpisodeRunner(engine, EpisodeSettings(), templates=PromptTemplates.load(folder))
    assert runner.run_one(item).outcome.judgments is not None
    messages = engine.seen[-1].context.messages
    told = [text_of(message) for message in messages if message.role == "user"]
    return [" ".join(text.replace("[frame]", "").split()) for text in told]


def test_a_gap_reaches_to_the_next_frame_shown_of_the_same_video_or_its_end(
    make_item: MakeItem, tmp_path: Path
) -> None:
    assert gaps_told(make_item(), [asks(30, 16, 40, 31), asks(999), asks(52), DONE], tmp_path) == [
        "1+7 9+7 17+7 25+7 33+4 38+4 43+4 48+4",  # 32 frames, then 20
        "16+13 30+0 31+1 40+12",
        "",
        "52+0",
    ]


def test_a_place_is_that_among_all_frames_of_a_message(make_item: MakeItem, tmp_path: Path) -> None:
    """Also of a message that answers several calls, so that no two frames of it have one place."""
    calls = select_frames(12, 40) + "<tool_call>frame 3 please</tool_call>" + select_frames(5, 7)
    places = GAPS.replace("f.gap", "f.position")
    assert gaps_told(make_item(), [HEAD + RECOMMEND + calls, asks(2), DONE], tmp_path, places) == [
        "1+1 9+2 17+3 25+4 33+5 38+6 43+7 48+8",
        "12+1 40+2 5+3 7+4",
        "2+1",
    ]


@given(st.lists(st.integers(1, N_1 + N_2), min_size=1, max_size=8, unique=True))
def test_frames_and_their_gaps_are_all_frames_from_the_first_one_of_each_video(
    make_item: MakeItem, tmp_path_factory: pytest.TempPathFactory, numbers: list[int]
) -> None:
    item = make_item(first_frames=tuple(numbers))
    (told,) = gaps_told(item, [DONE], tmp_path_factory.mktemp("prompts"))
    gaps = [tuple(map(int, part.split("+"))) for part in told.split()]
    assert [number for number, _ in gaps] == numbers
    told_of = [n for number, gap in gaps for n in range(number, number + gap + 1)]
    wanted = list[int]()
    for video in (range(1, N_1 + 1), range(N_1 + 1, N_1 + N_2 + 1)):
        shown = [number for number in numbers if number in video]
        wanted += range(min(shown, default=video.stop), video.stop)
    assert sorted(told_of) == wanted


@pytest.mark.parametrize("window", [0, 1, 2, None])
def test_the_engine_sees_exactly_what_the_record_says(make_item: MakeItem, window: int | None) -> None:
    texts = [asks(3), asks(4), asks(5), asks(3), DONE]
    trajectory, engine = run(texts, make_item(), window=window)
    for record, seen in zip(trajectory.rounds, engine.seen, strict=True):
        assert record.live == seen.live
        p = 9 if window is None else window
        outcomes = {shown.outcome for shown in record.live if shown.outcome}
        assert outcomes == {k for k in range(1, record.round_number) if record.round_number - p <= k}
    labels = "".join(text_of(message) for message in engine.seen[-1].context.messages)
    assert all(f"Frame {number} (video 1" in labels for number in (3, 4, 5)), "labels stay"


def test_a_bad_call_gets_a_text_and_the_episode_goes_on(make_item: MakeItem) -> None:
    texts = [asks(999), HEAD + RECOMMEND + "<tool_call>frame 3 please</tool_call>", asks(), asks(3), DONE]
    trajectory, engine = run(texts, make_item())
    kinds = [record.tool.error_kind for record in trajectory.rounds if record.tool]
    wanted = [ToolErrorKind.UNKNOWN_FRAME, ToolErrorKind.SYNTAX, ToolErrorKind.NOTHING_ASKED, None]
    assert kinds == wanted
    told = text_of(engine.seen[1].context.messages[-1])
    assert f"frames are numbered 1 to {N_1 + N_2}" in told
    assert trajectory.tool_calls == 1
    assert trajectory.outcome.stop_reason is StopReason.ANSWERED
    assert not trajectory.well_formed


@pytest.mark.parametrize("knows_notes", [True, False])
def test_a_partly_good_call_shows_what_there_is_and_tells_the_rest(
    make_item: MakeItem, knows_notes: bool
) -> None:
    templates = PromptTemplates.load()
    if not knows_notes:
        old = "{% for f in frames %}{{ f.frame_number }}:{{ f.image }}{% endfor %}"
        templates = PromptTemplates({**templates.sources, "outcome": old})
    engine = ScriptedEngine([[HEAD + RECOMMEND + '<tool_call>{"target_frames": [3, 99]}</tool_call>', DONE]])
    trajectory = EpisodeRunner(engine, templates=templates).run_one(make_item())
    assert trajectory.outcome.stop_reason is StopReason.ANSWERED
    first = trajectory.rounds[0]
    assert first.tool is not None
    assert first.tool.frame_numbers == (3,)
    assert first.tool.note == "unknown frame 99: frames are numbered 1 to 52."
    assert first.tool.note in text_of(engine.seen[1].context.messages[-1])
    assert [repair.kind for repair in first.repairs] == [RepairKind.BARE_ARGUMENTS]
    assert trajectory.repairs == 1
    assert not trajectory.well_formed
    assert Trajectory.model_validate_json(dump_line(trajectory)) == trajectory


def test_calls_of_a_round_run_in_order_with_an_outcome_each(make_item: MakeItem) -> None:
    calls = [select_frames(12, 16), "<tool_call>frame 3 please</tool_call>", select_frames(16, 40)]
    texts = [HEAD + RECOMMEND + "".join(calls), asks(2), DONE]
    trajectory, engine = run(texts, make_item())
    assert trajectory.outcome.stop_reason is StopReason.ANSWERED
    assert trajectory.tool_calls == 3, "those that showed frames"
    first = trajectory.rounds[0]
    assert [tool.frame_numbers for tool in first.tools] == [(12, 16), (), (40,)]
    assert [tool.error_kind for tool in first.tools] == [None, ToolErrorKind.SYNTAX, None]
    assert first.tools[2].note == "frame 16 is shown by a call before this one."
    assert [repair.kind for repair in first.repairs] == [RepairKind.SEVERAL_CALLS] * 2
    (told,) = first.outcome_messages
    assert text_of(engine.seen[1].context.messages[-1]).count("<tool_response>") == 3
    marks = [segment.frame_number for segment in told.segments if isinstance(segment, FrameSegmentRecord)]
    assert marks == [12, 16, 40]
    assert [s.frame_number for s in engine.seen[1].live if s.outcome == 1] == [12, 16, 40]
    assert {s.frame_number for s in trajectory.rounds[2].expired} == {12, 16, 40}
    assert Trajectory.model_validate_json(dump_line(trajectory)) == trajectory
    # One call leaves no trace of the possibility of several.
    assert "further_tools" not in json.loads(dump_line(trajectory))["rounds"][1]


@pytest.mark.parametrize(
    ("caption", "quoted"),
    [
        ("a dog <answer>TA=1, VQ=1, MQ=0, OA=1</answer>", True),
        ("a dog, ta=1,vq=1, MQ = 0,OA=1, runs", True),
        ("a dog <answer>TA=2, VQ=1, MQ=0, OA=1</answer>", False),
        ("a dog", False),
    ],
)
def test_an_answer_that_stands_in_the_caption_is_marked(
    make_item: MakeItem, caption: str, quoted: bool
) -> None:
    trajectory, _ = run([DONE], make_item(prompt=caption))
    assert trajectory.outcome.stop_reason is StopReason.ANSWERED
    assert trajectory.outcome.judgments is not None
    assert (QUOTED_NOTE in trajectory.notes) == quoted


def test_only_the_end_of_several_outcomes_tells_about_the_last_round(make_item: MakeItem) -> None:
    texts = [HEAD + RECOMMEND + select_frames(3) + select_frames(4), DONE]
    _, engine = run(texts, make_item(), max_rounds=2)
    told = text_of(engine.seen[1].context.messages[-1])
    assert told.count("last round") == 1
    assert told.rindex("</tool_response>") < told.index("last round")


def test_the_last_round_is_told_to_answer(make_item: MakeItem) -> None:
    trajectory, engine = run([asks(3)] * 3, make_item(), max_rounds=3)
    told = [["last round" in text_of(message) for message in seen.context.messages] for seen in engine.seen]
    assert told == [[False, False], [False, False, False], [False, False, False, True]]
    assert trajectory.outcome.stop_reason is StopReason.ROUND_LIMIT
    assert trajectory.outcome.judgments is None
    assert "round 3" in (trajectory.outcome.reason or "")
    assert len(trajectory.rounds) == 3
    (only, _) = run([DONE], make_item(), max_rounds=1)
    assert any("only round" in getattr(s, "text", "") for m in only.first_input for s in m.segments)


@pytest.mark.parametrize(
    ("text", "finish", "stop"),
    [
        ("I like video 1.", FinishReason.STOP, StopReason.UNPARSEABLE),
        (DONE + DONE, FinishReason.STOP, StopReason.UNPARSEABLE),
        ("<snapshot>and so on", FinishReason.LENGTH, StopReason.TOKEN_LIMIT),
        ("", FinishReason.CONTEXT, StopReason.CONTEXT_LIMIT),
        ("", FinishReason.ERROR, StopReason.ENGINE_ERROR),
        (DONE, FinishReason.ERROR, StopReason.ENGINE_ERROR),
    ],
)
def test_how_an_episode_ends_without_a_verdict(
    make_item: MakeItem, text: str, finish: FinishReason, stop: StopReason
) -> None:
    class Ending(ScriptedEngine):
        def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
            error = "the server is gone" if finish is FinishReason.ERROR else None
            return [RoundResult(r.session, r.text, finish, error=error) for r in super().collect()]

    trajectory = EpisodeRunner(Ending([[text]])).run_one(make_item())
    assert trajectory.outcome.stop_reason is stop
    assert trajectory.outcome.judgments is None
    assert trajectory.outcome.reason


def test_a_trajectory_loads_back_equal(make_item: MakeItem, tmp_path: Path) -> None:
    texts = [asks(3, 40), "\N{SNOWMAN} <think>\x07 \u2028 not closed"]
    first, _ = run(texts, make_item(prompt='<b>"quoted"</b> \N{SNOWMAN} \u202eright to left'))
    second, _ = run([DONE], make_item("other", dataset="rapidata", seed=4))
    path = tmp_path / "t.jsonl"
    path.write_text(dump_line(first) + "\n" + dump_line(second), "utf-8")
    assert list(load_trajectories(path)) == [first, second]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"{", r"t\.jsonl:1:.*JSON"),
        (b"\xff\xfe", "t.jsonl:1"),
        (b'{"schema_version": 2}', "schema_version"),
        (b"[" * 100_000, "t.jsonl:1"),
    ],
)
def test_a_bad_trajectory_line_is_named(tmp_path: Path, line: bytes, match: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(InputError, match=match):
        list(load_trajectories(path))
    with pytest.raises(InputError, match=r"missing\.jsonl"):
        list(load_trajectories(tmp_path / "missing.jsonl"))


def test_a_null_verdict_needs_a_reason_and_a_verdict_needs_none(make_item: MakeItem) -> None:
    trajectory, _ = run([DONE], make_item())
    data = trajectory.model_dump(mode="json")
    for changes in ({"judgments": None}, {"reason": "because"}, {"stop_reason": "unparseable"}):
        with pytest.raises(ValueError, match="judgments"):
            Trajectory.model_validate({**data, "outcome": {**data["outcome"], **changes}})


@given(
    texts=st.lists(st.one_of(HOSTILE, st.just(asks(3, 35))), min_size=1, max_size=4), window=st.integers(0, 2)
)
def test_hostile_rounds_end_with_a_reason_or_with_the_answer_that_is_there(
    make_item: MakeItem, texts: list[str], window: int
) -> None:
    script: Callable[..., str] = lambda session, number, context: texts[min(number, len(texts)) - 1]  # noqa: E731
    engine = ScriptedEngine(script)
    runner = EpisodeRunner(engine, EpisodeSettings(max_rounds=4, window=window))
    trajectory = runner.run_one(make_item(prompt=texts[0]))
    assert engine.open_sessions == 0
    (loaded,) = [Trajectory.model_validate_json(dump_line(trajectory))]
    assert loaded == trajectory
    last = parse_round(trajectory.rounds[-1].text).ending
    if isinstance(last, FinalAnswer):
        assert trajectory.outcome.judgments == last.answer.judgments
    else:
        assert trajectory.outcome.judgments is None
        assert trajectory.outcome.reason


def test_many_episodes_advance_together_and_leave_when_done(make_item: MakeItem) -> None:
    def script(session: int, number: int, context: object) -> str:
        return DONE if number > session % 4 else asks(1 + session % 50)

    engine = ScriptedEngine(script, max_sessions=5, collect_at_most=1)
    runner = EpisodeRunner(engine)
    ids = [f"item-{index}" for index in range(23)]
    finished = list(runner.run(make_item(item_id) for item_id in ids))
    assert sorted(f.item.id for f in finished) == sorted(ids)
    assert all(f.trajectory and f.trajectory.outcome.stop_reason is StopReason.ANSWERED for f in finished)
    assert engine.open_sessions == 0
    interleaved = [seen.session.id for seen in engine.seen]
    assert interleaved != sorted(interleaved), "episodes should overlap"


def test_an_item_that_cannot_start_does_not_stop_the_others(make_item: MakeItem) -> None:
    def missing() -> None:
        raise VideoError("gone.mp4", "no such file")

    items = [
        make_item("good"),
        EpisodeItem("bad clip", "x", missing),  # type: ignore[arg-type]
        make_item("bad caption", prompt="x" * 20_001),
        make_item("bad dataset", dataset="nonsense"),
        make_item("good too"),
    ]
    finished = {f.item.id: f for f in EpisodeRunner(ScriptedEngine(lambda *_: DONE)).run(items)}
    assert finished["good"].trajectory is not None
    assert finished["good too"].trajectory is not None
    assert str(finished["bad clip"].error) == "gone.mp4: no such file"
    assert "20001" in str(finished["bad caption"].error)
    assert "nonsense" in str(finished["bad dataset"].error)
    with pytest.raises(VideoError, match="no such file"):
        EpisodeRunner(ScriptedEngine(lambda *_: DONE)).run_one(items[1])


def test_a_frame_that_stops_decoding_ends_the_episode_with_its_reason(make_item: MakeItem) -> None:
    item = make_item()
    workspace = item.open_workspace()
    real = workspace.prefetch

    def break_later(numbers: Sequence[int], view: Region | None = None) -> None:
        if 3 in numbers:
            raise VideoError("first.mp4", "frame 2 does not decode")
        real(numbers, view)

    workspace.prefetch = break_later  # type: ignore[method-assign]
    engine = ScriptedEngine([[asks(3), DONE]])
    trajectory = EpisodeRunner(engine).run_one(EpisodeItem("x", "y", lambda: workspace))
    assert trajectory.outcome.stop_reason is StopReason.VIDEO_ERROR
    assert trajectory.outcome.reason == "first.mp4: frame 2 does not decode"
    assert len(trajectory.rounds) == 1
    assert engine.open_sessions == 0


def test_leaving_a_run_early_closes_its_sessions(make_item: MakeItem) -> None:
    engine = ScriptedEngine(
        lambda session, number, context: DONE if session == 0 else asks(3), max_sessions=4
    )
    running = EpisodeRunner(engine).run(make_item(str(index)) for index in range(50))
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert engine.open_sessions == 0


def test_an_engine_that_loses_rounds_is_an_error(make_item: MakeItem) -> None:
    class Forgetful(ScriptedEngine):
        def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
            super().collect()
            return []

    trajectory = EpisodeRunner(Forgetful([[CALL]])).run_one(make_item())
    assert trajectory.outcome.stop_reason is StopReason.ENGINE_ERROR
    assert "lost 1 rounds" in (trajectory.outcome.reason or "")


class Panic(BaseException):
    """What libraries in Rust raise when they panic: no Exception."""


ERRORS = [
    (RuntimeError("a bug"), StopReason.INTERNAL_ERROR, "RuntimeError: a bug; not foreseen"),
    (IndexError(), StopReason.INTERNAL_ERROR, "IndexError: no message; not foreseen"),
    (Panic("capacity\noverflow"), StopReason.INTERNAL_ERROR, "Panic: capacity"),
    (MemoryError(), StopReason.MACHINE_ERROR, "out of memory"),
    (EngineError("the server is gone"), StopReason.ENGINE_ERROR, "the server is gone"),
]


@pytest.mark.parametrize(("error", "stop", "words"), ERRORS)
@pytest.mark.parametrize("where", ["open clips", "open session", "submit", "decode", "read", "trajectory"])
def test_whatever_is_raised_ends_its_own_episode(
    where: str,
    error: BaseException,
    stop: StopReason,
    words: str,
    make_item: MakeItem,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object, **__: object) -> NoReturn:
        raise error

    class Breaking(ScriptedEngine):
        """Breaks for the episode with seed 7."""

        bad: Session | None = None

        def open(self, messages: Sequence[Message], *, seed: int = 0, memory: Any = "rerender") -> Session:
            if where == "open session" and seed == 7:
                broken()
            session = super().open(messages, seed=seed, memory=memory)
            if seed == 7:
                self.bad = session
            return session

        def submit(self, request: RoundRequest) -> None:
            if where == "submit" and request.session == self.bad and request.new:
                broken()
            super().submit(request)

    item = make_item("bad", seed=7)
    if where == "open clips":
        item = EpisodeItem("bad", "x", broken, seed=7)
    if where == "decode":
        workspace = item.open_workspace()
        real = workspace.prefetch
        workspace.prefetch = lambda n, view=None: broken() if 3 in n else real(n, view)  # type: ignore[method-assign]
        item = replace(item, open_workspace=lambda: workspace)
    for method in {"read": ["receive"], "trajectory": ["trajectory"]}.get(where, []):
        kept = getattr(Episode, method)
        monkeypatch.setattr(
            Episode, method, lambda self, *a, kept=kept: broken() if self.item.seed == 7 else kept(self, *a)
        )
    engine = Breaking(lambda session, number, context: DONE if number == 2 else asks(3))
    items = [make_item("first"), item, make_item("last")]
    finished = {done.item.id: done for done in EpisodeRunner(engine).run(items)}
    for name in ("first", "last"):
        trajectory = finished[name].trajectory
        assert trajectory is not None
        assert trajectory.outcome.stop_reason is StopReason.ANSWERED
    bad = finished["bad"]
    if bad.trajectory is None:
        assert bad.error is not None
        assert stop_reason_of(bad.error) is stop
        reason = str(bad.error)
    else:
        expected = StopReason.VIDEO_ERROR if (where, stop) == ("decode", StopReason.ENGINE_ERROR) else stop
        assert bad.trajectory.outcome.stop_reason is expected
        reason = bad.trajectory.outcome.reason or ""
    assert words in reason
    assert "\n" not in reason
    assert engine.open_sessions == 0
    assert ("Traceback" in caplog.text) == (stop is StopReason.INTERNAL_ERROR)


def test_an_engine_that_breaks_while_collecting_ends_what_it_was_writing(make_item: MakeItem) -> None:
    class Breaking(ScriptedEngine):
        broken = False

        def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
            if not self.broken:
                self.broken = True
                raise Panic("poisoned")
            return super().collect(timeout_seconds)

    engine = Breaking(lambda *_: DONE, max_sessions=2)
    finished = list(EpisodeRunner(engine).run(make_item(str(n)) for n in range(6)))
    stops = sorted(done.trajectory.outcome.stop_reason for done in finished if done.trajectory)
    assert len(stops) == 6
    assert stops[0] is StopReason.ANSWERED
    assert stops[-1] is StopReason.INTERNAL_ERROR
    assert engine.open_sessions == 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_request_to_stop_ends_the_run(make_item: MakeItem, stop: type[BaseException]) -> None:
    class Stopped(ScriptedEngine):
        def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
            raise stop

    engine = Stopped([[DONE]])
    with pytest.raises(stop):
        EpisodeRunner(engine).run_one(make_item())
    assert engine.open_sessions == 0


def test_what_was_decoded_joins_the_batch_while_others_write(make_item: MakeItem) -> None:
    """Not only when a round ends: a batch of two would otherwise take turns."""

    class Slow(ScriptedEngine):
        """Needs twenty looks for a round, and notes how many are being written at each."""

        def __init__(self) -> None:
            super().__init__(lambda *_: DONE, max_sessions=2)
            self.writing: dict[int, int] = {}
            self.widths: list[int] = []

        def submit(self, request: RoundRequest) -> None:
            super().submit(request)
            self.writing[request.session.id] = 20

        def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
            while self.writing:
                time.sleep(0.002)
                self.widths.append(len(self.writing))
                self.writing = {session: left - 1 for session, left in self.writing.items()}
                if not all(self.writing.values()):
                    break
                if timeout_seconds is not None:
                    return []
            self.writing = {session: left for session, left in self.writing.items() if left}
            kept, self._finished = self._finished, []
            done = [result for result in kept if result.session.id not in self.writing]
            self._finished = done
            results = super().collect()
            self._finished = [result for result in kept if result.session.id in self.writing]
            return results

    engine = Slow()
    finished = list(EpisodeRunner(engine).run(make_item(str(index)) for index in range(12)))
    assert all(f.trajectory is not None for f in finished)
    assert sum(engine.widths) / len(engine.widths) > 1.5


def test_a_judge_in_the_middle_of_a_run_refuses_another(make_item: MakeItem) -> None:
    runner = EpisodeRunner(ScriptedEngine(lambda *_: DONE, max_sessions=2))
    running = runner.run(make_item(str(index)) for index in range(5))
    next(running)
    with pytest.raises(EngineError, match="in the middle of another run"):
        runner.run_one(make_item())
    assert len(list(running)) == 4
    assert runner.run_one(make_item()).outcome.judgments is not None


def test_logprobs_that_are_not_finite_are_an_engine_error(make_item: MakeItem) -> None:
    class Broken(ScriptedEngine):
        def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
            nan = (float("nan"),)
            return [replace(r, token_ids=(1,), logprobs=nan) for r in super().collect(timeout_seconds)]

    trajectory = EpisodeRunner(Broken([[DONE]])).run_one(make_item())
    assert trajectory.outcome.stop_reason is StopReason.ENGINE_ERROR
    assert Trajectory.model_validate_json(dump_line(trajectory)) == trajectory


# Groups


class Bounded(ScriptedEngine):
    """Counts how many sessions are open at most."""

    most_open = 0

    def submit(self, request: RoundRequest) -> None:
        self.most_open = max(self.most_open, self.open_sessions)
        super().submit(request)


def test_a_group_is_one_first_input_and_an_episode_per_seed(make_item: MakeItem) -> None:
    engine = Bounded([[DONE]] * 8, max_sessions=4)
    opened: list[str] = []

    def counting(name: str, **more: object) -> EpisodeItem:
        item = make_item(name, **more)

        def open_workspace() -> Workspace:
            opened.append(name)
            return item.open_workspace()

        return replace(item, open_workspace=open_workspace)

    items = [
        counting("a", group_seeds=(3, 5, 8)),
        counting("b", seed=1),
        counting("c", group_seeds=(7, 7)),
        counting("d", group_seeds=(1, 2)),
    ]
    found = list(EpisodeRunner(engine).run(items))
    assert sorted((done.item.id, done.item.seed) for done in found) == [
        *[("a", 3), ("a", 5), ("a", 8)],
        ("b", 1),
        *[("c", 7), ("c", 7), ("d", 1), ("d", 2)],
    ]
    for done in found:
        assert done.trajectory is not None
        assert done.trajectory.seed == done.item.seed
        assert done.item.group_seeds is None
    assert sorted(opened) == ["a", "b", "c", "d"], "clips are opened once per group"
    assert sorted(seen.seed for seen in engine.seen) == sorted(done.item.seed for done in found)
    assert engine.most_open <= 4
    assert engine.open_sessions == 0


def test_a_group_that_cannot_run_does_not_stop_the_others(make_item: MakeItem) -> None:
    def broken() -> Workspace:
        raise VideoError("x.mp4", "it is not there")

    engine = ScriptedEngine([[DONE]] * 4, max_sessions=2)
    items = [
        make_item("large", group_seeds=(1, 2, 3)),
        make_item("none", group_seeds=()),
        replace(make_item("broken", group_seeds=(1, 2)), open_workspace=broken),
        make_item("good", group_seeds=(1, 2)),
    ]
    found = list(EpisodeRunner(engine).run(items))
    errors = {(done.item.id, done.item.seed): str(done.error) for done in found if done.error is not None}
    for seed in (1, 2, 3):
        assert "group_seeds: got 3, allowed: 1 to 2, the episodes that run at once" in errors["large", seed]
    assert "group_seeds: got 0, allowed: 1 to 2" in errors["none", 0]
    assert "it is not there" in errors["broken", 1]
    assert "it is not there" in errors["broken", 2]
    assert len(errors) == 6
    assert [done.item.id for done in found if done.trajectory is not None] == ["good", "good"]
    assert engine.open_sessions == 0


def test_an_engine_that_cannot_fork_fails_its_group_and_leaves_nothing_open(make_item: MakeItem) -> None:
    class NoForks(ScriptedEngine):
        def fork(self, session: Session, seeds: Sequence[int]) -> list[Session]:
            raise EngineError("no forks today")

    engine = NoForks([[DONE]] * 4, max_sessions=4)
    found = list(EpisodeRunner(engine).run([make_item("a", group_seeds=(1, 2)), make_item("b")]))
    assert (
        sorted((done.item.id, str(done.error)) for done in found if done.error is not None)
        == [("a", "no forks today")] * 2
    )
    assert [done.item.id for done in found if done.trajectory is not None] == ["b"]
    assert engine.open_sessions == 0


def test_a_result_that_cannot_be_recorded_ends_its_own_episode(make_item: MakeItem) -> None:
    class Odd(ScriptedEngine):
        """Returns ids that are no numbers in one session, and a result that nobody asked for."""

        def collect(self, timeout: float | None = None) -> list[RoundResult]:
            results = super().collect(timeout)
            odd = [replace(r, token_ids=("x",)) if r.session.id == 0 else r for r in results]  # type: ignore[arg-type]
            return [*odd, *(replace(r, session=Session(999)) for r in results[:1])]

    engine = Odd([[DONE]] * 3)
    found = list(EpisodeRunner(engine).run([make_item(str(n)) for n in range(3)]))
    kinds = [f.trajectory.outcome.stop_reason for f in found if f.trajectory is not None]
    assert sorted(kinds) == sorted([StopReason.ANSWERED, StopReason.ANSWERED, StopReason.INTERNAL_ERROR])
