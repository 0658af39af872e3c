"""The patch embedding as a product: equal to the convolution that transformers writes, gradients too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.engine.hf.patch_embed import PatchProduct, use_patch_product
from vrthinker.engine.hf.tiny import make_tiny

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_product_equals_convolution(tmp_path: Path, family: Any) -> None:
    folder = make_tiny(tmp_path / "model", family)
    model = VisionLanguageModel(folder, device=torch.device("cpu"), dtype=torch.float32)
    embed = model.model.model.visual.patch_embed
    embed.requires_grad_(True)
    product = embed.proj
    assert isinstance(product, PatchProduct)
    assert (product.bias is None) == (family == "qwen2.5-vl")
    conv = torch.nn.Conv3d(
        product.in_channels,
        product.out_channels,
        product.kernel_size,
        stride=product.stride,
        bias=product.bias is not None,
    )
    conv.load_state_dict(product.state_dict())
    patches = torch.randn(13, product.weight[0].numel(), generator=torch.Generator().manual_seed(0))
    found = []
    for proj in (product, conv):
        embed.proj = proj
        out = embed(patches)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in proj.parameters())])
    for got, wanted in zip(*found, strict=True):
        assert got is not None
        assert wanted is not None
        assert got.shape == wanted.shape
        assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_parameters_stay_the_same_objects_and_overlapping_kernels_are_left_alone() -> None:
    tower = torch.nn.Module()
    tower.patch_embed = torch.nn.Module()
    conv = tower.patch_embed.proj = torch.nn.Conv3d(3, 4, (2, 2, 2), stride=(2, 2, 2))
    use_patch_product(tower)
    assert tower.patch_embed.proj.weight is conv.weight
    assert tower.patch_embed.proj.bias is conv.bias
    overlapping = tower.patch_embed.proj = torch.nn.Conv3d(3, 4, (2, 2, 2), stride=(2, 1, 1))
    use_patch_product(tower)
    assert tower.patch_embed.proj is overlapping
