"""`evict`: every version equals the reference, bit for bit, over dtypes, shapes, strides and random spans."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evictions import DTYPES, bits, random_tensor
from hypothesis import given
from hypothesis import strategies as st
from products import covering

from vrthinker import _core
from vrthinker.errors import InputError
from vrthinker.kernels.evict import bench
from vrthinker.kernels.evict.op import evict_cache, evict_paged, evict_sequence
from vrthinker.kernels.evict.paged import plan_paged_eviction
from vrthinker.kernels.evict.plan import EvictionPlan, plan_eviction
from vrthinker.kernels.evict.reference import (
    evict_paged_reference_,
    evict_reference,
    evict_reference_,
    rotation_table,
)

INV_FREQ = 1e4 ** (-torch.arange(0, 1, 1 / 4))  # head_dim 8


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


def cache(
    plan: EvictionPlan, layout: str, dtype: torch.dtype, seed: int, *, spare: int = 2
) -> list[torch.Tensor]:
    """Two layers' keys or values, strided: views into longer buffers, as a preallocated cache has them."""
    tokens = max(plan.lengths, default=0) + spare
    shape = (plan.batch, 3, tokens + 3, 8) if layout == "bhtd" else (plan.batch, tokens + 3, 3, 8)
    tensors = [random_tensor(shape, dtype, seed + layer) for layer in range(2)]
    return [t[:, :, :tokens] if layout == "bhtd" else t[:, :tokens] for t in tensors]


def expected(
    tensors: list[torch.Tensor],
    plan: EvictionPlan,
    layout: str,
    inv_freq: torch.Tensor | None,
    *,
    in_place: bool,
) -> list[torch.Tensor]:
    runs = plan.table(in_place=in_place, renumber=inv_freq is not None)
    rotations = None if inv_freq is None else rotation_table(plan.shifts, inv_freq)
    dims = {"batch_dim": 0, "token_dim": 2 if layout == "bhtd" else 1}
    if not in_place:
        out = plan.out_tokens
        return [evict_reference(t, runs, out_tokens=out, rotations=rotations, **dims) for t in tensors]
    copies = [t.clone() for t in tensors]
    for copy in copies:
        evict_reference_(copy, runs, rotations=rotations, **dims)
    return copies


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b))


# Against the reference


@given(
    plan=plans(),
    layout=st.sampled_from(["bhtd", "bthd"]),
    dtype=st.sampled_from(DTYPES),
    renumber=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_caches_equal_the_reference(
    plan: EvictionPlan, layout: Any, dtype: torch.dtype, renumber: bool, in_place: bool, seed: int
) -> None:
    inv_freq = INV_FREQ if renumber else None
    keys, values = cache(plan, layout, dtype, seed), cache(plan, layout, dtype, seed + 10)
    wanted_keys = expected(keys, plan, layout, inv_freq, in_place=in_place)
    wanted_values = expected(values, plan, layout, None, in_place=in_place)
    found = evict_cache(keys, values, plan, layout=layout, in_place=in_place, inv_freq=inv_freq)
    assert_equal(found[0], wanted_keys)
    assert_equal(found[1], wanted_values)
    if in_place:
        assert all(a is b for a, b in zip([*found[0], *found[1]], [*keys, *values], strict=True))


@given(plan=plans(), seed=st.integers(0, 2**16), in_place=st.booleans())
def test_what_stands_beside_a_cache_equals_the_reference(
    plan: EvictionPlan, seed: int, in_place: bool
) -> None:
    tokens = max(plan.lengths, default=0)
    shape = (plan.batch, tokens)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 1 << 40, shape, generator=generator)
    mask = torch.randint(0, 2, shape, generator=generator).bool()
    positions = torch.randint(0, 1 << 40, (3, *shape), generator=generator)
    labels = torch.randint(0, 1 << 15, shape, generator=generator).to(torch.int32)
    embeddings = random_tensor((*shape, 5), torch.bfloat16, seed)
    wide = (
        random_tensor((*shape, 2, 3), torch.float64, seed)
        .permute(0, 3, 1, 2)
        .contiguous()
        .permute(0, 2, 3, 1)
    )
    tensors = [ids, mask, positions, labels, embeddings, wide]
    batch_dims, token_dims = [0, 0, 1, 0, 0, 0], [1, 1, 2, 1, 1, 1]
    runs = plan.table(in_place=in_place, renumber=False)
    wanted = []
    for tensor, batch_dim, token_dim in zip(tensors, batch_dims, token_dims, strict=True):
        dims = {"batch_dim": batch_dim, "token_dim": token_dim}
        if in_place:
            wanted.append(tensor.clone())
            evict_reference_(wanted[-1], runs, **dims)
        else:
            wanted.append(evict_reference(tensor, runs, out_tokens=plan.out_tokens, **dims))
    found = evict_sequence(tensors, plan, batch_dims=batch_dims, token_dims=token_dims, in_place=in_place)
    assert_equal(found, wanted)


@given(
    plan=plans(),
    block_size=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    renumber=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_paged_caches_hold_what_stays_in_order(
    plan: EvictionPlan, block_size: int, dtype: torch.dtype, renumber: bool, seed: int
) -> None:
    """Read back through the new tables, a sequence's tokens are those of the dense eviction."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) + 1 for length in plan.lengths]
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    keys = [random_tensor((sum(counts) + 2, block_size, 2, 8), dtype, seed + layer) for layer in range(2)]
    values = [
        random_tensor((sum(counts) + 2, block_size, 2, 8), dtype, seed + 5 + layer) for layer in range(2)
    ]
    paged = plan_paged_eviction(plan, tables, block_size, renumber=renumber)
    inv_freq = INV_FREQ if renumber else None

    def read(blocks: torch.Tensor, table: tuple[int, ...] | list[int], length: int) -> torch.Tensor:
        return blocks[list(table)].flatten(0, 1)[:length]

    before = {
        (place, sequence): read(blocks, tables[sequence], plan.lengths[sequence]).clone()
        for place, blocks in enumerate([*keys, *values])
        for sequence in range(plan.batch)
    }
    # By the reference of the paged move too.
    copies = [blocks.clone() for blocks in [*keys, *values]]
    rotations = rotation_table(plan.shifts, INV_FREQ) if renumber else None
    for place, blocks in enumerate(copies):
        evict_paged_reference_(
            blocks,
            paged.table(renumber=renumber),
            paged.working_tables,
            rotations=rotations if place < 2 else None,
        )
    evict_paged(keys, values, paged, inv_freq=inv_freq)
    assert_equal([*keys, *values], copies)
    for place, blocks in enumerate([*keys, *values]):
        for sequence in range(plan.batch):
            runs = plan.table(in_place=False, renumber=renumber and place < 2)
            runs = runs[runs[:, 0] == sequence].clone()
            runs[:, 0] = 0
            dense = evict_reference(
                before[place, sequence][None],
                runs,
                batch_dim=0,
                token_dim=1,
                out_tokens=plan.new_lengths[sequence],
                rotations=rotations,
            )[0]
            found = read(blocks, paged.block_tables[sequence], plan.new_lengths[sequence])
            assert torch.equal(bits(found), bits(dense))
    used = [block for table in paged.block_tables for block in table]
    assert sorted([*used, *paged.freed_blocks]) == sorted(block for table in tables for block in table)


def test_aligned_holes_of_a_paged_cache_move_nothing() -> None:
    plan = plan_eviction([[(4, 12)]], [15])
    paged = plan_paged_eviction(plan, [[7, 3, 9, 1]], 4)
    assert paged.table(renumber=False).shape == (0, 5)
    assert paged.block_tables == ((7, 1),)
    assert paged.freed_blocks == (3, 9)


def test_a_block_that_another_sequence_uses_is_not_written() -> None:
    plan = plan_eviction([[(1, 2)], []], [6, 4])
    with pytest.raises(
        InputError, match=r"block_tables\[0\]: block 5 would be written and is another sequence"
    ):
        plan_paged_eviction(plan, [[5, 6], [5]], 4)
    shared_prefix = plan_eviction([[(5, 6)], []], [8, 4])
    paged = plan_paged_eviction(shared_prefix, [[5, 6], [5]], 4)
    assert paged.block_tables == ((5, 6), (5,))
    aligned = plan_eviction([[(0, 4)], []], [8, 4])
    assert plan_paged_eviction(aligned, [[5, 6], [5]], 4).freed_blocks == ()
    with pytest.raises(InputError, match="block 6 would be written"):
        plan_paged_eviction(aligned, [[5, 6], [5, 6]], 4, renumber=True)
    # A plan that was made without turning in mind does not let keys be turned.
    plain = plan_paged_eviction(aligned, [[5, 6], [5, 6]], 4)
    blocks = [random_tensor((7, 4, 2, 8), torch.float32, seed) for seed in range(2)]
    before = [block.clone() for block in blocks]
    with pytest.raises(InputError, match="evict: plan: got a paged plan made without renumber, wanted one"):
        evict_paged(blocks[:1], blocks[1:], plain, inv_freq=INV_FREQ)
    assert_equal(blocks, before)


def test_one_tensor_of_all_layers() -> None:
    plan = plan_eviction([[(2, 4)], [(0, 3)]], [7, 5])
    both = random_tensor((2, 3, 2, 4, 7, 8), torch.float32, 0)  # [k/v, layers, batch, heads, tokens, dim]
    wanted = [
        torch.stack(
            [
                evict_reference(
                    layer, plan.table(in_place=False, renumber=False), batch_dim=0, token_dim=2, out_tokens=5
                )
                for layer in part
            ]
        )
        for part in both
    ]
    keys, values = evict_cache(both[0], both[1], plan, in_place=False)
    assert_equal([keys, values], wanted)
    evict_cache(both[0], both[1], plan)
    assert torch.equal(both[0][:, 0, :, :5], keys[:, 0])
    assert torch.equal(both[1][:, 1, :, :2], values[:, 1, :, :2])


@functools.cache
def large_layers(head_dim: int) -> list[torch.Tensor]:
    """24 MB, with one token too many in front."""
    heads = 8 * 64 // head_dim
    return [random_tensor((1, heads, 6001, head_dim), torch.bfloat16, seed) for seed in range(4)]


@pytest.mark.parametrize(("threads", "renumber", "head_dim"), covering([1, 2, 5], [False, True], [64, 8]))
def test_large_moves_by_many_threads_equal_the_reference(threads: int, renumber: bool, head_dim: int) -> None:
    """More than one thread's share (1 MB), and past the caches (16 MB): stores stream."""
    inv_freq = 1e4 ** (-torch.arange(0, 1, 2 / head_dim)) if renumber else None
    plan = plan_eviction([[(1, 2), (40, 900), (2000, 2001)]], [6000], freed_positions=[[1, 20, 3]])
    # An odd number of 16-byte rows in front: no store starts on a cache line by chance.
    layers = [layer.clone()[:, :, 1:] for layer in large_layers(head_dim)]
    wanted = [
        *expected(layers[:2], plan, "bhtd", inv_freq, in_place=True),
        *expected(layers[2:], plan, "bhtd", None, in_place=True),
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        evict_cache(layers[:2], layers[2:], plan, inv_freq=inv_freq)
    finally:
        torch.set_num_threads(before)
    assert_equal(layers, wanted)


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="limits of processes are Linux's")
def test_where_the_system_gives_no_thread_the_caller_does_all(tmp_path: Path) -> None:
    """A thread per part is tried for; under a limit on address space its stack cannot be had."""
    script = tmp_path / "few_threads.py"
    script.write_text(_FEW_THREADS)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


# Through the binding and without torch, which takes seconds to load.
_FEW_THREADS = """
import resource, threading
import numpy as np
from vrthinker import _core

def evict(cache, runs):
    _core.evict_cpu(
        sources=[cache], targets=[], batch_dims=[0], token_dims=[2], runs=np.array(runs), rotations=None,
        n_rotated=0, block_tables=None, block_size=0, out_tokens=0, num_threads=4)

cache = np.random.default_rng(0).standard_normal((1, 16, 6000, 64), np.float32)
wanted = np.concatenate((cache[:, :, :1], cache[:, :, 900:]), 2)
# Everything is loaded before memory is scarce.
evict(np.ones((1, 1, 3, 4), np.float32), [[0, 2, 1, 1, -1]])
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
try:
    threading.Thread(target=print).start()
except RuntimeError:
    pass
else:
    raise SystemExit("a thread could be started: the limit does not bind")
evict(cache, [[0, 900, 1, 5100, -1]])
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("equal" if np.array_equal(cache[:, :, :5101], wanted) else "differs")
"""


def test_keys_and_values_may_lie_between_each_other() -> None:
    plan = plan_eviction([[(1, 3)]], [7])
    both = random_tensor((1, 7, 4, 16), torch.float32, 0)
    keys, values = both[..., :8], both[..., 8:]
    wanted = [
        *expected([keys], plan, "bthd", None, in_place=True),
        *expected([values], plan, "bthd", None, in_place=True),
    ]
    evict_cache([keys], [values], plan, layout="bthd")
    assert_equal([keys, values], wanted)


@pytest.mark.parametrize("device", ["meta"])
def test_a_default_device_of_the_caller_changes_nothing(device: str) -> None:
    plan = plan_eviction([[(1, 3)], [(0, 2)]], [5, 4])
    paged = plan_paged_eviction(plan, [[0, 1], [2]], 4, renumber=True)
    key, value = fresh(), fresh()
    blocks = [random_tensor((3, 4, 2, 8), torch.float32, seed) for seed in range(2)]
    wanted = evict_cache([fresh()], [fresh()], plan, in_place=False, inv_freq=INV_FREQ)
    with torch.device(device):
        found = evict_cache([key], [value], plan_eviction([[(1, 3)], [(0, 2)]], [5, 4]), inv_freq=INV_FREQ)
        again = plan_paged_eviction(plan, [[0, 1], [2]], 4, renumber=True)
        evict_paged(blocks[:1], blocks[1:], again, inv_freq=INV_FREQ)
        shifts = plan.position_shifts()
    assert torch.equal(found[0][0][0, :, :3], wanted[0][0][0])
    assert torch.equal(again.working_tables, paged.working_tables)
    assert torch.equal(shifts, plan.position_shifts())


def test_in_place_touches_nothing_before_the_first_hole_and_nothing_behind_the_last_survivor() -> None:
    plan = plan_eviction([[(4, 6)]], [9])
    key = random_tensor((1, 2, 12, 8), torch.float32, 0)
    before = key.clone()
    evict_cache([key], [key.clone()], plan)
    assert torch.equal(key[:, :, :4], before[:, :, :4])
    assert torch.equal(key[:, :, 4:7], before[:, :, 6:9])
    assert torch.equal(key[:, :, 7:], before[:, :, 7:])


def test_empty_inputs() -> None:
    nothing = plan_eviction([], [])
    assert evict_cache([], [], nothing) == ([], [])
    assert evict_sequence([], nothing) == []
    (ids,) = evict_sequence([torch.zeros(0, 4, dtype=torch.int64)], nothing)
    assert ids.shape == (0, 0)
    all_gone = plan_eviction([[(0, 3)]], [3])
    (out,) = evict_sequence([torch.ones(1, 3, 2)], all_gone)
    assert out.shape == (1, 0, 2)
    no_heads = torch.zeros(1, 0, 3, 8)
    assert evict_cache([no_heads], [no_heads.clone()], all_gone, in_place=False)[0][0].shape == (1, 0, 0, 8)
    stays = plan_eviction([[]], [3])
    key = torch.ones(1, 1, 3, 8)
    assert evict_cache([key], [key.clone()], stays)[0][0] is key


# Renumbering


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        # Each turn rounds once: half an ulp of the dtype at the key's own size, five times, and the fp32
        # turns themselves. Measured largest: 2.9e-7, 8.3e-3, 1.1e-3 of the largest key.
        (torch.float32, 1e-6),
        (torch.bfloat16, 2e-2),
        (torch.float16, 2.5e-3),
    ],
)
def test_drift_of_five_evictions_is_bounded(dtype: torch.dtype, bound: float) -> None:
    """Keys turned five times against the key turned once by the sum, at a real head size and real shifts."""
    half = 64
    inv_freq = 1e6 ** (-torch.arange(half, dtype=torch.float64) / half)
    start = random_tensor((1, 2, 400 + 5 * 40, 2 * half), dtype, 3)
    key = start.clone()
    length = start.shape[2]
    for _ in range(5):
        plan = plan_eviction([[(100, 140)]], [length], freed_positions=[[160]])
        evict_cache([key], [key.clone()], plan, inv_freq=inv_freq)
        length -= 40
    once = rotation_table([5 * 160], inv_freq)
    wanted = start[:, :, 300:].double()
    low, high = wanted.chunk(2, dim=-1)
    cosine, sine = once[0].double().unbind(-1)
    wanted = torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)
    drift = (key[:, :, 100:400].double() - wanted).abs().max() / start.abs().max().double()
    assert 0 < drift < bound


def test_renumbered_keys_are_those_of_the_new_positions() -> None:
    """Against the rotary embedding itself: a key turned back by s is the key rotated to position m - s."""
    half = 16
    inv_freq = 1e4 ** (-torch.arange(half, dtype=torch.float64) / half)
    plain = random_tensor((1, 1, 50, 2 * half), torch.float64, 0)

    def rotary(positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None].double() * inv_freq
        low, high = plain.chunk(2, dim=-1)
        return torch.cat(
            (low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), dim=-1
        ).float()

    key = rotary(torch.arange(50))
    plan = plan_eviction([[(10, 30)]], [50], freed_positions=[[20]])
    evict_cache([key], [key.clone()], plan, inv_freq=inv_freq)
    wanted = rotary(torch.arange(50) - 20)[:, :, 30:]
    assert torch.allclose(key[:, :, 10:30], wanted, atol=2e-6)
    assert torch.equal(plan.position_shifts()[0], torch.tensor([0] * 10 + [20] * 20))


# Refusals: nothing is written


@pytest.mark.parametrize(
    ("spans", "lengths", "options", "message"),
    [
        ([[(0, 2)]], [3, 4], {}, "spans: got 1 sequences, wanted 2"),
        ([[(-1, 2)]], [3], {}, r"spans\[0\]: got \[-1, 2\), wanted a range within \[0, 3\)"),
        ([[], [(2, 1)]], [3, 3], {}, r"spans\[1\]: got \[2, 1\), wanted a range"),
        ([[(0, 4)]], [3], {}, r"got \[0, 4\), wanted a range within \[0, 3\)"),
        ([[(2, 4), (0, 3)]], [5], {}, r"got \[0, 3\) and \[2, 4\), wanted ranges that do not overlap"),
        ([[]], [-1], {}, r"lengths\[0\]: got -1, wanted 0 or more"),
        ([[(0, 1)]], [3], {"freed_positions": [[1, 2]]}, "freed_positions: got .2. numbers .*, wanted .1."),
        ([[(0, 1)]], [3], {"freed_positions": [[-1]]}, r"freed_positions\[0\]: got -1, wanted 0 or more"),
        ([[(1, 1)]], [3], {"freed_positions": [[2]]}, r"got 2 for \[1, 1\), wanted 0: it is empty"),
    ],
)
def test_bad_spans_are_refused(spans: Any, lengths: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match="evict: .*" + message):
        plan_eviction(spans, lengths, **options)


PLAN = plan_eviction([[(1, 3)], [(0, 2)]], [5, 4])


def fresh(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random_tensor((2, 1, 5, 8), dtype, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: evict_cache([k[:1]], [k.clone()], PLAN), r"keys\[0\]: got 1 sequences of 5 tokens"),
        (
            lambda k: evict_cache([k], [k[:, :, :4].clone()], PLAN),
            r"values\[0\]: got 2 sequences of 4 tokens",
        ),
        (
            lambda k: evict_cache([k], [k], PLAN),
            r"values\[0\]: got memory that keys\[0\] has too, wanted memory of its own",
        ),
        (
            lambda k: evict_cache([k[:, :, :4]], [k[:, :, 1:]], plan_eviction([[(1, 3)], []], [4, 4])),
            r"values\[0\]: got memory that keys\[0\] has too, wanted memory of its own",
        ),
        (
            lambda k: evict_sequence([k[:, 0, :, 3:], k[:, 0, :, :4]], PLAN, in_place=True),
            r"tensors\[1\]: got memory that tensors\[0\] has too",
        ),
        (
            lambda k: evict_sequence([k, k.clone(), k[:, 0]], PLAN, token_dims=[2, 2, 1], in_place=True),
            r"tensors\[2\]: got memory that tensors\[0\] has too",
        ),
        (
            lambda k: evict_cache(
                [k.transpose(2, 3).contiguous().transpose(2, 3)], [k], PLAN, inv_freq=INV_FREQ
            ),
            r"keys\[0\]: got strides .*, wanted a contiguous last dimension to renumber in place",
        ),
        (lambda k: evict_cache([k.numpy()], [k], PLAN), r"keys\[0\]: got ndarray, wanted a torch tensor"),
        (
            lambda k: evict_cache([k], [k.clone()], PLAN, inv_freq=[1.0] * 4),
            "inv_freq: got list, wanted a torch tensor",
        ),
        (
            lambda k: evict_paged([k.numpy()], [k], plan_paged_eviction(PLAN, [[0, 1], [2]], 4)),
            r"keys\[0\]: got ndarray, wanted a torch tensor",
        ),
        (
            lambda k: evict_paged(
                [torch.zeros(3, 4, 1, 8)],
                [torch.zeros(4, 4, 1, 8)],
                plan_paged_eviction(PLAN, [[0, 1], [2]], 4),
            ),
            r"values\[0\]: got 4 blocks, wanted 3 as keys\[0\] has",
        ),
        (
            lambda k: evict_cache([k[0]], [k[0]], PLAN),
            r"keys\[0\]: got shape \[1, 5, 8\], wanted \[batch, kv_h",
        ),
        (lambda k: evict_cache(k, k, PLAN), r"keys: got one tensor of shape \[2, 1, 5, 8\], wanted \[layers"),
        (
            lambda k: evict_cache([k], [k.clone()], PLAN, layout="tbhd"),
            "layout: got 'tbhd', wanted bhtd or bthd",
        ),
        (
            lambda k: evict_cache([k[:, :1].expand(2, 3, 5, 8)], [k.clone()], PLAN),
            r"keys\[0\]: got elements that share memory",
        ),
        (
            lambda k: evict_cache([k.clone().requires_grad_()], [k.clone()], PLAN),
            r"keys\[0\]: got a tensor that requires grad",
        ),
        (
            lambda k: evict_cache([k], [k.to("meta")], PLAN),
            r"values\[0\]: got a tensor on meta, wanted all on one cpu or cuda device",
        ),
        (
            lambda k: evict_cache([k], [k.clone()], PLAN, inv_freq=INV_FREQ[:3]),
            "got head_dim 8, wanted 6, twice",
        ),
        (
            lambda k: evict_cache([k.double()], [k.clone()], PLAN, inv_freq=INV_FREQ),
            r"keys\[0\]: got dtype torch.float64, wanted float32, bfloat16 or float16",
        ),
        (
            lambda k: evict_cache([k], [k.clone()], PLAN, inv_freq=torch.arange(4)),
            "inv_freq: got torch.int64 of shape .4., wanted floats",
        ),
        (lambda k: evict_sequence([k], PLAN, token_dims=[0]), "with batch in dimension 0 and tokens in 0"),
        (lambda k: evict_sequence([k.numpy()], PLAN), r"tensors\[0\]: got ndarray, wanted a torch tensor"),
        (
            lambda k: evict_sequence([torch.zeros(2, 5, *[2] * 6).permute(0, 1, 7, 6, 5, 4, 3, 2)], PLAN),
            "wanted at most 4 dimensions that are not contiguous",
        ),
        (
            lambda k: evict_sequence([k], PLAN, token_dims=[1, 2]),
            "got 1 tensors, 1 batch_dims and 2 token_dims",
        ),
        (
            lambda k: evict_paged([k], [k], plan_paged_eviction(PLAN, [[0, 1], [2]], 4)),
            "wanted .3 blocks or more, 4",
        ),
        (
            lambda k: plan_paged_eviction(PLAN, [[0], [2]], 4),
            r"block_tables\[0\]: got 1 blocks, wanted at least 2",
        ),
        (lambda k: plan_paged_eviction(PLAN, [[0, 0], [2]], 4), "wanted different blocks, 0 or above"),
        (lambda k: plan_paged_eviction(PLAN, [[0, -1], [2]], 4), "wanted different blocks, 0 or above"),
        (lambda k: plan_paged_eviction(PLAN, [[0, 1]], 4), "block_tables: got 1 sequences, wanted 2"),
        (lambda k: plan_paged_eviction(PLAN, [[0, 1], [2]], 0), "block_size: got 0, wanted 1 or more"),
    ],
)
def test_bad_tensors_are_refused(call: Callable[[torch.Tensor], object], message: str) -> None:
    key = fresh()
    before = key.clone()
    with pytest.raises(InputError, match="evict: .*" + message):
        call(key)
    assert torch.equal(key, before)


RUNS = torch.tensor([[0, 2, 0, 3, -1]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": torch.tensor([[0, 2, 3, 3, -1]])}, "runs: got run 0 from 2 to 3 of 3 tokens"),
        ({"runs": torch.tensor([[0, 3, 0, 3, -1]])}, "got run 0 from 3"),
        ({"runs": torch.tensor([[0, 2, 0, 1 << 62, -1]])}, "got run 0 from 2"),
        ({"runs": torch.tensor([[0, 2, -1, 3, -1]])}, "got run 0 from 2 to -1"),
        ({"runs": torch.tensor([[0, 2, 0, 3, 0]])}, "rotation 0"),
        (
            {"runs": torch.tensor([[2, 2, 0, 3, -1]])},
            "got sequence 2 in run 0, wanted ascending ones below 2",
        ),
        ({"runs": torch.tensor([[1, 2, 0, 3, -1], [0, 2, 0, 3, -1]])}, "got sequence 0 in run 1"),
        ({"runs": torch.tensor([[0, 3, 0, 2, -1], [0, 2, 1, 1, -1]])}, "got run 1 from 2"),
        (
            {"runs": torch.tensor([[0, 2, 1, 3, -1]]), "targets": [torch.zeros(2, 5, 4, 8)], "out_tokens": 4},
            "got run 0 from 2 to 1 of 3 tokens, rotation -1, wanted adjacent runs",
        ),
        ({"runs": RUNS.to(torch.int32)}, "runs: got dtype int32, wanted int64"),
        ({"runs": RUNS[:, :4]}, "runs: got "),
        ({"token_dims": [0]}, r"tensors\[0\]: got batch dimension 0 and token dimension 0"),
        ({"token_dims": [7]}, "token dimension 7"),
        ({"token_dims": [2, 2]}, "wanted as many targets and dimensions"),
        ({"n_rotated": 1}, "rotations: got none, wanted a table"),
        ({"n_rotated": 2}, "sizes: got one out of range"),
        ({"num_threads": 0}, "num_threads: got 0, wanted 1 or more"),
        ({"block_tables": torch.zeros(1, 1, dtype=torch.int64)}, "block_tables: got some"),
        (
            {"block_tables": torch.tensor([[9]]), "block_size": 5, "token_dims": [1]},
            "got block 9, wanted 0 to 1",
        ),
        ({"sources": ["no tensor"]}, "got str, wanted a tensor"),
    ],
)
def test_the_binding_refuses_what_would_break_memory(changes: dict[str, Any], message: str) -> None:
    key = random_tensor((2, 5, 5, 8), torch.float32, 0)
    before = key.clone()
    arguments: dict[str, Any] = {
        "sources": [key],
        "targets": [],
        "batch_dims": [0],
        "token_dims": [2],
        "runs": RUNS,
        "rotations": None,
        "n_rotated": 0,
        "block_tables": None,
        "block_size": 0,
        "out_tokens": 0,
        "num_threads": 1,
    }
    with pytest.raises((ValueError, TypeError), match="evict: .*" + message):
        _core.evict_cpu(**{**arguments, **changes})
    assert torch.equal(key, before)


def test_what_names_a_version_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", "cuda")
    with pytest.raises(InputError, match="evict: VRTHINKER_KERNELS=cuda, but it cannot run"):
        evict_cache([fresh()], [fresh()], PLAN)
    monkeypatch.setenv("VRTHINKER_KERNELS", "triton")
    with pytest.raises(InputError, match="cannot run: it has no in-place version"):
        evict_cache([fresh()], [fresh()], PLAN)


def test_the_reference_runs_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_arguments: object) -> None:
        raise AssertionError("the C++ version ran")

    wanted = evict_cache([fresh()], [fresh()], PLAN, in_place=False, inv_freq=INV_FREQ)
    monkeypatch.setattr(_core, "evict_cpu", refuse)
    with pytest.raises(AssertionError, match="ran"):
        evict_cache([fresh()], [fresh()], PLAN)
    monkeypatch.setenv("VRTHINKER_KERNELS", "reference")
    found = evict_cache([fresh()], [fresh()], PLAN, in_place=False, inv_freq=INV_FREQ)
    assert_equal([*found[0], *found[1]], [*wanted[0], *wanted[1]])
    key = fresh()
    evict_cache([key], [fresh()], PLAN, inv_freq=INV_FREQ)
    assert torch.equal(key[0, :, :3], wanted[0][0][0])


# torch.library


def test_opcheck() -> None:
    runs, moved = PLAN.table(in_place=False, renumber=True), PLAN.table(in_place=True, renumber=True)
    plain = PLAN.table(in_place=False, renumber=False)
    rotations = rotation_table(PLAN.shifts, INV_FREQ)
    grad = fresh().requires_grad_()
    ops = torch.ops.vrthinker
    torch.library.opcheck(
        ops.evict.default, ([grad, fresh().permute(0, 1, 2, 3)], [0, 0], [2, 2], runs, rotations, 1, 3)
    )
    torch.library.opcheck(
        ops.evict.default, ([torch.ones(2, 5, dtype=torch.bool)], [0], [1], plain, None, 0, 3)
    )
    torch.library.opcheck(ops.evict_.default, ([fresh(), fresh()], [0, 0], [2, 2], moved, rotations, 1))
    paged = plan_paged_eviction(PLAN, [[0, 1], [2]], 4)
    blocks = [random_tensor((3, 4, 2, 8), torch.bfloat16, 1) for _ in range(2)]
    torch.library.opcheck(
        ops.evict_paged_.default, (blocks, paged.table(renumber=False), paged.working_tables, None, 0)
    )


def test_compiles_into_one_graph() -> None:
    def boundary(key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        new_key, new_value = evict_cache([key], [value], PLAN, in_place=False, inv_freq=INV_FREQ)
        (new_ids,) = evict_sequence([ids], PLAN)
        evict_cache([key], [value], PLAN)
        total: torch.Tensor = new_key[0].sum() + new_value[0].sum() + new_ids.sum() + key.sum() + value.sum()
        return total

    compiled = torch.compile(boundary, fullgraph=True, backend="aot_eager")
    ids = torch.arange(10).reshape(2, 5)
    for dtype in (torch.float32, torch.float16):
        found = compiled(fresh(dtype), fresh(dtype), ids)
        assert torch.equal(found, boundary(fresh(dtype), fresh(dtype), ids))


def test_gradients() -> None:
    key = random_tensor((2, 2, 5, 8), torch.float32, 0).requires_grad_()
    value = random_tensor((2, 2, 5, 8), torch.float32, 1).requires_grad_()
    new = evict_cache([key], [value], PLAN, in_place=False, inv_freq=INV_FREQ)
    weights = [random_tensor(new[side][0].shape, torch.float32, 5 + side) for side in (0, 1)]
    sum((new[side][0] * weights[side]).sum() for side in (0, 1)).backward()  # type: ignore[union-attr]
    runs, rotations = PLAN.table(in_place=False, renumber=True), rotation_table(PLAN.shifts, INV_FREQ)
    for tensor, table, side in ((key, rotations, 0), (value, None, 1)):
        other = tensor.detach().clone().requires_grad_()
        out = evict_reference(other, runs, batch_dim=0, token_dim=2, out_tokens=3, rotations=table)
        (out * weights[side]).sum().backward()
        assert torch.allclose(tensor.grad, other.grad, atol=1e-6)
        assert (tensor.grad[0, :, 1:3] == 0).all(), "what left gets nothing"


def test_plans_tell_what_they_do() -> None:
    plan = plan_eviction([[(2, 4), (4, 5)], []], [8, 3], freed_positions=[[3, 1], []])
    assert plan.new_lengths == (5, 3)
    assert [(r.source, r.target, r.count, r.shift) for r in plan.runs if r.sequence == 0] == [
        (0, 0, 2, 0),
        (5, 2, 3, 4),
    ]
    assert plan.shifts == (4,)
    assert plan.table(in_place=True, renumber=True).tolist() == [[0, 5, 2, 3, 0]]
    assert plan.table(in_place=True, renumber=False).tolist() == [[0, 5, 2, 3, -1]]


# The benchmark


@pytest.mark.parametrize("in_place", [False, True])
def test_benchmark_cases_hold_what_they_claim(monkeypatch: pytest.MonkeyPatch, in_place: bool) -> None:
    monkeypatch.setattr(bench, "why_not_compiled", lambda device: "not in this test")
    shape = bench.Shape("tiny", 2, 2, 8, torch.bfloat16)
    make = functools.partial(
        bench._cache_case, "tiny", shape, [[(3, 5), (7, 9)]] * 2, 20, "cpu", 0, in_place=in_place
    )
    comparison = make()
    moved = 2 * (13 if in_place else 16)
    assert comparison.facts["tokens_moved"] == moved
    assert comparison.bytes_moved == 2 * moved * 2 * 2 * 2 * 8 * 2
    assert {"reference", "torch.cat of slices", "index_select"} < set(comparison.competitors)
    in_torch = {"copy_ of runs, in place", "index_select of the tail, in place"}
    assert set(comparison.competitors) & in_torch == (in_torch if in_place else set())
    comparison.check()
    for run in comparison.competitors.values():
        run()
    monkeypatch.setattr(bench, "evict_cache", lambda keys, values, plan, **_: (keys, values))
    with pytest.raises(RuntimeError, match="evict differs from the reference in layer 0"):
        make().check()


def test_the_benchmark_names_what_differs_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "why_not_compiled", lambda device: "not in this test")
    name = "copy_ of runs, in place"
    monkeypatch.setattr(bench, "_torch_in_place", lambda layers, plan, spans: {name: lambda: layers})
    shape = bench.Shape("tiny", 1, 2, 8, torch.float32)
    comparison = bench._cache_case("tiny", shape, [[(3, 5)]], 12, "cpu", 0, in_place=True)
    with pytest.raises(RuntimeError, match=f"evict: {name} differs from the reference in layer 0"):
        comparison.check()


def test_ragged_benchmark_cases_have_no_torch_version_of_all_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "why_not_compiled", lambda device: "not in this test")
    shape = bench.Shape("tiny", 1, 2, 8, torch.float32)
    comparison = bench._cache_case("tiny", shape, [[(3, 5)], [(4, 7)]], 12, "cpu", 0, in_place=True)
    assert set(comparison.competitors) == {"reference", "evict, in place", "evict, in place, renumber"}
    comparison.check()


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("renumber", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_gpu_versions_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    dtype: torch.dtype,
    layout: Any,
    renumber: bool,
    in_place: bool,
) -> None:
    if version == "triton" and in_place:
        pytest.skip("Triton has no in-place version")
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    inv_freq = INV_FREQ if renumber else None
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        lengths = torch.randint(1, 700, (3,), generator=generator).tolist()
        spans = []
        for length in lengths:
            cuts = sorted(torch.randint(0, length + 1, (6,), generator=generator).tolist())
            spans.append([(cuts[i], cuts[i + 1]) for i in (0, 2, 4)])
        plan = plan_eviction(spans, lengths)
        keys, values = cache(plan, layout, dtype, seed), cache(plan, layout, dtype, seed + 10)
        wanted = expected(keys, plan, layout, inv_freq, in_place=in_place)
        wanted_values = expected(values, plan, layout, None, in_place=in_place)
        on_gpu = [t.cuda() for t in keys], [t.cuda() for t in values]
        found = evict_cache(*on_gpu, plan, layout=layout, in_place=in_place, inv_freq=inv_freq)
        for a, b in zip(found[0], wanted, strict=True):
            if version == "triton" and renumber:  # Triton may fuse multiply and add
                assert torch.allclose(
                    a.cpu().float(), b.float(), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5
                )
            else:
                assert torch.equal(bits(a.cpu()), bits(b))
        assert_equal([t.cpu() for t in found[1]], wanted_values)


@pytest.mark.gpu
def test_gpu_paged_equals_the_reference() -> None:
    # One hole is whole blocks: what stays behind it is turned where it lies.
    plan = plan_eviction([[(3, 300), (305, 409)], [(16, 32)]], [900, 40])
    tables = [list(range(57, 0, -1)), [58, 59, 60]]
    for dtype in DTYPES:
        paged = plan_paged_eviction(plan, tables, 16, renumber=True)
        blocks = [random_tensor((61, 16, 2, 8), dtype, seed) for seed in range(2)]
        on_gpu = [b.cuda() for b in blocks]
        evict_paged(on_gpu[:1], on_gpu[1:], paged, inv_freq=INV_FREQ)
        rotations = rotation_table(plan.shifts, INV_FREQ)
        for place, block in enumerate(blocks):
            evict_paged_reference_(
                block,
                paged.table(renumber=True),
                paged.working_tables,
                rotations=rotations if place == 0 else None,
            )
        assert_equal([b.cpu() for b in on_gpu], blocks)


@pytest.mark.gpu
def test_gpu_sequences_and_streams() -> None:
    plan = plan_eviction([[(1, 4)], [(0, 2)]], [9, 6])
    ids = torch.arange(18).reshape(2, 9)
    mask = ids % 3 == 0
    wide = random_tensor((2, 9, 3584), torch.bfloat16, 0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_gpu = [t.cuda(non_blocking=True) for t in (ids, mask, wide)]
        found = evict_sequence(on_gpu, plan)
        evict_sequence(on_gpu, plan, in_place=True)
    stream.synchronize()
    assert_equal([t.cpu() for t in found], evict_sequence([ids, mask, wide], plan))
    assert_equal([t.cpu() for t in on_gpu], evict_sequence([ids, mask, wide], plan, in_place=True))
