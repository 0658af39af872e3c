"""Attention over random trees: every implementation against the dense mask, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vrthinker.policy import packed_attention
from vrthinker.policy.packed_attention import PackedAttention, dense_mask
from vrthinker.policy.packing import Pack, Segment
from vrthinker.policy.prefix_tree import NEVER

CPU = torch.device("cpu")


def random_pack(seed: int, segments: int = 9, longest: int = 40) -> Pack:
    """A tree of random shape: rounds grow towards the leaves, runs of tokens expire."""
    rng = np.random.default_rng(seed)
    parents = [-1, *(int(rng.integers(-1, number)) for number in range(1, segments))]
    children: dict[int, list[int]] = {number: [] for number in range(-1, segments)}
    for number, parent in enumerate(parents):
        children[parent].append(number)
    found: list[Segment] = []
    rounds: list[int] = []
    expires: list[int] = []

    def place(number: int, parent: int, round_: int) -> None:
        index, start = len(found), len(rounds)
        length = int(rng.integers(1, longest))
        found.append(Segment(start, start + length, 0, parent, round_))
        rounds.extend([round_] * length)
        hidden_from = np.full(length, NEVER)
        if length > 3:
            begin, end = sorted(rng.integers(0, length, 2))
            hidden_from[begin:end] = round_ + rng.integers(1, 3)
        expires.extend(hidden_from.tolist())
        for child in children[number]:
            place(child, index, round_ + int(rng.integers(0, 3)))
        found[index] = Segment(start, start + length, len(rounds), parent, round_)

    for root in children[-1]:
        place(root, -1, 1)
    tokens, none = len(rounds), np.zeros(0, dtype=np.int64)
    return Pack(
        token_ids=np.zeros(tokens, dtype=np.int64),
        positions=np.zeros((3, tokens), dtype=np.int64),
        rounds=np.array(rounds, dtype=np.int32),
        expires=np.array(expires, dtype=np.int32),
        segments=tuple(found),
        frames=(),
        frame_order=(),
        is_image=np.zeros(tokens, dtype=bool),
        sources=none,
        labels=none,
        sampled=(),
        trajectories=(),
        rounds_of=(),
        n_context_tokens=tokens,
    )


def inputs(pack: Pack, device: torch.device, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Queries, keys and values as a model has them: heads behind tokens in memory."""
    generator = torch.Generator(device).manual_seed(seed)
    found = []
    for heads in (4, 2, 2):
        shape = (1, pack.n_tokens, heads, 32)
        tensor = torch.empty(shape, device=device).normal_(generator=generator).to(dtype)
        found.append(tensor.transpose(1, 2).requires_grad_())
    return found


@pytest.mark.parametrize("seed", range(12))
def test_segments_equal_the_dense_mask_forward_and_backward(seed: int) -> None:
    pack = random_pack(seed)
    mask = dense_mask(pack)
    assert not mask.all()
    assert mask.diagonal().all()
    weight = torch.randn(1, 4, pack.n_tokens, 32, generator=torch.Generator().manual_seed(seed))
    results = []
    for implementation in ("segments", "dense"):
        given = inputs(pack, CPU, torch.float32, seed)
        out = PackedAttention(pack, CPU, implementation)(*given)  # type: ignore[arg-type]
        gradients = torch.autograd.grad((out * weight).sum(), given)
        results.append([out, *gradients])
    for found, wanted in zip(*results, strict=True):
        assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))


def test_half_precision_is_near_float32() -> None:
    pack = random_pack(3, segments=20)
    exact = inputs(pack, CPU, torch.float32, 3)
    halves = inputs(pack, CPU, torch.bfloat16, 3)
    # As under autocast: rotated queries and keys are float32, values are not.
    mixed = [halves[0].float().detach().requires_grad_(), halves[1].float().detach(), halves[2]]
    attend = PackedAttention(pack, CPU)
    wanted = attend(*exact)
    for given in (halves, mixed):
        out = attend(*given)
        assert out.dtype == given[0].dtype
        assert (out.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
        (gradient,) = torch.autograd.grad(out.float().square().sum(), given[:1])
        (exact_gradient,) = torch.autograd.grad(attend(*exact).square().sum(), exact[:1])
        assert (gradient.float() - exact_gradient).norm() < 0.05 * exact_gradient.norm()


def test_the_dense_mask_has_its_limit() -> None:
    long = random_pack(0, segments=3, longest=40)
    with pytest.raises(ValueError, match="segments: got a tensor on meta, allowed: cpu"):
        PackedAttention(long, torch.device("meta"), "segments")
    big = random_pack(1, segments=10, longest=2000)
    assert big.n_tokens > 4096
    with pytest.raises(ValueError, match=r"dense: got \d+ tokens, allowed: up to 4096"):
        PackedAttention(big, CPU, "dense")


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_flex_attention_is_compiled_once_for_all_lengths(device: str) -> None:
    packs = [random_pack(seed, segments=6, longest=90) for seed in range(4)]
    assert len({pack.n_tokens for pack in packs}) == len(packs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    where = torch.device(device)
    with torch.no_grad():
        for seed, pack in enumerate(packs):
            given = [tensor.detach() for tensor in inputs(pack, where, torch.float32, seed)]
            mask = packed_attention.block_mask(pack, where)
            scale = 32**-0.5
            flex = packed_attention._compiled_flex()(*given, block_mask=mask, scale=scale, enable_gqa=True)
            dense = PackedAttention(pack, where, "dense")(*given)
            assert torch.allclose(flex, dense, atol=1e-5 if device == "cpu" else 1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.gpu
def test_gradients_on_a_gpu() -> None:
    where = torch.device("cuda")
    for seed in range(3):
        pack = random_pack(seed, segments=6, longest=90)
        results = []
        for implementation in ("flex", "dense"):
            given = inputs(pack, where, torch.bfloat16, seed)
            out = PackedAttention(pack, where, implementation)(*given)  # type: ignore[arg-type]
            results.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
        for found, wanted in zip(*results, strict=True):
            assert (found.float() - wanted.float()).norm() < 0.02 * wanted.float().norm()
