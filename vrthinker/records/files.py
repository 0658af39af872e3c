"""Atomic changes of files: a file is replaced in one step, or appended to in one write.

Invariant: a file that exists under its name is complete. A replaced file is written under another name,
synced and renamed, so that after a crash and for a reader there is either the old file or the new one. An
appended line is either written completely, or the file is unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Literal

from vrthinker.errors import VRThinkerError
from vrthinker.records.locks import locked

_READ_BYTES = 1 << 16


def spare_name(path: Path) -> Path:
    """The name under which `replace_file` writes before it renames. After a kill, this file may remain."""
    return path.with_name(path.name + ".new")


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file atomically. The caller prevents concurrent writers.

    Raises:
        VRThinkerError: The file could not be written. The old file is unchanged.
    """
    spare = spare_name(path)
    try:
        with contextlib.suppress(FileNotFoundError):
            spare.unlink()  # a killed writer's; opening it might wait, if it were a pipe
        with spare.open("xb") as stream:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(stream.fileno(), stat.S_IMODE(path.stat().st_mode))
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        spare.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            spare.unlink()
        raise VRThinkerError(
            f"{path}: cannot be written ({error.strerror}); make room or grant writing, then run again"
        ) from None


def write_whole(descriptor: int, content: bytes, *, sync: bool = False) -> None:
    """Appends to a file in one write, completely or not at all. The caller prevents concurrent writers.

    If even shortening the file again fails (because its disk went away), an unfinished last line remains.

    Args:
        descriptor: The descriptor of a file that was opened for appending.
        content: The bytes to add.
        sync: Whether the content has to be on the disk on return.

    Raises:
        OSError: The content could not be written (a full disk). The file is unchanged.
    """
    size = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if sync:
            os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
            if sync:
                os.fsync(descriptor)
        raise


def append_line(path: Path, line: str, *, unfinished: Literal["cut", "close"]) -> None:
    """Adds one line to a file that several processes append to, under its lock.

    A killed writer may have written a last line without its end. The caller decides what happens to it:

    - `cut`: it is removed. This is for lines that their writer makes again after a restart (an episode is
      judged again), in a file whose readers refuse an unfinished line.
    - `close`: it is kept, and a newline is added. This is for lines that are not made again (a measurement),
      in a file that people edit: a line may only lack its newline, and no row should be removed unseen.

    Args:
        path: The file, which is made if it is missing.
        line: The line, with its newline and no other.
        unfinished: What happens to an unfinished last line.

    Raises:
        OSError: The file could not be opened or written (a full disk). Its complete lines are unchanged.
        InputError: The file system has no locks.
        ValueError: `line` is not one line.
    """
    if line.find("\n") != len(line) - 1 or not line:
        raise ValueError(f"line: got {line[:60]!r}, allowed: one line with its newline at the end")
    content = line.encode()
    with path.open("a+b", buffering=0) as stream, locked(stream, path):
        descriptor = stream.fileno()
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            if unfinished == "cut":
                os.ftruncate(descriptor, _whole_lines_end(descriptor, size))
            else:
                content = b"\n" + content
        write_whole(descriptor, content)


def _whole_lines_end(descriptor: int, size: int) -> int:
    """The size of a file up to its last newline."""
    end = size
    while end:
        start = max(0, end - _READ_BYTES)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def sync_folder(folder: Path) -> None:
    """Makes a new name in a folder survive a crash of the machine, if the file system supports that."""
    with contextlib.suppress(OSError):  # without the sync, a crash may lose the file, but not damage it
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
