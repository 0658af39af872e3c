"""Worlds made by several processes, of which some die: jobs for `forks.py`."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from vrthinker.world import files
from vrthinker.world.world import PRESETS

PAIRS_PER_TASK = 2
_map = ProcessPoolExecutor.map


def job(
    folder: Path, *, pairs: int, seed: int, die_after: int = 0, whose: str = "parent", most_bytes: int = 0
) -> dict[str, Any]:
    """Makes a medium world in two processes, in tasks of two pairs.

    Args:
        folder: The world.
        pairs: How many.
        seed: The world's.
        die_after: Somebody dies when so many tasks are done; 0 for nobody.
        whose: The process that dies: the `parent`, or a `worker`.
        most_bytes: No file may grow beyond it, as on a full disk; 0 for no limit.
    """
    arguments = {
        "folder": str(folder),
        "pairs": pairs,
        "seed": seed,
        "die_after": die_after,
        "whose": whose,
        "most_bytes": most_bytes,
    }
    return {"job": "world_worker:job_make", "arguments": arguments}


def job_make(folder: str, pairs: int, seed: int, die_after: int, whose: str, most_bytes: int) -> int:
    """See `job`."""
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))

    def map_and_die(self: ProcessPoolExecutor, act: Any, tasks: Any) -> Iterator[Any]:
        for number, found in enumerate(_map(self, act, tasks), start=1):
            if number == die_after:
                os.kill(os.getpid() if whose == "parent" else next(iter(self._processes)), signal.SIGKILL)
            yield found

    ProcessPoolExecutor.map = map_and_die  # type: ignore[assignment,method-assign]
    files._PAIRS_PER_TASK = PAIRS_PER_TASK
    made = files.make_world(
        Path(folder), PRESETS["medium"], pairs=pairs, seed=seed, prefix="medium", workers=2
    )
    return len(made)
