"""What of a checkpoint stands in front of its weights: the tokenizer, and how pixels become patches.

Every engine that runs a checkpoint uses it, whatever computes the model, so that all of them write the same
token ids and show the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vrthinker.errors import InputError


@dataclass(frozen=True)
class Frontend:
    """A checkpoint without its weights.

    Attributes:
        folder: The checkpoint's folder.
        tokenizer: The transformers fast tokenizer.
        vocabulary_size: The number of rows of the model's output layer, as the configuration has it.
        max_positions: The most positions that the configuration promises.
        patch_size: The side of a patch in pixels.
        merge_size: The side, in patches, of the block that becomes one token.
        temporal_patch_size: The number of copies of a frame in a patch.
        mean: The mean of each channel, for values scaled to 0..1.
        std: The standard deviation of each channel, for values scaled to 0..1.
        least_pixels: The fewest pixels that the preprocessor leaves a picture, if it says so; else 0.
    """

    folder: Path
    tokenizer: Any
    vocabulary_size: int
    max_positions: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    least_pixels: int = 0

    @property
    def factor(self) -> tuple[int, int]:
        """The (height, width) in pixels of the block that becomes one token."""
        side = self.patch_size * self.merge_size
        return side, side

    def patches(self, frames: torch.Tensor, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Frames of one size, uint8 `[n, height, width, 3]`, as the rows that the vision tower takes.

        Returns:
            The patches of all frames, `[n * patches of a frame, 3 * temporal_patch_size * patch_size**2]`.
        """
        from vrthinker.kernels.patchify.op import patchify

        return patchify(
            frames,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            temporal_patch_size=self.temporal_patch_size,
            mean=self.mean,
            std=self.std,
            out_dtype=out_dtype,
        )

    def grid(self, size: Sequence[int]) -> tuple[int, int, int]:
        """(1, height, width) of a frame of this (height, width) in pixels, counted in patches."""
        return 1, size[0] // self.patch_size, size[1] // self.patch_size


def load_frontend(folder: Path, config: Any) -> Frontend:
    """Loads the tokenizer and the preprocessor of a folder that `load_config` has checked.

    Args:
        folder: The checkpoint's folder.
        config: What `load_config` returned for it.

    Raises:
        InputError: A number of the preprocessor is out of range.
        BaseException: Whatever the files provoke in their libraries; see `unloadable`.
    """
    from transformers import AutoTokenizer

    # `from transformers import AutoImageProcessor` gives a stand-in that requires torchvision (5.17).
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    text, vision = config.text_config, config.vision_config
    return Frontend(
        folder=folder,
        tokenizer=tokenizer,
        vocabulary_size=int(text.vocab_size),
        max_positions=int(text.max_position_embeddings),
        patch_size=int(vision.patch_size),
        merge_size=int(vision.spatial_merge_size),
        temporal_patch_size=int(vision.temporal_patch_size),
        mean=_three(processor.image_mean, "mean"),
        std=_three(processor.image_std, "std"),
        least_pixels=_least_pixels(processor),
    )


def _least_pixels(processor: Any) -> int:
    size = getattr(processor, "size", None)
    found = getattr(size, "shortest_edge", None) or getattr(processor, "min_pixels", None)
    if found is None and isinstance(size, Mapping):
        found = size.get("shortest_edge")
    return found if type(found) is int and found > 0 else 0


def _three(values: object, name: str) -> tuple[float, float, float]:
    """Checks a mean or standard deviation, one number per colour."""
    numbers = tuple(float(value) for value in values) if isinstance(values, list | tuple) else ()
    low = 0.0 if name == "std" else -math.inf
    if len(numbers) != 3 or not all(math.isfinite(value) and value > low for value in numbers):
        raise InputError(f"preprocessor: image_{name}: got {values!r}, allowed: three numbers")
    return numbers
