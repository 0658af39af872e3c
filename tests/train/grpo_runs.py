"""Small runs of GRPO: the nano judge, a few pairs of the world, three steps in two refreshes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vrthinker.episode.trajectory import Trajectory, load_trajectories
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.world.files import PAIRS_FILE, make_world
from vrthinker.world.world import PRESETS

N_PAIRS, SIZE, SEED = 6, 3, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of `N_PAIRS` pairs."""
    folder = tmp_path_factory.mktemp("world") / "world"
    make_world(folder, PRESETS["medium"], pairs=N_PAIRS, seed=43, workers=1)
    return folder


def values(world: Path, **more: Any) -> dict[str, Any]:
    """The settings of a run; `more` replaces some."""
    return {
        "model": "nano",
        "seed": SEED,
        "tracker": "none",
        "items": {"kind": "file", "path": str(world / PAIRS_FILE)},
        "rollouts": {"group_size": SIZE, "batch_size": 12, "temperature": 1.5},
        "checkpoint_every": 1,
        "learn": {
            "steps": 3, "groups_per_step": 1, "steps_per_refresh": 2, "max_pack_tokens": 1500,
            "learning_rate": {"peak": 1e-4, "warmup_ratio": 0.0, "shape": "constant"},
        },
        **more,
    }  # fmt: skip


def episodes(run: Path) -> list[Trajectory]:
    """What a run sampled, refresh by refresh."""
    files = sorted(run.glob("rollouts/refresh-*/draw-*/episodes.jsonl"))
    return [trajectory for file in files for trajectory in load_trajectories(file)]


def metrics(run: Path) -> list[Mapping[str, Any]]:
    """The lines of a run's steps."""
    return [line for line in read_metrics(run / METRICS_FILE) if line["step"] > 0]
