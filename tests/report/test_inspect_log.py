"""Evaluations as logs of inspect_ai: read back with its own reader, they say what the run says."""

from __future__ import annotations

import base64
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cli_run import vrthinker
from clips import make_clip
from PIL import Image
from report.test_eval_page import HOSTILE, about_of, item
from report.test_page import DONE, asks, judged

from vrthinker.episode.trajectory import Trajectory, dump_line
from vrthinker.errors import InputError
from vrthinker.evals.run_files import write_run
from vrthinker.records.eval_items import EvalItem, ItemStatus
from vrthinker.report.inspect_log import write_inspect_log

ITEMS = [
    item(1, 1, confidence=1, prompt=HOSTILE),
    item(2, 0, confidence=2),
    item(3, None),
    item(4, None, status=ItemStatus.FAILED, reason="video_error: broken"),
    item(5, None, status=ItemStatus.JUDGED, reason=None, scores={"OA": -0.4}, labels={"OA": 2}),
]


@pytest.fixture
def episode(tmp_path: Path) -> Trajectory:
    first = make_clip(tmp_path / "first.mp4", 16, fps=8)
    second = make_clip(tmp_path / "second.mp4", 12, size=(64, 64))
    return judged((first, second), [asks("6, 21"), DONE]).model_copy(update={"id": "p2"})


def exported(out: Path, items: list[EvalItem], **options: Any) -> Any:
    log = pytest.importorskip(
        "inspect_ai.log", reason="inspect_ai is not installed: pip install 'vrthinker[view]'"
    )
    written = write_inspect_log(out, items, about_of(items), **options)
    return log.read_eval_log(str(written), resolve_attachments=True)


def test_a_log_has_every_item_with_its_scores_and_the_run_s_own_numbers(tmp_path: Path) -> None:
    found = exported(tmp_path / "run.eval", ITEMS)
    assert found.status == "success"
    assert found.eval.model.startswith("m <script>"), "text stays text"
    assert found.eval.task_version == about_of(ITEMS)["summary"]["protocol_version"]
    samples = {sample.id: sample for sample in found.samples}
    assert list(samples) == [one.id for one in ITEMS]
    assert HOSTILE in samples["p1"].input
    assert samples["p1"].target == "video 1"
    assert {code: score.value for code, score in samples["p1"].scores.items()} == {
        **{"TA": "C", "VQ": "C", "MQ": "I"},
        "OA": "C",
    }
    assert samples["p2"].scores["OA"].value == "I"
    assert samples["p2"].scores["OA"].answer == "tie"
    assert {samples[name].scores["OA"].value for name in ("p3", "p4")} == {"N"}
    assert samples["p3"].scores["OA"].reason == "invalid_response_format"
    assert samples["p4"].scores["OA"].explanation == "video_error: broken"
    assert set(samples["p5"].scores) == {"OA"}, "people judged nothing else of it"
    assert samples["p5"].metadata["scores"] == {"OA": -0.4}
    measured = about_of(ITEMS)["summary"]["measures"]["all"]
    (overall,) = [score for score in found.results.scores if score.name == "OA"]
    assert overall.metrics["accuracy"].value == measured["oa/tau"]["value"]
    assert overall.metrics["low"].value == measured["oa/tau"]["low"]
    assert (found.results.total_samples, found.results.completed_samples) == (5, 3)


def test_an_episode_is_told_with_its_pictures(tmp_path: Path, episode: Trajectory) -> None:
    lines = tmp_path / "trajectories.jsonl"
    older = episode.model_copy(update={"rounds": episode.rounds[:1]})
    lines.write_text(dump_line(older) + dump_line(episode) + "no episode\n")
    sample = exported(tmp_path / "a.eval", ITEMS, trajectories=lines, pictures=1).samples[1]
    written = [turn.text for turn in sample.messages if turn.role == "assistant"]
    assert written == [record.text for record in episode.rounds], "the last episode of an id counts"
    images = [part.image for turn in sample.messages for part in turn.content if hasattr(part, "image")]
    shown = len(episode.rounds[0].live) + 2
    assert len(images) == shown, "the surest error has pictures: its first frames, and the two it asked for"
    sizes = {Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).format for image in images}
    assert sizes == {"JPEG"}
    assert "asked for 2 frames" in sample.scores["OA"].explanation
    named = exported(tmp_path / "b.eval", ITEMS, trajectories=lines, pictures=0).samples[1]
    texts = " ".join(turn.text for turn in named.messages)
    assert "[frame 6: video 1, " in texts
    assert "[frame 21: video 2, " in texts
    Path(episode.videos[0].path).unlink()
    half = exported(tmp_path / "c.eval", ITEMS, trajectories=lines, pictures=5).samples[1]
    assert "[frame 6: video 1, " in " ".join(turn.text for turn in half.messages), "its clip is gone"


def test_two_exports_of_a_run_hold_the_same(tmp_path: Path, episode: Trajectory) -> None:
    lines = tmp_path / "trajectories.jsonl"
    lines.write_text(dump_line(episode))
    contents = []
    for name in ("a.eval", "b.eval", "b.eval"):
        exported(tmp_path / name, ITEMS, trajectories=lines)
        with zipfile.ZipFile(tmp_path / name) as archive:
            contents.append({member: archive.read(member) for member in archive.namelist()})
    assert contents[0] == contents[1] == contents[2]
    assert sorted(path.name for path in tmp_path.glob("*.eval")) == ["a.eval", "b.eval"]


def test_odd_ids_and_records_cost_no_sample_and_no_file(tmp_path: Path, episode: Trajectory) -> None:
    odd = ["a\0b", "a\0c", "../../x", "y" * 70_000, "plain"]
    items = [item(number, 1, id=name) for number, name in enumerate(odd)]
    images = episode.videos[0].model_copy(update={"codec": "images", "fps": 0.0})
    frames = tuple(frame.model_copy(update={"frame_index": -1000}) for frame in episode.frames)
    changes = {"id": "plain", "frames": frames, "videos": (images, episode.videos[1])}
    lines = tmp_path / "trajectories.jsonl"
    lines.write_text(dump_line(episode.model_copy(update=changes)))
    (tmp_path / "log.new.eval").write_text("mine")
    found = exported(tmp_path / "log.eval", items, trajectories=lines)
    assert {sample.metadata["id"] for sample in found.samples} == set(odd)
    assert len(found.samples) == len(odd)
    with zipfile.ZipFile(tmp_path / "log.eval") as archive:
        samples = [name for name in archive.namelist() if name.startswith("samples/")]
    assert len(samples) == 5
    assert not any(".." in name or "\0" in name for name in samples)
    assert (tmp_path / "log.new.eval").read_text() == "mine"
    assert list(tmp_path.glob(".*")) == []
    about = {**about_of(ITEMS), "provenance": {"date": "0001-01-01T00:00:00+14:00"}}
    write_inspect_log(tmp_path / "log.eval", ITEMS, about)


def test_what_cannot_be_exported_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.eval").write_text("my notes")
    (tmp_path / "folder.eval").mkdir()
    for name, words in (
        ("log.json", "allowed: .eval"),
        ("notes.eval", "holds something else than a log"),
        ("folder.eval", "not a file"),
        ("gone/log.eval", "no folder that can be written to"),
    ):
        with pytest.raises(InputError, match=words):
            write_inspect_log(tmp_path / name, ITEMS, about_of(ITEMS))
    assert (tmp_path / "notes.eval").read_text() == "my notes"
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    with pytest.raises(InputError, match=r"not installed: pip install 'vrthinker\[view\]'"):
        write_inspect_log(tmp_path / "log.eval", ITEMS, about_of(ITEMS))
    assert not (tmp_path / "log.eval").exists()


def test_the_command_writes_the_log_into_the_run_s_folder(tmp_path: Path) -> None:
    about = {"judge": "m", "data": "d", "protocol": {}}
    write_run(tmp_path / "run", ITEMS, about_of(ITEMS)["summary"], about)
    refused = vrthinker("eval", "export", tmp_path / "run", "--pictures", -1)
    assert refused.code == 2
    assert "--pictures: got -1, allowed: 0 and above" in refused.last_line
    elsewhere = vrthinker("eval", "export", tmp_path)
    assert elsewhere.code == 2
    assert "has no items.jsonl" in elsewhere.last_line
    pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed")
    done = vrthinker("eval", "export", tmp_path / "run")
    assert (done.code, done.out) == (0, f"{tmp_path / 'run' / 'log.eval'}\n")
    assert zipfile.is_zipfile(tmp_path / "run" / "log.eval")


def test_a_file_that_is_no_run_is_named(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed")
    for broken in ({}, {"summary": {}}, {"summary": {**about_of(ITEMS)["summary"], "measures": 3}}):
        with pytest.raises(InputError, match=r"eval\.json is not what"):
            write_inspect_log(tmp_path / "log.eval", ITEMS, broken)
