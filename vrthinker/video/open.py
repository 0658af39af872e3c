"""The choice of the reader that decodes on this machine.

This module is separate from the protocol (`reader.py`) to avoid a circular import.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from vrthinker.errors import InputError
from vrthinker.video.reader import VideoReader

ReaderName = Literal["auto", "pyav", "dali"]
READERS: tuple[ReaderName, ...] = ("auto", "pyav", "dali")


class ReaderChoice(NamedTuple):
    """The reader that `auto` takes on this machine.

    Attributes:
        name: The reader's name.
        reason: Why this one, as the end of "pyav: ...".
    """

    name: str
    reason: str


def auto_choice() -> ReaderChoice:
    """The reader that `auto` takes, and why. No video library is loaded.

    It takes DALI nowhere yet: on a CPU, DALI decodes three codecs only, and is slower
    (`benchmarks/results/dali_reader_cpu.jsonl`); on a GPU nobody has measured it.
    """
    from vrthinker.video.dali.support import has_gpu, installed_version

    if not has_gpu():
        return ReaderChoice("pyav", "no NVIDIA GPU to decode on")
    if installed_version() is None:
        return ReaderChoice("pyav", "NVIDIA DALI is not installed (pip install 'vrthinker[dali]')")
    return ReaderChoice("pyav", "DALI on a GPU has not been measured yet; --reader dali takes it")


def open_reader(name: ReaderName = "auto", *, image_fps: float = 8.0) -> VideoReader:
    """Returns a reader of this machine. All of them list a file once while it does not change.

    Args:
        name: The reader: "pyav" (the CPU), "dali" (NVIDIA DALI, on a GPU if there is one), or "auto".
        image_fps: The frame rate of folders of images, which do not state one.

    Raises:
        InputError: There is no such reader, or it cannot run here.
    """
    from vrthinker.video.pyav.index_cache import SHARED
    from vrthinker.video.pyav.reader import PyAVReader

    if name not in READERS:
        raise InputError(f"reader: got {name!r}, allowed: {', '.join(READERS)}")
    cpu = PyAVReader(image_fps=image_fps, indexes=SHARED)
    if name == "dali":
        from vrthinker.video.dali.reader import DaliReader
        from vrthinker.video.dali.support import has_gpu

        return DaliReader("gpu" if has_gpu() else "cpu", cpu)
    return cpu
