"""The parts that `vrthinker doctor` examines, one function each.

Invariant: nothing here uses the network, and heavy packages are imported only inside the checks. They are
imported because only that tells whether an installed package works. A package that cannot be imported is a
finding with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from vrthinker.engine.vllm.library import (
    VERSIONS,
    installed_version,
    is_cpu_build,
    is_tested_version,
    obstacle,
)

Status = Literal["ok", "missing", "warning"]

RANGES: dict[str, tuple[str, str | None]] = {
    "python": ("3.11", None),
    "torch": ("2.11", None),
    "transformers": ("5.17", "5.24"),
    "av": ("18", None),
    "pillow": ("11", None),
    "numpy": ("1.26", None),
}
"""Supported versions, the upper end exclusive. They equal the package's requirements."""

DECODERS: dict[str, tuple[str, ...]] = {
    "h264": ("h264",),
    "hevc": ("hevc",),
    "vp9": ("vp9", "libvpx-vp9"),
    # FFmpeg's own decoder `av1` only works with hardware support.
    "av1": ("libdav1d", "libaom-av1"),
    "mpeg4": ("mpeg4",),
    "mjpeg": ("mjpeg",),
    "gif": ("gif",),
}
"""Codec -> FFmpeg's decoders for it, any of which suffices."""

EXTRAS = {
    "dali": "decoding frames on the GPU",
    "triton": "the Triton versions of the kernels",
    "liger": "logprobs over large vocabularies, fused, on a GPU",
    "vllm": "judging and rollouts through vLLM, in an environment of its own",
    "train": "tables of pairs and verdicts in Parquet, plots of benchmarks",
    "trackers": "metrics of a training run in trackio, tensorboard or wandb",
    "serve": "the HTTP reward service",
    "view": "evaluations as logs of inspect_ai, for its viewer",
}
"""The extras, and the use of each."""

UNUSED = frozenset(
    {
        "scipy",
        "fastapi",
        "uvicorn",
        "prometheus_client",
    }
)
"""The packages of extras that no code of this version uses: installing them would change nothing."""

_MODELS = ("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration")
_GIB = 1 << 30
_SMALL_MEMORY_BYTES = 16 * _GIB
_SMALL_DISK_BYTES = 20 * _GIB


@dataclass(frozen=True)
class Finding:
    """What was found about one part of the machine.

    Attributes:
        part: The name of the part.
        status: The status: "ok", "warning" (works, but read the detail) or "missing" (absent or broken).
        detail: What was found.
        needed_for: What does not work without the part.
        remedy: What to do; empty if there is nothing to do.
        required: Whether judging on this machine needs the part.
    """

    part: str
    status: Status
    detail: str
    needed_for: str
    remedy: str = ""
    required: bool = False


def first_line(error: BaseException) -> str:
    """An error's first line, with its type."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _root(error: BaseException) -> BaseException:
    """The original cause of an error, which lazy imports wrap and the user needs to see."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import(name: str) -> ModuleType | str:
    """The module, or the reason why it cannot be imported. A broken library may raise anything."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return first_line(error)


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _out_of_range(name: str, version: str) -> str | None:
    """The allowed versions, if `version` is not one of them; else None."""
    low, high = RANGES[name]
    release = _release(version)
    if release >= _release(low) and (high is None or release < _release(high)):
        return None
    return f">={low}" + (f",<{high}" if high else "")


def _package(
    distribution: str, module: str, needed_for: str, describe: Callable[[ModuleType], str] = lambda module: ""
) -> Finding:
    """Checks that a required package is installed, can be imported, and has a supported version."""
    low, high = RANGES[distribution]
    wanted = f"'{distribution}>={low}{f',<{high}' if high else ''}'"
    version = _version(distribution)
    loaded = _import(module)
    if isinstance(loaded, str):
        absent = version is None and importlib.util.find_spec(module.partition(".")[0]) is None
        detail = (
            "not installed" if absent else f"{version or 'unknown version'}, cannot be imported: {loaded}"
        )
        force = "" if absent else "--force-reinstall "
        return Finding(distribution, "missing", detail, needed_for, f"pip install {force}{wanted}", True)
    version = version or str(getattr(loaded, "__version__", "unknown version"))
    more = describe(loaded)
    detail = f"{version}, {more}" if more else version
    allowed = _out_of_range(distribution, version)
    if allowed:
        return Finding(
            distribution,
            "missing",
            f"got {detail}, allowed: {allowed}",
            needed_for,
            f"pip install {wanted}",
            True,
        )
    return Finding(distribution, "ok", detail, needed_for, "", True)


def _python() -> list[Finding]:
    version = platform.python_version()
    allowed = _out_of_range("python", version)
    detail = f"{version} ({sys.executable})"
    if allowed:
        return [Finding("python", "missing", f"{detail}, allowed: {allowed}", "everything", "use it", True)]
    return [Finding("python", "ok", detail, "everything", "", True)]


def _vrthinker() -> list[Finding]:
    from vrthinker._version import __version__

    if importlib.util.find_spec("vrthinker.kernels") is None:
        detail = f"{__version__}, run from a source tree that is not installed: no vrthinker.kernels"
        return [Finding("vrthinker", "missing", detail, "judging", "pip install . in its source tree", True)]
    installed = _version("vrthinker")
    if installed is None:
        detail = f"{__version__}, without installation data: its extras cannot be looked up"
        return [Finding("vrthinker", "warning", detail, "judging", "pip install it", True)]
    return [Finding("vrthinker", "ok", __version__, "judging", "", True)]


def _core() -> list[Finding]:
    needed = "fast frame preprocessing (without it the slower reference runs)"
    core = _import("vrthinker._core")
    if isinstance(core, str):
        return [Finding("native core", "missing", core, needed, "reinstall vrthinker with a C++ compiler")]
    info = dict(core.build_info())
    cuda, architectures = info.get("cuda_version"), info.get("cuda_architectures") or []
    built = f"CUDA {cuda} for {', '.join(map(str, architectures))}" if cuda else "CPU only"
    detail = f"{info.get('version', 'unknown version')}, {built}"
    if info.get("sanitizers") or info.get("optimized") is False:
        detail += f", a {info.get('build_type', 'debugging')} build: slow"
        return [Finding("native core", "warning", detail, needed, "reinstall vrthinker in Release mode")]
    if not cuda and _probe().get("device_count"):
        remedy = "reinstall vrthinker with nvcc on the PATH"
        return [Finding("native core", "warning", f"{detail}, but a GPU is here", needed, remedy)]
    return [Finding("native core", "ok", detail, needed)]


def _probe() -> dict[str, Any]:
    """What the CUDA driver reports through the native core; empty if it cannot be asked."""
    with contextlib.suppress(Exception):
        return dict(importlib.import_module("vrthinker._core").cuda_probe())
    return {}


def _torch_build(torch: ModuleType) -> str:
    return f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"


def _torch() -> list[Finding]:
    return [_package("torch", "torch", "running a model here", _torch_build)]


def _cuda() -> list[Finding]:
    needed = "judging at speed (a CPU works, slowly)"
    probe = _probe()
    torch = _import("torch")
    if isinstance(torch, ModuleType) and torch.version.cuda and torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        names = ", ".join(
            f"{d.name} ({d.total_memory / _GIB:.0f} GiB, compute {d.major}.{d.minor})" for d in devices
        )
        return [Finding("CUDA", "ok", f"driver for CUDA {probe.get('driver_version', '?')}: {names}", needed)]
    if probe.get("device_count"):
        names = ", ".join(str(device.get("name")) for device in probe.get("devices", []))
        remedy = "pip install a CUDA build of torch that the driver supports"
        return [Finding("CUDA", "warning", f"{names} is here, torch cannot use it", needed, remedy)]
    driver = Path("/proc/driver/nvidia/version").exists() or probe.get("driver_version")
    reason = str(probe.get("reason") or ("the driver shows no GPU" if driver else "no CUDA driver found"))
    remedy = (
        "check nvidia-smi and CUDA_VISIBLE_DEVICES"
        if driver
        else "nothing, on a machine without an NVIDIA GPU"
    )
    return [Finding("CUDA", "warning" if driver else "missing", reason, needed, remedy)]


def _transformers() -> list[Finding]:
    def models(transformers: ModuleType) -> str:
        for name in _MODELS:
            getattr(transformers, name)
        return "Qwen2.5-VL and Qwen3-VL load"

    needed = "running a model here"
    try:
        return [_package("transformers", "transformers", needed, models)]
    except Exception as error:  # the package can be imported, but a model's code cannot
        detail = f"{_version('transformers')}, its Qwen models cannot be imported: {first_line(_root(error))}"
        remedy = "mend what the message names (often torchvision: pip uninstall torchvision)"
        return [Finding("transformers", "missing", detail, needed, remedy, True)]


def _torchvision() -> list[Finding]:
    needed = "nothing here"
    version = _version("torchvision")
    if version is None and importlib.util.find_spec("torchvision") is None:
        return [Finding("torchvision", "ok", "absent, and not needed", needed)]
    loaded = _import("torchvision")
    if isinstance(loaded, str):
        detail = f"{version}, cannot be imported: {loaded}; it can break transformers"
        remedy = "pip uninstall torchvision, or install the build that fits torch"
        return [Finding("torchvision", "warning", detail, needed, remedy)]
    return [Finding("torchvision", "ok", f"{version}, not used", needed)]


def _pyav() -> list[Finding]:
    package = _package("av", "av", "reading videos")
    if package.status == "missing":
        return [package]
    codec = importlib.import_module("av.codec")

    def decodes(name: str) -> bool:
        try:
            return bool(codec.Codec(name, "r").is_decoder)
        except Exception:
            return False

    has = {name: any(decodes(decoder) for decoder in decoders) for name, decoders in DECODERS.items()}
    present = ", ".join(name for name, there in has.items() if there)
    absent = ", ".join(name for name, there in has.items() if not there)
    if absent:
        remedy = "pip install --force-reinstall --only-binary av av (its wheel carries them all)"
        lacks = Finding("video decoders", "missing", f"no {absent}; has {present}", "such clips", remedy)
        return [package, lacks]
    return [package, Finding("video decoders", "ok", present, "clips of each kind")]


def _reader() -> list[Finding]:
    from vrthinker.video.open import auto_choice

    choice = auto_choice()
    return [Finding("video reader", "ok", f"auto takes {choice.name}: {choice.reason}", "decoding clips")]


def _pillow() -> list[Finding]:
    return [_package("pillow", "PIL.Image", "resizing frames, folders of images")]


def _numpy() -> list[Finding]:
    return [_package("numpy", "numpy", "frames")]


def _requirements() -> list[tuple[str, str | None]]:
    """The installed package's requirements as (distribution, extra or None)."""
    try:
        lines = importlib.metadata.requires("vrthinker") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        if name:
            found.append((name.group(), extra.group(1) if extra else None))
    return found


def _has_distribution(name: str) -> bool:
    """Whether a distribution is installed. DALI has one per CUDA version, and any suffices; so has vLLM."""
    family = "nvidia-dali-cuda"
    if name.startswith(family):
        return any((d.name or "").startswith(family) for d in importlib.metadata.distributions())
    if name == "vllm":
        return installed_version() is not None  # some builds have another name
    return _version(name) is not None


def _other_packages() -> list[Finding]:
    others = [name for name, extra in _requirements() if extra is None and name.lower() not in RANGES]
    absent = [name for name in others if not _has_distribution(name)]
    if not others:
        return []
    if absent:
        remedy = f"pip install {' '.join(absent)}"
        return [Finding("other packages", "missing", f"no {', '.join(absent)}", "judging", remedy, True)]
    return [Finding("other packages", "ok", f"all {len(others)} are there", "judging", "", True)]


def _extras() -> list[Finding]:
    findings = []
    requirements = _requirements()
    for extra, purpose in EXTRAS.items():
        every = [name for name, of in requirements if of == extra]
        required = {name for name, of in requirements if of is None}
        names = [name for name in every if name not in UNUSED and name not in required]
        absent = [name for name in names if not _has_distribution(name)]
        part = f"extra: {extra}"
        if every and not names:
            findings.append(Finding(part, "ok", "not used by this version", purpose))
        elif not names:
            detail = "unknown: vrthinker's installation data do not list it"
            findings.append(Finding(part, "warning", detail, purpose, "reinstall vrthinker"))
        elif absent:
            remedy = f"pip install 'vrthinker[{extra}]'"
            findings.append(Finding(part, "missing", f"no {', '.join(absent)}", purpose, remedy))
        else:
            findings.append(Finding(part, "ok", f"{', '.join(names)}", purpose))
    return findings


def _engines() -> list[Finding]:
    """What can write rounds here, and why something cannot."""
    broken = [found for found in (*_torch(), *_transformers()) if found.status == "missing"]
    judging = "judging with a checkpoint, training"
    here = Finding("engine: hf", "ok", "Qwen2.5-VL and Qwen3-VL run here", judging)
    if broken:
        why = "; ".join(f"{found.part}: {found.detail}" for found in broken)
        here = Finding("engine: hf", "missing", why, judging, "mend what is named there")
    many = "thousands of judgments or rollouts (--engine vllm)"
    why_not = obstacle()
    if why_not is None:
        version = installed_version()
        built = "for CPUs" if is_cpu_build() else "for GPUs"
        inside = is_tested_version()
        detail = f"vLLM {version}, {built}" + ("" if inside else f", tested with {VERSIONS[0]} only")
        there = Finding("engine: vllm", "ok" if inside else "warning", detail, many)
    else:
        reason, _, remedy = why_not.partition("; ")
        there = Finding("engine: vllm", "missing", reason, many, remedy)
    server = "judging through any OpenAI-compatible server (--endpoint)"
    return [here, there, Finding("engine: endpoint", "ok", "needs an address only", server)]


def _memory_bytes() -> int:
    """The memory that this process may use: the machine's, or the limit of its container."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # the file is absent or says "max"
            total = min(total, int(Path(limit).read_text()))
    return total


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory = _memory_bytes()
    detail = f"{cores} cores, {memory / _GIB:.0f} GiB"
    needed = "decoding; models on the CPU"
    if memory < _SMALL_MEMORY_BYTES:
        remedy = (
            "judge on a GPU, through an endpoint, or with a small model (3B in bf16 takes 8 GiB, 7B takes 16)"
        )
        return [Finding("CPU and memory", "warning", detail, needed, remedy)]
    return [Finding("CPU and memory", "ok", detail, needed)]


def _disk() -> list[Finding]:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    # If the cache does not exist yet, the folder in which it will be made is examined.
    there = next((place for place in (cache, *cache.parents) if place.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    detail, needed = f"{free / _GIB:.0f} GiB free for {cache}", "downloading a model"
    if free < _SMALL_DISK_BYTES:
        remedy = "make room or set HF_HOME (a 7B checkpoint takes 16 GiB)"
        return [Finding("disk", "warning", detail, needed, remedy)]
    return [Finding("disk", "ok", detail, needed)]


CHECKS: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
    ("python", _python),
    ("vrthinker", _vrthinker),
    ("native core", _core),
    ("torch", _torch),
    ("CUDA", _cuda),
    ("transformers", _transformers),
    ("torchvision", _torchvision),
    ("av", _pyav),
    ("video reader", _reader),
    ("pillow", _pillow),
    ("numpy", _numpy),
    ("other packages", _other_packages),
    ("extras", _extras),
    ("engines", _engines),
    ("CPU and memory", _machine),
    ("disk", _disk),
)
"""Part -> the function that examines it, in the order of the report."""
