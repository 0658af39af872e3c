"""The lock of an open file: one process, or one thread, at a time.

Invariant: the lock lies on what was opened and ends with it, however the process ends; there is no stale lock
to be told from a live one. A child that was forked while the lock was held keeps it alive after a parent that
was killed. This holds for processes on one machine and a local file system.

The claims of a results file are something else (`claims.py`): many of them lie on one file.
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
        file: The open file or its descriptor; it stays open.
        path: The name for messages.
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
        # A child that was forked in here shares the lock: leaving, it would take it from its parent.
        if os.getpid() == holder:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
