"""The synthetic world's pixels: a `PairTruth` drawn and encoded as real H.264 files.

Everything is drawn on a grid of 56 x 56 units, whatever the clip's size, so that a defect covers the same
share of a small and of a big picture. Invariant: equal truths give byte-equal files under one version of the
encoder (x264 without look-ahead and with one thread, because its defaults are not reproducible).
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from vrthinker.world.world import UNITS, WORLD_COMMENT, ClipTruth, Defect, Hint, PairTruth

DRAWING = 2
"""Counts the ways in which equal truths were drawn, so that clips of two ways are not mixed in a folder."""
_BACKGROUND = 0.25
_TEXTURE = 0.02
_LANE = -0.13
"""How much darker a lane is than the background."""
_FADE = 0.07
_BAR_UNITS = 3
_RADIUS = {1: 8.0, 2: 6.0}
_RGB = np.array(
    [
        [0.90, 0.15, 0.15],
        [0.15, 0.80, 0.20],
        [0.20, 0.35, 0.95],
        [0.95, 0.85, 0.15],
        [0.60, 0.20, 0.70],
        [0.95, 0.50, 0.10],
        [0.95, 0.95, 0.95],
        [0.15, 0.80, 0.85],
    ],
    np.float32,
)


def draw_clip(pair: PairTruth, clip: ClipTruth) -> Iterator[np.ndarray]:
    """Draws a clip's frames in order, uint8 `[size, size, 3]` each, RGB."""
    rng = np.random.default_rng(clip.seed)
    units = np.arange(pair.size) * UNITS // pair.size
    texture = rng.normal(_BACKGROUND, _TEXTURE, (UNITS, UNITS, 3)).astype(np.float32)
    drawn = texture.transpose(1, 0, 2) if pair.vertical else texture
    for lane in pair.lanes(clip):
        drawn[int(lane) - 1 : int(lane) + 1] += _LANE
    plain = _to_bytes(_enlarge(texture, units))
    radius = _RADIUS[len(pair.objects)]
    for index in range(clip.n_frames):
        defects, hints = clip.defects_at(index), clip.hints_at(index)
        noise = pair.noise if Defect.NOISE in defects else _FADE if Hint.FADE in hints else 0.0
        field: np.ndarray | None = None
        if noise:
            # The noise only brightens. A small vision tower hardly learns to see noise around zero.
            grain = np.abs(rng.normal(0.0, noise, (UNITS, UNITS, 3))).astype(np.float32)
            field = _enlarge(grain, units)
        picture: np.ndarray | None = None
        if Hint.BARS in hints:
            barred = texture.copy()
            barred[:_BAR_UNITS] += pair.bars
            barred[-_BAR_UNITS:] += pair.bars
            picture = _enlarge(barred, units)
        elif noise:
            picture = _enlarge(texture, units)
        if picture is not None and field is not None:
            picture = picture + field
        image = plain.copy() if picture is None else _to_bytes(picture)
        for number, (color, shape) in enumerate(pair.objects):
            wrong = number == 0 and Defect.COLOR in defects
            rgb = _RGB[clip.wrong_color if wrong else color]
            _draw_shape(image, rgb, shape, pair.centres(clip, index)[number], radius, field)
        yield image


def write_clip(path: Path, pair: PairTruth, clip: ClipTruth) -> None:
    """Draws and encodes a clip as an H.264 mp4 file."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = WORLD_COMMENT
        stream = container.add_stream("libx264", rate=Fraction(pair.fps))
        stream.width = stream.height = pair.size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "17", "preset": "ultrafast"}
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = 16
        for image in draw_clip(pair, clip):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _draw_shape(
    image: np.ndarray,
    rgb: np.ndarray,
    shape: int,
    centre: tuple[float, float],
    radius: float,
    field: np.ndarray | None,
) -> None:
    """Draws an object in place. If there is noise, the object has it too."""
    size = image.shape[0]
    scale = size / UNITS
    low = [max(0, int((c - radius) * scale)) for c in centre]
    high = [min(size, int((c + radius) * scale) + 2) for c in centre]
    x = (np.arange(low[0], high[0], dtype=np.float32) + 0.5) / scale - centre[0]
    y = ((np.arange(low[1], high[1], dtype=np.float32) + 0.5) / scale - centre[1])[:, None]
    if shape == 0:
        mask = x * x + y * y < radius * radius
    elif shape == 1:
        mask = (np.abs(x) < radius - 1) & (np.abs(y) < radius - 1)
    else:
        mask = (y < radius - 1) & (y > -radius) & (np.abs(x) < (y + radius) * 0.55)
    box = image[low[1] : high[1], low[0] : high[0]]
    if field is None:
        box[mask] = _to_bytes(rgb)
    else:
        box[mask] = _to_bytes(rgb + field[low[1] : high[1], low[0] : high[0]][mask])


def _enlarge(grid: np.ndarray, units: np.ndarray) -> np.ndarray:
    enlarged: np.ndarray = grid[units][:, units]
    return enlarged


def _to_bytes(values: np.ndarray) -> np.ndarray:
    drawn: np.ndarray = (np.clip(values, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    return drawn
