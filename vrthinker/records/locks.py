"""The lock of an open file, which one process or thread holds at a time.

Invariant: the lock belongs to the open file and ends with it, however the process ends, so that stale locks
do not exist. If a child was forked while its parent held the lock, it still holds the lock after the parent
was killed. This is for processes on one machine and a local file system.

The claims of a results file are something else (`claims.py`): one file has many of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vrthinker.errors import InputError


def open_lock_file(path: Path) -> int:
    """Opens a lock file, which is made if it is missing, and returns its descriptor.

    Raises:
        OSError: The file cannot be opened.
        InputError: There is a folder, a pipe or a device with its name.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: got a folder, a pipe or a device, where the lock file is; remove it")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


@contextlib.contextmanager
def locked(file: int | IO[Any], path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock of an open file.

    Args:
        file: The open file or its descriptor. It stays open.
        path: The path of the file, for messages.
        wait: Whether to wait for another holder.

    Raises:
        BlockingIOError: There is another holder, and `wait` is false.
        InputError: The file system has no locks.
    """
    descriptor = file if isinstance(file, int) else file.fileno()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        raise InputError(
            f"{path}: its file system has no locks ({error.strerror}); write to a local disk instead"
        ) from None
    holder = os.getpid()
    try:
        yield
    finally:
        # A child that was forked in here shares the lock. If it unlocked, its parent would lose the lock.
        if os.getpid() == holder:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
