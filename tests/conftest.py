"""What every area shares: the CPU gauge, the rule for tests that need a GPU, checkpoints and clips."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from gauge import Gauge
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from sampled import Sampled, Stage

    from vrthinker.episode.trajectory import Trajectory
    from vrthinker.visibility import MemoryMode

# Before torch loads: on a machine shared with other work, OpenMP threads that spin while they wait cost
# up to fifty times the work that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core already: more threads would only wait for cores
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

# What a developer measured on this machine must not decide which reader tests get.
os.environ["VRTHINKER_READER_TIMES"] = os.devnull + "/none"

# A forked child collects nothing of what was here before it. Freeing what belongs to a thread (a decoder, a
# scaler of pictures) waits for that thread, which the child does not have.
os.register_at_fork(after_in_child=gc.freeze)

# No deadline and no check of how fast data comes: tests must not depend on the machine's speed. `thorough` is
# for `make full-check`; a test that names a number of its own has a reason for it.
settings.register_profile(
    "default", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=200, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

MakeCheckpoint = Callable[[str], Path]
MakeStage = Callable[[str], "Stage"]
MakeEpisodes = Callable[..., "list[tuple[Trajectory, list[Sampled]]]"]


class _Failures:
    """Names what failed at once: a run that is cut off says so too."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            said = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr or "").splitlines()
            terminal.write_line(f"\n{report.when} of {report.nodeid} failed: {said[0][:300] if said else ''}")


def pytest_configure(config: pytest.Config) -> None:
    """Starts the gauge, and the one who names failures."""
    config.pluginmanager.register(Gauge(config), "cpu-gauge")
    config.pluginmanager.register(_Failures(config), "failures")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Imports what every model needs, so that no first test is charged for it."""
    folders = {Path(item.nodeid.partition("::")[0]).parent.name for item in session.items}
    if folders & {"engine", "policy", "train", "judge", "doctor", "evals", "commands"}:
        import importlib

        for family in ("qwen2_5_vl", "qwen3_vl"):
            importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        importlib.import_module("transformers.models.auto.image_processing_auto")


@functools.cache
def _why_no_gpu() -> str | None:
    import torch

    from vrthinker import _core

    if not torch.cuda.is_available():
        return f"no CUDA device: torch sees none; {_core.cuda_probe()['reason'] or 'the driver sees some'}"
    if _core.build_info()["cuda_version"] is None:
        return "vrthinker._core was built without CUDA"
    return None


@functools.cache
def _why_no_vllm() -> str | None:
    from vrthinker.engine.vllm.library import obstacle

    return obstacle()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips `gpu` tests where there is no GPU, and `vllm` tests where there is no vLLM.

    VRTHINKER_REQUIRE_GPU=1 and VRTHINKER_REQUIRE_VLLM=1 make that a failure.
    """
    for marker, why, variable in (
        ("gpu", _why_no_gpu, "VRTHINKER_REQUIRE_GPU"),
        ("vllm", _why_no_vllm, "VRTHINKER_REQUIRE_VLLM"),
    ):
        if item.get_closest_marker(marker) is None or (reason := why()) is None:
            continue
        if os.environ.get(variable) == "1":
            pytest.fail(f"{variable}=1, but {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """A small random checkpoint: of each family, and nano before training."""
    from vrthinker.engine.hf.tiny import make_tiny
    from vrthinker.world.nano import write_nano

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

    from vrthinker.video.resize import ResizeSettings
    from vrthinker.world.nano import nano_settings

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
