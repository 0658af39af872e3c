"""The comparisons of `vrthinker bench decode_attention`, on fresh random queries and caches.

Competitors are transformers' attention over PyTorch's, with the same cache and a mask, and the reference.
Rows of a batch differ in length, as sessions that decode together do: between half of the longest row and
all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vrthinker.kernels.decode_attention.op import decode_attention
from vrthinker.kernels.decode_attention.reference import decode_attention_reference
from vrthinker.kernels.measure import Comparison

TOLERANCE = 2e-6


@dataclass(frozen=True)
class Case:
    """One case to measure: the batch, the heads, and the length of the longest row."""

    name: str
    rows: int
    heads: int
    kv_heads: int
    head_size: int
    longest: int


CASES = (
    Case("nano, 64 rows of up to 700 tokens", 64, 4, 4, 32, 700),
    Case("10 M parameters, 64 rows of up to 1,200 tokens", 64, 6, 2, 64, 1200),
    Case("qwen2.5-vl-3b, 8 rows of up to 4,000 tokens", 8, 16, 2, 128, 4000),
)


def comparisons(device: str, seed: int) -> Iterator[Callable[[], Comparison]]:
    """Yields a function per case, which makes the case's cache from `seed` when it is called. Only a CPU."""
    if device == "cpu":
        for case in CASES:
            yield partial(compare, case, seed)


def compare(case: Case, seed: int) -> Comparison:
    """A case with its competitors."""
    generator = torch.Generator().manual_seed(seed)
    capacity = case.longest + 200
    cache = (case.rows, case.kv_heads, capacity, case.head_size)
    query = torch.randn(case.rows, case.heads, case.head_size, generator=generator)
    keys, values = (torch.randn(cache, generator=generator) for _ in range(2))
    lengths = torch.randint(case.longest // 2, case.longest + 1, (case.rows,), generator=generator)
    lengths[0] = case.longest
    mask = (torch.arange(case.longest) < lengths[:, None])[:, None, None]

    layer: Any = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = case.heads // case.kv_heads, True

    def transformers() -> torch.Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        key, value = keys[:, :, : case.longest], values[:, :, : case.longest]
        attended: torch.Tensor = sdpa_attention_forward(
            layer, query[:, :, None], key, value, mask, scaling=case.head_size**-0.5
        )[0]
        return attended[:, 0]

    versions: dict[str, Callable[[], torch.Tensor]] = {
        "reference": lambda: decode_attention_reference(query, keys, values, lengths, case.head_size**-0.5),
        "cpp": lambda: decode_attention(query, keys, values, lengths),
        "transformers": transformers,
    }

    def check() -> None:
        expected = versions["reference"]()
        for name, run in versions.items():
            difference = float((run() - expected).abs().max())
            if difference > TOLERANCE:
                raise RuntimeError(f"{name} differs from the reference by {difference}")

    read = 2 * int(lengths.sum()) * case.kv_heads * case.head_size * 4
    return Comparison(
        op="decode_attention",
        case=case.name,
        bytes_moved=read + 2 * query.nbytes,
        competitors=versions,
        check=check,
        facts={"query": list(query.shape), "cache": list(cache), "keys_read": int(lengths.sum())},
    )
