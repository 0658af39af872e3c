"""What was measured on this machine about its readers, by which `auto` decides who decodes a clip.

`vrthinker doctor --readers` writes the file (`measured_readers.py` measures). Invariant: a file of another
machine, or of other versions of what decodes, decides nothing; without a measurement the CPU reader decodes.
So what `auto` takes changes only when somebody measures again or changes the machine, and otherwise two runs
show the same pixels. Nothing about the file stops a command: one that cannot be used is a reason.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vrthinker.bounded_files import read_json
from vrthinker.errors import InputError, first_problem, one_line
from vrthinker.video.dali.support import gpu_names, has_gpu, installed_version

if TYPE_CHECKING:
    from vrthinker.video.reader import VideoInfo

FILE_VARIABLE = "VRTHINKER_READER_TIMES"
MARGIN = 1.1
"""How many times the CPU reader's speed DALI's has to be, so that noise does not decide."""
MOST_LEVELS = 2.0
"""How far the readers' colours may be apart on average, in levels of 255: rounding and how chroma is spread
over pixels stay below it, another colour matrix or another frame does not."""
_MAX_BYTES = 1 << 20
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_CONFIG = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Rate(BaseModel):
    """Frames a second, over some reads."""

    model_config = _CONFIG

    median: float = Field(gt=0)
    min: float = Field(gt=0)
    max: float = Field(gt=0)


class ClipTimes(BaseModel):
    """How fast both readers gave resized frames of one clip, with as many threads."""

    model_config = _CONFIG

    codec: str = Field(max_length=16, pattern=r"^[\w-]+$")
    """FFmpeg's name of the codec."""
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    n_frames: int = Field(gt=0)
    """The frames of the clip."""
    frames_a_read: int = Field(gt=0)
    """The frames that a read asked for, evenly spaced over the clip."""
    threads: int = Field(gt=0)
    """Threads that read at a time, each a copy of the clip."""
    pyav: Rate
    """The CPU reader's frames a second, of all threads together."""
    dali: Rate | None
    """DALI's frames a second; null if it did not decode the clip."""
    why_not: str | None = Field(None, max_length=300)
    """Why DALI did not decode the clip, or may not."""
    largest_difference: int | None = Field(None, ge=0, le=255)
    """The largest difference between the readers' colours, in levels of 255."""
    mean_difference: float | None = Field(None, ge=0, le=255)
    """The mean difference between the readers' colours, in levels of 255."""

    @property
    def ratio(self) -> float:
        """DALI's speed relative to the CPU reader's."""
        return self.dali.median / self.pyav.median if self.dali else 0.0

    @property
    def faster(self) -> str:
        """The name of the reader that decodes such clips."""
        equal = self.mean_difference is not None and self.mean_difference <= MOST_LEVELS
        return "dali" if equal and self.why_not is None and self.ratio >= MARGIN else "pyav"

    @property
    def summary(self) -> str:
        """What was found, in words."""
        like = f"{self.codec} of {self.width}x{self.height} and {self.n_frames} frames"
        if self.why_not is not None or self.dali is None:
            reason = one_line(self.why_not or "no reason was kept")
            return f"measured with {like}, DALI did not decode it: {reason}"
        apart = f"; its colours differ by {self.mean_difference} levels on average"
        speed = f"measured with {like}, DALI is {self.ratio:.2f} times as fast as the CPU reader"
        return speed + (apart if (self.mean_difference or 0) > MOST_LEVELS else "")


class ReaderTimes(BaseModel):
    """The file of measurements."""

    model_config = _CONFIG

    schema_version: int = Field(1, ge=1, le=1)
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")
    """When it was measured (UTC, ISO 8601)."""
    device: Literal["cpu", "gpu"]
    """Where DALI decoded."""
    machine: dict[str, Any]
    """What `machine()` said then."""
    clips: tuple[ClipTimes, ...] = Field(min_length=1, max_length=1000)

    def nearest(self, info: VideoInfo) -> ClipTimes | None:
        """The measured clip that is most like this one; None if its codec was not measured."""

        def distance(clip: ClipTimes) -> float:
            area = clip.width * clip.height / max(1, info.width * info.height)
            return abs(math.log2(area)) + abs(math.log2(clip.n_frames / max(1, info.n_frames)))

        alike = [clip for clip in self.clips if clip.codec == info.codec]
        return min(alike, key=distance, default=None)

    def why_not_dali(self, info: VideoInfo) -> str | None:
        """Why the CPU reader decodes a clip that DALI can decode; None if DALI does."""
        clip = self.nearest(info)
        if clip is None:
            return f"{info.codec} was not measured (vrthinker doctor --readers)"
        return None if clip.faster == "dali" else clip.summary

    @classmethod
    def load(cls) -> Self | None:
        """The measurements of this machine; None if there are none yet.

        Raises:
            InputError: The file cannot be read, is no such file, or was measured on another machine or with
                other versions.
        """
        path = times_file()
        if not os.path.exists(path):  # false for a name that cannot be looked at
            return None
        again = "vrthinker doctor --readers measures again"
        content = read_json(path, _MAX_BYTES)
        try:
            times = cls.model_validate(content)
        except ValidationError as error:
            raise InputError(f"{path}: {first_problem(error)}; {again}") from None
        if installed_version() is None:
            raise InputError(
                f"{path}: measured where NVIDIA DALI was installed; pip install 'vrthinker[dali]'"
            )
        if times.machine != machine() or times.device != ("gpu" if has_gpu() else "cpu"):
            raise InputError(f"{path}: measured on another machine, or with other versions; {again}")
        return times


def times_file() -> Path:
    """Where the measurements are kept: `VRTHINKER_READER_TIMES`, or in the user's cache.

    Raises:
        InputError: Nothing tells where the user's cache is.
    """
    if named := os.environ.get(FILE_VARIABLE):
        return Path(named)
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except RuntimeError:
        raise InputError(
            f"this user has no home; {FILE_VARIABLE} names the file of the readers' times"
        ) from None
    return Path(cache, "vrthinker", "reader_times.json")


def machine() -> dict[str, Any]:
    """What decides about the readers' speed: the processor, the GPUs, and the versions of what decodes."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpus": gpu_names(),
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "all"),
        "driver": _first_line(_DRIVER_VERSION),
        "versions": {
            "dali": installed_version(),
            **{name: _version(name) for name in ("vrthinker", "av", "pillow")},
        },
    }


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
