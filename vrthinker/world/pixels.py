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

from vrthinker.world.world import WORLD_COMMENT, ClipTruth, Defect, Hint, PairTruth

UNITS = 56
"""The number of units per side of the picture."""

_BACKGROUND = 0.25
_TEXTURE = 0.02
_FADE = 0.07
_BAR_UNITS = 3
_TRAVEL = 32.0
"""The distance from the first frame to the last in units, including the leaps of speed hints."""
_LEAP = 5.0
_LANES = {1: (28.0,), 2: (17.0, 39.0)}
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
    plain = _to_bytes(_enlarge(texture, units))
    radius, lanes = _RADIUS[len(pair.objects)], _LANES[len(pair.objects)]
    for index in range(clip.n_frames):
        defects, hint = clip.defects_at(index), clip.hint_at(index)
        noise = pair.noise if Defect.NOISE in defects else _FADE if hint is Hint.FADE else 0.0
        field: np.ndarray | None = None
        if noise:
            # The noise only brightens. A small vision tower hardly learns to see noise around zero.
            grain = np.abs(rng.normal(0.0, noise, (UNITS, UNITS, 3))).astype(np.float32)
            field = _enlarge(grain, units)
        picture: np.ndarray | None = None
        if hint is Hint.BARS:
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
            first = number == 0
            rgb = _RGB[clip.wrong_color if first and Defect.COLOR in defects else color]
            off = clip.jump if first and Defect.JUMP in defects else 0.0
            centre = _centre(pair, clip, index, lanes[number] + clip.lane + off)
            _draw_shape(image, rgb, shape, centre, radius, field)
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


def _centre(pair: PairTruth, clip: ClipTruth, index: int, lane: float) -> tuple[float, float]:
    """The (x, y) of an object's centre in units."""
    leaps = [event.first_index for event in clip.events if event.hint is Hint.SPEED]
    speed = (_TRAVEL - _LEAP * len(leaps)) / clip.n_frames
    along = 12 + clip.start + speed * index + _LEAP * sum(index >= first for first in leaps)
    if pair.direction in (1, 3):
        along = UNITS - 1 - along
    return (along, lane) if pair.direction < 2 else (lane, along)


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
