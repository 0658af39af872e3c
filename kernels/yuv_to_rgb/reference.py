"""The specification of `yuv_to_rgb`, in plain numpy.

Chroma is interpolated linearly between the places where its samples lie; beyond the outermost sample that
sample goes on. Then colour = luma * factor + chroma * factor, rounded to the nearest level (halves up), and
bounded to 0..255. Samples are counted in 1/16, in which linear interpolation by halves and quarters in two
directions is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vrthinker.kernels.yuv_to_rgb.colours import YuvColours, YuvPlanes


def yuv_to_rgb_reference(planes: YuvPlanes, colours: YuvColours) -> np.ndarray[Any, Any]:
    """The picture. Arguments and result as in `yuv_to_rgb`."""
    y, u, v = planes
    luma, v_red, u_green, v_green, u_blue = colours.factors
    grey = (y.astype(np.int64) - colours.black) * 16 * luma
    wide_u, wide_v = (
        _interpolated(_interpolated(plane.astype(np.int64), 0, colours.down), 1, colours.right) - 128 * 16
        for plane in (u, v)
    )
    sums = (grey + wide_v * v_red, grey + wide_u * u_green + wide_v * v_green, grey + wide_u * u_blue)
    rounded = (np.stack(sums, axis=-1) + (1 << 16)) >> 17
    pixels: np.ndarray[Any, Any] = np.clip(rounded, 0, 255).astype(np.uint8)
    return pixels


def _interpolated(samples: np.ndarray[Any, Any], axis: int, offset: int) -> np.ndarray[Any, Any]:
    """Twice as many samples along an axis, times 4. Those given lie `offset` half pixels into their pairs."""
    count = samples.shape[axis]
    quarters = 2 * np.arange(2 * count) - offset  # a pixel's distance from the first sample
    first, weight = np.divmod(quarters, 4)
    weight = weight.reshape([-1 if dimension == axis else 1 for dimension in range(samples.ndim)])
    before, after = (np.take(samples, np.clip(first + k, 0, count - 1), axis) for k in (0, 1))
    wide: np.ndarray[Any, Any] = before * (4 - weight) + after * weight
    return wide
