"""The vision tower's patch embedding as one matrix product.

transformers computes it as a 3D convolution whose stride equals its kernel size. Every patch is then
multiplied with the kernel once, which is a matrix product. Convolution kernels reach only a fraction of a
matrix product's speed, and even less in the backward pass (docs/log.md). The result differs only in the order
of additions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear


class PatchProduct(torch.nn.Conv3d):
    """A convolution over patches that are as large as its kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[patches, channels, frames, height, width]` to `[patches, hidden]`."""
        return linear(input.flatten(1), self.weight.flatten(1), self.bias)


def use_patch_product(visual: Any) -> None:
    """Replaces the patch convolution of a loaded vision tower. Parameters stay the same objects.

    Args:
        visual: The vision tower of a Qwen2.5-VL or Qwen3-VL model.
    """
    conv = visual.patch_embed.proj
    if tuple(conv.kernel_size) != tuple(conv.stride):
        return
    product = PatchProduct(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        bias=conv.bias is not None,
        device="meta",
    )
    product.weight, product.bias = conv.weight, conv.bias
    visual.patch_embed.proj = product.train(conv.training)
