"""Reads defects and hints of the synthetic world off decoded pixels, for tests.

It knows what a viewer knows, the caption and that most frames are plain, and shares no code and no table with
what draws the clips: noise is roughness, a colour is a hue, a jump is a distance from the usual lane.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

UNITS = 56
Array = np.ndarray[Any, Any]

_HUES = {
    0: "red",
    30: "orange",
    53: "yellow",
    124: "green",
    184: "cyan",
    228: "blue",
    288: "purple",
    360: "red",
}


@dataclass(frozen=True)
class Sight:
    """What one frame shows."""

    defects: frozenset[str]
    """Among color, noise, jump."""
    hint: str | None
    """bars, fade or None."""
    leap: bool
    """The object is much further than its speed takes it from the frame before."""
    color: str | None
    """The first object's, by name; None under noise."""
    along: float
    """How far the last object is from the left or the top edge, along the way, in units; a triangle's mass
    lies up to 2 units below its middle."""
    lane: float
    """How far the first object is from the top or the left edge, across the way."""


@dataclass(frozen=True)
class _Measures:
    level: float
    roughness: float
    bars: float
    rgb: Array
    along: float
    lane: float


def see_clip(frames: Sequence[Array], caption: str) -> list[Sight]:
    """Reads a whole clip.

    Args:
        frames: uint8 `[size, size, 3]` each, in order; the size is a multiple of 56.
        caption: Says in which direction the objects move, and how many there are.
    """
    direction = caption.rstrip(".").split()[-1]
    two = " and " in caption
    seen = [_measure(frame, horizontal=direction in ("left", "right"), two=two) for frame in frames]
    sign = 1 if direction in ("right", "down") else -1
    steps = sign * np.diff([m.along for m in seen], prepend=seen[0].along)
    usual_step, usual_lane = np.median(steps[1:]), np.median([m.lane for m in seen])
    plain = [m for m in seen if m.level < 0.275]
    usual_color = np.median([m.rgb for m in plain], axis=0)
    sights = []
    for m, step in zip(seen, steps, strict=True):
        noisy = m.roughness > 0.05
        defects = {
            "noise": noisy,
            "jump": abs(m.lane - usual_lane) > 6,
            "color": np.abs(m.rgb - _brightened(usual_color, m.level)).max() > 0.16,
        }
        faint = not noisy and m.level > 0.275
        sights.append(
            Sight(
                defects=frozenset(name for name, found in defects.items() if found),
                hint="bars" if m.bars > 0.08 else "fade" if faint else None,
                leap=bool(step > usual_step + 2.5),
                color=None if noisy or faint else color_name(m.rgb),
                along=m.along,
                lane=m.lane,
            )
        )
    return sights


def shape_of(frame: Array) -> str:
    """The shape of a frame's only object, in a frame without noise and bars."""
    mask = frame.max(-1).astype(float) > 115
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    filled = box.mean()
    return "square" if filled > 0.9 else "circle" if filled > 0.66 else "triangle"


def _measure(frame: Array, *, horizontal: bool, two: bool) -> _Measures:
    block = frame.shape[0] // UNITS
    units = frame.reshape(UNITS, block, UNITS, block, 3).mean((1, 3)) / 255
    light = units @ np.array([0.299, 0.587, 0.114])
    middle = light[6:50]
    level, roughness = float(np.median(middle)), float(np.median(np.abs(np.diff(middle, axis=1))))
    edges = [float(np.median(rows)) - level for rows in (light[:3], light[-3:])]
    bars = min(edges)
    if bars > 0.08:
        units[:3] -= edges[0]
        units[-3:] -= edges[1]
    smooth = _smoothed(units, 2 if roughness > 0.05 else 1).max(-1)
    mask = smooth > np.median(smooth) + 0.18
    first = mask
    place = np.arange(UNITS)[:, None] if horizontal else np.arange(UNITS)[None]
    if two:  # the second one keeps to its half, its colour and its lane, so it says how far both are
        mask, first = mask & (place >= 34), mask & (place < 32)
    along = _centre(mask)[1 if horizontal else 0]
    row, column = _centre(first)
    near = (np.arange(UNITS)[:, None] - row) ** 2 + (np.arange(UNITS)[None] - column) ** 2 < 10
    lane = row if horizontal else column
    return _Measures(level, roughness, bars, units[near].mean(0), along, lane)


def _smoothed(units: Array, radius: int) -> Array:
    padded = np.pad(units, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    side = 2 * radius + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(0, 1))
    smoothed: Array = windows.mean((-2, -1))
    return smoothed


def _centre(mask: Array) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(rows.mean()), float(columns.mean())


def _brightened(rgb: Array, level: float) -> Array:
    """A colour under static that lifts a background of 0.25 to `level`, and nothing above white."""
    strength = max(0.0, level - 0.25) / 0.77
    grain = np.abs(np.random.default_rng(0).normal(0.0, strength, 4000))
    lifted: Array = np.minimum(rgb[:, None] + grain, 1.0).mean(1)
    return lifted


def color_name(rgb: Array) -> str:
    """The name of a colour that is one of the world's, more or less; its parts are 0 to 1."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*(float(v) for v in rgb))
    return "white" if saturation < 0.25 else _HUES[min(_HUES, key=lambda h: abs(h - hue * 360))]
