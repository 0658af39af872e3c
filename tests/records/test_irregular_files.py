"""Pipes, devices and links to them in the place of files: each is refused at once, and nothing waits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vrthinker.commands.options import check_writable
from vrthinker.data.pairs import load_pairs
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.errors import InputError
from vrthinker.evals.world import load_report
from vrthinker.evals.world_truth import find_truth
from vrthinker.records import verdicts
from vrthinker.records.files import replace_file, spare_name
from vrthinker.records.metrics_file import read_metrics
from vrthinker.records.run_lock import LOCK_FILE, lock_run
from vrthinker.records.trajectories import check_trajectories_file
from vrthinker.records.verdict_log import VerdictLog, read_verdicts
from vrthinker.world.files import TRUTH_FILE, load_truths

RUN = {"window": 1}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("the pipe"))
    path.symlink_to("the pipe")


def link_to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def beside_log(ending: str) -> Callable[[Path], object]:
    def use(path: Path) -> object:
        path.rename(path.with_name(f"log{ending}"))
        return VerdictLog(path.with_name("log"), RUN)

    return use


def beside_run(path: Path) -> object:
    path.rename(path.with_name(LOCK_FILE))
    with lock_run(path.parent):
        return None


def as_eval_run(path: Path) -> object:
    path.rename(path.with_name("run.json"))
    return load_report(path.parent)


def as_truth(path: Path) -> object:
    path.rename(path.with_name(TRUTH_FILE))
    return load_truths(path.parent)


USES: dict[str, Callable[[Path], object]] = {
    "pairs": load_pairs,
    "verdicts to read": read_verdicts,
    "a results file": lambda path: VerdictLog(path, RUN),
    "a results file's configuration": beside_log(".run.json"),
    "a results file's lock": beside_log(".lock"),
    "a run's lock": beside_run,
    "metrics": read_metrics,
    "trajectories to read": lambda path: list(load_trajectories(path)),
    "trajectories to write": check_trajectories_file,
    "an evaluation's settings": as_eval_run,
    "truths": as_truth,
    "an output": lambda path: check_writable("--out", path),
}


@pytest.mark.parametrize("make", [pipe, link_to_pipe, link_to_zero, folder])
@pytest.mark.parametrize("use", USES)
def test_what_is_no_file_is_refused_at_once(use: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises(InputError) as caught:
        USES[use](path)
    assert any(name in str(caught.value) for name in (str(tmp_path), "/dev/zero"))


def test_a_pipe_beside_clips_is_no_truth(tmp_path: Path) -> None:
    pipe(tmp_path / TRUTH_FILE)
    assert find_truth(tmp_path / "clips" / "a.mp4", tmp_path / "clips" / "b.mp4") is None


@pytest.mark.parametrize("make", [pipe, link_to_zero])
def test_what_a_file_is_written_under_first_may_be_anything(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    make(spare_name(path))
    replace_file(path, b"content")
    assert path.read_bytes() == b"content"
    assert path.is_file()
    assert not path.is_symlink()


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "MAX_LINE_BYTES", 1 << 16)
    monkeypatch.setattr(verdicts, "_READ_BYTES", 1 << 14)
    out = tmp_path / "out.jsonl"
    VerdictLog(out, RUN).close()
    os.truncate(out, 1 << 40)  # a hole: it takes no room
    with pytest.raises(InputError, match="got a line of more than 65536 bytes"):
        VerdictLog(out, RUN)
    with pytest.raises(InputError, match="got more than 65536 bytes"):
        read_verdicts(out)


@pytest.mark.parametrize("place", ["/", ".", ".."])
def test_a_folder_is_no_results_file(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="got a folder, a pipe or a device, allowed: a file"):
        VerdictLog(place, RUN)


def test_pairs_come_through_a_pipe_that_somebody_writes_to(tmp_path: Path) -> None:
    path = tmp_path / "pairs"
    os.mkfifo(path)
    line = json.dumps({"id": "a", "prompt": "x", "video_1": "a.mp4", "video_2": "b.mp4"})
    both_ends = os.open(path, os.O_RDWR)
    os.write(both_ends, line.encode())
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # what was written stays while one end is open
    os.close(both_ends)
    try:
        assert load_pairs(path)[0].id == "a"
    finally:
        os.close(reading)
