"""`grpo_loss` in Triton: three launches, none of which waits for the host.

The first counts the learned tokens per episode. The second passes over the logprobs and writes a row of sums
per tile. The third is one program that adds the rows in order, so that equal inputs give equal bits. This
module is imported only where it runs.

Exponentials are Triton's. On a GPU they are off by a few units in the last place; those of C++ and CUDA by
one or two.
"""

# Triton's decorator and its device functions have no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_TILE = 1024
_SUMS = 8
"""A row's sums: loss, ratio, KL, learned tokens, clipped low, clipped high, largest ratio; one is unused."""

_AGGREGATIONS = {"token_mean": 0, "episode_mean": 1, "fixed_length": 2}
EPISODE_MEAN = tl.constexpr(1)
TOKEN_MEAN = tl.constexpr(0)
INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["tokens"])
def count_kernel(mask, mask_stride, offsets, offset_stride, learned, tokens, TILE: tl.constexpr):
    """Counts the learned tokens of one episode."""
    episode = tl.program_id(0).to(tl.int64)
    # The offsets are clamped, because nothing has checked them.
    begin = tl.minimum(tl.maximum(tl.load(offsets + episode * offset_stride), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(offsets + (episode + 1) * offset_stride), 0), tokens)
    count = tl.zeros([TILE], tl.int32)
    while begin < end:
        at = begin + tl.arange(0, TILE)
        count += (tl.load(mask + at * mask_stride, mask=at < end, other=0) != 0).to(tl.int32)
        begin += TILE
    tl.store(learned + episode, tl.sum(count, 0))


@triton.jit
def _gap(d):
    """e^d - 1 and k3 = e^d - 1 - d. Near 0 differences would lose both, so a power series is used."""
    tail = 1.9875691500e-4
    tail = tail * d + 1.3981999507e-3
    tail = tail * d + 8.3334519073e-3
    tail = tail * d + 4.1665795894e-2
    tail = tail * d + 1.6666665459e-1
    tail = tail * d + 5.0000001201e-1
    tail = tail * d * d
    near = tl.abs(d) < 0.34
    far = tl.exp(d) - 1.0
    return tl.where(near, tail + d, far), tl.where(near, tail, far - d)


@triton.jit(do_not_specialize=["tokens", "episodes", "search_steps"])
def loss_kernel(
    policy,
    policy_stride,
    old,
    old_stride,
    ref,
    ref_stride,
    advantages,
    advantage_stride,
    mask,
    mask_stride,
    offsets,
    offset_stride,
    learned,
    token_loss,
    gradient,
    sums,
    tokens,
    episodes,
    lowest_ratio,
    highest_ratio,
    kl_weight,
    search_steps,
    AGGREGATION: tl.constexpr,
    PER_EPISODE: tl.constexpr,
    HAS_REF: tl.constexpr,
    TILE: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Computes the losses, the gradients and a row of sums of one tile of tokens."""
    tile = tl.program_id(0).to(tl.int64)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < tokens
    used = tl.load(mask + at * mask_stride, mask=inside, other=0) != 0
    weight = tl.where(used, 1.0, 0.0)
    advantage_at = at
    if PER_EPISODE or AGGREGATION == EPISODE_MEAN:
        # The number of episodes that end at or before each token is found by bisection.
        low = tl.zeros([TILE], tl.int64)
        high = tl.zeros([TILE], tl.int64) + (episodes - 1)
        for _ in range(search_steps):
            middle = (low + high) // 2
            ended = tl.load(offsets + (middle + 1) * offset_stride, mask=used, other=0) <= at
            going = low < high
            low = tl.where(going & ended, middle + 1, low)
            high = tl.where(going & ~ended, middle, high)
        if PER_EPISODE:
            advantage_at = low
        if AGGREGATION == EPISODE_MEAN:
            count = tl.load(learned + low, mask=used, other=1)
            weight = weight / tl.maximum(count, 1).to(tl.float32)
    # Tokens that are not learned are never read.
    p = tl.load(policy + at * policy_stride, mask=used, other=0).to(tl.float32)
    o = tl.load(old + at * old_stride, mask=used, other=0).to(tl.float32)
    advantage = tl.load(advantages + advantage_at * advantage_stride, mask=used, other=0)
    # Clipping could hide an infinite logprob. Comparisons with NaN are false.
    finite = (tl.abs(p) < INFINITY) & (tl.abs(o) < INFINITY) & (tl.abs(advantage) < INFINITY)
    ratio = tl.exp(p - o)
    below = ratio < lowest_ratio
    above = ratio > highest_ratio
    clipped = tl.where(below, lowest_ratio, tl.where(above, highest_ratio, ratio))
    gain = ratio * advantage
    clipped_gain = clipped * advantage
    clip_decides = gain > clipped_gain
    loss = -tl.where(clip_decides, clipped_gain, gain)
    share = tl.where((below | above) & (gain == clipped_gain), 0.5, 1.0)
    slope = tl.where(clip_decides, 0.0, -gain * share)
    kl = tl.zeros([TILE], tl.float32)
    if HAS_REF:
        r = tl.load(ref + at * ref_stride, mask=used, other=0).to(tl.float32)
        expm1, kl = _gap(r - p)
        if kl_weight != 0.0:
            finite = finite & (tl.abs(r) < INFINITY)
            loss += kl_weight * kl
            slope -= kl_weight * expm1
    loss = tl.where(finite, loss, float("nan"))
    slope = tl.where(finite, slope, float("nan"))
    loss = tl.where(used, loss, 0.0)
    tl.store(token_loss + at, loss, mask=inside)
    tl.store(gradient + at, tl.where(used, slope * weight, 0.0), mask=inside)
    ratio = tl.where(used, ratio, 0.0)
    row = sums + tile * SUMS
    tl.store(row, tl.sum(loss * weight, 0))
    tl.store(row + 1, tl.sum(ratio, 0))
    tl.store(row + 2, tl.sum(kl, 0))
    tl.store(row + 3, tl.sum(used.to(tl.float32), 0))
    tl.store(row + 4, tl.sum((used & below & (advantage < 0)).to(tl.float32), 0))
    tl.store(row + 5, tl.sum((used & above & (advantage > 0)).to(tl.float32), 0))
    # A maximum may ignore NaN; the sum does not.
    tl.store(row + 6, tl.max(ratio, 0))


@triton.jit(do_not_specialize=["tiles", "episodes"])
def finish_kernel(
    sums,
    tiles,
    learned,
    episodes,
    loss,
    scale,
    metrics,
    fixed_length,
    normalizer,
    AGGREGATION: tl.constexpr,
    TILE: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Adds the rows, counts the episodes with learned tokens, and writes the scalars."""
    lane = tl.arange(0, TILE)
    total_loss = tl.zeros([TILE], tl.float64)
    total_ratio = tl.zeros([TILE], tl.float64)
    total_kl = tl.zeros([TILE], tl.float64)
    total_tokens = tl.zeros([TILE], tl.float64)
    total_low = tl.zeros([TILE], tl.float64)
    total_high = tl.zeros([TILE], tl.float64)
    largest = tl.zeros([TILE], tl.float32)
    for first in range(0, tiles, TILE):
        here = first + lane < tiles
        row = sums + (first + lane).to(tl.int64) * SUMS
        total_loss += tl.load(row, mask=here, other=0).to(tl.float64)
        total_ratio += tl.load(row + 1, mask=here, other=0).to(tl.float64)
        total_kl += tl.load(row + 2, mask=here, other=0).to(tl.float64)
        total_tokens += tl.load(row + 3, mask=here, other=0).to(tl.float64)
        total_low += tl.load(row + 4, mask=here, other=0).to(tl.float64)
        total_high += tl.load(row + 5, mask=here, other=0).to(tl.float64)
        largest = tl.maximum(largest, tl.load(row + 6, mask=here, other=0))
    tokens = tl.sum(total_tokens, 0)
    divisor = tokens
    if AGGREGATION != TOKEN_MEAN:
        divisor = episodes.to(tl.float64)
    if AGGREGATION == EPISODE_MEAN:
        counted = tl.zeros([TILE], tl.float64)
        for first in range(0, episodes, TILE):
            here = first + lane < episodes
            counted += (tl.load(learned + first + lane, mask=here, other=0) > 0).to(tl.float64)
        divisor = tl.sum(counted, 0)
    zero = tl.full([], 0.0, tl.float64)  # makes Python's and fp32 numbers fp64
    if normalizer > 0:
        divisor = zero + normalizer
    divisor *= zero + fixed_length
    factor = tl.where(divisor > 0, 1.0 / tl.where(divisor > 0, divisor, 1.0), 0.0)
    tl.store(scale, factor.to(tl.float32))
    tl.store(loss, (tl.sum(total_loss, 0) * factor).to(tl.float32))
    none = tokens == 0
    count = tl.where(none, 1.0, tokens)
    ratio = tl.sum(total_ratio, 0) / count
    top = tl.max(largest, 0)
    low = tl.sum(total_low, 0)
    high = tl.sum(total_high, 0)
    tl.store(metrics, tl.where(none, 1.0, ratio).to(tl.float32))
    tl.store(metrics + 1, tl.where(none, 1.0, tl.where(ratio != ratio, ratio.to(tl.float32), top)))
    tl.store(metrics + 2, (low / count).to(tl.float32))
    tl.store(metrics + 3, (high / count).to(tl.float32))
    tl.store(metrics + 4, ((low + high) / count).to(tl.float32))
    tl.store(metrics + 5, (tl.sum(total_kl, 0) / count).to(tl.float32))


def grpo_loss_triton(
    policy: torch.Tensor,
    old: torch.Tensor,
    ref: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    offsets: torch.Tensor,
    loss: torch.Tensor,
    token_loss: torch.Tensor,
    gradient: torch.Tensor,
    scale: torch.Tensor,
    metrics: torch.Tensor,
    lowest_ratio: float,
    highest_ratio: float,
    kl_weight: float,
    aggregation: str,
    fixed_length: int,
    normalizer: float,
) -> None:
    """Fills the five outputs from checked inputs. `op.py` explains them."""
    tokens, episodes = policy.shape[0], offsets.shape[0] - 1
    tiles = triton.cdiv(tokens, _TILE)
    how = _AGGREGATIONS[aggregation]
    learned = offsets.new_empty(max(episodes, 1), dtype=torch.int32)
    sums = loss.new_empty((max(tiles, 1), _SUMS))
    mask_bytes = mask.view(torch.uint8)
    stated_ref = policy if ref is None else ref
    # Triton launches on torch's current device.
    with torch.cuda.device_of(policy):  # type: ignore[no-untyped-call]
        if how == EPISODE_MEAN.value and episodes > 0:
            count_kernel[(episodes,)](
                mask_bytes, mask.stride(0), offsets, offsets.stride(0), learned, tokens, TILE=_TILE
            )
        if tiles > 0:
            loss_kernel[(tiles,)](
                policy,
                policy.stride(0),
                old,
                old.stride(0),
                stated_ref,
                stated_ref.stride(0),
                advantages,
                advantages.stride(0),
                mask_bytes,
                mask.stride(0),
                offsets,
                offsets.stride(0),
                learned,
                token_loss,
                gradient,
                sums,
                tokens,
                episodes,
                lowest_ratio,
                highest_ratio,
                kl_weight,
                max(episodes, 1).bit_length(),
                AGGREGATION=how,
                PER_EPISODE=advantages.shape[0] != tokens,
                HAS_REF=ref is not None,
                TILE=_TILE,
                SUMS=_SUMS,
            )
        finish_kernel[(1,)](
            sums,
            tiles,
            learned,
            episodes,
            loss,
            scale,
            metrics,
            float(fixed_length or 1),
            normalizer,
            AGGREGATION=how,
            TILE=_TILE,
            SUMS=_SUMS,
        )


def _entry(kernel: Any, choice: dict[str, Any]) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """A kernel to compile ahead of time, with policy, old and reference logprobs in three dtypes."""
    pointers = {
        "policy": "*bf16",
        "ref": "*fp16",
        "mask": "*u8",
        "offsets": "*i64",
        "learned": "*i32",
    }
    integers = {"tokens", "episodes", "tiles", "search_steps"}
    numbers = {"lowest_ratio", "highest_ratio", "kl_weight", "fixed_length", "normalizer"}
    constants = {name: value for name, value in choice.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_stride") or name in integers:
            signature[name] = "i32"
        else:
            signature[name] = "fp32" if name in numbers else pointers.get(name, "*fp32")
    return kernel, signature, constants


AOT: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    _entry(
        kernel,
        {"AGGREGATION": way, "PER_EPISODE": per_episode, "HAS_REF": has_ref, "TILE": 1024, "SUMS": 8},
    )
    for kernel in (count_kernel, loss_kernel, finish_kernel)
    for way, per_episode, has_ref in ((0, False, False), (1, True, True), (2, True, False))
]
"""Kernels that tests compile ahead of time, with argument types and constants."""
