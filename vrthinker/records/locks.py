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
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vrthinker.errors import InputError


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
