"""What every area shares: the rule for tests that need a GPU."""

from __future__ import annotations

import functools
import os

import pytest

# Before torch loads: on a machine shared with other work, OpenMP threads that spin while they wait cost
# up to fifty times the work that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@functools.cache
def _why_no_gpu() -> str | None:
    import torch

    from vrthinker import _core

    if not torch.cuda.is_available():
        return f"no CUDA device: torch sees none; {_core.cuda_probe()['reason'] or 'the driver sees some'}"
    if _core.build_info()["cuda_version"] is None:
        return "vrthinker._core was built without CUDA"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips `gpu` tests where there is no GPU; VRTHINKER_REQUIRE_GPU=1 makes that a failure."""
    if item.get_closest_marker("gpu") is None or (reason := _why_no_gpu()) is None:
        return
    if os.environ.get("VRTHINKER_REQUIRE_GPU") == "1":
        pytest.fail(f"VRTHINKER_REQUIRE_GPU=1, but {reason}")
    pytest.skip(reason)
