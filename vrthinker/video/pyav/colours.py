"""Decoded frames to RGB: FFmpeg's exact conversion, by our own code where that gives the same bits.

FFmpeg converts exactly only in plain C, which takes longer than decoding the frame. The op `yuv_to_rgb` is
several times as fast, for frames in 4:2:0 with 8 bits, even sides and no interlacing. What it needs to know
about a stream, PyAV does not tell in full (where the chroma samples lie). So each kind of frame is tried out
first, anew in every group of pictures, because a stream may change there: a small random picture with the
properties of the frame is converted in both ways.

Invariant: the op is used only if it gave FFmpeg's bits for that picture. Everything else is converted by
FFmpeg.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from vrthinker.kernels.yuv_to_rgb import op
from vrthinker.kernels.yuv_to_rgb.colours import LUMA_WEIGHTS, YuvColours, YuvPlanes, yuv_colours
from vrthinker.video.transparency import on_ground

_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_FORMATS = frozenset({"yuv420p", "yuvj420p"})
_FULL_RANGE = 2
"""PyAV's number of a range that uses all values."""
_LEAST_SIDE = 16
"""Below this, FFmpeg takes fewer chroma samples for a pixel."""
_SAMPLE = (32, 48)
"""The (height, width) of the picture that is tried out, and its transposed one."""
_BRIGHTEST = 200
"""Of the picture that is tried out. FFmpeg's sums overflow for colours far beyond white."""


class _Kind(NamedTuple):
    """What decides how a frame is converted, as far as PyAV tells it."""

    pixel_format: str
    matrix: int
    range: int
    interlaced: bool
    height: int
    width: int


class RgbConverter:
    """Converts the frames of one clip. What it found out about their kind holds for a group of pictures."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()  # reuses its tables for all frames
        self._colours: dict[_Kind, YuvColours | None] = {}

    def begin_group(self) -> None:
        """Forgets what was found out, because a group of pictures begins."""
        self._colours.clear()

    def check(self, frame: Any) -> None:
        """Makes sure that a frame can be converted, without converting it: the usual ones always can.

        Raises:
            Exception: It cannot be (what PyAV raises).
        """
        if frame.format.name not in _FORMATS or int(frame.colorspace) not in LUMA_WEIGHTS:
            self._reformatter.reformat(
                frame, _LEAST_SIDE, _LEAST_SIDE, format="rgb24", interpolation=_EXACT, threads=1
            )

    def convert(self, frame: Any, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """The pixels of a frame. Transparent ones are laid over the ground.

        Args:
            frame: The decoded frame.
            out: An array that may be filled and returned, contiguous uint8 `[height, width, 3]`.

        Returns:
            The pixels, uint8 `[height, width, 3]`, in `out` or in a new array.

        Raises:
            Exception: It cannot be converted (what PyAV raises).
        """
        colours = self._colours_of(frame)
        if colours is not None:
            return op.yuv_to_rgb(_planes(frame), colours, out)
        rgb = _exact_rgb(self._reformatter, frame)
        return on_ground(rgb, opacity(frame)) if has_alpha(frame) else rgb

    def _colours_of(self, frame: Any) -> YuvColours | None:
        """How the op converts a frame; None if FFmpeg has to."""
        if not op.runs_natively() or min(plane.line_size for plane in frame.planes) <= 0:
            return None
        kind = _Kind(
            frame.format.name,
            int(frame.colorspace),
            int(frame.color_range),
            bool(frame.interlaced_frame),
            frame.height,
            frame.width,
        )
        if kind not in self._colours:
            self._colours[kind] = _found_colours(frame, kind)
        return self._colours[kind]


def has_alpha(frame: Any) -> bool:
    """Whether a decoded frame's format holds an opacity for each pixel."""
    return any(component.is_alpha for component in frame.format.components)


def opacity(frame: Any) -> np.ndarray[Any, Any]:
    """The opacity of each pixel of a frame that has one, uint8 `[height, width]`."""
    rgba: np.ndarray[Any, Any] = frame.reformat(format="rgba", threads=1).to_ndarray()
    return rgba[..., 3]


def _exact_rgb(reformatter: VideoReformatter, frame: Any) -> np.ndarray[Any, Any]:
    shown = reformatter.reformat(frame, format="rgb24", interpolation=_EXACT, threads=1)
    return shown.to_ndarray()


def _planes(frame: Any) -> YuvPlanes:
    """The three planes of a frame in 4:2:0, as views."""
    y, u, v = (
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        for plane in frame.planes
    )
    return y, u, v


def _found_colours(frame: Any, kind: _Kind) -> YuvColours | None:
    """What makes the op equal to FFmpeg for frames of this kind; None if nothing does."""
    even = not kind.height % 2 and not kind.width % 2 and min(kind.height, kind.width) >= _LEAST_SIDE
    if kind.pixel_format not in _FORMATS or kind.matrix not in LUMA_WEIGHTS or kind.interlaced or not even:
        return None
    sample = _like(frame, kind)
    expected = _exact_rgb(VideoReformatter(), sample)
    full_range = kind.range == _FULL_RANGE or kind.pixel_format == "yuvj420p"
    for right, down in itertools.product((0, 1), (1, 0, 2)):
        colours = yuv_colours(kind.matrix, full_range=full_range, right=right, down=down)
        if np.array_equal(op.yuv_to_rgb(_planes(sample), colours), expected):
            return colours
    return None


def _like(frame: Any, kind: _Kind) -> Any:
    """A small picture of random pixels with the properties of a frame."""
    height, width = _SAMPLE if (kind.height, kind.width) != _SAMPLE else _SAMPLE[::-1]
    # Scaling copies the properties, also those that PyAV does not name, into memory of its own.
    sample = VideoReformatter().reformat(frame, width, height, format=kind.pixel_format, threads=1)
    random = np.random.default_rng(0)
    for plane, most in zip(sample.planes, (_BRIGHTEST, 255, 255), strict=True):
        plane.update(random.integers(0, most, plane.buffer_size, dtype=np.uint8).tobytes())
    sample.colorspace, sample.color_range = kind.matrix, kind.range
    return sample
