"""The Triton version of `group_advantage`, for builds without CUDA. It works like the CUDA kernel.

Program 0 counts bad values. The others take one group each and write its episodes, or their tokens. Sums have
Triton's order, so results may differ from the reference's in the last bit. Under
`batch_std` and `reinforce_plus_plus` every program reads the whole batch.

Invariant: whatever the offsets say, nothing is read or written out of bounds (see group_advantage_kernel.h).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vrthinker.kernels.group_advantage.reference import MAX_REWARD, METHODS

BLOCK = 256
# The last two divide by a number that is taken from the whole batch.
_GRPO, _DR_GRPO, _RLOO, _BATCH_STD, _REINFORCE_PLUS_PLUS = (
    tl.constexpr(METHODS.index(name)) for name in METHODS
)
_MAX_REWARD = tl.constexpr(MAX_REWARD)


@triton.jit
def _load_rewards(rewards, reward_stride, valid, valid_stride, at, inside, HAS_VALID: tl.constexpr):
    """The rewards in double (0 if they do not count), whether each counts, and whether each is bad."""
    exact = tl.load(rewards + at * reward_stride, mask=inside, other=0.0).to(tl.float64)
    counts = inside
    if HAS_VALID:
        counts = inside & (tl.load(valid + at * valid_stride, mask=inside, other=0) != 0)
    good = tl.abs(exact) <= _MAX_REWARD
    return tl.where(counts & good, exact, 0.0), counts & good, counts & (good == 0), counts


@triton.jit
def _tally(
    rewards, reward_stride, valid, valid_stride, begin, end, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum, minimum, maximum, count and bad count of the rewards of the episodes [begin, end)."""
    total = tl.zeros((BLOCK,), tl.float64)
    lowest = tl.full((BLOCK,), float("inf"), tl.float64)
    highest = tl.full((BLOCK,), float("-inf"), tl.float64)
    count = tl.zeros((BLOCK,), tl.int64)
    bad = tl.zeros((BLOCK,), tl.int64)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        exact, counts, is_bad, _valid = _load_rewards(
            rewards, reward_stride, valid, valid_stride, at, at < end, HAS_VALID
        )
        total += exact
        lowest = tl.minimum(lowest, tl.where(counts, exact, float("inf")))
        highest = tl.maximum(highest, tl.where(counts, exact, float("-inf")))
        count += counts.to(tl.int64)
        bad += is_bad.to(tl.int64)
    return tl.sum(total), tl.min(lowest), tl.max(highest), tl.sum(count), tl.sum(bad)


@triton.jit
def _scale(
    rewards, reward_stride, valid, valid_stride, begin, end, mean, count, eps: tl.constexpr,
    DDOF: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The standard deviation of the rewards of the episodes [begin, end), plus eps."""
    squares = tl.zeros((BLOCK,), tl.float64)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        exact, counts, _bad, _valid = _load_rewards(
            rewards, reward_stride, valid, valid_stride, at, at < end, HAS_VALID
        )
        deviation = tl.where(counts, exact - mean, 0.0)
        squares += deviation * deviation
    freedom = tl.maximum(count - DDOF, 1).to(tl.float64)
    return tl.sqrt(tl.sum(squares) / freedom) + eps


@triton.jit
def _squares_within(
    rewards, reward_stride, valid, valid_stride, group_offsets, group_stride, groups, episodes,
    HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of all squared deviations from the mean of the own group. A lane takes whole groups."""
    squares = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        begin = tl.load(group_offsets + group * group_stride, mask=group < groups, other=0)
        begin = tl.minimum(tl.maximum(begin, 0), episodes)
        end = tl.load(group_offsets + (group + 1) * group_stride, mask=group < groups, other=0)
        end = tl.minimum(tl.maximum(end, begin), episodes)
        longest = tl.max(end - begin)
        total = tl.zeros((BLOCK,), tl.float64)
        lowest = tl.full((BLOCK,), float("inf"), tl.float64)
        highest = tl.full((BLOCK,), float("-inf"), tl.float64)
        count = tl.zeros((BLOCK,), tl.int64)
        for i in range(0, longest):
            exact, counts, _bad, _valid = _load_rewards(
                rewards, reward_stride, valid, valid_stride, begin + i, begin + i < end, HAS_VALID
            )
            total += exact
            lowest = tl.minimum(lowest, tl.where(counts, exact, float("inf")))
            highest = tl.maximum(highest, tl.where(counts, exact, float("-inf")))
            count += counts.to(tl.int64)
        mean = total / tl.maximum(count, 1).to(tl.float64)
        for i in range(0, longest):
            exact, counts, _bad, _valid = _load_rewards(
                rewards, reward_stride, valid, valid_stride, begin + i, begin + i < end, HAS_VALID
            )
            deviation = tl.where(counts & (lowest < highest), exact - mean, 0.0)
            squares += deviation * deviation
    return tl.sum(squares)


@triton.jit
def _bad_offset(offsets, stride, k, last, limit, inside, COVERS: tl.constexpr):
    """Whether offset k is bad. Offsets must ascend within [0, limit], and reach both ends if COVERS."""
    value = tl.load(offsets + k * stride, mask=inside, other=0)
    previous = tl.load(offsets + (k - 1) * stride, mask=inside & (k > 0), other=0)
    bad = (value < previous) | (value < 0) | (value > limit)
    if COVERS:
        bad = bad | ((k == 0) & (value != 0)) | ((k == last) & (value != limit))
    return inside & bad


@triton.jit
def _clamped(offsets, stride, k, limit):
    return tl.minimum(tl.maximum(tl.load(offsets + k * stride), 0), limit)


@triton.jit
def _fill(out, begin, end, value, BLOCK: tl.constexpr):
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(out + at, tl.zeros((BLOCK,), out.dtype.element_ty) + value, mask=at < end)


@triton.jit(do_not_specialize=["episodes", "groups", "n_tokens"])
def group_advantage_kernel(
    rewards, valid, group_offsets, token_offsets, advantages, zero_variance, status,
    reward_stride, valid_stride, group_stride, token_stride, episodes, groups, n_tokens,
    METHOD: tl.constexpr, DDOF: tl.constexpr, EPS: tl.constexpr, HAS_VALID: tl.constexpr,
    TO_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Runs on a grid of 1 + groups + 2. The last two take episodes that bad offsets omit at either end."""
    part = tl.program_id(0).to(tl.int64) - 1
    episodes = episodes.to(tl.int64)
    groups = groups.to(tl.int64)
    n_tokens = n_tokens.to(tl.int64)
    if part < 0:
        _total, _lowest, _highest, _count, bad = _tally(
            rewards, reward_stride, valid, valid_stride, 0, episodes, HAS_VALID, BLOCK
        )
        for first in range(0, groups + 1, BLOCK):
            k = first + tl.arange(0, BLOCK)
            wrong = _bad_offset(group_offsets, group_stride, k, groups, episodes, k <= groups, True)
            bad += tl.sum(wrong.to(tl.int64))
        if TO_TOKENS:
            for first in range(0, episodes + 1, BLOCK):
                k = first + tl.arange(0, BLOCK)
                wrong = _bad_offset(token_offsets, token_stride, k, episodes, n_tokens, k <= episodes, False)
                bad += tl.sum(wrong.to(tl.int64))
        tl.store(status, tl.minimum(bad, 2147483647).to(tl.int32))
    else:
        nan = float("nan")
        poisoned = part >= groups
        if part < groups:
            begin = _clamped(group_offsets, group_stride, part, episodes)
            end = tl.maximum(_clamped(group_offsets, group_stride, part + 1, episodes), begin)
            poisoned = _bad_offset(group_offsets, group_stride, part, groups, episodes, True, True)
            poisoned |= _bad_offset(group_offsets, group_stride, part + 1, groups, episodes, True, True)
        elif part == groups:
            begin = episodes * 0
            end = _clamped(group_offsets, group_stride, 0, episodes)
        else:
            begin = _clamped(group_offsets, group_stride, groups, episodes)
            end = episodes
        total, lowest, highest, count, bad = _tally(
            rewards, reward_stride, valid, valid_stride, begin, end, HAS_VALID, BLOCK
        )
        poisoned |= bad > 0
        flat = (lowest < highest) == 0
        mean = total / tl.maximum(count, 1).to(tl.float64)
        scale = tl.full((), 1.0, tl.float64)
        if METHOD == _GRPO:
            scale = _scale(
                rewards, reward_stride, valid, valid_stride, begin, end, mean, count, EPS, DDOF, HAS_VALID,
                BLOCK,
            )  # fmt: skip
        if METHOD >= _BATCH_STD:
            batch_total, _batch_lowest, _batch_highest, batch_count, batch_bad = _tally(
                rewards, reward_stride, valid, valid_stride, 0, episodes, HAS_VALID, BLOCK
            )
            if METHOD == _BATCH_STD:
                batch_mean = batch_total / tl.maximum(batch_count, 1).to(tl.float64)
                scale = _scale(
                    rewards, reward_stride, valid, valid_stride, 0, episodes, batch_mean, batch_count, EPS,
                    DDOF, HAS_VALID, BLOCK,
                )  # fmt: skip
            else:
                squares = _squares_within(
                    rewards, reward_stride, valid, valid_stride, group_offsets, group_stride, groups,
                    episodes, HAS_VALID, BLOCK,
                )  # fmt: skip
                scale = tl.sqrt(squares / tl.maximum(batch_count - DDOF, 1).to(tl.float64) + EPS)
            scale = tl.where(batch_bad > 0, nan, scale)
        others = tl.maximum(count - 1, 1).to(tl.float64)
        if part < groups:
            tl.store(zero_variance + part, (flat & (poisoned == 0)).to(tl.int8))

        if TO_TOKENS:
            for i in range(begin, end):
                exact, _counts, _bad, is_valid = _load_rewards(
                    rewards, reward_stride, valid, valid_stride, i, i < end, HAS_VALID
                )
                value = _advantage(exact, is_valid, total, mean, others, scale, flat, poisoned, METHOD)
                wrong = _bad_offset(token_offsets, token_stride, i, episodes, n_tokens, i < end, False)
                wrong |= _bad_offset(token_offsets, token_stride, i + 1, episodes, n_tokens, i < end, False)
                first_token = _clamped(token_offsets, token_stride, i, n_tokens)
                last_token = _clamped(token_offsets, token_stride, i + 1, n_tokens)
                value = tl.where(wrong, nan, value).to(advantages.dtype.element_ty)
                _fill(advantages, first_token, last_token, value, BLOCK)
            if part >= groups:
                # The two extra programs also write the tokens that no episode covers.
                k = tl.where(part == groups, 0, episodes)
                edge = _clamped(token_offsets, token_stride, k, n_tokens)
                wrong = _bad_offset(token_offsets, token_stride, k, episodes, n_tokens, True, False)
                value = tl.where(wrong, nan, 0.0).to(advantages.dtype.element_ty)
                _fill(
                    advantages, tl.where(part == groups, 0, edge), tl.where(part == groups, edge, n_tokens),
                    value, BLOCK,
                )  # fmt: skip
        else:
            for first in range(begin, end, BLOCK):
                at = first + tl.arange(0, BLOCK)
                exact, _counts, _bad, is_valid = _load_rewards(
                    rewards, reward_stride, valid, valid_stride, at, at < end, HAS_VALID
                )
                value = _advantage(exact, is_valid, total, mean, others, scale, flat, poisoned, METHOD)
                tl.store(advantages + at, value.to(advantages.dtype.element_ty), mask=at < end)


@triton.jit
def _advantage(exact, is_valid, total, mean, others, scale, flat, poisoned, METHOD: tl.constexpr):
    if METHOD == _RLOO:
        value = exact - (total - exact) / others
    elif METHOD == _DR_GRPO:
        value = exact - mean
    else:
        value = (exact - mean) / scale
    value = tl.where(flat, 0.0, value)
    value = tl.where(poisoned, float("nan"), value)
    return tl.where(is_valid, value, 0.0)


def group_advantage_triton(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    valid: torch.Tensor | None,
    token_offsets: torch.Tensor | None,
    advantages: torch.Tensor,
    zero_variance: torch.Tensor,
    status: torch.Tensor,
    method: str,
    ddof: int,
    eps: float,
) -> None:
    """Fills `advantages`, `zero_variance` and `status`; `op.group_advantage` has checked the arguments."""
    groups = group_offsets.shape[0] - 1
    # An absent tensor is never read, but a pointer has to be passed.
    valid_bytes = rewards if valid is None else valid.view(torch.uint8)
    tokens = group_offsets if token_offsets is None else token_offsets
    # Triton launches on torch's current device.
    with torch.cuda.device_of(rewards):  # type: ignore[no-untyped-call]
        group_advantage_kernel[(1 + groups + 2,)](
            rewards,
            valid_bytes,
            group_offsets,
            tokens,
            advantages,
            zero_variance.view(torch.int8),
            status,
            rewards.stride(0),
            valid_bytes.stride(0),
            group_offsets.stride(0),
            tokens.stride(0),
            rewards.shape[0],
            groups,
            advantages.shape[0],
            METHOD=METHODS.index(method),
            DDOF=ddof,
            EPS=eps,
            HAS_VALID=valid is not None,
            TO_TOKENS=token_offsets is not None,
            BLOCK=BLOCK,
        )


def _entry(real: str, method: int, *, given: bool) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """A kernel to compile ahead of time, with or without validity and tokens."""
    constants = {
        "METHOD": method,
        "DDOF": 1,
        "EPS": 1e-6,
        "HAS_VALID": given,
        "TO_TOKENS": given,
        "BLOCK": BLOCK,
    }
    signature = {
        **dict.fromkeys(group_advantage_kernel.arg_names, "i32"),
        **dict.fromkeys(("rewards", "advantages"), f"*{real}"),
        **dict.fromkeys(("group_offsets", "token_offsets"), "*i64"),
        **{"valid": "*u8", "zero_variance": "*i8", "status": "*i32"},
        **dict.fromkeys(constants, "constexpr"),
    }
    return group_advantage_kernel, signature, constants


AOT: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    _entry(real, method, given=given)
    for real in ("fp32", "fp64")
    for method in range(len(METHODS))
    for given in ((False, True) if method == 0 else (True,))
]
"""Kernels that tests compile ahead of time, with argument types and constants."""
