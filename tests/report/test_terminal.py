"""What reaches a terminal: text is text, and nothing in it runs there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clips import make_clip
from terminals import stderr_on_terminal

from vrthinker import Judge
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.records.verdict_log import VerdictRecord
from vrthinker.report.terminal import FileProgress, plain, print_episode, print_verdict
from vrthinker.verdict import Verdict

EVIL = "\x1b]0;owned\x07\x1b[2J[red]bold[/red]\r\x9b1m"
ASKS = (
    f"<snapshot>{EVIL}</snapshot><think>x</think><recommend answer>TA=1, VQ=1, MQ=1, OA=1, CF=1"
    '</recommend answer><tool_call>{"name": "select_frames", "arguments": {"target_frames": [2]}}</tool_call>'
)
NO_TOOL = ASKS.replace("select_frames", "crop\\u001b")
DONE = "<snapshot>x</snapshot><think>y</think><answer>TA=1, VQ=0, MQ=2, OA=2, CF=1</answer>"


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> Verdict:
    folder = tmp_path_factory.mktemp("clips")
    first = make_clip(folder / "a.mp4", 9, size=(64, 96))
    second = make_clip(folder / "b.mp4", 7, size=(64, 96))
    return Judge(ScriptedEngine([[ASKS, NO_TOOL, DONE]]))(f"a {EVIL} dog", first, second)


def is_tame(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def test_the_table_says_which_video_is_better(verdict: Verdict, capsys: pytest.CaptureFixture[str]) -> None:
    print_verdict(verdict.trajectory, verdict.notes)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert "video 1" in rows["TA"]
    assert "tie" in rows["VQ"]
    assert "video 2" in rows["MQ"]
    assert "Overall" in rows["OA"]
    assert "3 rounds, 1 tool call, 9 of 16 frames seen, confidence high" in " ".join(lines)


def test_hostile_text_is_shown_as_text(verdict: Verdict, capsys: pytest.CaptureFixture[str]) -> None:
    print_episode(verdict.trajectory, verdict.notes)
    out = capsys.readouterr().out
    assert is_tame(out)
    assert "[red]bold[/red]" in out
    assert "select_frames: shows frames 2" in out
    assert "refused: unknown tool" in out
    assert "expired: 2" in out


def test_a_narrow_terminal_is_no_error(verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "4")
    print_episode(verdict.trajectory, verdict.notes)


def test_a_verdict_without_judgments_says_why(capsys: pytest.CaptureFixture[str], verdict: Verdict) -> None:
    first, second = (video.path for video in verdict.trajectory.videos)
    silent = Judge(ScriptedEngine([[EVIL]]))("x", first, second)
    print_verdict(silent.trajectory, silent.notes)
    out = capsys.readouterr().out
    assert "no verdict (unparseable): round 1: neither an answer nor a tool call" in out
    assert is_tame(out)


def record_of(pair_id: str, *, judged: bool = True) -> VerdictRecord:
    return VerdictRecord(
        id=pair_id,
        judgment={"TA": 1, "VQ": 1, "MQ": 1, "OA": 1} if judged else None,
        confidence=None,
        rounds=1,
        tool_calls=0,
        frames_seen=[],
        stop_reason="answered" if judged else "video_error",
        reason=None if judged else EVIL,
        well_formed=None,
        latency_seconds=None,
        prompt_tokens=None,
        sampled_tokens=None,
        seed=0,
        model="m",
    )


def test_a_line_says_every_so_often_how_many_pairs_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    with FileProgress(43, done=1) as progress:
        for n in range(1, 43):
            progress.record(record_of(f"p{n}"))
            progress.wait(3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "1 of 43 pairs recorded already",
        "2 of 43 pairs",
        "waiting for 3 pairs that other processes are judging",
    ]
    assert lines[3:] == [f"{n} of 43 pairs" for n in [*range(4, 43, 2), 43]]
    with FileProgress(43, done=0):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_begins_at_what_is_recorded() -> None:
    with stderr_on_terminal() as said, FileProgress(4, done=2) as progress:
        progress.wait(1)
        progress.record(record_of("a"))
        progress.record(record_of("b"))
    assert "judging" in said[0]
    assert "2/4" in said[0]
    assert "4/4" in said[0]
    assert "waiting for 1 pair that" in said[0]
    assert "recorded already" not in said[0]


def test_failures_are_listed_one_line_each_and_counted_apart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    records = [record_of("good"), *(record_of(f"bad\n{index}", judged=False) for index in range(25))]
    with FileProgress(26, done=0) as progress:
        for item in records:
            progress.record(item)
        assert progress.summarise(records, tmp_path / "out.jsonl", as_json=False) == 1
        assert progress.summarise(records[:1], tmp_path / "out.jsonl", as_json=False) == 0
    out = capsys.readouterr().out
    assert is_tame(out)
    assert "1 verdict in" in out
    assert "better overall: tie 0, video 1 1, video 2 0" in out
    assert "25 pairs without a verdict" in out
    assert out.count("video_error:") == 20
    assert "and 5 more" in out


def test_what_a_reader_has_to_know_comes_first_and_retrying_is_advised_where_it_helps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def ended(pair_id: str, stop_reason: str, *notes: str) -> VerdictRecord:
        values = {"id": pair_id, "stop_reason": stop_reason, "reason": "why", "notes": list(notes)}
        return record_of(pair_id, judged=False).model_copy(update=values)

    foreign = "not from its world:\n \x1b[31m no meaning"
    written = [ended("a", "round_limit", foreign), ended("b", "unparseable", foreign, "a note")]
    with FileProgress(2, done=2) as progress:
        assert progress.summarise(written, tmp_path / "out", as_json=False) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == [
            "note on 2 of 2 pairs: not from its world:   [31m no meaning",
            "note on 1 of 2 pairs: a note",
            f"0 verdicts in {tmp_path / 'out'}",
        ]
        assert lines[3] == "2 pairs without a verdict (another judge may do better):"
        progress.summarise([*written, ended("c", "engine_error")], tmp_path / "out", as_json=False)
        assert "3 pairs without a verdict (--retry-failed judges them again):" in capsys.readouterr().out
        progress.summarise(written, tmp_path / "out", as_json=True)
        assert json.loads(capsys.readouterr().out)["notes"] == {foreign: 2, "a note": 1}
        many = [ended("d", "round_limit", *(f"note {n}" for n in range(9)))]
        progress.summarise(many, tmp_path / "out", as_json=False)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "note on 1 of 1 pair: note 0"
        assert lines[5].startswith("and 4 other notes, in ")
        assert "1 pair without a verdict" in lines[7]


def test_the_summary_says_how_pixels_were_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    decoding = {"decode/pixel_wait_share": 0.034, "decode/frames_per_frame_shown": 5.24}
    with FileProgress(1, done=1) as progress:
        for as_json in (False, True):
            progress.summarise([record_of("a")], tmp_path / "out", as_json=as_json, decoding=decoding)
    lines, _, rest = capsys.readouterr().out.partition("{")
    assert "pixels: the engine waited for them 3% of the time, 5.2 frames decoded for each one read" in lines
    assert json.loads("{" + rest)["metrics"] == decoding


def test_a_file_that_is_finished_says_so_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with FileProgress(1, done=1):
        assert capsys.readouterr().err == "nothing to judge: 1 of 1 pair recorded already\n"


def test_plain_keeps_what_is_readable() -> None:
    assert plain("é \N{SNOWMAN}\n\x1b[2J") == "é \N{SNOWMAN}\n [2J"
