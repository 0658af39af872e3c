"""The choice of the reader that decodes on this machine.

This module is separate from the protocol (`reader.py`) to avoid a circular import.
"""

from __future__ import annotations

from vrthinker.video.reader import VideoReader


def open_reader(*, image_fps: float = 8.0) -> VideoReader:
    """Returns the default reader of this machine. All of them list a file once while it does not change.

    Args:
        image_fps: The frame rate of folders of images, which do not state one.
    """
    from vrthinker.video.pyav.index_cache import SHARED
    from vrthinker.video.pyav.reader import PyAVReader

    return PyAVReader(image_fps=image_fps, indexes=SHARED)
