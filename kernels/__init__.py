"""Native and reference kernels: one folder per op, and the rule that picks which version of it runs.

Each op's folder holds `reference.py` (plain torch, the specification), the fast versions beside it,
`op.py` (checks, dispatch, registration with `torch.library`) and `bench.py`. Which version runs is read
from the environment variable `VRTHINKER_KERNELS` at every call: `auto` (the fastest that can run where the
tensor lies), `reference`, `cpu`, `cuda` or `triton`.

Invariant: a version that was named and cannot run is an error, never a silent fallback. Importing this
module loads no tensor library.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

from vrthinker.errors import InputError

if TYPE_CHECKING:
    import torch

Version = Literal["reference", "cpu", "cuda", "triton"]
ENVIRONMENT_VARIABLE = "VRTHINKER_KERNELS"

_AUTO_ORDER: tuple[Version, ...] = ("cuda", "triton", "cpu", "reference")


def requested_version() -> Version | None:
    """The version that `VRTHINKER_KERNELS` names, or None for `auto`.

    Raises:
        InputError: The variable holds something else.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "") or "auto"
    if value == "auto":
        return None
    for version in get_args(Version):
        if value == version:
            return version  # type: ignore[no-any-return]
    raise InputError(f"{ENVIRONMENT_VARIABLE}: got {value!r}, allowed: auto, " + ", ".join(get_args(Version)))


def choose_version(op: str, obstacles: Mapping[Version, str | None]) -> Version:
    """Picks the version of an op that runs.

    Args:
        op: The op's name, for the message.
        obstacles: Every version that the op has, with what keeps it from running on the tensors at
            hand, or None where nothing does. The reference runs everywhere.

    Returns:
        The version that `VRTHINKER_KERNELS` names, or under `auto` the first of cuda, triton, cpu and
        reference that can run.

    Raises:
        InputError: The named version does not exist or cannot run; the message says why.
    """
    named = requested_version()
    if named is not None:
        if named not in obstacles:
            raise InputError(
                f"{op}: {ENVIRONMENT_VARIABLE}={named}, but the op has no such version; it has: "
                + ", ".join(obstacles)
            )
        obstacle = obstacles[named]
        if obstacle is not None:
            raise InputError(f"{op}: {ENVIRONMENT_VARIABLE}={named}, but it cannot run: {obstacle}")
        return named
    for version in _AUTO_ORDER:
        if version in obstacles and obstacles[version] is None:
            return version
    raise InputError(f"{op}: no version can run: " + "; ".join(f"{k}: {v}" for k, v in obstacles.items()))


def benchmarked_ops() -> tuple[str, ...]:
    """The ops that `vrthinker bench` measures, by name: every folder here that holds a `bench.py`."""
    return tuple(
        sorted(
            module.name
            for module in pkgutil.iter_modules(__path__)
            if module.ispkg and importlib.util.find_spec(f"{__name__}.{module.name}.bench") is not None
        )
    )


def native_obstacles(device: torch.device) -> dict[Version, str | None]:
    """What keeps the reference, the C++ and the CUDA version of an op from running on tensors on `device`.

    Args:
        device: Where the op's tensors lie.

    Returns:
        For `choose_version`: None for a version that can run, or why it cannot.
    """
    try:
        import vrthinker._core as _core
    except ImportError as error:
        missing = f"the native module vrthinker._core cannot be imported ({error}); reinstall the package"
        return {"reference": None, "cpu": missing, "cuda": missing}
    cpu = cuda = None
    if device.type != "cpu":
        cpu = f"the tensors are on {device}, it takes tensors on cpu"
    if _core.build_info()["cuda_version"] is None:
        cuda = "this build has no CUDA; reinstall with nvcc on the PATH"
    elif device.type != "cuda":
        cuda = f"the tensors are on {device}, it takes tensors on cuda"
    return {"reference": None, "cpu": cpu, "cuda": cuda}


def triton_obstacle(device: torch.device) -> str | None:
    """What keeps a Triton version from running on tensors on `device`; None where nothing does.

    On a CPU it runs under Triton's interpreter, which `TRITON_INTERPRET=1` turns on before Triton is first
    imported. The interpreter is for tests: it is slow.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors are on {device}; on a cpu it needs TRITON_INTERPRET=1 (slow, for tests)"
