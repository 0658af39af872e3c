"""A run folder is held by one thread of one process; the loop's tests have the other processes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from vrthinker.errors import InputError, VRThinkerError
from vrthinker.records.run_lock import LOCK_FILE, lock_run


def test_another_thread_is_not_let_in(tmp_path: Path) -> None:
    said: list[str] = []

    def enter() -> None:
        try:
            with lock_run(tmp_path):
                said.append("in")
        except VRThinkerError as error:
            said.append(str(error))

    with lock_run(tmp_path):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert said == [
        f"{tmp_path}: another process trains into it (process {os.getpid()}); wait for it, or choose another "
        "run folder"
    ]
    enter()
    assert said[1:] == ["in"]


def test_its_holder_may_enter_again(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    with lock_run(run):
        with lock_run(run):
            pass
        assert (run / LOCK_FILE).read_text() == f"{os.getpid()}\n"
        with pytest.raises(BlockingIOError, match="mine"), lock_run(run):
            raise BlockingIOError("mine")


def test_what_cannot_be_a_run_folder_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="cannot be used as a run folder"), lock_run(tmp_path / "run"):
        pass
