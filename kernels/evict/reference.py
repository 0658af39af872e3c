"""The specification of `evict` in plain torch, which moves one run of rows after the other.

With gaps, rows are only moved, so the result is exact. With renumbering, a key whose position falls from m to
m - s is rotated by the angle -s * inv_freq, in fp32. Frequency i rotates the pair (i, i + half), as in the
Qwen models' rotary embedding. M-RoPE gives each frequency to the temporal, height or width position. A
removed frame shifts all three by the same integer, so it does not matter here which frequency has which.

Source: method section 3 (`evict`, `renumber`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rotation_table(shifts: Sequence[int], inv_freq: torch.Tensor) -> torch.Tensor:
    """The cosine and sine for each shift and frequency.

    Args:
        shifts: The numbers by which positions fall.
        inv_freq: The inverse frequencies, `[half]`, on any device.

    Returns:
        The table, float32 `[shifts, half, 2]` on the CPU. Angles are computed in double precision: in fp32 a
        large shift times a frequency would be too inexact.
    """
    falls = torch.tensor(shifts, dtype=torch.float64, device="cpu")
    angles = -falls[:, None] * inv_freq.detach().cpu().double()[None]
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float().contiguous()


def rotate(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotates keys.

    Args:
        rows: The keys, `[..., 2 * half]`.
        table: The cosines and sines, float32 `[half, 2]`.

    Returns:
        The rotated keys in their own dtype, computed in fp32 and rounded once.
    """
    low, high = rows.float().chunk(2, dim=-1)
    cosine, sine = table.to(rows.device).unbind(dim=-1)
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1).to(rows.dtype)


def evict_reference(
    tensor: torch.Tensor,
    runs: torch.Tensor | Sequence[Sequence[int]],
    *,
    batch_dim: int,
    token_dim: int,
    out_tokens: int,
    rotations: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gathers the runs into a new tensor.

    Args:
        tensor: A tensor of any shape with a batch and a token dimension.
        runs: For each run: sequence, source, target, count and row of `rotations` (-1: none), int64 `[runs,
            5]`. With plain numbers `torch.compile` sees one graph.
        batch_dim: The index of the batch dimension.
        token_dim: The index of the token dimension.
        out_tokens: The size of the result's token dimension. Tokens that no run fills are 0.
        rotations: The cosines and sines (`rotation_table`) that the last dimension is rotated by. None
            rotates nothing.

    Returns:
        The result, contiguous.
    """
    rows = tensor.movedim((batch_dim, token_dim), (0, 1))
    out = rows.new_zeros((rows.shape[0], out_tokens, *rows.shape[2:]))
    for sequence, source, target, count, rotation in (
        runs.tolist() if isinstance(runs, torch.Tensor) else runs
    ):
        kept = rows[sequence, source : source + count]
        if rotations is not None and rotation >= 0:
            kept = rotate(kept, rotations[rotation])
        out[sequence, target : target + count] = kept
    return out.movedim((0, 1), (batch_dim, token_dim)).contiguous()


def evict_reference_(
    tensor: torch.Tensor,
    runs: torch.Tensor,
    *,
    batch_dim: int,
    token_dim: int,
    rotations: torch.Tensor | None = None,
) -> None:
    """Does the same in place. Rows that no run is moved to keep their content."""
    rows = tensor.movedim((batch_dim, token_dim), (0, 1))
    for sequence, source, target, count, rotation in runs.tolist():
        kept = rows[sequence, source : source + count].clone()
        if rotations is not None and rotation >= 0:
            kept = rotate(kept, rotations[rotation])
        rows[sequence, target : target + count] = kept


def evict_paged_reference_(
    blocks: torch.Tensor,
    runs: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    rotations: torch.Tensor | None = None,
) -> None:
    """Does the same in a paged cache: a sequence's row r is slot r % block_size of its block r // block_size.

    Args:
        blocks: The cache, `[blocks, block_size, ...]`, changed in place.
        runs: The runs over the rows of each sequence (see `evict_reference`).
        block_tables: The blocks of each sequence, int64 `[batch, blocks of a sequence]`.
        rotations: The cosines and sines that keys are rotated by, or None.
    """
    block_size = blocks.shape[1]
    for sequence, source, target, count, rotation in runs.tolist():
        table = block_tables[sequence].to(blocks.device)

        def slots(first: int, count: int = count, table: torch.Tensor = table) -> tuple[torch.Tensor, ...]:
            rows = torch.arange(first, first + count, device=blocks.device)
            return table[rows // block_size], rows % block_size

        kept = blocks[slots(source)]
        if rotations is not None and rotation >= 0:
            kept = rotate(kept, rotations[rotation])
        blocks[slots(target)] = kept


def evict_backward_reference(
    gradient: torch.Tensor,
    runs: torch.Tensor,
    *,
    batch_dim: int,
    token_dim: int,
    tokens: int,
    rotations: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of `evict_reference`: the gradient of each moved row, rotated back.

    Args:
        gradient: The gradient of the result.
        runs: The runs (see `evict_reference`).
        batch_dim: The index of the batch dimension.
        token_dim: The index of the token dimension.
        tokens: The number of tokens before the eviction. Removed tokens get 0.
        rotations: The cosines and sines that keys were rotated by, or None.
    """
    rows = gradient.movedim((batch_dim, token_dim), (0, 1))
    out = rows.new_zeros((rows.shape[0], tokens, *rows.shape[2:]))
    for sequence, source, target, count, rotation in runs.tolist():
        kept = rows[sequence, target : target + count]
        if rotations is not None and rotation >= 0:
            kept = rotate(kept, rotations[rotation] * rotations.new_tensor([1.0, -1.0]))
        out[sequence, source : source + count] = kept
    return out.movedim((0, 1), (batch_dim, token_dim)).contiguous()
