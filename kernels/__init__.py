"""Native and reference kernels: one folder per op, and the rule that picks the version that runs.

Each op's folder has `reference.py` (the specification, in plain torch or numpy), the fast versions, `op.py`
(checks, dispatch, registration with `torch.library`) and `bench.py`. The environment variable
`VRTHINKER_KERNELS` is read at every call and decides which version runs: `auto` (the fastest that can run on
the tensor's device), `reference`, `cpu`, `cuda` or `triton`.

Invariant: if a named version cannot run, that is an error, and no other version is used silently. Importing
this module loads no tensor library.
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
        InputError: The variable has an unknown value.
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
        obstacles: Version -> the reason why it cannot run on the given tensors, or None if it can, for every
            version of the op. The reference runs everywhere.

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
    """The names of the ops that `vrthinker bench` measures: the folders here that have a `bench.py`."""
    return tuple(
        sorted(
            module.name
            for module in pkgutil.iter_modules(__path__)
            if module.ispkg and importlib.util.find_spec(f"{__name__}.{module.name}.bench") is not None
        )
    )


def native_obstacles(device: torch.device) -> dict[Version, str | None]:
    """The reasons why the reference, the C++ or the CUDA version of an op cannot run on a device.

    Args:
        device: The device of the op's tensors.

    Returns:
        Version -> the reason why it cannot run, or None if it can, for `choose_version`.
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
    """The reason why a Triton version cannot run on tensors on `device`; None if it can.

    On a CPU it runs under Triton's interpreter, which is slow and meant for tests. `TRITON_INTERPRET=1` turns
    it on before Triton is first imported.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors are on {device}; on a cpu it needs TRITON_INTERPRET=1 (slow, for tests)"
