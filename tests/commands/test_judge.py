"""`vrthinker judge`: a pair, a file of pairs, what is refused, what is kept when processes die."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import heavy  # noqa: F401
import pytest
from cli_run import vrthinker
from clips import cut, make_clip
from command_worker import at, command
from forks import Outcomes

from vrthinker import Judge
from vrthinker.commands.make_tiny import RANDOM_NOTE
from vrthinker.episode.trajectory import load_trajectories

SEED = 20261121
WritePairs = Callable[..., Path]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_judge_prints_a_table(tiny: Path, clips: Path) -> None:
    done = vrthinker(
        "judge", clips / "a.mp4", clips / "b.mp4", "--prompt", "[red]a dog[/red]", "--model", tiny
    )
    assert done.code == 0, done.err
    for words in ("Text Alignment", "Overall", "of 54 frames seen", RANDOM_NOTE):
        assert words in done.out


def test_judge_prints_json_and_keeps_the_trajectory(tiny: Path, clips: Path, tmp_path: Path) -> None:
    record = tmp_path / "t.jsonl"
    done = vrthinker(
        *("judge", clips / "a.mp4", clips / "b.mp4", "--prompt", "x", "--model", tiny, "--json"),
        *("--trajectories", record, "--window", 2, "--rounds", 2, "--frames", 4, "--seed", 5),
    )
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert set(printed["judgment"]) == {"TA", "VQ", "MQ", "OA"}
    (trajectory,) = load_trajectories(record)
    assert (trajectory.settings.window, trajectory.settings.max_rounds, trajectory.seed) == (2, 2, 5)
    assert trajectory.settings.initial_frames == 4
    assert printed["rounds"] == len(trajectory.rounds) <= 2
    explained = printed["explain"]
    assert explained["story"]
    assert [told["round"] for told in explained["rounds"]] == list(range(1, printed["rounds"] + 1))
    assert explained["rounds"][-1]["judgment"] == printed["judgment"]
    assert (
        sorted({frame for told in explained["rounds"] for frame in told["frames"]}) == printed["frames_seen"]
    )


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip that breaks off, an empty one, and one that is text."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "folder").mkdir()
    cut(make_clip(folder / "whole.mkv", 40, size=(64, 96)), folder / "cut.mkv", 0.5)
    return folder


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["judge"], "--model: missing"),
        (["judge", "--model", "MODEL"], "0 clips and no --prompt"),
        (["judge", "A", "--model", "MODEL", "--prompt", "x"], "got 1 clip and a --prompt"),
        (["judge", "A", "B", "--model", "/no/such/folder", "--prompt", "x"], "/no/such/folder"),
        (["judge", "A", "MISSING", "--model", "MODEL", "--prompt", "x"], "missing.mp4: "),
        (["judge", "A", "EMPTY", "--model", "MODEL", "--prompt", "x"], "empty.mp4: "),
        (["judge", "A", "TEXT", "--model", "MODEL", "--prompt", "x"], "text.mp4: "),
        (["judge", "A", "FOLDER", "--model", "MODEL", "--prompt", "x"], "folder"),
        (["judge", "A", "CUT", "--model", "MODEL", "--prompt", "x"], "cut.mkv: "),
        (["judge", "A", "B", "--model", "MODEL", "--prompt", "x", "--rounds", "0"], "--rounds: got 0"),
        (["judge", "A", "B", "--model", "MODEL", "--prompt", "x", "--frames", "0"], "--frames: got 0"),
        (["judge", "A", "B", "--model", "MODEL", "--prompt", "x", "--frames", "9"], "--frames: got 9"),
        (["judge", "A", "B", "--model", "MODEL", "--prompt", "x", "--window", "-1"], "--window: got -1"),
        (
            ["judge", "A", "B", "--model", "MODEL", "--prompt", "x", "--batch-size", "0"],
            "--batch-size: got 0",
        ),
        (
            ["judge", "A", "B", "--model", "MODEL", "--prompt", "x", "--out", "OUT"],
            "--out: goes with --pairs",
        ),
        (["judge", "A", "B", "--model", "n" * 5000, "--prompt", "x"], "nnn"),
        (["judge", "A", "B", "--model", "/" + "n" * 5000, "--prompt", "x"], "nnn"),
        (["judge", "--pairs", "PAIRS", "--out", "/", "--model", "MODEL"], "/: got a folder"),
        (
            ["judge", "--pairs", "PAIRS", "--out", "x.csv", "--table", "y.csv", "--model", "MODEL"],
            "--table x.csv writes a table",
        ),
        (["judge", "--pairs", "PAIRS", "--out", "x.tsv", "--model", "MODEL"], "like x.jsonl"),
        (
            ["judge", "--pairs", "PAIRS", "--out", "OUT", "--table", "x.txt", "--model", "MODEL"],
            "--table: got x",
        ),
        (
            ["judge", "--pairs", "PAIRS", "--out", "OUT", "--trajectories", "t.csv", "--model", "MODEL"],
            "--trajectories: got t.csv",
        ),
        (["judge", "A", "B", "--model", "MODEL", "--prompt", "x", "--dataset", "mine"], "mine"),
        (
            ["judge", "A", "B", "--model", "MODEL", "--prompt", "x", "--device", "gpu7"],
            "--device: got 'gpu7'",
        ),
        (["judge", "--pairs", "PAIRS", "--model", "MODEL"], "--out"),
        (["judge", "--pairs", "MISSING", "--out", "OUT", "--model", "MODEL"], "missing.mp4"),
        (["judge", "--pairs", "TEXT", "--out", "OUT", "--model", "MODEL"], "line 1"),
        (["make-tiny", "MODEL"], "tiny"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    args: list[str],
    words: str,
    tiny: Path,
    clips: Path,
    broken: Path,
    write_pairs: WritePairs,
    tmp_path: Path,
) -> None:
    places = {
        "MODEL": tiny,
        "A": clips / "a.mp4",
        "B": clips / "b.mp4",
        "MISSING": tmp_path / "missing.mp4",
        "EMPTY": broken / "empty.mp4",
        "TEXT": broken / "text.mp4",
        "FOLDER": broken / "folder",
        "CUT": broken / "cut.mkv",
        "PAIRS": write_pairs(tmp_path / "pairs.jsonl", 1),
        "OUT": tmp_path / "out.jsonl",
    }
    done = vrthinker(*[places.get(arg, arg) for arg in args])
    assert (done.code, done.out) == (2, ""), done.err
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.line, "and nothing was loaded"
    assert not list(tmp_path.glob("out.jsonl*"))


def test_a_truncated_clip_is_judged_only_when_told_to_and_the_verdict_says_so(
    tiny: Path, clips: Path, broken: Path
) -> None:
    args = ("judge", clips / "a.mp4", broken / "cut.mkv", "--prompt", "x", "--model", tiny, "--json")
    refused = vrthinker(*args)
    assert refused.code == 2
    assert "--tolerate-truncation" in refused.err
    done = vrthinker(*args, "--tolerate-truncation")
    assert done.code == 0, done.err
    assert any("video 2" in note for note in json.loads(done.out)["notes"])


def test_a_pairs_file_is_judged_and_failures_are_listed_with_reasons(
    tiny: Path, clips: Path, write_pairs: WritePairs, tmp_path: Path
) -> None:
    bad = {"id": "bad", "prompt": "x", "video_1": "a.mp4", "video_2": "nowhere.mp4"}
    pairs = write_pairs(tmp_path / "pairs.jsonl", 3, [bad])
    out, record = tmp_path / "verdicts.jsonl", tmp_path / "t.jsonl"
    args = ("judge", "--pairs", pairs, "--out", out, "--model", tiny)
    done = vrthinker(*args, "--trajectories", record)
    assert done.code == 1, done.err
    assert "3 verdicts" in done.out
    assert "nowhere.mp4" in done.out
    rows = {row["id"]: row for row in read_jsonl(out)}
    assert len(rows) == 4
    assert rows["bad"]["judgment"] is None
    assert rows["bad"]["stop_reason"] == "video_error"
    assert all(rows[f"p{i}"]["judgment"] is not None for i in range(3))
    assert {t.id for t in load_trajectories(record)} == {f"p{i}" for i in range(3)}

    before = out.read_bytes()
    again = vrthinker(*args)
    assert again.code == 1
    assert out.read_bytes() == before, "a second run judges nothing twice"

    (tmp_path / "nowhere.mp4").symlink_to(clips / "b.mp4")
    mended = vrthinker(*args, "--retry-failed", "--json")
    assert mended.code == 0, mended.err
    assert json.loads(mended.out)["verdicts"] == 4

    other = vrthinker(*args, "--window", "3")
    assert other.code == 2
    assert "window" in other.err


def test_a_finished_file_run_again_loads_no_model_and_may_become_a_table(
    tiny: Path, write_pairs: WritePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"id": "bad", "prompt": "x", "video_1": "a.mp4", "video_2": "nowhere.mp4"}
    pairs, out = write_pairs(tmp_path / "pairs.jsonl", 1, [bad]), tmp_path / "verdicts.jsonl"
    args = ("judge", "--pairs", pairs, "--out", out, "--model", tiny)
    table = tmp_path / "verdicts.csv"
    first = vrthinker(*args, "--table", table)
    assert first.code == 1
    assert first.err.splitlines()[0] == f"loading {tiny}", "nobody waits in silence"
    assert first.err.splitlines()[1].startswith("1 clip not there, so that pairs get no verdict: ")
    assert "nowhere.mp4" in first.err.splitlines()[1]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    recorded = {row["id"]: row for row in read_jsonl(out)}
    assert [row["id"] for row in rows] == list(recorded)
    for row in rows:
        labels = recorded[row["id"]]["judgment"] or dict.fromkeys(("TA", "VQ", "MQ", "OA"), "")
        assert {code: row[code] for code in labels} == {code: str(label) for code, label in labels.items()}
        assert json.loads(row["frames_seen"]) == recorded[row["id"]]["frames_seen"]
        assert json.loads(row["notes"]) == recorded[row["id"]]["notes"]
        assert row["reason"] == (recorded[row["id"]]["reason"] or "")

    def loaded(*_: object, **__: object) -> NoReturn:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(Judge, "from_pretrained", loaded)
    before = table.read_bytes()
    table.write_text(table.read_text().splitlines()[0])
    again = vrthinker(*args, "--table", table)
    # What reading pixels cost is told of the run that read them.
    pixels = [line for line in first.out.splitlines(keepends=True) if line.startswith("pixels: ")]
    assert len(pixels) == 1
    said = first.out.replace(pixels[0], "")
    assert (again.code, again.out) == (1, said)
    assert again.err.splitlines()[0] == "nothing to judge: 2 of 2 pairs recorded already"
    assert table.read_bytes() == before
    named = vrthinker("judge", "--pairs", pairs, "--out", table, "--model", tiny)
    assert (named.code, named.out) == (1, said), "the table's lines are those beside it"
    assert f"the verdicts are kept as lines, which a killed run continues: {out}" in named.err
    assert table.read_bytes() == before
    other = vrthinker(*args, "--window", "3")
    assert (other.code, other.out) == (2, "")
    assert "window=3" in other.line


def test_a_judge_that_cannot_be_loaded_leaves_no_results_file(
    tiny: Path, write_pairs: WritePairs, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(tiny, model)
    (model / "model.safetensors").write_bytes(b"damaged")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 1)
    done = vrthinker("judge", "--pairs", pairs, "--out", out, "--model", model)
    assert done.code == 2, done.err
    assert not list(tmp_path.glob("out.jsonl*")), "another model may be given next"


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_replaces_nothing_but_a_table_of_verdicts(
    ending: str, write_pairs: WritePairs, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    table, out = tmp_path / f"table.{ending}", tmp_path / "out.jsonl"
    pairs = write_pairs(tmp_path / "pairs.jsonl", 1)
    args = ("judge", "--pairs", pairs, "--out", out, "--model", "nano", "--table", table)
    for content in (b"id,mine\na,1\n", b"PAR1 and so on", b"\xff"):
        table.write_bytes(content)
        done = vrthinker(*args)
        assert (done.code, done.line) == (
            2,
            f"vrthinker: --table: {table}: holds something else than verdicts; give another file",
        )
        assert table.read_bytes() == content
    table.unlink()
    table.mkdir()
    assert "holds something else than verdicts" in vrthinker(*args).line
    table.rmdir()
    table.symlink_to(pairs)
    assert "another file of this command" in vrthinker(*args).line


@pytest.mark.parametrize("place", ["clip", "pairs", "out"])
def test_a_trajectories_file_never_harms_another_file(
    place: str, tiny: Path, clips: Path, write_pairs: WritePairs, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 1)
    clip, out = tmp_path / "c.mp4", tmp_path / "out.jsonl"
    clip.write_bytes((clips / "a.mp4").read_bytes())
    wanted = {"clip": clip, "pairs": pairs, "out": out}[place]
    before = {path: path.read_bytes() for path in (clip, pairs)}
    if place == "clip":
        args = ["judge", clip, clips / "b.mp4", "--prompt", "x"]
    else:
        args = ["judge", "--pairs", pairs, "--out", out]
    done = vrthinker(*args, "--model", tiny, "--trajectories", wanted)
    assert done.code == 2, done.out + done.err
    assert f"{wanted}: got the same file twice" in done.err
    assert {path: path.read_bytes() for path in before} == before


# Processes

APPEND = "vrthinker.records.verdict_log:VerdictLog.append"
CLAIM = "vrthinker.records.verdict_log:VerdictLog.claim"


@pytest.mark.multi_process
def test_two_processes_share_one_results_file(
    tiny: Path, write_pairs: WritePairs, commands: Outcomes, tmp_path: Path
) -> None:
    """Each records a verdict while the other is in the middle of its work."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 10)
    out = tmp_path / "verdicts.jsonl"
    meeting = at(APPEND, 1, meet=tmp_path / "meeting")
    job = command(
        *("judge", "--pairs", pairs, "--out", out, "--model", tiny, "--batch-size", 2), moments=[meeting]
    )
    for done in commands([job, job], together=True):
        assert done["result"] == 0, done
    assert len(list((tmp_path / "meeting").iterdir())) == 2
    rows = read_jsonl(out)
    assert Counter(row["id"] for row in rows) == {f"p{index}": 1 for index in range(10)}
    assert all(row["judgment"] is not None for row in rows)


class Killed:
    """A file of pairs that is judged by processes which die."""

    def __init__(self, pairs: Path, model: Path, commands: Outcomes) -> None:
        self.out = pairs.with_name("verdicts.jsonl")
        self.seen: dict[str, str] = {}
        self._args = ("judge", "--pairs", pairs, "--out", self.out, "--model", model, "--batch-size", 4)
        self._commands = commands

    def run(self, **how: Any) -> int:
        """Runs until it dies; every whole line stays what it was. Returns the exit code."""
        (done,) = self._commands([command(*self._args, **how)])
        for line in self.out.read_text().splitlines(keepends=True) if self.out.exists() else []:
            if line.endswith("\n"):  # or a torn last line, mended by the next run
                assert self.seen.setdefault(json.loads(line)["id"], line) == line, "a verdict changed"
        code: int = done["code"] or done["result"]
        return code

    def finish(self, count: int) -> None:
        """Runs to the end: every pair once, and nothing that was recorded is lost."""
        assert self.run() == 0
        rows = self.out.read_text().splitlines(keepends=True)
        assert Counter(json.loads(row)["id"] for row in rows) == {f"p{index}": 1 for index in range(count)}
        assert set(self.seen.values()) == set(rows)


@pytest.mark.multi_process
def test_killed_and_run_again_every_pair_is_there_once(
    tiny: Path, write_pairs: WritePairs, commands: Outcomes, tmp_path: Path
) -> None:
    """Before the first verdict, with verdicts recorded and others judged, and in the middle of a line."""
    killed = Killed(write_pairs(tmp_path / "pairs.jsonl", 6), tiny, commands)
    assert killed.run(moments=[at(CLAIM, 1, "SIGKILL", after=True)]) == -9
    assert not killed.seen
    assert killed.run(moments=[at(APPEND, 2, "SIGKILL")]) == -9
    assert len(killed.seen) == 1
    assert killed.run(moments=[at("os:write", 1, "SIGKILL", tear=90)]) == -9
    assert not killed.out.read_bytes().endswith(b"\n")
    assert killed.run(moments=[at(APPEND, 1, "SIGKILL", after=True)]) == -9
    assert len(killed.seen) == 2
    killed.finish(6)


@pytest.mark.slow
@pytest.mark.multi_process
def test_killed_at_many_moments_and_run_again_every_pair_is_there_once(
    tiny: Path, write_pairs: WritePairs, commands: Outcomes, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    killed = Killed(write_pairs(tmp_path / "pairs.jsonl", 40), tiny, commands)
    for _ in range(12):
        call = chance.randrange(1, 4)
        if chance.random() < 0.3:
            moment = at("os:write", call, "SIGKILL", tear=chance.randrange(1, 300))
        else:
            moment = at(chance.choice((APPEND, CLAIM)), call, "SIGKILL", after=chance.random() < 0.5)
        assert killed.run(moments=[moment]) == -9
    assert 8 < len(killed.seen) < 40
    killed.finish(40)
