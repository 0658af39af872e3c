"""The out-of-place `evict` in Triton, with one launch for all tensors of one shape.

The in-place version exists only in C++ and CUDA: Triton cannot order one thread's loads before another's
stores, and its interpreter, which runs one block after the other, would hide the race.

A tensor is viewed as `[batch, outer_1, outer_2, tokens, row]` with contiguous rows. If it has no such view,
it is copied first. A table made on the host has the source row of each target row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from vrthinker.errors import InputError

_TILE_ROWS = 32


@triton.jit
def _gather_rows(
    sources,  # int64 [tensors]: addresses
    targets,
    source_rows,  # int64 [batch, out_tokens]; -1: zeros
    rotation_rows,  # int64 [batch, out_tokens]; -1: none
    rotations,  # fp32 [shifts, half, 2]
    outer_1,
    outer_2,
    out_tokens,
    source_batch,
    source_outer_1,
    source_outer_2,
    source_token,
    target_batch,
    target_outer_1,
    target_outer_2,
    target_token,
    row,  # elements of a row
    half,
    row_tiles,
    DTYPE: tl.constexpr,
    ROTATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    source = tl.load(sources + tl.program_id(1)).to(tl.pointer_type(DTYPE))
    target = tl.load(targets + tl.program_id(1)).to(tl.pointer_type(DTYPE))
    # Lanes and tiles of rows share an axis of the grid, the only one that may be longer than 65,535.
    tile = tl.program_id(0).to(tl.int64)
    lane = tile // row_tiles
    second = lane % outer_2
    first = lane // outer_2 % outer_1
    sequence = lane // outer_2 // outer_1
    source += sequence * source_batch + first * source_outer_1 + second * source_outer_2
    target += sequence * target_batch + first * target_outer_1 + second * target_outer_2

    out_row = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    inside = out_row < out_tokens
    from_row = tl.load(source_rows + sequence * out_tokens + out_row, mask=inside, other=-1)
    kept = from_row >= 0
    source += tl.where(kept, from_row, 0)[:, None] * source_token
    target += out_row[:, None] * target_token
    if ROTATE:
        turn = tl.load(rotation_rows + sequence * out_tokens + out_row, mask=inside, other=-1)
        turned = turn >= 0
        table = rotations + tl.where(turned, turn, 0)[:, None] * (half * 2)
        head = 2 * half
        for begin in range(0, row // 2, COLUMNS):
            pair = begin + tl.arange(0, COLUMNS)
            in_row = pair < row // 2
            frequency = pair % half
            low_at = pair // half * head + frequency
            used = kept[:, None] & in_row[None, :]
            low = tl.load(source + low_at[None, :], mask=used, other=0.0)
            high = tl.load(source + low_at[None, :] + half, mask=used, other=0.0)
            angle = table + frequency[None, :] * 2
            with_angle = turned[:, None] & in_row[None, :]
            cosine = tl.load(angle, mask=with_angle, other=1.0)
            sine = tl.load(angle + 1, mask=with_angle, other=0.0)
            low_fp32 = low.to(tl.float32)
            high_fp32 = high.to(tl.float32)
            new_low = tl.where(turned[:, None], (low_fp32 * cosine - high_fp32 * sine).to(DTYPE), low)
            new_high = tl.where(turned[:, None], (high_fp32 * cosine + low_fp32 * sine).to(DTYPE), high)
            written = inside[:, None] & in_row[None, :]
            tl.store(target + low_at[None, :], new_low, mask=written)
            tl.store(target + low_at[None, :] + half, new_high, mask=written)
    else:
        for begin in range(0, row, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            in_row = column < row
            values = tl.load(source + column[None, :], mask=kept[:, None] & in_row[None, :], other=0)
            tl.store(target + column[None, :], values, mask=inside[:, None] & in_row[None, :])


_NUMBERS = (
    "outer_1",
    "outer_2",
    "out_tokens",
    "source_batch",
    "source_outer_1",
    "source_outer_2",
    "source_token",
    "target_batch",
    "target_outer_1",
    "target_outer_2",
    "target_token",
    "row",
    "half",
    "row_tiles",
)
_SIGNATURE = {
    "sources": "*i64",
    "targets": "*i64",
    "source_rows": "*i64",
    "rotation_rows": "*i64",
    "rotations": "*fp32",
    **dict.fromkeys(_NUMBERS, "i64"),
    **dict.fromkeys(("DTYPE", "ROTATE", "ROWS", "COLUMNS"), "constexpr"),
}
AOT: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (_gather_rows, _SIGNATURE, {"DTYPE": dtype, "ROTATE": rotate, "ROWS": _TILE_ROWS, "COLUMNS": 64})
    for dtype, rotate in ((tl.bfloat16, True), (tl.float16, True), (tl.float32, True), (tl.int16, False))
]
"""Kernels that tests compile ahead of time, with argument types and constants."""

_TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_BITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


def evict_triton(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    batch_dims: Sequence[int],
    token_dims: Sequence[int],
    runs: torch.Tensor,
    rotations: torch.Tensor | None,
    n_rotated: int,
) -> None:
    """Fills new contiguous targets. `evict_reference` explains the arguments."""
    groups: dict[tuple[Any, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for place, (source, target) in enumerate(zip(sources, targets, strict=True)):
        rotated = rotations is not None and place < n_rotated
        dims = (batch_dims[place], token_dims[place])
        split = _split(target.shape, *dims)
        source_view, target_view = _as_lanes(source, *dims, split), _as_lanes(target, *dims, split)
        # Values that are only moved are moved as integers of their size.
        dtype = _TRITON_TYPES[source.dtype] if rotated else _BITS[source.element_size()]
        key = (
            source_view.shape,
            source_view.stride(),
            target_view.shape,
            target_view.stride(),
            dtype,
            rotated,
        )
        groups.setdefault(key, []).append((source_view, target_view))
    for (_, _, shape, _, dtype, rotated), views in groups.items():
        if 0 not in shape:
            _launch(views, runs, rotations if rotated else None, dtype)


def _launch(
    views: list[tuple[torch.Tensor, torch.Tensor]],
    runs: torch.Tensor,
    rotations: torch.Tensor | None,
    dtype: Any,
) -> None:
    source, target = views[0]
    device = source.device
    batch, outer_1, outer_2, out_tokens, row = target.shape
    source_rows = torch.full((batch, out_tokens), -1, dtype=torch.int64, device="cpu")
    rotation_rows = torch.full_like(source_rows, -1)
    for sequence, first, to, count, rotation in runs.tolist():
        source_rows[sequence, to : to + count] = torch.arange(first, first + count, device="cpu")
        rotation_rows[sequence, to : to + count] = rotation
    addresses = [torch.tensor([pair[side].data_ptr() for pair in views], device=device) for side in (0, 1)]
    table = source_rows.new_zeros(1, dtype=torch.float32) if rotations is None else rotations
    half = 1 if rotations is None else rotations.shape[1]
    row_tiles = triton.cdiv(out_tokens, _TILE_ROWS)
    grid = (batch * outer_1 * outer_2 * row_tiles, len(views))
    # Triton launches on torch's current device.
    with torch.cuda.device_of(source):  # type: ignore[no-untyped-call]
        _gather_rows[grid](
            *addresses,
            source_rows.to(device),
            rotation_rows.to(device),
            table.to(device),
            outer_1,
            outer_2,
            out_tokens,
            *source.stride()[:4],
            *target.stride()[:4],
            row,
            half,
            row_tiles,
            DTYPE=dtype,
            ROTATE=rotations is not None,
            ROWS=_TILE_ROWS,
            COLUMNS=min(128, triton.next_power_of_2(max(1, row if rotations is None else row // 2))),
        )


def _split(shape: torch.Size, batch_dim: int, token_dim: int) -> tuple[int, int, int]:
    """The (outer_1, outer_2, row) of contiguous tensors of a shape, with rows as long as possible.

    The split fits any number of tokens. (With only one token, dimensions before and behind it could be
    joined to one row. But the source has more tokens, and there they cannot.)

    Raises:
        InputError: The tensor needs more than two outer dimensions.
    """
    two_tokens = [2 if dim == token_dim else size for dim, size in enumerate(shape)]
    moved = torch.empty(two_tokens, device="meta").movedim((batch_dim, token_dim), (0, 1))
    rest = list(moved.shape[2:])
    for n_outer in range(min(2, len(rest)) + 1):
        outer_1, outer_2 = [*rest[:n_outer], 1, 1][:2]
        row = math.prod(rest[n_outer:])
        try:
            view = moved.view(*moved.shape[:2], outer_1, outer_2, row)
        except RuntimeError:
            continue
        if row <= 1 or view.stride(-1) == 1:
            return outer_1, outer_2, row
    raise InputError(
        f"evict: triton: got shape {list(shape)} with batch in dimension {batch_dim} and tokens in "
        f"{token_dim}, wanted at most two dimensions beside them that lie before the tokens"
    )


def _as_lanes(
    tensor: torch.Tensor, batch_dim: int, token_dim: int, split: tuple[int, int, int]
) -> torch.Tensor:
    """The view `[batch, outer_1, outer_2, tokens, row]`, of a copy if the tensor has no such view."""
    for source in (tensor, tensor.contiguous()):
        moved = source.movedim((batch_dim, token_dim), (0, 1))
        try:
            view = moved.view(*moved.shape[:2], *split)
        except RuntimeError:
            continue
        if split[2] <= 1 or view.stride(-1) == 1:
            return view.permute(0, 2, 3, 1, 4)
    raise AssertionError("a contiguous tensor splits as its target does")
