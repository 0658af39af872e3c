"""What was measured on this machine about its readers, by which `auto` decides who decodes a clip.

`vrthinker doctor --readers` writes the file (`measured_readers.py` measures). Invariant: a file of another
machine, or of other versions of what decodes, decides nothing; without a measurement the CPU reader decodes.
So what `auto` takes changes only when somebody measures again, and two runs show the same pixels.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vrthinker.bounded_files import read_json
from vrthinker.errors import InputError
from vrthinker.video.dali.support import gpu_names, installed_version

if TYPE_CHECKING:
    from vrthinker.video.reader import VideoInfo

FILE_VARIABLE = "VRTHINKER_READER_TIMES"
MARGIN = 1.1
"""How many times the CPU reader's speed DALI's has to be, so that noise does not decide."""
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

    codec: str
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
    why_not: str | None = None
    """Why DALI did not decode the clip."""
    largest_difference: int | None = None
    """The largest difference between the readers' colours, in levels of 255."""

    @property
    def ratio(self) -> float:
        """DALI's speed relative to the CPU reader's."""
        return self.dali.median / self.pyav.median if self.dali else 0.0

    @property
    def faster(self) -> str:
        """The name of the reader that decodes such clips."""
        return "dali" if self.ratio >= MARGIN else "pyav"


class ReaderTimes(BaseModel):
    """The file of measurements."""

    model_config = _CONFIG

    schema_version: int = Field(1, ge=1, le=1)
    date: str
    """When it was measured (UTC, ISO 8601)."""
    device: str
    """Where DALI decoded: "cpu" or "gpu"."""
    machine: dict[str, Any]
    """What `machine()` said then."""
    clips: tuple[ClipTimes, ...]

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
        if clip.faster == "dali":
            return None
        like = f"{clip.codec} of {clip.width}x{clip.height} and {clip.n_frames} frames"
        return f"measured with {like}, DALI is {clip.ratio:.2f} times as fast as the CPU reader"

    @classmethod
    def load(cls) -> Self | None:
        """The measurements of this machine; None if there are none yet.

        Raises:
            InputError: The file is no such file, or was measured on another machine or with other versions.
        """
        path = times_file()
        if not path.is_file():
            return None
        try:
            times = cls.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{path}: {place}: {first['msg']}; vrthinker doctor --readers measures again"
            ) from None
        if times.machine != machine():
            raise InputError(
                f"{path}: measured on another machine, or with other versions; vrthinker doctor --readers "
                "measures again"
            )
        return times


def times_file() -> Path:
    """Where the measurements are kept: `VRTHINKER_READER_TIMES`, or in the user's cache."""
    if named := os.environ.get(FILE_VARIABLE):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache, "vrthinker", "reader_times.json")


def machine() -> dict[str, Any]:
    """What decides about the readers' speed: the processor, the GPUs, and the versions of what decodes."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpu_names(),
        "versions": {
            "dali": installed_version(),
            **{name: _version(name) for name in ("vrthinker", "av", "pillow")},
        },
    }


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
