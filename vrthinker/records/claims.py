"""Claims on the items that several processes on one machine judge, held in one lock file.

Each claim is a POSIX lock on one byte of the file, at an offset hashed from the item's id. Byte 0 guards
writes. The kernel keeps these locks, so that a claim ends with its process, however that ends. Stale claims
do not exist.

Invariant: a process has at most one open descriptor of a lock file, because closing any of them would drop
all of the process's locks. That is why all users of a path share one `LockFile`, and why claims of threads of
one process are kept apart here and not by the kernel.

On a network file system, POSIX locks depend on its lock daemon. Nothing is guaranteed there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from vrthinker.errors import VRThinkerError, unwritable
from vrthinker.records.locks import open_lock_file

_FLOCK = "hhqqi0q"
"""The `struct flock` of Linux: type, whence, start, length, holder's pid."""

_WRITE_BYTE = 0
_shared: dict[Path, LockFile] = {}
_shared_guard = threading.Lock()


class LockFile:
    """A lock file, as all users in one process share it. `open_locks` returns it; `leave` ends one use.

    Attributes:
        path: The lock file. It stays empty, and it must not be removed while a process uses it.
        mutex: The lock between threads of this process for access to the file and to what it guards.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._fd = open_lock_file(path)
        except OSError as error:
            raise unwritable(path, error, "choose another output", failed="cannot be opened") from None
        self.path = path
        self.mutex = threading.RLock()
        self.users = 0
        self._owners: dict[int, object] = {}
        self._identity = _identity(os.fstat(self._fd))

    def check(self) -> None:
        """Checks that the locks of this process are still valid.

        Raises:
            VRThinkerError: The file was closed, inherited through a fork, removed or replaced.
        """
        if self._fd < 0:
            raise VRThinkerError(
                f"{self.path}: closed, or opened before a fork; open the log again in this process"
            )
        try:
            same = _identity(os.stat(self.path)) == self._identity
        except OSError:
            same = False
        if not same:
            raise VRThinkerError(
                f"{self.path}: removed or replaced while in use, so claims no longer hold; stop every "
                "process that writes there and run the command again (what is recorded stays)"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the write lock, so that no other process uses what the file guards. Not re-entrant."""
        with self.mutex:
            self.check()
            self._lock(_WRITE_BYTE, wait=True)
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _WRITE_BYTE)

    def take(self, name: str, owner: object) -> bool:
        """Claims a name for `owner`. Returns False if it is claimed already, by this owner or another."""
        offset = claim_offset(name)
        with self.mutex:
            self.check()
            if offset in self._owners or not self._lock(offset, wait=False):
                return False
            self._owners[offset] = owner
            return True

    def has(self, name: str, owner: object) -> bool:
        """Whether `owner` holds the name."""
        with self.mutex:
            return self._owners.get(claim_offset(name)) is owner

    def drop(self, name: str, owner: object) -> None:
        """Gives up a claim. This is harmless if `owner` does not hold it."""
        with self.mutex:
            if self.has(name, owner):
                self._unlock(claim_offset(name))

    def drop_all(self, owner: object) -> None:
        """Gives up every claim of `owner`."""
        with self.mutex:
            for offset in [offset for offset, other in self._owners.items() if other is owner]:
                self._unlock(offset)

    def holder(self, name: str) -> int | None:
        """The process that holds a name (0: a process that is not visible in this container), or None."""
        offset = claim_offset(name)
        with self.mutex:
            self.check()
            if offset in self._owners:
                return os.getpid()
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
            kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))
            return None if kind == fcntl.F_UNLCK else int(pid)

    def leave(self) -> None:
        """Ends one use. The end of the last use closes the file and drops every claim of this process."""
        with _shared_guard:
            self.users -= 1
            if self.users == 0 and self._fd >= 0:
                del _shared[self.path]
                self.shut()

    def shut(self) -> None:
        """Closes the descriptor."""
        os.close(self._fd)
        self._fd = -1
        self._owners.clear()

    def _lock(self, offset: int, *, wait: bool) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, offset)
        except OSError as error:
            if not wait and error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise VRThinkerError(
                f"{self.path}: cannot be locked ({error.strerror}); write to a local disk instead"
            ) from None
        return True

    def _unlock(self, offset: int) -> None:
        # Closed and forked files hold no locks, and their descriptor's number may belong to another file.
        if self._fd >= 0:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, offset)
        self._owners.pop(offset, None)


def claim_offset(name: str) -> int:
    """The offset of the byte of a name, in [1, 2^62], the same in every process and version.

    Two names with the same byte would only wait for each other. With 100,000 names, the probability is 1e-9.
    """
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
    return 1 + (int.from_bytes(digest, "big") >> 2)


def open_locks(path: Path) -> LockFile:
    """The process's only `LockFile` of a resolved path. The file is created, empty, if it is missing.

    Raises:
        InputError: The file cannot be created or opened.
    """
    with _shared_guard:
        locks = _shared.get(path)
        if locks is None:
            locks = _shared[path] = LockFile(path)
        locks.users += 1
        return locks


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _after_fork() -> None:
    """Invalidates inherited lock files, because a child process does not hold its parent's locks."""
    global _shared_guard
    _shared_guard = threading.Lock()
    for locks in _shared.values():
        locks.mutex = threading.RLock()
        locks.shut()
    _shared.clear()


os.register_at_fork(after_in_child=_after_fork)
