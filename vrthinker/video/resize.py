"""Resizing of frames to the model's patch grid. Frames are resized nowhere else.

Invariant: the model's own image processor would not change a size chosen here, and the pixels are bit-equal
to what that processor would have made, so no engine resizes again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vrthinker.errors import InputError
from vrthinker.limits import MAX_FRAME_PIXELS

if TYPE_CHECKING:
    import numpy as np

MAX_ASPECT_RATIO = 200


class ResizeSettings(BaseModel):
    """How frames are resized for a model. The settings are stored in the checkpoint's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    patch_size: int = Field(default=14, ge=1, le=256)
    """Side of a vision patch in pixels."""
    merge_size: int = Field(default=2, ge=1, le=16)
    """Number of patches per side that the model merges into one token."""
    min_pixels: int = Field(default=56 * 56, ge=1)
    """A frame with fewer pixels than this is enlarged."""
    max_pixels: int = Field(default=512 * 28 * 28, ge=1)
    """A frame with more pixels than this is shrunk. 28 x 28 pixels are one token of Qwen2.5-VL."""

    @model_validator(mode="after")
    def _limits_leave_room(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels: got {self.min_pixels}, allowed: at most max_pixels ({self.max_pixels})"
            )
        if self.max_pixels > MAX_FRAME_PIXELS.value:
            raise ValueError(
                f"max_pixels: got {self.max_pixels}, allowed: up to {MAX_FRAME_PIXELS.value}; "
                f"{MAX_FRAME_PIXELS.how_to_raise}"
            )
        if self.max_pixels < self.multiple**2:
            raise ValueError(
                f"max_pixels: got {self.max_pixels}, allowed: at least {self.multiple**2} "
                f"(one token of {self.multiple} x {self.multiple} pixels)"
            )
        return self

    @property
    def multiple(self) -> int:
        """Both sides of a resized frame are multiples of this: `patch_size * merge_size`."""
        return self.patch_size * self.merge_size

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Picks the size for a frame: the nearest multiples, within the pixel limits.

        The aspect ratio is kept as closely as the grid allows. The rule is exactly that of the Qwen-VL image
        processors. A very long strip may stay above `max_pixels`, because no side becomes smaller than one
        multiple.

        Args:
            height: The height in pixels before resizing.
            width: The width in pixels before resizing.

        Returns:
            The (height, width) in pixels after resizing.

        Raises:
            InputError: The frame is empty, or one side is over 200 times the other.
        """
        if height < 1 or width < 1:
            raise InputError(f"frame size: got {width}x{height}, allowed: at least 1x1")
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise InputError(
                f"frame size: got {width}x{height}, allowed: an aspect ratio up to {MAX_ASPECT_RATIO}; "
                "crop the clip first"
            )
        step = self.multiple
        # Python rounds halves to even, as the processors do, so that ties are rounded in the same direction.
        new_height, new_width = round(height / step) * step, round(width / step) * step
        if new_height * new_width > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            new_height = max(step, math.floor(height / shrink / step) * step)
            new_width = max(step, math.floor(width / shrink / step) * step)
        elif new_height * new_width < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            new_height = math.ceil(height * grow / step) * step
            new_width = math.ceil(width * grow / step) * step
        return new_height, new_width


def resize_frame(frame: np.ndarray[Any, Any], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Resizes one frame with Pillow's bicubic filter.

    Args:
        frame: The frame, uint8 `[height, width, 3]`.
        size: The (height, width) in pixels after resizing.

    Returns:
        The resized frame, uint8 `[size[0], size[1], 3]`; `frame` itself if it has that size already.

    Raises:
        ValueError: `frame` has another shape or dtype, or `size` is empty.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or str(frame.dtype) != "uint8":
        raise ValueError(f"frame: got {frame.dtype} {list(frame.shape)}, expected uint8 [height, width, 3]")
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size: got {size}, allowed: (height, width) of at least 1")
    if frame.shape[:2] == (height, width):
        return frame
    import numpy as np
    from PIL import Image

    resized = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized, dtype=np.uint8)
