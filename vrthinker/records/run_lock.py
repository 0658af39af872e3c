"""The lock of a run folder, so that one process at a time trains into it.

Invariant: the folder is held by the lock of an open file (`locks.py`), which ends with the process, however
that ends.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from vrthinker.errors import VRThinkerError, unwritable
from vrthinker.records.locks import locked, open_lock_file

LOCK_FILE = ".lock"

_held: dict[str, int] = {}
"""Lock file of this process -> the thread that holds it."""


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Holds a run folder, which is made if it is missing. The thread that holds it may enter again.

    Raises:
        InputError: The folder cannot be made, its lock file cannot be opened, or its file system has no
            locks.
        VRThinkerError: Another process or another thread holds it.
    """
    descriptor, path = _open(run)
    try:
        if _held.get(path) != threading.get_ident():
            with _locked(descriptor, run):
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
        return open_lock_file(Path(path)), path
    except OSError as error:
        failed = "cannot be used as a run folder"
        raise unwritable(run, error, "choose another", failed=failed) from None


@contextlib.contextmanager
def _locked(descriptor: int, run: Path) -> Iterator[None]:
    """Holds the lock, and writes the holder to the file, for the message to other processes."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(descriptor, run, wait=False))
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            raise VRThinkerError(
                f"{run}: another process trains into it (process {holder or 'unknown'}); wait for it, or "
                "choose another run folder"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
