"""Video files, their frames, and the workspace that numbers them. Nothing here knows prompts or models.

Importing this package does not load PyAV, numpy or Pillow. Opening a reader does.
"""

from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.frames import Frames
from vrthinker.video.open import open_reader
from vrthinker.video.reader import VideoInfo, VideoReader
from vrthinker.video.resize import ResizeSettings, resize_frame
from vrthinker.video.workspace import Workspace, WorkspaceFrame

__all__ = [
    "FrameCache",
    "Frames",
    "ResizeSettings",
    "VideoInfo",
    "VideoReader",
    "Workspace",
    "WorkspaceFrame",
    "open_reader",
    "resize_frame",
]
