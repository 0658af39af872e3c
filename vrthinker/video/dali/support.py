"""What DALI can be given on this machine, found out without loading it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vrthinker.video.pyav.index import ClipIndex

CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
GPU_CODECS = CPU_CODECS | {"h264", "hevc", "av1", "mpeg4"}
NOT_INSTALLED = "reader dali: NVIDIA DALI is not installed; pip install 'vrthinker[dali]', or --reader pyav"
_FAMILY = "nvidia-dali-cuda"
_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
_MATRICES = frozenset({2, 5, 6})
"""FFmpeg's numbers of a colour matrix that is not stated and of BT.601's two. DALI uses BT.601's always."""
_FULL_RANGE = 2
_MAX_FILE_BYTES = 1 << 28
"""DALI is given the whole file in memory."""
_DRIVER = Path("/proc/driver/nvidia/gpus")


@functools.cache
def installed_version() -> str | None:
    """The version of DALI that is installed, for whatever version of CUDA; None if none is."""
    for distribution in importlib.metadata.distributions():
        try:
            if (distribution.name or "").startswith(_FAMILY):
                return distribution.version
        except Exception:  # some package's broken metadata are not ours to report
            continue
    return None


def has_gpu() -> bool:
    """Whether NVIDIA's driver shows this process a GPU. No library is loaded to find out."""
    # The first entry that names no GPU ends the list.
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() in ("", "-1", "NoDevFiles"):
        return False
    try:
        return any(_DRIVER.iterdir())
    except OSError:
        return False


def gpu_names() -> list[str]:
    """The names of the GPUs that NVIDIA's driver shows; none if there is no GPU to use."""
    names = []
    for folder in sorted(_DRIVER.iterdir()) if has_gpu() else ():
        try:
            text = (folder / "information").read_text("utf-8", "replace")
        except OSError:
            text = ""
        found = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Model:")]
        names.append(found[0] if found else "unknown")
    return names


def why_handed_over(index: ClipIndex, device: str) -> str | None:
    """Why a clip is not decoded by DALI; None if it is.

    Args:
        index: The CPU reader's index of the clip.
        device: Where DALI decodes, "cpu" or "gpu".
    """
    info = index.info
    allowed = CPU_CODECS if device == "cpu" else GPU_CODECS
    if info.codec not in allowed:
        return f"{info.codec} (on a {device.upper()}, DALI decodes {', '.join(sorted(allowed))})"
    if info.truncated is not None:
        return "the file breaks half-way"
    if index.ticks is None or index.n_packets != info.n_frames or index.has_edits:
        return "packets that show no picture, or pictures that an edit list hides"
    if info.is_variable_frame_rate:
        return "a variable frame rate"
    if info.rotation_degrees or index.orientation.mirrored:
        return "pictures that have to be turned"
    if index.pixel_format not in _PIXEL_FORMATS:
        return f"pixels in {index.pixel_format}, not in 4:2:0 with 8 bits"
    if index.matrix not in _MATRICES:
        return f"a colour matrix other than BT.601's (FFmpeg's number {index.matrix})"
    if (index.range == _FULL_RANGE) != (info.codec == "mjpeg"):
        return "a range of values other than the codec's usual one"
    if device == "gpu" and (info.width % 2 or info.height % 2):
        return "an odd size"
    if os.path.getsize(info.path) > _MAX_FILE_BYTES:
        return f"a file of more than {_MAX_FILE_BYTES >> 20} MiB"
    return None
