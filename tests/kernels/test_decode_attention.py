"""`decode_attention`: the reference against a plain loop in double precision, the C++ version, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vrthinker import _core
from vrthinker.errors import InputError
from vrthinker.kernels.decode_attention.bench import CASES, compare
from vrthinker.kernels.decode_attention.op import decode_attention
from vrthinker.kernels.decode_attention.reference import decode_attention_reference

NAN = math.nan


def random_call(
    lengths: list[int], heads: int = 4, kv_heads: int = 2, size: int = 32, capacity: int = 80, seed: int = 0
) -> dict[str, Any]:
    """A query and a cache that holds NaN behind each row's length."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    query = 2 * torch.randn(rows, heads, size, generator=generator)
    keys, values = (torch.randn(rows, kv_heads, capacity, size, generator=generator) for _ in range(2))
    for row, length in enumerate(lengths):
        keys[row, :, length:] = values[row, :, length:] = NAN
    return {"query": query, "keys": keys, "values": values, "lengths": torch.tensor(lengths)}


def loop(call: dict[str, Any], scale: float) -> torch.Tensor:
    """One query at a time, in double precision."""
    query, keys, values = (call[name].double() for name in ("query", "keys", "values"))
    out = torch.zeros_like(query)
    shared = query.shape[1] // keys.shape[1]
    for row, length in enumerate(call["lengths"].tolist()):
        for head in range(query.shape[1] if length else 0):
            of_row = keys[row, head // shared, :length], values[row, head // shared, :length]
            weights = torch.softmax(of_row[0] @ query[row, head] * scale, 0)
            out[row, head] = weights @ of_row[1]
    return out


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 3),
    size=st.sampled_from([1, 7, 8, 20, 32, 64, 128, 130]),
    seed=st.integers(0, 1 << 20),
)
def test_every_version_is_a_loop_over_queries(
    lengths: list[int], kv_heads: int, shared: int, size: int, seed: int
) -> None:
    call = random_call(lengths, kv_heads * shared, kv_heads, size, seed=seed)
    expected = loop(call, size**-0.5)
    torch.testing.assert_close(decode_attention(**call).double(), expected, rtol=0, atol=3e-6)
    reference = decode_attention_reference(**call, scale=size**-0.5)
    torch.testing.assert_close(reference.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0, -1.0])
def test_sharp_and_flat_weights(scale: float) -> None:
    """Scores of thousands are no overflow, and what is far below the largest weighs nothing."""
    call = random_call([80, 33, 1], seed=5)
    expected = loop(call, scale)
    torch.testing.assert_close(decode_attention(**call, scale=scale).double(), expected, rtol=0, atol=2e-5)


def test_a_row_alone_is_the_row_among_others_and_threads_change_no_bit() -> None:
    lengths = [3000, 1, 2999, 0, 1024, 65, 64, 63]
    call = random_call(lengths, capacity=3000, size=64)
    together = decode_attention(**call, num_threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(decode_attention(**call, num_threads=threads), together)
    for row in range(len(lengths)):
        alone = {name: value[row : row + 1] for name, value in call.items()}
        assert torch.equal(decode_attention(**alone)[0], together[row])


def test_views_of_a_larger_cache_are_read_in_place() -> None:
    call = random_call([40, 12], capacity=60)
    expected = decode_attention(**call)
    store = torch.full((5, 2, 90, 32), NAN)
    store[1:5:2, :, 4:64] = call["keys"]
    views = call | {"keys": store[1:5:2, :, 4:64]}
    assert torch.equal(decode_attention(**views), expected)
    turned = call["values"].transpose(2, 3).contiguous().transpose(2, 3)
    by_head = call["query"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(decode_attention(**(views | {"values": turned, "query": by_head})), expected)


def test_what_is_not_finite_shows_only_where_it_is_seen() -> None:
    call = random_call([20, 20, 20], heads=2)
    call["keys"][0, 0, 3, 1] = NAN
    call["values"][1, 1, 19, 0] = math.inf
    found = decode_attention(**call)
    assert found[0, 0].isnan().all()
    assert found[1, 1, 0] == math.inf
    assert found[0, 1].isfinite().all()
    assert found[1, 1, 1:].isfinite().all()
    assert found[2].isfinite().all()


def test_the_op_is_registered_well_and_compiles() -> None:
    call = random_call([9, 30])
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**call), decode_attention(**call))
    arguments = (*call.values(), 0.2, 1)
    torch.library.opcheck(torch.ops.vrthinker.decode_attention, arguments)


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_call([9, 30])
    monkeypatch.setenv("VRTHINKER_KERNELS", "reference")
    expected = decode_attention_reference(**call, scale=32**-0.5)
    assert torch.equal(decode_attention(**call), expected)
    monkeypatch.setenv("VRTHINKER_KERNELS", "cuda")
    with pytest.raises(InputError, match="the op has no such version; it has: reference, cpu"):
        decode_attention(**call)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": torch.zeros(2, 4, 32, dtype=torch.float64)}, "query: got dtype torch.float64"),
        ({"query": torch.zeros(2, 32)}, "query: got shape"),
        ({"keys": torch.zeros(2, 2, 80, 16)}, "keys: got shape"),
        ({"keys": torch.zeros(2, 3, 80, 32), "values": torch.zeros(2, 3, 80, 32)}, "keys: got 3 heads"),
        ({"values": torch.zeros(2, 2, 70, 32)}, "values: got shape"),
        ({"lengths": torch.tensor([1])}, "lengths: got shape"),
        ({"lengths": torch.tensor([1, 81])}, "lengths: got 1 to 81, wanted 0 to the capacity, 80"),
        ({"lengths": torch.tensor([-1, 8])}, "lengths: got -1 to 8"),
        ({"lengths": [1, 2]}, "lengths: got list, wanted a torch tensor"),
        ({"scale": NAN}, "scale: got nan"),
        ({"scale": 1e300}, "scale: got 1e\\+300, wanted a number that is finite in float32"),
        ({"num_threads": 0}, "num_threads: got 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"decode_attention: {words}"):
        decode_attention(**(random_call([9, 30]) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": torch.tensor([1, 81])}, "lengths: got 81, wanted 0 to the capacity, 80"),
        ({"lengths": torch.tensor([1, 2, 3])}, "lengths"),
        ({"query": torch.zeros(2, 5, 32)}, "out"),
        ({"keys": torch.zeros(2, 2, 32, 80).transpose(2, 3)}, "between elements of a head"),
        ({"keys": torch.zeros(2, 2, 80, 32, dtype=torch.float64)}, "keys: got dtype float64"),
        ({"num_threads": 0}, "num_threads"),
    ],
)
def test_the_native_module_checks_by_itself(changes: dict[str, Any], words: str) -> None:
    call = random_call([9, 30])
    arguments = {**call, "out": torch.zeros(2, 4, 32), "scale": 1.0, "num_threads": 1} | changes
    with pytest.raises(ValueError, match=words):
        _core.decode_attention_cpu(**arguments)


def test_the_benchmark_checks_before_it_measures() -> None:
    small = compare(CASES[0], seed=1)
    small.check()
    assert set(small.competitors) == {"reference", "cpp", "transformers"}


@pytest.mark.parametrize("version", ["cpu", "reference"])
def test_no_rows_and_no_keys(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    call = random_call([])
    call["lengths"] = torch.zeros(0, dtype=torch.int64)
    assert decode_attention(**call).shape == (0, 4, 32)
    assert torch.equal(decode_attention(**random_call([0, 0, 0], capacity=0)), torch.zeros(3, 4, 32))
