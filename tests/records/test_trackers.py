"""Trackers: the real ones where they are installed, what they get, and that none of them ends a run."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vrthinker.records.trackers import Tracker, TrackerName, open_tracker

CONFIG = {"seed": 1, "phases": [{"steps": 8}]}


def logged(name: TrackerName | None, run: Path) -> None:
    """A run of five steps of which three had a checkpoint, resumed and ended."""
    run.mkdir(exist_ok=True)
    for first, steps in ((0, range(1, 6)), (3, range(4, 9))):
        with open_tracker(name, run=run, title="cold start", config=CONFIG, first_step=first) as tracker:
            assert tracker.is_open
            for step in steps:
                tracker.log({"loss/sft": 1 / step, "optim/grad_norm": math.nan}, step)
            assert tracker.is_open, "it took everything"
        assert not tracker.is_open


def test_tensorboard_gets_every_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged("tensorboard", tmp_path / "run")
    assert capsys.readouterr().out == ""
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss/sft"], "what is not finite is left out"
    got = [(event.step, event.value) for event in events.Scalars("loss/sft")]
    assert got == [(step, pytest.approx(1 / step)) for step in range(1, 9)]


@pytest.mark.parametrize("name", ["trackio", None])
def test_trackio_keeps_a_run_in_a_local_file(
    name: TrackerName | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is the default where it is installed. A resumed run has the name that it had."""
    pytest.importorskip("trackio")
    import trackio.utils

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    folder = Path(trackio.utils.TRACKIO_DIR)  # it reads the variable when it is imported
    run = tmp_path / f"run-{name}"
    logged(name, run)
    assert capsys.readouterr().out == "", "its lines go to stderr"
    (database,) = folder.glob("vrthinker.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
    mine = [row for row in rows if row[0].startswith(run.name)]
    assert len({row[0] for row in mine}) == 1
    last = {step: json.loads(metrics) for _, step, metrics in mine}
    assert last == {step: {"loss/sft": 1 / step} for step in range(1, 9)}


def test_wandb_writes_offline_where_nobody_is_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")  # whoever runs the tests may be logged in
    logged("wandb", tmp_path / "run")
    assert capsys.readouterr().out == ""
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2, "one for each process"
    assert all(b"loss/sft" in file.read_bytes() for file in files)


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_tracker_that_is_absent_is_said_in_one_line(
    name: TrackerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("trackio", "wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with open_tracker(name, run=tmp_path / "run", title="t", config={}) as tracker:
        assert not tracker.is_open
        tracker.log({"loss/sft": 1.0}, 1)
    written = capsys.readouterr()
    assert written.out == ""
    (line,) = written.err.splitlines()
    assert line.startswith(f"tracker {name} did not start (")
    assert "pip install 'vrthinker[trackers]'" in line
    assert line.endswith("metrics.jsonl has everything")


def test_none_is_no_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_tracker("none", run=tmp_path, title="t", config={}) as tracker:
        tracker.log({"loss/sft": 1.0}, 1)
        assert not tracker.is_open
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


class _Failing:
    """A tracker that fails in one of its methods, and that prints."""

    def __init__(self, where: str, how: BaseException) -> None:
        self._where, self._how = where, how
        self.logged: list[int] = []
        print("a word to stdout")  # noqa: T201
        if where == "start":
            raise how

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append(step)
        if self._where == "log" and step == 2:
            raise self._how

    def close(self) -> None:
        if self._where == "close":
            raise self._how


@pytest.mark.parametrize("where", ["start", "log", "close"])
@pytest.mark.parametrize("how", [OSError("no\nroom"), SystemExit(3), RuntimeError()])
def test_a_tracker_that_fails_ends_nothing(
    where: str, how: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Any] = []

    def start() -> _Failing:
        made.append(_Failing(where, how))
        return made[0]

    with Tracker("kept", start) as tracker:
        for step in (1, 2, 3):
            tracker.log({"loss/sft": 1.0}, step)
    tracker.close()
    written = capsys.readouterr()
    assert written.out == ""
    (line,) = [line for line in written.err.splitlines() if line != "a word to stdout"]
    assert line.startswith("tracker kept ")
    if where == "log":
        assert made[0].logged == [1, 2], "after the failure nothing is sent"


def test_ctrl_c_is_not_taken_for_a_failure() -> None:
    with pytest.raises(KeyboardInterrupt):
        Tracker("kept", lambda: _Failing("start", KeyboardInterrupt()))
