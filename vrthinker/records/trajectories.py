"""The file that episodes are kept in: one JSON line each, appended by any number of processes.

`vrthinker.episode.trajectory` says what is in a line (`dump_line`) and reads the file (`load_trajectories`).
Invariant: nothing is ever written to a file that holds something else than trajectories, as long as
`check_trajectories_file` is asked first.
"""

from __future__ import annotations

import os
from pathlib import Path

from vrthinker.errors import InputError
from vrthinker.records.files import append_line

_LINE_START = b'{"schema_version":1,"id":'


def check_trajectories_file(path: Path, *others: Path) -> None:
    """Refuses a trajectories file that holds something else or is not writable, before any work is done.

    Args:
        path: The file that trajectories are to be appended to; made when it is missing.
        others: Files of the same command (clips, pairs, results).

    Raises:
        InputError: It is one of `others`, holds something else than trajectories, or cannot be written.
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
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another file") from None
    if start != _LINE_START[: len(start)]:
        raise InputError(f"{path}: holds something else than trajectories; give another file")


def append_trajectory(path: Path, line: str) -> None:
    """Adds a trajectory to a file, after cutting off what a killed writer left of another.

    Call `check_trajectories_file` first: an unfinished last line is lost here.

    Args:
        path: The trajectories file; made when it is missing.
        line: The trajectory as `dump_line` spells it.

    Raises:
        InputError: The file cannot be written; its whole lines are as they were.
    """
    try:
        append_line(path, line, unfinished="cut")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another file") from None
