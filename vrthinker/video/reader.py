"""The protocol of video readers: probe a file, and get frames by their exact position.

Invariant: frame i of a file is the i-th picture that a player would show (presentation order, edit
lists applied), for every reader. A reader never returns another frame than the one asked for: where
it cannot tell, it decodes from the start, and where that fails too, it raises.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vrthinker.errors import VideoError
from vrthinker.video.frames import Frames

VideoPath = str | os.PathLike[str]

MAX_SIDE_PIXELS = 8192
MAX_FRAMES = 1_000_000


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` tells about a clip.

    Attributes:
        path: The file as it was given.
        codec: FFmpeg's name of the codec ("h264", "vp9", ...); "images" for a folder of images.
        width: In pixels, as displayed (after rotation). Non-square pixels are not stretched.
        height: In pixels, as displayed.
        n_frames: How many frames `frames_at` can return.
        fps: Average frame rate, `n_frames / duration_seconds`.
        duration_seconds: From the first frame's appearance to the last one's end.
        is_variable_frame_rate: Whether the gaps between frames differ by more than the rounding of
            the container's clock.
        rotation_degrees: By how much the stored pictures are turned clockwise for display: 0, 90, 180
            or 270. Already applied to `width`, `height` and the pixels.
        pts_seconds: When each frame is shown, counted from the first frame, so it starts at 0.
        truncated: Why only the frames before the break are listed, under `tolerate_truncation`.
        comment: The file's own comment, from its metadata; empty where there is none.
    """

    path: str
    codec: str
    width: int
    height: int
    n_frames: int
    fps: float
    duration_seconds: float
    is_variable_frame_rate: bool
    rotation_degrees: int
    pts_seconds: tuple[float, ...] = field(repr=False)
    truncated: str | None = None
    comment: str = field(default="", repr=False)


@runtime_checkable
class VideoReader(Protocol):
    """What turns files into frames. Safe to use from several threads at once.

    `tolerate_truncation` lets a file that breaks half-way be read up to the break; the same value
    must be given to `probe` and to the reads that follow it.
    """

    def probe(self, path: VideoPath, *, tolerate_truncation: bool = False) -> VideoInfo:
        """Finds out what the file holds.

        Raises:
            VideoError: The file cannot be used; the message says why in one line.
        """

    def frames_at(
        self, path: VideoPath, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Returns the frames at these 0-based positions, in the order given; repeats are allowed.

        Raises:
            VideoError: The file cannot be used, an index is not in the file, or a frame that is
                needed for one of those asked for does not decode.
        """

    def read_many(
        self, requests: Sequence[tuple[VideoPath, Sequence[int]]], *, tolerate_truncation: bool = False
    ) -> list[Frames]:
        """`frames_at` for several requests; results in their order, each file opened once.

        Raises:
            VideoError: As `frames_at`.
        """


def checked_indices(path: VideoPath, frame_indices: Sequence[int], n_frames: int) -> tuple[int, ...]:
    """Makes plain integers of frame indices; for backends.

    Raises:
        VideoError: An index is not in the file.
    """
    wanted = tuple(operator.index(i) for i in frame_indices)
    for i in wanted:
        if not 0 <= i < n_frames:
            raise VideoError(path, f"frame_index: got {i}, allowed: 0 to {n_frames - 1}")
    return wanted


def broken_error(path: VideoPath, reason: str, n_frames: int) -> VideoError:
    """The error for a clip that breaks after `n_frames` good frames; for backends."""
    if n_frames == 0:
        return VideoError(path, f"no frame decodes: {reason}")
    return VideoError(
        path,
        f"breaks after frame {n_frames}: {reason}; --tolerate-truncation judges the {n_frames} "
        f"frame{'s' if n_frames > 1 else ''} before the break",
    )
