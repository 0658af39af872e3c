"""Pairs judged in both orders of their clips: one verdict of two episodes, which counts once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import unescape
from pathlib import Path

import heavy  # noqa: F401
import numpy as np
import pytest
from cli_run import vrthinker
from clips import make_clip
from PIL import Image
from quick_judge import make_quick_judge

from vrthinker import Clip, Dimension, Judge, Preference, StopReason
from vrthinker.commands.judge import show_verdict
from vrthinker.data.pairs import Pair
from vrthinker.engine.base import Message
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.errors import InputError
from vrthinker.judge_file import judge_file, run_configuration
from vrthinker.records.verdict_log import VerdictLog
from vrthinker.records.verdicts import read_verdicts
from vrthinker.report.terminal import FileProgress
from vrthinker.video.transparency import NOTE


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return make_clip(folder / "a.mp4", 9, size=(64, 96)), make_clip(folder / "b.mp4", 7, size=(64, 96))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick_judge(tmp_path_factory.mktemp("model") / "tiny")


def says(label: int) -> str:
    return f"<snapshot>x</snapshot><think>y</think><answer>TA=1, VQ=0, MQ=2, OA={label}, CF=2</answer>"


def shown_first(messages: Sequence[Message]) -> str:
    """The name of the file that is shown as video 1."""
    return Path(next(f.key[0] for m in messages for f in m.frames)).name


def prefers_a(index: int, number: int, messages: Sequence[Message]) -> str:
    """A judge that likes a.mp4, wherever it stands, and the first place in TA."""
    return says(1 if shown_first(messages) == "a.mp4" else 2)


def test_a_habit_for_a_place_is_seen_and_becomes_a_tie(clips: tuple[Path, Path]) -> None:
    judge = Judge(ScriptedEngine(lambda *_: says(1)))
    verdict = judge("a dog", *clips, both_orders=True)
    assert verdict.judgments is not None
    assert verdict.judgments.as_dict() == {"TA": 0, "VQ": 0, "MQ": 0, "OA": 0}
    assert verdict.consistent is False
    assert verdict.rounds == 2
    record = verdict.record("p")
    assert record.orders is not None
    assert [order.judgment and order.judgment["OA"] for order in record.orders] == [1, 2]
    assert verdict.other_order is not None
    assert [video.path for video in verdict.other_order.videos] == [str(clips[1]), str(clips[0])]


def test_what_both_orders_say_stays(clips: tuple[Path, Path]) -> None:
    judge = Judge(ScriptedEngine(prefers_a))
    verdict = judge("a dog", *clips, both_orders=True)
    assert verdict.overall is Preference.VIDEO_1
    assert verdict.consistent is True
    assert judge("a dog", *clips).consistent is None
    turned = judge("a dog", *reversed(clips), both_orders=True)
    assert turned.judgments == verdict.judgments.swapped()  # type: ignore[union-attr]
    # 9 and 7 frames, of which 4 each are shown first: the second order's numbers are turned back.
    assert verdict.frames_seen == (1, 3, 5, 7, 10, 11, 13, 15)


def test_one_order_without_a_verdict_leaves_none(clips: tuple[Path, Path]) -> None:
    def fails_swapped(index: int, number: int, messages: Sequence[Message]) -> str:
        return "nothing" if shown_first(messages) == "b.mp4" else says(1)

    verdict = Judge(ScriptedEngine(fails_swapped))("a dog", *clips, both_orders=True)
    assert verdict.judgments is None
    assert verdict.stop_reason is StopReason.UNPARSEABLE
    assert str(verdict.reason).startswith("in the other order of the clips: round 1:")
    assert verdict.consistent is None
    assert verdict.record("p").judgment is None


def test_notes_of_both_orders_name_the_videos_of_the_pair(clips: tuple[Path, Path], tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGBA", (64, 96), (200, 0, 0, 128)).save(tmp_path / f"{number}.png")
    verdict = Judge(ScriptedEngine(lambda *_: says(1)))("a dog", clips[0], tmp_path, both_orders=True)
    assert verdict.notes == (f"video 2 {NOTE}",)
    assert verdict.other_order is not None
    assert verdict.other_order.notes == (f"video 1 {NOTE}",)


def test_a_record_says_which_reader_showed_which_clip(clips: tuple[Path, Path]) -> None:
    judge = Judge(ScriptedEngine(lambda *_: says(1)))
    array = Clip.from_array(np.zeros((4, 64, 96, 3), np.uint8), fps=4)
    assert judge("a dog", clips[0].read_bytes(), clips[1]).record("p").readers == ["pyav", "pyav"]
    assert judge("a dog", array, clips[1]).record("p").readers == ["memory", "pyav"]


def test_what_shows_a_verdict_of_both_orders_does_not_contradict_it(
    clips: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = Judge(ScriptedEngine(lambda *_: says(1)))("a dog", *clips, both_orders=True)
    assert verdict.overall is Preference.TIE
    story = "In the pair's own order: It answered from the first 8 frames: video 1 is better."
    assert verdict.story == story
    told = "in both orders of the clips: overall video 1 and video 2, they differ; the verdict of both is tie"
    assert verdict.notes == ()
    html = unescape(verdict._repr_html_())
    assert "<td>OA</td><td><b>tie</b></td>" in html
    assert story in html
    assert told in html
    page = unescape(verdict.report(tmp_path / "page.html").read_text())
    assert "<h1>A tie</h1>" in page
    assert story in page
    assert told in page
    show_verdict(verdict, as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "OA │ Overall │ tie" in shown
    assert story in shown
    assert told in shown
    assert "2 rounds, 0 tool calls, 8 of 16 frames seen, confidence middle" in shown


def test_what_shows_that_one_order_has_no_verdict_says_why(
    clips: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails_swapped(index: int, number: int, messages: Sequence[Message]) -> str:
        return "nothing" if shown_first(messages) == "b.mp4" else says(1)

    verdict = Judge(ScriptedEngine(fails_swapped))("a dog", *clips, both_orders=True)
    why = "no verdict (unparseable): in the other order of the clips: round 1:"
    assert why in verdict._repr_html_()
    page = verdict.report(tmp_path / "page.html").read_text()
    assert "<h1>No verdict</h1>" in page
    assert "in the other order of the clips: round 1:" in page
    show_verdict(verdict, as_json=False)
    assert why in " ".join(capsys.readouterr().out.split())


def test_swapping_the_clips_mirrors_verdict_and_probabilities(model: Path, clips: tuple[Path, Path]) -> None:
    judge = Judge.from_pretrained(model)
    verdict = judge("a dog", *clips, both_orders=True)
    mirrored = judge("a dog", *reversed(clips), both_orders=True)
    assert verdict.judgments is not None
    assert mirrored.judgments == verdict.judgments.swapped()
    assert verdict.probabilities is not None
    assert mirrored.probabilities is not None
    for dimension in Dimension:
        one, other = verdict.probabilities[dimension], mirrored.probabilities.swapped()[dimension]
        assert one is not None
        assert other is not None
        assert [one[p] for p in Preference] == pytest.approx([other[p] for p in Preference], abs=1e-4)
        assert one.video_1 + one.tie + one.video_2 == pytest.approx(1)


def test_a_file_has_one_record_and_two_episodes_a_pair(
    clips: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = clips
    # The third pair has the id that the first one's second episode would have.
    pairs = [
        Pair(id="p", prompt="a dog", video_1=a, video_2=b),
        Pair(id="q", prompt="a dog", video_1=b, video_2=a),
        Pair(id="p#swapped", prompt="a dog", video_1=a, video_2=tmp_path / "missing.mp4"),
    ]
    out, episodes = tmp_path / "verdicts.jsonl", tmp_path / "episodes.jsonl"
    judge = Judge(ScriptedEngine(prefers_a, collect_at_most=1))
    run, ignored = run_configuration(judge, pairs_file=tmp_path / "pairs.jsonl", seed=0, both_orders=True)
    with VerdictLog(out, run, ignore=ignored) as log:
        judge_file(judge, pairs, log, trajectories=episodes, both_orders=True)
        judge_file(judge, pairs, log, trajectories=episodes, both_orders=True)
    records = {record.id: record for record in read_verdicts(out)}
    assert len(read_verdicts(out)) == 3
    assert [records[i].judgment and records[i].judgment["OA"] for i in ("p", "q")] == [1, 2]
    assert "missing.mp4" in str(records["p#swapped"].reason)
    assert [records[i].consistent for i in ("p", "q", "p#swapped")] == [True, True, None]
    assert sorted(t.id for t in load_trajectories(episodes)) == ["p", "p#swapped'", "q", "q#swapped"]
    with FileProgress(3, done=3) as progress:
        assert progress.summarise(list(records.values()), out, as_json=False) == 1
        assert "both orders of the clips agree overall on 2 of 2 pairs (100%)" in capsys.readouterr().out
        progress.summarise(list(records.values()), out, as_json=True)
        assert json.loads(capsys.readouterr().out)["consistent"] == 2
    alone, ignored = run_configuration(judge, pairs_file=tmp_path / "pairs.jsonl", seed=0)
    with pytest.raises(InputError, match="both_orders"):
        VerdictLog(out, alone, ignore=ignored)


def test_the_command_prints_what_both_orders_said(
    model: Path, clips: tuple[Path, Path], tmp_path: Path
) -> None:
    episodes = tmp_path / "episodes.jsonl"
    command = ["judge", *map(str, clips), "--prompt", "a dog", "--model", str(model), "--both-orders"]
    done = vrthinker(*command, "--trajectories", episodes)
    assert done.code == 0, done.err
    shown = " ".join(done.out.split())
    assert "judged in both orders of the clips: overall" in shown
    assert [t.id for t in load_trajectories(episodes)] == ["pair", "pair#swapped"]
