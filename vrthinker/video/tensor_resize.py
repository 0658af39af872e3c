"""Resizing of frames that live on a GPU, with the bits of `resize_frame`. It needs torch.

Pillow's bicubic filter for bytes is integer arithmetic: each output pixel is a sum of input pixels times
weights with 22 fractional bits, rounded and bounded to a byte, along rows and along columns one after the
other. Here the same is done in int32, a weight at a time for all pixels. Which step comes first depends on
the sizes, and on Pillow's version (since 13, a height that shrinks much goes first). So each pair of sizes is
tried out once, on random pictures.

Invariant: a frame has the same pixels whether a CPU or a GPU resizes it. Sizes for which the pictures do not
tell one order from the other, or agree with neither, are resized by Pillow on the host.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vrthinker.video.resize import resize_frame

if TYPE_CHECKING:
    import torch

_FRACTION_BITS = 22
_REACH = 2.0
"""How many pixels the filter reaches to each side, in the larger of both pitches."""
_A = -0.5
_TRIED = 4
"""How many pictures are tried out: one of all levels, and some in black and white, with sums out of range."""
_CHUNK_PIXELS = 1 << 24
"""The pixels that are resized at a time."""


def resize_tensor(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes frames with Pillow's bicubic filter, where they are.

    Args:
        frames: The frames, uint8 `[n, height, width, 3]`, on any device.
        size: The (height, width) in pixels after resizing.

    Returns:
        The resized frames, uint8 `[n, size[0], size[1], 3]`, on the same device; `frames` itself if they have
        that size already.

    Raises:
        ValueError: `frames` has another shape or dtype, or `size` is empty.
    """
    import torch

    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            f"frames: got {frames.dtype} {list(frames.shape)}, expected uint8 [n, height, width, 3]"
        )
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size: got {size}, allowed: (height, width) of at least 1")
    if tuple(frames.shape[1:3]) == (height, width):
        return frames
    axes = _order((frames.shape[1], frames.shape[2]), (height, width), frames.device)
    if axes is None:
        resized = [resize_frame(frame, (height, width)) for frame in frames.cpu().numpy()]
        return torch.from_numpy(np.stack(resized)).to(frames.device)
    step = max(1, _CHUNK_PIXELS // (frames.shape[1] * frames.shape[2]))
    parts = torch.split(frames, step)
    return torch.cat([_in_order(part, axes, size) for part in parts])


@functools.lru_cache(maxsize=256)
def _order(before: tuple[int, int], after: tuple[int, int], device: torch.device) -> tuple[int, int] | None:
    """The order of the axes in which Pillow resizes between two sizes; None if that cannot be told."""
    import torch

    pictures = np.random.default_rng(0).integers(0, 256, (_TRIED, *before, 3), dtype=np.uint8)
    pictures[1:] = (pictures[1:] > 127) * np.uint8(255)
    expected = torch.from_numpy(np.stack([resize_frame(picture, after) for picture in pictures])).to(device)
    tried = torch.from_numpy(pictures).to(device)
    orders = ((2, 1), (1, 2))
    equal = [axes for axes in orders if torch.equal(_in_order(tried, axes, after), expected)]
    one_axis = before[0] == after[0] or before[1] == after[1]  # then both orders are the same
    return equal[0] if len(equal) == 1 or (equal and one_axis) else None


def _in_order(frames: torch.Tensor, axes: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    for axis in axes:
        frames = _along(frames, axis, size[axis - 1])
    return frames


def _along(frames: torch.Tensor, axis: int, count: int) -> torch.Tensor:
    """Frames with `count` pixels along an axis, 1 or 2."""
    import torch

    if frames.shape[axis] == count:
        return frames
    places, weights = _taps_on(frames.shape[axis], count, frames.device)
    shape = [1, 1, 1, 1]
    shape[axis] = count
    sums: torch.Tensor | None = None
    for place, weight in zip(places, weights, strict=True):
        part = frames.index_select(axis, place).to(torch.int32).mul_(weight.view(shape))
        sums = part.add_(1 << (_FRACTION_BITS - 1)) if sums is None else sums.add_(part)
    assert sums is not None
    return (sums >> _FRACTION_BITS).clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _taps_on(before: int, after: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables of `_taps` on a device."""
    import torch

    places, weights = (torch.from_numpy(table).to(device) for table in _taps(before, after))
    return places, weights


def _taps(before: int, after: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pillow's weights, int32 `[taps, after]`, and the places of the pixels, int64 `[taps, after]`.

    The order of operations is Pillow's. A pixel with fewer neighbours has weights of 0.
    """
    scale = before / after
    filter_scale = max(scale, 1.0)
    support = _REACH * filter_scale
    taps = math.ceil(support) * 2 + 1
    places, weights = np.zeros((taps, after), np.int64), np.zeros((taps, after), np.int32)
    for pixel in range(after):
        center = (pixel + 0.5) * scale
        first = max(0, int(center - support + 0.5))
        end = min(before, int(center + support + 0.5))
        row = [_bicubic((x + first - center + 0.5) * (1.0 / filter_scale)) for x in range(end - first)]
        total = 0.0
        for weight in row:
            total += weight
        places[: len(row), pixel] = range(first, end)
        weights[: len(row), pixel] = [_rounded(weight / total if total else weight) for weight in row]
    return places, weights


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1.0:
        return ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1
    if x < _REACH:
        return (((x - 5) * x + 8) * x - 4) * _A
    return 0.0


def _rounded(weight: float) -> int:
    """With 22 fractional bits, halves away from zero."""
    return int(math.copysign(0.5, weight) + weight * (1 << _FRACTION_BITS))
