"""A verdict in the hands of its caller: what asks for it, prints it and shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from clips import make_clip

from vrthinker import Judge, Preference
from vrthinker.engine.scripted import ScriptedEngine

ASKS = (
    "<snapshot>x</snapshot><think>x</think><recommend answer>TA=1, VQ=1, MQ=1, OA=1, CF=1"
    '</recommend answer><tool_call>{"name": "select_frames", "arguments": {"target_frames": [2]}}</tool_call>'
)
TIE = "<snapshot>x</snapshot><think>y</think><answer>TA=1, VQ=0, MQ=2, OA=0, CF=1</answer>"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    size = (64, 96)
    return make_clip(folder / "a.mp4", 9, size=size), make_clip(folder / "b.mp4", 7, size=size)


def test_a_tie_is_a_verdict_and_prints_as_one(clips: tuple[Path, Path]) -> None:
    verdict = Judge(ScriptedEngine([[TIE]]))("a dog", *clips)
    assert verdict.overall
    assert verdict.overall is Preference.TIE
    assert str(verdict.overall) == "tie"
    assert str(verdict.judgments) == "TA: video 1, VQ: tie, MQ: video 2, OA: tie"
    assert verdict.record("p").judgment == {"TA": 1, "VQ": 0, "MQ": 2, "OA": 0}


def test_a_verdict_is_shown_on_one_short_line(clips: tuple[Path, Path]) -> None:
    verdict = Judge(ScriptedEngine([[ASKS, TIE]]))("a dog\n" * 200, *clips)
    assert repr(verdict) == (
        "Verdict(overall=tie, TA=video 1, VQ=tie, MQ=video 2, stop_reason=answered, rounds=2, tool_calls=1, "
        "frames_seen=9 frames, notes=0 notes)"
    )
    shown = repr(verdict.trajectory)
    assert len(shown.splitlines()) == 1
    assert len(shown) < 400, "without prompts, rounds and frames"


def test_no_verdict_says_why_on_its_line(clips: tuple[Path, Path]) -> None:
    verdict = Judge(ScriptedEngine([["nothing\nof use"]]))("a dog", *clips)
    assert not verdict.overall
    assert repr(verdict).startswith("Verdict(overall=None, reason='")
    assert verdict.stop_reason.value in repr(verdict)
    assert len(repr(verdict).splitlines()) == 1
