"""A verdict in the hands of its caller: what asks for it, prints it and shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import make_clip
from quick_judge import make_quick_judge

from vrthinker import Clip, EngineError, InputError, Judge, Preference
from vrthinker.data.pairs import Pair
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.settings import SETTINGS_FILE
from vrthinker.judge_items import EMPTY_NOTE, SAME_NOTE

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


def test_a_notebook_shows_a_verdict_as_a_table(clips: tuple[Path, Path], tmp_path: Path) -> None:
    verdict = Judge(ScriptedEngine([[ASKS, TIE]]))("a <script>dog</script>", *clips)
    html = verdict._repr_html_()
    assert "a &lt;script&gt;dog&lt;/script&gt;" in html
    assert "<td>Text Alignment</td><td>TA</td><td>video 1</td>" in html
    assert "<b>tie</b>" in html
    assert "video 1: <code>a.mp4</code> and video 2: <code>b.mp4</code>" in html
    assert verdict.story == "First video 1. It asked for 1 frame, and changed to a tie."
    assert verdict.story in html
    silent = Judge(ScriptedEngine([["nothing of use"]]))("a dog", *clips)
    assert "no verdict (unparseable): round 1" in silent._repr_html_()
    page = verdict.report(tmp_path / "page.html")
    assert verdict.story in page.read_text()


def test_clips_in_memory_are_shown_if_they_are_given_again(clips: tuple[Path, Path], tmp_path: Path) -> None:
    frames = np.random.default_rng(3).integers(0, 256, (9, 64, 96, 3), np.uint8)
    in_array, in_bytes = Clip.from_array(frames, fps=8), Clip.from_bytes(clips[1].read_bytes())
    verdict = Judge(ScriptedEngine([[ASKS, TIE]]))("a dog", in_array, in_bytes)
    bare = verdict.report(tmp_path / "bare.html").read_text()
    assert bare.count("neither the clip nor its frames are shown") == 2
    page = verdict.report(tmp_path / "page.html", clips=[in_array, in_bytes]).read_text()
    assert "are shown:" not in page
    assert len(re.findall(r"data:video/mp4;base64,", page)) == 2
    mixed = Judge(ScriptedEngine([[ASKS, TIE]]))("a dog", in_array, clips[1])
    assert "are shown:" not in mixed.report(tmp_path / "mixed.html", clips=[in_array, clips[1]]).read_text()
    other = Clip.from_array(frames[::-1].copy(), fps=8)
    with pytest.raises(InputError, match=r"clips: number 1: got memory:sha256:.*, allowed: what was judged"):
        verdict.report(tmp_path / "page.html", clips=[other])


def test_no_verdict_says_why_on_its_line(clips: tuple[Path, Path]) -> None:
    verdict = Judge(ScriptedEngine([["nothing\nof use"]]))("a dog", *clips)
    assert not verdict.overall
    assert repr(verdict).startswith("Verdict(overall=None, reason='")
    assert verdict.stop_reason.value in repr(verdict)
    assert len(repr(verdict).splitlines()) == 1


def test_what_makes_a_verdict_doubtful_is_noted(clips: tuple[Path, Path], tmp_path: Path) -> None:
    link = tmp_path / "link.mp4"
    link.symlink_to(clips[0])
    judge = Judge(ScriptedEngine(lambda session, number, messages: TIE))
    assert judge("a dog", *clips).notes == ()
    assert judge(" \n", *clips).notes == (EMPTY_NOTE,)
    assert judge("a dog", clips[0], link).notes == (SAME_NOTE,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "a", "b"), "caption: got NoneType, allowed: a text"),
        ((b"x", "a", "b"), "caption: got bytes, allowed: a text"),
        (("x", None, "b"), "video 1: got NoneType, allowed: a path, bytes"),
        (("x", "a", 3), "video 2: got int, allowed: a path, bytes"),
        (("x", "a", "b", {"dataset": 3}), "dataset: got int, allowed: a name, or None"),
        (("x", "a", "b", {"seed": "1"}), "seed: got '1', allowed: an integer"),
        (("x", "a\0b", "b"), "cannot be read"),
    ],
)
def test_arguments_of_other_types_are_input_errors(arguments: tuple[Any, ...], message: str) -> None:
    *given, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(InputError, match=re.escape(message)):
        Judge(ScriptedEngine([[TIE]]))(*given, **options)


def test_a_closed_judge_judges_no_more(clips: tuple[Path, Path]) -> None:
    with Judge(ScriptedEngine([[TIE]])) as judge:
        pass
    judge.close()
    with pytest.raises(EngineError, match="the judge is closed"):
        judge("a dog", *clips)
    with pytest.raises(EngineError, match="the judge is closed"):
        list(judge.judge_pairs([Pair(id="p", prompt="x", video_1=clips[0], video_2=clips[1])]))


@pytest.mark.parametrize("wrong", [None, 3])
def test_a_model_of_another_type_is_an_input_error(wrong: Any) -> None:
    with pytest.raises(InputError, match=f"model: got {type(wrong).__name__}"):
        Judge.from_pretrained(wrong)


def test_the_configuration_is_known_before_the_weights_are_loaded(tmp_path: Path) -> None:
    folder = make_quick_judge(tmp_path / "tiny")
    for name in ("", SETTINGS_FILE):
        if name:
            (folder / name).unlink()
        expected = Judge.configuration_of(folder, window=2, max_pixels=20_000)
        with Judge.from_pretrained(folder, window=2, max_pixels=20_000) as judge:
            assert judge.configuration.model == expected.model
            assert judge.configuration.settings == expected.settings
            assert judge.configuration.templates.digest == expected.templates.digest
    with pytest.raises(InputError, match="initial_frames: got 9, allowed: an even number"):
        Judge.configuration_of(folder, initial_frames=9)
    with pytest.raises(InputError, match="max_pixels: got 'x'"):
        Judge.configuration_of(folder, max_pixels="x")  # type: ignore[arg-type]
