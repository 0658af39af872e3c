"""What the tests of `evict` share: random tensors, and bits to compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits, so that -0 is not 0 and NaN is NaN."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])
