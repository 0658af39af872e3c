"""The ground on which transparent pixels are shown: white, in every container.

Formats store arbitrary colours below transparent pixels, often black, which nobody was meant to see. Browsers
and image viewers show such pictures on the page's ground; white is the most usual one. Invariant: opaque
pixels are not changed by a bit, and every reader uses `on_ground`, so that one picture looks the same from
every container.
"""

from __future__ import annotations

from typing import Any

import numpy as np

GROUND = 255
"""The value of red, green and blue of the ground."""
NOTE = "has transparent pixels (an alpha channel), which are shown on white"


def on_ground(rgb: np.ndarray[Any, Any], alpha: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Lays a picture over the ground.

    Args:
        rgb: The colours, uint8 `[height, width, 3]`, not multiplied by the opacity.
        alpha: The opacity, uint8 `[height, width]`; 255 is opaque.

    Returns:
        The visible picture, uint8 `[height, width, 3]`.
    """
    if alpha.min() == 255:
        return rgb
    opacity = alpha[..., None].astype(np.uint16)
    mixed = rgb * opacity + GROUND * (255 - opacity)  # at most 255 * 255
    return ((mixed + 127) // 255).astype(np.uint8)
