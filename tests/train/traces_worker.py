"""Traces in many small shards, made by several processes that a test can kill: a job for `forks.py`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from vrthinker.train import world_traces as traces
from vrthinker.train.trace_sources import WorldTraces
from vrthinker.world.nano import nano_settings, nano_templates
from vrthinker.world.oracle import BehaviorMix

SOURCE = WorldTraces(
    pairs=24,
    seed=5,
    calls=2,
    mix=BehaviorMix(oracle=0.5, random_frames=0.3, immediate=0.2),
    filter=False,
)
SHARD_PAIRS = 3


def make(folder: Path, *, workers: int) -> int:
    """Makes them; returns how many there are."""
    made = traces.make_traces(SOURCE, folder, nano_settings(), nano_templates(), seed=7, workers=workers)
    return len(made.traces)


def job(folder: Path, die_after: int = 0) -> dict[str, Any]:
    """Makes them in two processes; dies when so many shards are made."""
    return {"job": "traces_worker:job_make", "arguments": {"folder": str(folder), "die_after": die_after}}


def job_make(folder: str, die_after: int) -> object:
    """See `job`."""
    Path(folder).mkdir(exist_ok=True)
    traces._SHARD_PAIRS = SHARD_PAIRS
    whole = ProcessPoolExecutor.map

    def map_and_die(self: ProcessPoolExecutor, act: Any, tasks: Any) -> Iterator[Any]:
        for number, found in enumerate(whole(self, act, tasks), start=1):
            if number == die_after and act is traces._run_shard:
                os.kill(os.getpid(), signal.SIGKILL)
            yield found

    ProcessPoolExecutor.map = map_and_die  # type: ignore[assignment,method-assign]
    return make(Path(folder), workers=2)
