"""The commands as a user runs them: real processes, real files, real kills."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from clips import cut, make_clip

from vrthinker.commands.make_tiny import RANDOM_NOTE, make_tiny_judge
from vrthinker.episode.trajectory import load_trajectories


def vrthinker(
    *args: object, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vrthinker", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False)


def start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vrthinker", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_judge(tmp_path_factory.mktemp("model") / "tiny", "qwen2.5-vl")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "a.mp4", 24, size=(64, 96), fps=12)
    make_clip(folder / "b.mp4", 30, size=(48, 80), fps=15)
    return folder


def write_pairs(path: Path, clips: Path, count: int, extra: list[dict[str, Any]] | None = None) -> Path:
    rows = [
        {"id": f"p{index}", "prompt": f"caption {index}", "video_1": "a.mp4", "video_2": "b.mp4"}
        for index in range(count)
    ]
    for name in ("a.mp4", "b.mp4"):
        if not (path.parent / name).exists():
            (path.parent / name).symlink_to(clips / name)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *(extra or [])]))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_importing_and_helping_are_quick_and_load_nothing_heavy() -> None:
    named = "{'torch', 'transformers', 'av', 'numpy'}"
    heavy = f"import sys; bad = {named} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    helped = f"""
import sys
from vrthinker.cli import main
try:
    main(["--help"])
except SystemExit:
    {heavy}
"""
    for code in (f"import vrthinker; {heavy}", helped):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def seconds(*command: str) -> float:
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
            times.append(time.perf_counter() - begun)
        return min(times)

    bare = seconds("-c", "pass")
    assert seconds("-c", "import vrthinker") - bare < 0.3
    assert seconds("-m", "vrthinker", "--help") - bare < 0.3


def test_judge_prints_a_table(model: Path, clips: Path) -> None:
    done = vrthinker(
        "judge", clips / "a.mp4", clips / "b.mp4", "--prompt", "[red]a dog[/red]", "--model", model
    )
    assert done.returncode == 0, done.stderr
    for words in ("Text Alignment", "Overall", "of 54 frames seen", RANDOM_NOTE):
        assert words in done.stdout


def test_judge_prints_json_and_keeps_the_trajectory(model: Path, clips: Path, tmp_path: Path) -> None:
    record = tmp_path / "t.jsonl"
    options = (
        "--json",
        "--trajectories",
        record,
        "--window",
        "2",
        "--rounds",
        "2",
        "--frames",
        "4",
        "--seed",
        "5",
    )
    done = vrthinker("judge", clips / "a.mp4", clips / "b.mp4", "--prompt", "x", "--model", model, *options)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert set(printed["judgment"]) == {"TA", "VQ", "MQ", "OA"}
    (trajectory,) = load_trajectories(record)
    assert (trajectory.settings.window, trajectory.settings.max_rounds, trajectory.seed) == (2, 2, 5)
    assert trajectory.settings.initial_frames == 4
    assert printed["rounds"] == len(trajectory.rounds) <= 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["judge"], "--model: missing"),
        (["judge", "--model", "MODEL"], "0 clips and no --prompt"),
        (["judge", "A", "--model", "MODEL", "--prompt", "x"], "1 clips"),
        (["judge", "A", "B", "--model", "/no/such/folder", "--prompt", "x"], "/no/such/folder"),
        (["judge", "A", "MISSING", "--model", "MODEL", "--prompt", "x"], "missing.mp4: "),
        (["judge", "A", "EMPTY", "--model", "MODEL", "--prompt", "x"], "empty.mp4: "),
        (["judge", "A", "TEXT", "--model", "MODEL", "--prompt", "x"], "text.mp4: "),
        (["judge", "A", "FOLDER", "--model", "MODEL", "--prompt", "x"], "folder"),
        (["judge", "A", "CUT", "--model", "MODEL", "--prompt", "x"], "cut.mkv: "),
        (["judge", "A", "B", "--model", "MODEL", "--prompt", "x", "--rounds", "0"], "max_rounds"),
        (["judge", "A", "B", "--model", "MODEL", "--prompt", "x", "--dataset", "mine"], "mine"),
        (["judge", "A", "B", "--model", "MODEL", "--prompt", "x", "--device", "gpu7"], "device: got 'gpu7'"),
        (["judge", "--pairs", "PAIRS", "--model", "MODEL"], "--out"),
        (["judge", "--pairs", "MISSING", "--out", "OUT", "--model", "MODEL"], "missing.mp4"),
        (["judge", "--pairs", "TEXT", "--out", "OUT", "--model", "MODEL"], "line 1"),
        (["make-tiny", "MODEL"], "tiny"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    args: list[str], words: str, model: Path, clips: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "folder").mkdir()
    cut(make_clip(tmp_path / "whole.mkv", 40, size=(64, 96)), tmp_path / "cut.mkv", 0.5)
    places = {
        "MODEL": model,
        "A": clips / "a.mp4",
        "B": clips / "b.mp4",
        "MISSING": tmp_path / "missing.mp4",
        "EMPTY": tmp_path / "empty.mp4",
        "TEXT": tmp_path / "text.mp4",
        "FOLDER": tmp_path / "folder",
        "CUT": tmp_path / "cut.mkv",
        "PAIRS": write_pairs(tmp_path / "pairs.jsonl", clips, 1),
        "OUT": tmp_path / "out.jsonl",
    }
    done = vrthinker(*[places.get(arg, arg) for arg in args])
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    if "--pairs" not in args:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_truncated_clip_is_judged_only_when_told_to_and_the_verdict_says_so(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    broken = cut(make_clip(tmp_path / "whole.mkv", 40, size=(64, 96)), tmp_path / "cut.mkv", 0.5)
    args = ("judge", clips / "a.mp4", broken, "--prompt", "x", "--model", model, "--json")
    refused = vrthinker(*args)
    assert refused.returncode == 2
    assert "--tolerate-truncation" in refused.stderr
    done = vrthinker(*args, "--tolerate-truncation")
    assert done.returncode == 0, done.stderr
    assert any("video 2" in note for note in json.loads(done.stdout)["notes"])


def test_a_pairs_file_is_judged_and_failures_are_listed_with_reasons(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    bad = {"id": "bad", "prompt": "x", "video_1": "a.mp4", "video_2": "nowhere.mp4"}
    pairs = write_pairs(tmp_path / "pairs.jsonl", clips, 5, [bad])
    out, record = tmp_path / "verdicts.jsonl", tmp_path / "t.jsonl"
    args = ("judge", "--pairs", pairs, "--out", out, "--model", model)
    done = vrthinker(*args, "--trajectories", record)
    assert done.returncode == 1, done.stderr
    assert "5 verdicts" in done.stdout
    assert "nowhere.mp4" in done.stdout
    rows = {row["id"]: row for row in read_jsonl(out)}
    assert len(rows) == 6
    assert rows["bad"]["judgment"] is None
    assert rows["bad"]["stop_reason"] == "video_error"
    assert all(rows[f"p{i}"]["judgment"] is not None for i in range(5))
    assert {t.id for t in load_trajectories(record)} == {f"p{i}" for i in range(5)}

    before = out.read_bytes()
    again = vrthinker(*args)
    assert again.returncode == 1
    assert out.read_bytes() == before, "a second run judges nothing twice"

    (tmp_path / "nowhere.mp4").symlink_to(clips / "b.mp4")
    mended = vrthinker(*args, "--retry-failed", "--json")
    assert mended.returncode == 0, mended.stderr
    assert json.loads(mended.stdout)["verdicts"] == 6

    other = vrthinker(*args, "--window", "3")
    assert other.returncode == 2
    assert "window" in other.stderr


@pytest.mark.parametrize("place", ["clip", "pairs", "out"])
def test_a_trajectories_file_never_harms_another_file(
    place: str, model: Path, clips: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", clips, 1)
    clip, out = tmp_path / "c.mp4", tmp_path / "out.jsonl"
    clip.write_bytes((clips / "a.mp4").read_bytes())
    wanted = {"clip": clip, "pairs": pairs, "out": out}[place]
    before = {path: path.read_bytes() for path in (clip, pairs)}
    if place == "clip":
        args = ["judge", clip, clips / "b.mp4", "--prompt", "x"]
    else:
        args = ["judge", "--pairs", pairs, "--out", out]
    done = vrthinker(*args, "--model", model, "--trajectories", wanted)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{wanted}: got the same file twice" in done.stderr
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.multi_process
def test_two_processes_share_one_results_file(model: Path, clips: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", clips, 40)
    out = tmp_path / "verdicts.jsonl"
    args = ("judge", "--pairs", pairs, "--out", out, "--model", model, "--batch-size", "2")
    both = [start(*args), start(*args)]
    for process in both:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    rows = read_jsonl(out)
    assert Counter(row["id"] for row in rows) == {f"p{index}": 1 for index in range(40)}
    assert all(row["judgment"] is not None for row in rows)


@pytest.mark.slow
@pytest.mark.multi_process
def test_kill_at_ten_random_moments_and_rerun_gives_every_pair_exactly_once(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("VRTHINKER_TEST_SEED", "0"))
    rng = random.Random(seed)
    count = 150
    pairs = write_pairs(tmp_path / "pairs.jsonl", clips, count)
    out = tmp_path / "verdicts.jsonl"
    args = ("judge", "--pairs", pairs, "--out", out, "--model", model, "--batch-size", "4")
    seen: dict[str, str] = {}
    kills = 0
    while kills < 10:
        lines = len(out.read_bytes().splitlines()) if out.exists() else 0
        process = start(*args)
        # Some kills before the first verdict of a run, most of them amid judging.
        deadline = time.monotonic() + 60
        while rng.random() > 0.05 and process.poll() is None and time.monotonic() < deadline:
            if out.exists() and len(out.read_bytes().splitlines()) > lines + rng.randrange(8):
                break
            time.sleep(0.02)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        kills += 1
        for line in out.read_text().splitlines() if out.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # a torn last line, mended by the next run
            assert seen.setdefault(row["id"], line) == line, "a recorded verdict changed"
    done = vrthinker(*args, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = out.read_text().splitlines()
    assert Counter(json.loads(row)["id"] for row in rows) == {f"p{index}": 1 for index in range(count)}
    assert set(seen.values()) <= set(rows), "nothing that was recorded is lost"
    assert statistics.mean(len(row) for row in rows) > 100


def test_make_tiny_writes_a_judge_of_either_family(tmp_path: Path) -> None:
    for family in ("qwen2.5-vl", "qwen3-vl"):
        done = vrthinker("make-tiny", tmp_path / family, "--family", family)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / family)
        assert {"config.json", "model.safetensors", "tokenizer.json", "vrthinker.json"} <= {
            path.name for path in (tmp_path / family).iterdir()
        }


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m vrthinker judge --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr


def test_world_make_writes_two_hundred_pairs_in_no_time(tmp_path: Path) -> None:
    from vrthinker.data.pairs import load_pairs
    from vrthinker.world.files import load_truths

    begun = time.perf_counter()
    done = vrthinker("world", "make", "--out", tmp_path / "w")
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begun < 60
    assert done.stdout == f"{tmp_path / 'w' / 'pairs.jsonl'}\n"
    assert done.stderr == ""
    pairs, truths = load_pairs(tmp_path / "w" / "pairs.jsonl"), load_truths(tmp_path / "w")
    assert [pair.id for pair in pairs] == [f"easy-0-{index:06d}" for index in range(200)]
    assert [pair.labels for pair in pairs] == [truth.judgments.as_dict() for truth in truths]
    assert all(pair.video_1.is_file() and pair.video_2.is_file() for pair in pairs)

    again = vrthinker("world", "make", "--out", tmp_path / "w")
    assert again.returncode == 0, again.stderr
    refused = vrthinker("world", "make", "--out", tmp_path / "w", "--difficulty", "hard")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "was made with" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


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
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_world_ceilings_are_printed_as_a_table_and_as_json() -> None:
    done = vrthinker("world", "ceilings", "--pairs", "30", "--seed", "2")
    assert done.returncode == 0, done.stderr
    assert "perfect readers of the easy world, 30 pairs" in done.stdout
    (marked,) = (line for line in done.stdout.splitlines() if line.startswith("marked gaps  "))
    assert marked.count("1.000") == 4
    (even,) = (line for line in done.stdout.splitlines() if line.startswith("16 frames, even"))
    assert even.split()[-1] == "-"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    done = vrthinker("world", "ceilings", "--pairs", "30", "--seed", "2", "--json")
    rows = json.loads(done.stdout, parse_constant=refuse)
    assert [row["calls"] for row in rows] == [0, 2, 2, 6, 0, 0, 0]
    assert rows[2]["oa_tau"] == rows[2]["oa_tau_best_guess"] == 1.0
    assert rows[4]["oa_tau_best_guess"] is None
