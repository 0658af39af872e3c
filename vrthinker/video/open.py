"""Which reader decodes on this machine.

It stands apart from the protocol (`reader.py`), so that readers can import the protocol without a circle.
"""

from __future__ import annotations

from vrthinker.video.reader import VideoReader


def open_reader(*, image_fps: float = 8.0) -> VideoReader:
    """Returns the default reader of this machine.

    Args:
        image_fps: The frame rate that a folder of images is given; nothing in it says one.
    """
    from vrthinker.video.pyav.reader import PyAVReader

    return PyAVReader(image_fps=image_fps)
