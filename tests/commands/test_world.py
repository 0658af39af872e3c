"""`vrthinker world`: worlds on disk, ceilings on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_run import vrthinker

from vrthinker.commands.world import WorldMakeCommand
from vrthinker.data.pairs import load_pairs
from vrthinker.world.files import load_truths


def assert_written(folder: Path, count: int, *options: object) -> None:
    done = vrthinker("world", "make", "--out", folder, *options)
    assert (done.code, done.out, done.err) == (0, f"{folder / 'pairs.jsonl'}\n", "")
    pairs, truths = load_pairs(folder / "pairs.jsonl"), load_truths(folder)
    assert [pair.id for pair in pairs] == [f"easy-0-{index:06d}" for index in range(count)]
    assert [pair.labels for pair in pairs] == [truth.judgments.as_dict() for truth in truths]
    assert all(pair.video_1.is_file() and pair.video_2.is_file() for pair in pairs)


def test_world_make_writes_pairs_and_refuses_another_world(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    assert_written(folder, 5, "--pairs", 5)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    assert_written(folder, 5, "--pairs", 5)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")} == before
    refused = vrthinker("world", "make", "--out", folder, "--pairs", 5, "--difficulty", "hard")
    assert (refused.code, refused.out) == (2, "")
    assert "was made with" in refused.line
    assert WorldMakeCommand(out=folder).pairs == 200


@pytest.mark.slow
@pytest.mark.multi_process
def test_world_make_writes_two_hundred_pairs_by_itself(tmp_path: Path) -> None:
    assert_written(tmp_path / "w", 200)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["make", "--out", "NEW", "--pairs", "0"], "got 0 pairs, allowed: 1 to 1000000"),
        (["make", "--out", "NEW", "--seed", "-1"], "got seed -1"),
        (["make", "--out", "NEW", "--workers", "0"], "--workers: got 0"),
        (["ceilings", "--pairs", "0"], "got 0 pairs"),
    ],
)
def test_world_refuses_bad_input_in_one_line(args: list[str], words: str, tmp_path: Path) -> None:
    done = vrthinker("world", *[tmp_path / "new" if arg == "NEW" else arg for arg in args])
    assert (done.code, done.out) == (2, "")
    assert words in done.line
    assert not (tmp_path / "new").exists()


def test_world_ceilings_are_printed_as_a_table_and_as_json() -> None:
    done = vrthinker("world", "ceilings", "--pairs", 30, "--seed", 2)
    assert done.code == 0, done.err
    assert "perfect readers of the easy world, 30 pairs" in done.out
    (marked,) = (line for line in done.out.splitlines() if line.startswith("marked gaps  "))
    assert marked.count("1.000") == 4
    (even,) = (line for line in done.out.splitlines() if line.startswith("16 frames, even"))
    assert even.split()[-1] == "-"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    done = vrthinker("world", "ceilings", "--pairs", 30, "--seed", 2, "--json")
    rows = json.loads(done.out, parse_constant=refuse)
    assert [row["calls"] for row in rows] == [0, 2, 2, 6, 0, 0, 0]
    assert rows[2]["oa_tau"] == rows[2]["oa_tau_best_guess"] == 1.0
    assert rows[4]["oa_tau_best_guess"] is None
