"""The choice of the reader that decodes on this machine.

This module is separate from the protocol (`reader.py`) to avoid a circular import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from vrthinker.errors import InputError, VRThinkerError
from vrthinker.video.reader import VideoReader

if TYPE_CHECKING:
    from vrthinker.video.reader_times import ReaderTimes

ReaderName = Literal["auto", "pyav", "dali"]
READERS: tuple[ReaderName, ...] = ("auto", "pyav", "dali")


class ReaderChoice(NamedTuple):
    """What `auto` takes on this machine.

    Attributes:
        name: The reader's name. "dali" hands to the CPU reader the clips that it is slower with.
        reason: Why this one, as the end of "pyav: ...".
        times: What was measured, by which "dali" decides for each clip.
    """

    name: str
    reason: str
    times: ReaderTimes | None = None


def auto_choice() -> ReaderChoice:
    """What `auto` takes, and why. No video library is loaded.

    Without a measurement of this machine (`vrthinker doctor --readers`) it is the CPU reader: DALI decodes a
    few codecs only, and where it is faster depends on the machine, the codec and the clip's length.
    """
    from vrthinker.video.dali.support import has_gpu, installed_version
    from vrthinker.video.reader_times import ReaderTimes

    try:
        times = ReaderTimes.load()
    except (VRThinkerError, OSError) as error:
        return ReaderChoice("pyav", str(error))
    if times is not None:
        by_codec = {clip.codec for clip in times.clips}
        ahead = {clip.codec for clip in times.clips if clip.faster == "dali"}
        if not ahead and all(clip.dali is None for clip in times.clips):
            return ReaderChoice("pyav", f"on {times.date[:10]}, {times.clips[0].summary}", times)
        if not ahead:
            return ReaderChoice("pyav", f"it was measured to be the faster one on {times.date[:10]}", times)
        part = ", ".join(sorted(ahead))
        rest = f"; pyav decodes {', '.join(sorted(by_codec - ahead))}" if by_codec - ahead else ""
        return ReaderChoice(
            "dali", f"measured on {times.date[:10]} to be faster with clips in {part}{rest}", times
        )
    if installed_version() is None:
        reason = "no NVIDIA GPU to decode on" if not has_gpu() else "NVIDIA DALI is not installed"
        return ReaderChoice("pyav", reason + (" (pip install 'vrthinker[dali]')" if has_gpu() else ""))
    return ReaderChoice(
        "pyav", "nothing has been measured here; vrthinker doctor --readers compares it with DALI"
    )


def open_reader(name: ReaderName = "pyav", *, image_fps: float = 8.0) -> VideoReader:
    """Returns a reader of this machine. All of them list a file once while it does not change.

    Args:
        name: The reader: "pyav" (the CPU), "dali" (NVIDIA DALI, on a GPU if there is one), or "auto" (the
            faster one for each clip, as far as that was measured). Training and whatever reads records
            again take the default, so that they see the same pixels on every machine.
        image_fps: The frame rate of folders of images, which do not state one.

    Raises:
        InputError: There is no such reader, or it cannot run here.
    """
    from vrthinker.video.pyav.index_cache import SHARED
    from vrthinker.video.pyav.reader import PyAVReader

    if name not in READERS:
        raise InputError(f"reader: got {name!r}, allowed: {', '.join(READERS)}")
    cpu = PyAVReader(image_fps=image_fps, indexes=SHARED)
    choice = auto_choice() if name == "auto" else ReaderChoice(name, "it was named")
    if choice.name == "dali":
        from vrthinker.video.dali.reader import DaliReader
        from vrthinker.video.dali.support import has_gpu

        return DaliReader("gpu" if has_gpu() else "cpu", cpu, times=choice.times)
    return cpu
