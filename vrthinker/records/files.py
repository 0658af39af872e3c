"""Files written whole: replaced in one step, or appended to in one write.

Invariant: a file that exists under its name is whole. A replaced file is written under another name, synced,
and renamed, so that a reader and a crash see the old file or the new one. An appended line is on the disk
whole, or the file is as it was.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from vrthinker.errors import VRThinkerError


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


def sync_folder(folder: Path) -> None:
    """Makes a new name in a folder outlive a crash of the machine, where the file system lets us."""
    with contextlib.suppress(OSError):  # a folder that cannot be synced costs durability, no correctness
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
