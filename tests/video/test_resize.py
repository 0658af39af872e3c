"""Sizes and pixels are those of the model's own image processor."""

from __future__ import annotations

import random

import numpy as np
import pytest
from clips import draw_number
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from vrthinker.errors import InputError
from vrthinker.video import ResizeSettings, resize_frame


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    patch_size=st.sampled_from([14, 16]),
    min_tokens=st.integers(1, 300),
    more_tokens=st.integers(0, 2000),
)
def test_sizes_equal_the_processors(
    height: int, width: int, patch_size: int, min_tokens: int, more_tokens: int
) -> None:
    area = (2 * patch_size) ** 2
    settings = ResizeSettings(
        patch_size=patch_size, min_pixels=min_tokens * area, max_pixels=(min_tokens + more_tokens) * area
    )
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InputError, match=rf"got {width}x{height}, allowed: an aspect ratio up to 200"):
            settings.grid_size(height, width)
        return
    size = settings.grid_size(height, width)
    assert size == smart_resize(
        height, width, 2 * patch_size, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
    )
    assert size[0] % settings.multiple == 0 == size[1] % settings.multiple


@given(height=st.integers(28, 3000), width=st.integers(28, 3000))
def test_a_chosen_size_is_kept(height: int, width: int) -> None:
    """No engine resizes again: the processor's rule leaves a size that was chosen here as it is."""
    settings = ResizeSettings()
    if max(height, width) > 10 * min(height, width):
        return
    size = settings.grid_size(height, width)
    assert settings.grid_size(*size) == size


@pytest.mark.parametrize(("patch_size", "size"), [(14, (752, 1360)), (14, (77, 113)), (16, (33, 1000))])
def test_pixels_equal_the_processors(patch_size: int, size: tuple[int, int]) -> None:
    settings = ResizeSettings(patch_size=patch_size, max_pixels=128 * 28 * 28)
    rng = np.random.default_rng(3)
    frame = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = resize_frame(frame, settings.grid_size(*size))
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
    )
    theirs = processor(frame, do_rescale=False, do_normalize=False, return_tensors="np")
    again = processor(ours, do_rescale=False, do_normalize=False, return_tensors="np")
    resized_by_them = np.array(theirs["pixel_values"])
    assert resized_by_them.shape == again["pixel_values"].shape
    assert np.array_equal(resized_by_them, again["pixel_values"])
    assert theirs["image_grid_thw"].tolist() == [
        [1, ours.shape[0] // patch_size, ours.shape[1] // patch_size]
    ]


def test_an_equal_size_is_left_alone() -> None:
    frame = draw_number(5, (56, 84))
    assert resize_frame(frame, (56, 84)) is frame
    assert resize_frame(frame, (84, 56)).shape == (84, 56, 3)


def test_bad_frames_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got float64 \[8, 8, 3\], expected uint8"):
        resize_frame(np.zeros((8, 8, 3)), (28, 28))
    with pytest.raises(ValueError, match=r"got uint8 \[8, 8\]"):
        resize_frame(np.zeros((8, 8), np.uint8), (28, 28))
    with pytest.raises(ValueError, match=r"size: got \(0, 28\)"):
        resize_frame(np.zeros((8, 8, 3), np.uint8), (0, 28))
    with pytest.raises(InputError, match="got 0x5, allowed: at least 1x1"):
        ResizeSettings().grid_size(5, 0)


def test_settings_are_frozen_checked_and_load_back() -> None:
    settings = ResizeSettings(patch_size=16, max_pixels=1_000_000)
    assert ResizeSettings.model_validate_json(settings.model_dump_json()) == settings
    assert settings.multiple == 32
    assert ResizeSettings().model_dump() == {
        "patch_size": 14,
        "merge_size": 2,
        "min_pixels": 56 * 56,
        "max_pixels": 512 * 28 * 28,
    }
    with pytest.raises(ValidationError):
        settings.patch_size = 14  # type: ignore[misc]
    for bad in (
        {"patch": 14},
        {"min_pixels": 10**9},
        {"max_pixels": 100, "min_pixels": 1},
        {"merge_size": 0},
    ):
        with pytest.raises(ValidationError):
            ResizeSettings.model_validate(bad)
    assert all(field.description for field in ResizeSettings.model_fields.values())


def test_pixels_stay_within_the_limits() -> None:
    rng = random.Random(0)
    settings = ResizeSettings()
    for _ in range(300):
        height, width = rng.randrange(60, 4000), rng.randrange(60, 4000)
        if max(height, width) < 20 * min(height, width):
            new_height, new_width = settings.grid_size(height, width)
            assert settings.min_pixels <= new_height * new_width <= settings.max_pixels
