"""`vrthinker data`: what it writes, prints and refuses, and that it never loads torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_run import vrthinker
from published import feedback_row, genai_row, videoalign_row, write_csv, write_json

from vrthinker.data.pairs import load_pairs


def test_import_prints_what_it_read_and_writes_both_files(tmp_path: Path) -> None:
    rows = [videoalign_row(), videoalign_row(), videoalign_row(path_A="z.mp4", prompt="")]
    source = write_csv(tmp_path / "annotations.csv", rows)
    done = vrthinker("data", "import", "videoalign", source, "--out", tmp_path / "new" / "out")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == f"{tmp_path / 'new' / 'out' / 'pairs.jsonl'}: 2 pairs of 3 rows"
    assert lines[1].split() == ["label", "pairs", "video", "1", "video", "2", "ties", "derived"]
    assert lines[5].split() == ["OA", "2", "0", "0", "2", "2"]
    assert "OA is derived, nobody gave it: " in done.out
    assert "1             the same row again" in lines
    assert "1 empty captions" in lines
    assert lines[-1].startswith("3 of 3 files are not there")
    assert len(load_pairs(tmp_path / "new" / "out" / "pairs.jsonl")) == 2
    report = json.loads((tmp_path / "new" / "out" / "import.json").read_text())
    assert report["dimensions"]["OA"]["derived"] == 2
    again = vrthinker("data", "import", "videoalign", source, "--out", tmp_path / "new" / "out", "--json")
    assert json.loads(again.out) == report


def test_import_makes_folders_of_frames_that_are_clips(tmp_path: Path) -> None:
    from PIL import Image

    from vrthinker.video.open import open_reader

    rows = [feedback_row("a", 1), feedback_row("b", 3)]
    (tmp_path / "frames").mkdir()
    for row in rows:
        for name in row["images"]:
            Image.new("RGB", (32, 32), (row["visual quality"] * 20, 0, 0)).save(tmp_path / name)
    source = write_json(tmp_path / "vf.json", rows)
    for _ in range(2):  # the second time, the links are there
        done = vrthinker("data", "import", "videofeedback", source, "--out", tmp_path / "out")
        assert done.code == 0, done.err
    (pair,) = load_pairs(tmp_path / "out" / "pairs.jsonl")
    assert "clips/" in (tmp_path / "out" / "pairs.jsonl").read_text()
    assert open_reader().probe(str(pair.video_1)).n_frames == 3
    (pair.video_1 / "x.png").touch()
    done = vrthinker("data", "import", "videofeedback", source, "--out", tmp_path / "out")
    assert (done.code, done.line.endswith("give an empty folder as --out")) == (2, True)


def test_export_says_what_it_leaves_out(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", [videoalign_row()])
    vrthinker("data", "import", "videoalign", source, "--out", tmp_path)
    done = vrthinker(
        "data", "export", "genai-bench", tmp_path / "pairs.jsonl", "--out", tmp_path / "new" / "x.json"
    )
    assert (done.code, done.out) == (0, f"{tmp_path / 'new' / 'x.json'}: 1 pair\n")
    assert done.err.splitlines() == [f"left out: 1 {code} labels" for code in ("TA", "VQ", "MQ")]


def test_split_writes_its_parts_and_their_balance(tmp_path: Path) -> None:
    rows = [
        genai_row(id=i, prompt=f"c{i // 2}", video_left=f"{i}.mp4", video_right=f"r{i}.mp4")
        for i in range(20)
    ]
    vrthinker("data", "import", "genai-bench", write_json(tmp_path / "g.json", rows), "--out", tmp_path)
    command = ("data", "split", tmp_path / "pairs.jsonl", "--out", tmp_path / "s", "--parts", "a=0.8,b=0.2")
    done = vrthinker(*command)
    assert done.code == 0, done.err
    assert "40 clips cannot be read and known by path only" in done.err
    assert done.out.splitlines()[1].split() == ["a", "16", "80%", "OA", "16/0/0"]
    parts = {name: load_pairs(tmp_path / "s" / f"{name}.jsonl") for name in "ab"}
    assert {name: len(pairs) for name, pairs in parts.items()} == {"a": 16, "b": 4}
    whole = load_pairs(tmp_path / "pairs.jsonl")
    assert sorted(pair.id for pairs in parts.values() for pair in pairs) == sorted(pair.id for pair in whole)
    assert all(pair in whole for pairs in parts.values() for pair in pairs)
    files = {path: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    assert json.loads(vrthinker(*command, "--json").out) == json.loads(
        (tmp_path / "s" / "split.json").read_text()
    )
    assert {path: path.read_bytes() for path in (tmp_path / "s").iterdir()} == files


def test_a_split_leaves_no_part_of_an_older_one_beside_it(tmp_path: Path) -> None:
    rows = [genai_row(id=i, prompt=f"c{i}", video_left=f"{i}.mp4", video_right=f"r{i}.mp4") for i in range(9)]
    vrthinker("data", "import", "genai-bench", write_json(tmp_path / "g.json", rows), "--out", tmp_path)
    split = ("data", "split", tmp_path / "pairs.jsonl", "--out", tmp_path / "s", "--parts")
    assert vrthinker(*split, "a=0.4,b=0.3,c=0.3").code == 0
    files = {path: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    done = vrthinker(*split, "a=0.5,b=0.5", "--seed", "1")
    assert (done.code, done.out) == (2, "")
    assert "holds another split with the part c" in done.last_line
    assert {path: path.read_bytes() for path in (tmp_path / "s").iterdir()} == files
    (tmp_path / "s" / "c.jsonl").unlink()
    assert vrthinker(*split, "a=0.5,b=0.5", "--seed", "1").code == 0


def test_an_import_does_not_write_over_its_source(tmp_path: Path) -> None:
    source = write_json(tmp_path / "import.json", [genai_row()])
    before = source.read_bytes()
    done = vrthinker("data", "import", "genai-bench", source, "--out", tmp_path)
    assert done.code == 2
    assert "is the file that is read" in done.last_line
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import", "imagenet", "SRC", "--out", "NEW"], "data import: got 'imagenet', allowed: videoalign, "),
        (["import", "videoalign", "gone.csv", "--out", "NEW"], "gone.csv: cannot be read (No such file"),
        (["import", "videoalign", "SRC", "--out", "SRC"], "--out: "),
        (
            ["import", "videoalign", "SRC", "--out", "NEW", "--margin", "1"],
            "--margin: goes with formats that",
        ),
        (["import", "rapidata", "SRC", "--out", "NEW", "--margin", "-1"], "--margin: got -1.0"),
        (["import", "rapidata", "SRC", "--out", "NEW", "--margin", "nan"], "--margin: got nan"),
        (["import", "videoalign", "SRC", "--out", "NEW", "--videos", "gone"], "--videos: gone: no folder"),
        (
            ["import", "videoalign", "SRC", "--out", "NEW", "--ignore-assets"],
            "--ignore-assets: goes with rapidata",
        ),
        (
            ["import", "videoalign", "SRC", "--out", "NEW", "--pairs-per-prompt", "0"],
            "--pairs-per-prompt: got 0",
        ),
        (["import", "genai-bench", "SRC", "--out", "NEW"], "vote_type: got nothing, allowed: leftvote"),
        (["export", "csv", "SRC", "--out", "x.csv"], "data export: got 'csv'"),
        (["export", "videoalign", "SRC", "--out", "x.txt"], "--out: got x.txt, allowed for videoalign"),
        (["export", "videoalign", "SRC", "--out", "SRC"], "is the file that is read"),
        (["split", "SRC", "--out", "NEW", "--parts", "a=1,b=1"], "--parts: got shares that add up to 2"),
        (["split", "SRC", "--out", "NEW"], "the unknown column"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", [videoalign_row()])
    before = source.read_bytes()
    places = {"SRC": source, "NEW": tmp_path / "new"}
    done = vrthinker("data", *[places.get(argument, argument) for argument in arguments])
    assert (done.code, done.out) == (2, "")
    assert words in done.last_line
    assert source.read_bytes() == before
    assert not (tmp_path / "new").exists()
