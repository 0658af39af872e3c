"""Clips for tests: the frame's number is drawn into every frame, in blocks that survive a codec.

A wrong frame is therefore seen by reading its pixels, whatever codec carried them. The number is drawn as
a 4 x 4 grid of black and white cells: 12 bits of number, 4 bits of check, the top left cell first.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vrthinker.video.measured_readers import leave_real_time

_GRID = 4
_NUMBER_BITS = 12
MAX_NUMBER = (1 << _NUMBER_BITS) - 1

ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"preset": "ultrafast"}),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"}),
    "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "av1": ("libsvtav1", {"preset": "8", "crf": "20"}),
    "mpeg4": ("mpeg4", {"qscale": "3"}),
    "mpeg2video": ("mpeg2video", {"qscale": "3"}),
    "mjpeg": ("mjpeg", {"qscale": "3"}),
    "gif": ("gif", {}),
}
"""Codec name to PyAV's encoder and its options, chosen for speed."""

_PIXEL_FORMATS = {"mjpeg": "yuvj420p", "gif": "rgb8"}
_NO_ODD_CHROMA = {"h264", "hevc"}
"""Encoders that refuse odd sizes with subsampled colour; they get full-resolution colour then."""


def draw_number(number: int, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Draws a frame's number.

    Args:
        number: 0 to 4095.
        size: (height, width) in pixels, at least 32 each.

    Returns:
        uint8 `[height, width, 3]`.
    """
    if not 0 <= number <= MAX_NUMBER:
        raise ValueError(f"number: got {number}, allowed: 0 to {MAX_NUMBER}")
    height, width = size
    bits = np.array([(_with_check(number) >> bit) & 1 for bit in range(15, -1, -1)], dtype=np.uint8)
    rows = np.arange(height) * _GRID // height
    columns = np.arange(width) * _GRID // width
    cells = bits.reshape(_GRID, _GRID)[rows[:, None], columns[None, :]]
    frame = np.empty((height, width, 3), dtype=np.uint8)
    # Colour moves with the number too, so that two frames with the same cells still differ.
    frame[..., 0] = np.where(cells, 225, 30)
    frame[..., 1] = np.where(cells, 235, 20 + number % 7)
    frame[..., 2] = np.where(cells, 215, 40)
    return frame


def read_number(frame: np.ndarray[Any, Any]) -> int:
    """Reads the number back.

    Args:
        frame: uint8 `[height, width, 3]`, at any size, as decoded.

    Raises:
        ValueError: The cells do not add up: a damaged frame, or not one of ours.
    """
    height, width = frame.shape[:2]
    value = 0
    for row in range(_GRID):
        for column in range(_GRID):
            top, bottom = height * row // _GRID, height * (row + 1) // _GRID
            left, right = width * column // _GRID, width * (column + 1) // _GRID
            inset_y, inset_x = (bottom - top) // 4, (right - left) // 4
            cell = frame[top + inset_y : bottom - inset_y, left + inset_x : right - inset_x]
            value = value << 1 | int(cell.mean() > 127)
    number = value >> 4
    if _with_check(number) != value:
        raise ValueError(f"no number in this frame: cells read {value:016b}")
    return number


def _with_check(number: int) -> int:
    """The number in the high 12 bits, and 4 bits by which a damaged one is (mostly) noticed."""
    check = (number * 7 + (number >> 4) * 3 + (number >> 8) * 5 + 9) & 0xF
    return number << 4 | check


def make_clip(
    path: Path,
    n_frames: int,
    size: tuple[int, int] = (64, 96),
    codec: str = "h264",
    fps: int | Fraction = 24,
    pts: Sequence[int] | None = None,
    rotation: int = 0,
    gop: int = 12,
    *,
    mirror: bool = False,
    b_frames: int = 0,
    first_number: int = 0,
    audio: bool = False,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encodes frames numbered `first_number`, `first_number + 1`, ...

    Args:
        path: Where to; its ending picks the container.
        n_frames: How many.
        size: (height, width) of the stored pictures.
        codec: A key of `ENCODERS`.
        fps: Constant rate, when `pts` is None.
        pts: When each frame is shown, in milliseconds (10 ms steps for a GIF): a variable rate.
        rotation: Degrees clockwise that a player has to turn the pictures by.
        gop: A keyframe at least every so many frames.
        mirror: A player has to mirror the pictures left to right after turning them.
        b_frames: How many may follow each other (H.264, HEVC, MPEG-4, MPEG-2).
        first_number: The first frame's number.
        audio: Adds a second of silence, as the first stream.
        options: More options for the encoder.
        container_options: Options for the container.

    Returns:
        `path`.
    """
    encoder, defaults = ENCODERS[codec]
    settings = dict(defaults)
    if codec == "hevc":
        settings["x265-params"] += f":keyint={gop}:min-keyint={gop}:bframes={b_frames}:scenecut=0:open-gop=0"
    if codec in {"h264"}:
        settings["x264-params"] = f"scenecut=0:bframes={b_frames}:keyint={gop}:min-keyint={min(gop, 2)}"
    for key, value in (options or {}).items():
        settings[key] = f"{settings[key]}:{value}" if key.endswith("-params") and key in settings else value
    odd = any(side % 2 for side in size)
    with av.open(str(path), "w", options=container_options or {}) as container:
        silence = container.add_stream("aac", rate=8000) if audio else None
        stream: Any = container.add_stream(encoder, rate=Fraction(fps), options=settings)
        stream.height, stream.width = size
        colour = "yuv444p" if odd and codec in _NO_ODD_CHROMA else "yuv420p"
        stream.pix_fmt = _PIXEL_FORMATS.get(codec, colour)
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1  # on pictures this small threads only wait for each other
        if codec in {"mpeg4", "mpeg2video"}:
            stream.codec_context.max_b_frames = b_frames
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation or mirror:
            # PyAV counts counter-clockwise, and mirrors after turning.
            stream.set_display_rotation(-rotation, hflip=mirror)
        if silence is not None:
            _write_silence(container, silence)
        for i in range(n_frames):
            frame = av.VideoFrame.from_ndarray(draw_number(first_number + i, size), format="rgb24")
            frame.pts = i if pts is None else pts[i]
            frame.time_base = 1 / Fraction(fps) if pts is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
            if codec == "av1" and i == 0:
                leave_real_time()
        container.mux(stream.encode(None))
    return path


def _write_silence(container: Any, stream: Any) -> None:
    samples = np.zeros((1, 1024), dtype=np.float32)
    for i in range(8):
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 8000
        frame.pts = i * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def cut(source: Path, target: Path, keep: float) -> Path:
    """Copies the first part of a file: `keep` is the share of its bytes."""
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        file.truncate(int(source.stat().st_size * keep))
    return target


def stream_copy(source: Path, target: Path, start_seconds: float) -> Path:
    """Copies the packets from the keyframe at or before a time on, as clip cutters do without encoding anew.

    The times are shifted so that `start_seconds` becomes 0. What lies before it has negative times, and the
    container of the target decides what becomes of them.
    """
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        video = old.streams.video[0]
        copy = new.add_stream_from_template(video)
        assert video.time_base is not None
        shift = round(start_seconds / video.time_base)
        old.seek(shift, stream=video)
        for packet in old.demux(video):
            if packet.size and packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                new.mux(packet)
    return target
