"""What the tests of `evict` share: random plans and tensors, and bits to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from vrthinker.kernels.evict.plan import EvictionPlan, plan_eviction

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits, so that -0 is not 0 and NaN is NaN."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def make_plan(spans: Any, lengths: Any, freed: Any = None) -> EvictionPlan:
    return plan_eviction(spans, lengths, freed_positions=freed)


@st.composite
def plans(draw: st.DrawFn) -> EvictionPlan:
    """Ragged batches with any spans: none, touching, empty, all of a sequence."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    spans, freed = [], []
    for length in lengths:
        cuts = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
        own = [(cuts[i], cuts[i + 1]) for i in range(0, len(cuts) - 1, 2)]
        spans.append(own)
        freed.append([draw(st.integers(0, 50)) if start < end else 0 for start, end in own])
    return plan_eviction(spans, lengths, freed_positions=freed)
