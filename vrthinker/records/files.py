"""Files written whole: replaced in one step, or appended to in one write.

Invariant: a file that exists under its name is whole. A replaced file is written under another name, synced,
and renamed, so that a reader and a crash see the old file or the new one. An appended line is on the disk
whole, or the file is as it was.
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
    """Where `replace_file` writes before it renames; a killed one leaves it behind."""
    return path.with_name(path.name + ".new")


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one step. The caller keeps other writers out.

    Raises:
        VRThinkerError: It could not be written; what was there before stays.
    """
    spare = spare_name(path)
    try:
        with spare.open("wb") as stream:
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
    """Writes at the end of a file in one write, all or nothing. The caller keeps other writers out.

    A file that cannot even be shortened again (its disk went away) keeps a part: an unfinished last line.

    Args:
        descriptor: A file that was opened for appending.
        content: The bytes to add.
        sync: Whether the content is to be on the disk on return.

    Raises:
        OSError: It could not be written (a full disk); the file is as it was.
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

    A writer that was killed may have left the last line without its end. What becomes of it is for the caller
    to say, because it depends on what the line was worth:

    - `cut`: it is removed. For what its writer makes again when it is restarted (an episode is judged again),
      in a file whose readers refuse a line that is not whole.
    - `close`: it is kept, and given its end. For what is not made again (a measurement), in a file that
      people edit: a line that only lacks its newline may be whole, and nobody's row is removed unseen.

    Args:
        path: The file; made when it is missing.
        line: The line, with its newline and no other.
        unfinished: The fate of an unfinished last line.

    Raises:
        OSError: The file could not be opened or written (a full disk); its whole lines are as they were.
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
    """Makes a new name in a folder outlive a crash of the machine, where the file system lets us."""
    with contextlib.suppress(OSError):  # a folder that cannot be synced costs durability, no correctness
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
