"""The protocol of video readers: probe a file, and get frames by their exact position.

Invariant: for every reader, frame i of a file is the i-th picture that a player would show (in presentation
order, with edit lists applied). A reader never returns another frame than the requested one. If it cannot be
sure, it decodes from the start, and if that fails too, it raises.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vrthinker import limits
from vrthinker.errors import VideoError
from vrthinker.video.frames import Frames

VideoPath = str | os.PathLike[str]


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` finds out about a clip.

    Attributes:
        path: The file as it was given.
        codec: FFmpeg's name of the codec ("h264", "vp9", ...); "images" for a folder of images.
        width: The width in pixels, as displayed (after rotation). Non-square pixels are not stretched.
        height: The height in pixels, as displayed.
        n_frames: The number of frames that `frames_at` can return.
        fps: The average frame rate, `n_frames / duration_seconds`.
        duration_seconds: The time from the first frame's appearance to the last one's end.
        is_variable_frame_rate: Whether the gaps between frames differ by more than the rounding of
            the container's clock.
        rotation_degrees: The angle by which stored pictures are turned clockwise for display: 0, 90, 180 or
            270. It is already applied to `width`, `height` and the pixels.
        pts_seconds: The time at which each frame is shown, counted from the first frame, so it starts at 0.
        truncated: The reason why only the frames before a break are listed, under `tolerate_truncation`.
        notes: What a reader of the verdict has to know about how the clip is shown. Each continues the words
            "video 1", such as "has pixels that are not square (4:3) and ...".
        comment: The file's comment, from its metadata; empty if there is none.
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
    notes: tuple[str, ...] = ()
    comment: str = field(default="", repr=False)


class ReadCounts:
    """How much a reader did so far. Thread-safe.

    Attributes:
        decoded: The number of pictures that came out of decoders for reads (not for indexes).
        shown: The number of distinct frames that reads asked for.
    """

    def __init__(self) -> None:
        self.decoded = self.shown = 0
        self._lock = threading.Lock()

    def add(self, *, decoded: int = 0, shown: int = 0) -> None:
        """Adds to the counts."""
        with self._lock:
            self.decoded += decoded
            self.shown += shown


@runtime_checkable
class VideoReader(Protocol):
    """Turns files into frames. A reader is thread-safe.

    With `tolerate_truncation`, a file that breaks half-way is read up to the break. The same value must be
    given to `probe` and to the reads that follow it.
    """

    def probe(self, path: VideoPath, *, tolerate_truncation: bool = False) -> VideoInfo:
        """Finds out what a file contains.

        Raises:
            VideoError: The file cannot be used; the message says why in one line.
        """

    def frames_at(
        self, path: VideoPath, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Returns the frames at these 0-based positions, in the order given; repeats are allowed.

        Raises:
            VideoError: The file cannot be used, an index is not in the file, or a requested frame, or one
                that it depends on, does not decode.
        """

    def read_many(
        self, requests: Sequence[tuple[VideoPath, Sequence[int]]], *, tolerate_truncation: bool = False
    ) -> list[Frames]:
        """Does what `frames_at` does for several requests, in their order, and opens each file once.

        Raises:
            VideoError: A request cannot be fulfilled (see `frames_at`).
        """


def reader_name(reader: VideoReader, path: VideoPath, *, tolerate_truncation: bool = False) -> str | None:
    """The name of the reader that shows the frames of a clip; None if the reader does not say.

    Raises:
        VideoError: The file cannot be used.
    """
    ask = getattr(reader, "reader_of", None)
    name = None if ask is None else ask(path, tolerate_truncation=tolerate_truncation)
    return None if name is None else str(name)


def close_idle_clips(reader: VideoReader) -> None:
    """Closes the clips that a reader keeps open between reads, if it keeps any. It can be used on."""
    close = getattr(reader, "close_idle", None)
    if close is not None:
        close()


def checked_indices(path: VideoPath, frame_indices: Sequence[int], n_frames: int) -> tuple[int, ...]:
    """Converts frame indices to plain integers, for backends.

    Raises:
        VideoError: An index is not in the file.
    """
    wanted = tuple(operator.index(i) for i in frame_indices)
    for i in wanted:
        if not 0 <= i < n_frames:
            raise VideoError(path, f"frame_index: got {i}, allowed: 0 to {n_frames - 1}")
    return wanted


def select_frames(frames: Frames, frame_indices: Sequence[int]) -> Frames:
    """Frames that were read, in another order or repeated, for backends."""
    slots = [frames.frame_indices.index(operator.index(i)) for i in frame_indices]
    return Frames(
        frames.data[slots],
        tuple(frames.frame_indices[slot] for slot in slots),
        tuple(frames.pts_seconds[slot] for slot in slots),
        frames.device,
    )


def check_side(path: VideoPath, width: int, height: int, what: str = "pictures of") -> None:
    """Refuses pictures that are too wide or too high, for backends.

    Raises:
        VideoError: A side is over the limit (`vrthinker/limits.py`).
    """
    limit = limits.MAX_SIDE_PIXELS
    if max(width, height) > limit.value:
        allowed = f"allowed: up to {limit.value}x{limit.value}; {limit.how_to_raise}"
        raise VideoError(path, f"{what} {width}x{height} pixels, {allowed}")


def most_frames(width: int, height: int) -> int:
    """The number of frames of this size that a clip may have (`vrthinker/limits.py`)."""
    return min(limits.MAX_FRAMES.value, limits.MAX_CLIP_PIXELS.value // max(1, width * height))


def check_amount(path: VideoPath, width: int, height: int, n_frames: int) -> None:
    """Refuses clips of too many frames, or of too many pixels in all frames together, for backends.

    Raises:
        VideoError: The clip is over a limit (`vrthinker/limits.py`).
    """
    if n_frames <= most_frames(width, height):
        return
    frames, pixels = limits.MAX_FRAMES, limits.MAX_CLIP_PIXELS
    if n_frames > frames.value:
        raise VideoError(
            path, f"over {frames.value} frames, allowed: up to {frames.value}; {frames.how_to_raise}"
        )
    raise VideoError(
        path,
        f"at least {n_frames} frames of {width}x{height} pixels, allowed: {pixels.value} pixels in all; "
        f"{pixels.how_to_raise}, or shorten the clip",
    )


def broken_error(path: VideoPath, reason: str, n_frames: int) -> VideoError:
    """The error for a clip that breaks after `n_frames` good frames, for backends."""
    if n_frames == 0:
        return VideoError(path, f"no frame decodes: {reason}")
    return VideoError(
        path,
        f"breaks after frame {n_frames}: {reason}; --tolerate-truncation judges the {n_frames} "
        f"frame{'s' if n_frames > 1 else ''} before the break",
    )
