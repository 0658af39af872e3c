"""The lock of an open file: held by one, given back however the holder leaves."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from vrthinker.errors import InputError
from vrthinker.records.locks import locked
from vrthinker.records.provenance import append_row
from vrthinker.records.run_lock import lock_run
from vrthinker.records.trajectories import append_trajectory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def is_free(path: Path) -> bool:
    with path.open("ab") as stream:
        try:
            with locked(stream, path, wait=False):
                return True
        except BlockingIOError:
            return False


def test_one_holds_it_at_a_time(path: Path) -> None:
    with path.open("ab") as stream:
        with locked(stream, path):
            assert not is_free(path)
        assert is_free(path)
        with locked(stream.fileno(), path):
            assert not is_free(path)
        with pytest.raises(ZeroDivisionError), locked(stream, path):
            raise ZeroDivisionError
        assert is_free(path)


@pytest.mark.multi_process
def test_a_child_that_lives_on_keeps_no_lock_that_was_given_back(path: Path) -> None:
    with path.open("ab") as stream:
        with locked(stream, path):
            pid = os.fork()
            if pid == 0:
                signal.pause()
                os._exit(1)
        try:
            assert is_free(path)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.multi_process
def test_a_child_that_leaves_gives_nothing_back(path: Path) -> None:
    with path.open("ab") as stream, contextlib.ExitStack() as stack:
        stack.enter_context(locked(stream, path))
        pid = os.fork()
        if pid == 0:
            try:
                stack.close()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert not is_free(path)


@pytest.mark.multi_process
def test_the_lock_of_a_killed_process_is_gone(path: Path) -> None:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with path.open("ab") as stream, locked(stream, path):
                os.write(theirs, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.read(ours, 1)
    assert not is_free(path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert is_free(path)
    os.close(ours)
    os.close(theirs)


def hold(path: Path) -> None:
    with lock_run(path):
        pass


@pytest.mark.parametrize(
    "act",
    [
        lambda path: append_row(path, {}),
        lambda path: append_trajectory(path, "{}\n"),
        hold,
    ],
    ids=["a row", "a trajectory", "a run folder"],
)
def test_a_file_system_without_locks_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], None]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError) as caught:
        act(path)
    assert str(caught.value) == (
        f"{path}: its file system has no locks (No locks available); write to a local disk instead"
    )
