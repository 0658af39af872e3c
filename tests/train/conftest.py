"""Lets the tests of this folder import what stands beside them; checkpoints and clips that they share."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sampled import Sampled, Stage

    from vrthinker.episode.trajectory import Trajectory
    from vrthinker.visibility import MemoryMode

sys.path.insert(0, str(Path(__file__).parent))

Outcomes = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture
def run() -> Iterator[Path]:
    """A run folder in memory where there is one: hundreds of syncs take minutes on a busy disk.

    What a killed process leaves behind is the same there; only a crash of the machine is not.
    """
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder) / "run"


@pytest.fixture(scope="session")
def outcomes_of() -> Iterator[Outcomes]:
    """Runs jobs one after another, each in a process of its own. What forks them is started once."""
    yield from _outcomes("training_worker.py")


@pytest.fixture(scope="session")
def commands() -> Iterator[Outcomes]:
    """The same for whole commands."""
    yield from _outcomes("cold_start_worker.py")


def _outcomes(program: str) -> Iterator[Outcomes]:
    worker = Path(__file__).with_name(program)
    with subprocess.Popen(
        [sys.executable, worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(jobs) + "\n")
            process.stdin.flush()
            found: list[dict[str, Any]] = json.loads(process.stdout.readline())
            return found

        yield ask
        process.communicate()


KINDS = ("qwen2.5-vl", "qwen3-vl", "nano")
MakeCheckpoint = Callable[[str], Path]
MakeStage = Callable[[str], "Stage"]
MakeEpisodes = Callable[..., "list[tuple[Trajectory, list[Sampled]]]"]


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """A small random checkpoint: of each family, and nano before training."""
    from vrthinker.engine.hf.tiny import make_tiny
    from vrthinker.train.nano import write_nano

    @functools.cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint") / kind
        if kind == "nano":
            return write_nano(folder, seed=3)
        return make_tiny(folder, "qwen3-vl" if kind == "qwen3-vl" else "qwen2.5-vl", seed=3, layers=4)

    return make


@pytest.fixture(scope="session")
def clip_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two clips of different length, size and container."""
    from clips import make_clip

    folder = tmp_path_factory.mktemp("clips")
    return (
        make_clip(folder / "first.mp4", 12, size=(112, 168), fps=8),
        make_clip(folder / "second.mkv", 10, size=(84, 56), fps=12),
    )


@pytest.fixture(scope="session")
def stage_of(clip_pair: tuple[Path, Path]) -> MakeStage:
    """The clips at the frame sizes of a kind of checkpoint."""
    from sampled import Stage

    from vrthinker.train.nano import nano_settings
    from vrthinker.video.resize import ResizeSettings

    @functools.cache
    def make(kind: str) -> Stage:
        if kind == "nano":
            return Stage(clip_pair, nano_settings().resize)
        patch = 16 if kind == "qwen3-vl" else 14
        limits = {"min_pixels": (2 * patch) ** 2, "max_pixels": 64 * (2 * patch) ** 2}
        return Stage(clip_pair, ResizeSettings(patch_size=patch, merge_size=2, **limits))

    return make


@pytest.fixture(scope="session")
def episodes_of(checkpoint_of: MakeCheckpoint, stage_of: MakeStage) -> MakeEpisodes:
    """Sampled episodes of a kind of checkpoint under a window: `sampled.EPISODES`, and one written freely.

    `make(kind, window, memory="rerender")`.
    """
    from sampled import EPISODES

    @functools.cache
    def make(
        kind: str, window: int | None, memory: MemoryMode = "rerender"
    ) -> list[tuple[Trajectory, list[Sampled]]]:
        return stage_of(kind).sample(checkpoint_of(kind), [*EPISODES, None], window=window, memory=memory)

    return make
