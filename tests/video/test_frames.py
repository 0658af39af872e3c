"""`Frames` checks itself and exports DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vrthinker.video import Frames


def pixels(n: int = 2) -> np.ndarray[Any, Any]:
    return np.arange(n * 4 * 5 * 3, dtype=np.uint8).reshape(n, 4, 5, 3)


def test_it_exports_dlpack_without_a_copy() -> None:
    data = pixels()
    frames = Frames(data, (4, 1), (0.4, 0.1))
    assert len(frames) == 2
    assert frames.size == (4, 5)
    tensor = torch.from_dlpack(frames)
    assert tensor.dtype == torch.uint8
    assert tensor.tolist() == data.tolist()
    data[0, 0, 0, 0] = 77
    assert int(tensor[0, 0, 0, 0]) == 77
    assert np.from_dlpack(frames).shape == (2, 4, 5, 3)  # type: ignore[arg-type]
    assert frames.__dlpack_device__() == (1, 0)
    assert frames.numpy() is data


def test_it_holds_tensors_too() -> None:
    frames = Frames(torch.from_numpy(pixels()), (0, 1), (0.0, 0.1), device="cpu")
    assert np.array_equal(frames.numpy(), pixels())


def test_it_prints_its_shape_not_its_pixels() -> None:
    assert repr(Frames(pixels(), (4, 1), (0.4, 0.1))) == (
        "Frames(shape=[2, 4, 5, 3], dtype=uint8, device='cpu', frame_indices=(4, 1), "
        "pts_seconds=(0.400, 0.100))"
    )


@pytest.mark.parametrize(
    ("data", "indices", "seconds", "message"),
    [
        (pixels()[0], (0,), (0.0,), r"got shape \[4, 5, 3\], expected \[n, height, width, 3\]"),
        (pixels()[..., :2], (0, 1), (0.0, 0.1), r"got shape \[2, 4, 5, 2\]"),
        (pixels().astype(np.float32), (0, 1), (0.0, 0.1), "got dtype float32, expected uint8"),
        (torch.zeros(2, 4, 5, 3), (0, 1), (0.0, 0.1), "got dtype torch.float32, expected uint8"),
        (pixels(), (0,), (0.0, 0.1), "got 2 pictures, 1 frame_indices and 2 pts_seconds"),
        (pixels(), (0, 1), (0.0,), "got 2 pictures, 2 frame_indices and 1 pts_seconds"),
        (pixels(), (0, -1), (0.0, 0.1), "allowed: 0 and above"),
    ],
)
def test_it_refuses_what_does_not_fit(data: Any, indices: Any, seconds: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Frames(data, indices, seconds)
