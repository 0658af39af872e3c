"""The specification of `patchify`: what the Hugging Face Qwen2-VL image processor does after resizing.

Qwen2.5-VL (patch 14) and Qwen3-VL (patch 16) both take frames as rows of flattened patches. The rows of a
frame come in merge blocks, so that the `merge_size`^2 patches that become one token are adjacent. A still
frame is repeated to fill its `temporal_patch_size` slots. The arithmetic follows the processor's step by
step, so that float32 results are bit-equal: v * (1/255) in double, rounded to float32, minus the mean and
divided by the deviation in float32. A bfloat16 result is that value rounded to nearest even.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def patchify_reference(
    frames: torch.Tensor,
    *,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Normalises frames and lays them out as patches.

    Args:
        frames: The frames, uint8 `[n, height, width, 3]`, any strides. Height and width are multiples of
            `patch_size * merge_size`.
        patch_size: The side of a patch in pixels.
        merge_size: The side, in patches, of the block that becomes one token.
        temporal_patch_size: The number of copies of the frame in a patch.
        mean: The mean of each channel, for values scaled to 0..1.
        std: The standard deviation of each channel, for values scaled to 0..1.
        out_dtype: The dtype of the result, float32 or bfloat16.

    Returns:
        The patches, `[n * (height / patch_size) * (width / patch_size), 3 * temporal_patch_size *
        patch_size**2]`, on the frames' device. Columns run over (channel, copy, y, x).
    """
    n, height, width, channels = frames.shape
    rescaled = (frames.to(torch.float64) * (1.0 / 255.0)).to(torch.float32)
    mean_row = torch.tensor(mean, dtype=torch.float32, device=frames.device)
    std_row = torch.tensor(std, dtype=torch.float32, device=frames.device)
    normalised = ((rescaled - mean_row) / std_row).to(out_dtype)

    blocks = normalised.reshape(
        n,
        height // (patch_size * merge_size),
        merge_size,
        patch_size,
        width // (patch_size * merge_size),
        merge_size,
        patch_size,
        channels,
    )
    # (n, block_y, my, py, block_x, mx, px, c) -> (n, block_y, block_x, my, mx, c, py, px)
    patches = blocks.permute(0, 1, 4, 2, 5, 7, 3, 6)
    copies = patches.unsqueeze(6).expand(*patches.shape[:6], temporal_patch_size, *patches.shape[6:])
    return copies.reshape(
        n * (height // patch_size) * (width // patch_size),
        channels * temporal_patch_size * patch_size * patch_size,
    )
