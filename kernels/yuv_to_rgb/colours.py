"""How the numbers of a picture in 4:2:0 become colours: the factors, and where the chroma samples lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vrthinker.errors import InputError

LUMA_WEIGHTS = {
    1: (0.2126, 0.0722),
    2: (0.299, 0.114),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
"""Matrix coefficients of ISO/IEC 23091-2 (BT.709, unspecified, FCC, BT.601 twice, SMPTE 240M, BT.2020) ->
the weights of red and blue in luma. FFmpeg takes an unspecified matrix to be BT.601's."""


YuvPlanes = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class YuvColours:
    """How the numbers of a picture become colours.

    Attributes:
        black: The luma of black.
        factors: The factors of luma, V for red, U for green, V for green and U for blue, with 13 fractional
            bits.
        right: Where the chroma samples lie in their blocks of 2 x 2 pixels, in half pixels to the right of
            the first one: 0 or 1.
        down: Where they lie in half pixels down: 0, 1 or 2.
    """

    black: int
    factors: tuple[int, int, int, int, int]
    right: int
    down: int


def yuv_colours(matrix: int, *, full_range: bool, right: int, down: int) -> YuvColours:
    """The colours of a stream, with the factors rounded as FFmpeg rounds them.

    Args:
        matrix: One of `LUMA_WEIGHTS`.
        full_range: Whether luma and chroma use all values, and not 16 to 235 and 16 to 240.
        right: Where the chroma samples lie to the right (see `YuvColours`).
        down: Where they lie down.

    Raises:
        InputError: The matrix is another one.
    """
    if matrix not in LUMA_WEIGHTS:
        raise InputError(f"yuv_to_rgb: matrix: got {matrix}, wanted one of {sorted(LUMA_WEIGHTS)}")
    red, blue = LUMA_WEIGHTS[matrix]
    green = 1 - red - blue
    v_to_red, u_to_blue = 2 * (1 - red), 2 * (1 - blue)
    # With 16 fractional bits first, for the limited range, and then with 13.
    limited = [round(value * 255 / 224 * (1 << 16)) for value in (v_to_red, u_to_blue * blue / green)]
    limited += [round(value * 255 / 224 * (1 << 16)) for value in (v_to_red * red / green, u_to_blue)]
    luma = (1 << 16) if full_range else (1 << 16) * 255 // 219
    chroma = [value * 224 // 255 if full_range else value for value in limited]
    red_v, green_u, green_v, blue_u = chroma
    factors = tuple((value + 4) >> 3 for value in (luma, red_v, -green_u, -green_v, blue_u))
    return YuvColours(0 if full_range else 16, factors, right, down)  # type: ignore[arg-type]
