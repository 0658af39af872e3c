"""One process trains into a run folder at a time.

Invariant: the lock lies on an open file and ends with the process (and the children that it forked without
starting another program), however that ends; there is no stale lock to be told from a live one. This holds
for processes on one machine and a local file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from vrthinker.errors import InputError, VRThinkerError

LOCK_FILE = ".lock"

_held: dict[str, int] = {}
"""Lock files of this process, and the thread that holds each."""


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Holds a run folder; makes it when it is missing. The thread that holds it may enter again.

    Raises:
        InputError: The folder cannot be made or its lock file not opened.
        VRThinkerError: Another process, or another thread, holds it.
    """
    descriptor, path = _open(run)
    try:
        if _held.get(path) != threading.get_ident():
            _lock(descriptor, run)
            _held[path] = threading.get_ident()
            try:
                yield
            finally:
                del _held[path]
        else:
            yield
    finally:
        os.close(descriptor)


def _open(run: Path) -> tuple[int, str]:
    try:
        run.mkdir(parents=True, exist_ok=True)
        path = os.path.realpath(run / LOCK_FILE)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), path
    except OSError as error:
        raise InputError(
            f"{run}: cannot be used as a run folder ({error.strerror}); choose another"
        ) from None


def _lock(descriptor: int, run: Path) -> None:
    """Takes the lock and writes down who has it, for the message to the next one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        raise VRThinkerError(
            f"{run}: another process trains into it (process {holder or 'unknown'}); wait for it, or "
            "choose another run folder"
        ) from None
    except OSError as error:
        raise InputError(
            f"{run}: its file system has no locks ({error.strerror}); choose a folder on a local disk"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
