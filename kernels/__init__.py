"""Native and reference kernels: one folder per op, and the rule that picks which version of it runs.

Each op's folder holds `reference.py` (plain torch, the specification), the fast versions beside it,
`op.py` (checks, dispatch, registration with `torch.library`) and `bench.py`. Which version runs is read
from the environment variable `VRTHINKER_KERNELS` at every call: `auto` (the fastest that can run where the
tensor lies), `reference`, `cpu`, `cuda` or `triton`.

Invariant: a version that was named and cannot run is an error, never a silent fallback. Importing this
module loads no tensor library.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, get_args

from vrthinker.errors import InputError

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
