"""The file of trajectories, one JSON line each, to which any number of processes may append.

`vrthinker.episode.trajectory` defines the content of a line (`dump_line`) and reads the file
(`load_trajectories`).
Invariant: nothing is ever written to a file with other content, if `check_trajectories_file` is called first.
"""

from __future__ import annotations

import os
from pathlib import Path

from vrthinker.errors import InputError, unwritable
from vrthinker.records.files import append_line

_LINE_START = b'{"schema_version":1,"id":'


def check_trajectories_file(path: Path, *others: Path) -> None:
    """Refuses a file that has other content than trajectories or is not writable, before any work is done.

    Args:
        path: The file that trajectories are to be appended to. It is made if it is missing.
        others: Other files of the same command (clips, pairs, results).

    Raises:
        InputError: The file is one of `others`, has other content than trajectories, or cannot be written.
    """
    try:
        if path.exists() and any(other.exists() and path.samefile(other) for other in others):
            raise InputError(f"{path}: got the same file twice; give --trajectories a file of its own")
        if path.resolve() in {other.resolve() for other in others}:
            raise InputError(f"{path}: got the same file twice; give --trajectories a file of its own")
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file; give --trajectories a file")
        with path.open("a+b", buffering=0) as stream:
            start = os.pread(stream.fileno(), len(_LINE_START), 0)
    except OSError as error:
        raise unwritable(path, error, "give another file") from None
    if start != _LINE_START[: len(start)]:
        raise InputError(f"{path}: holds something else than trajectories; give another file")


def append_trajectory(path: Path, line: str) -> None:
    """Appends a trajectory to a file. An unfinished last line of a killed writer is removed first.

    Call `check_trajectories_file` before, because an unfinished last line of any other file would be lost.

    Args:
        path: The trajectories file, which is made if it is missing.
        line: The line that `dump_line` returns.

    Raises:
        InputError: The file cannot be written. Its complete lines are unchanged.
        MachineError: The disk is full. The same holds.
    """
    try:
        append_line(path, line, unfinished="cut")
    except OSError as error:
        raise unwritable(path, error, "give another file") from None
