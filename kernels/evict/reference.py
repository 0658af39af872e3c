"""The specification of `evict`, in plain torch, one run of tokens after the other.

Gaps: what stays is moved, nothing else; the result is exact. Renumbering: a key that stood at position m and
now stands at m - s is turned by the angle -s * inv_freq, in fp32, pair (i, i + half) by frequency i, as the
Qwen models' rotary embedding pairs them. M-RoPE gives each frequency to the temporal, height or width
position, and a frame that leaves shifts all three by the same integer, so its sections do not matter here.

Source: method section 3 (`evict`, `renumber`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rotation_table(shifts: Sequence[int], inv_freq: torch.Tensor) -> torch.Tensor:
    """Cosine and sine for each shift and frequency.

    Args:
        shifts: By how much positions fall.
        inv_freq: `[half]`, inverse frequencies, on any device.

    Returns:
        float32 `[shifts, half, 2]` on the CPU. Angles are computed in double: a large shift times a
        frequency would lose them in fp32.
    """
    falls = torch.tensor(shifts, dtype=torch.float64, device="cpu")
    angles = -falls[:, None] * inv_freq.detach().cpu().double()[None]
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float().contiguous()


def rotate(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns keys.

    Args:
        rows: `[..., 2 * half]`.
        table: float32 `[half, 2]`: cosine and sine.

    Returns:
        The turned keys in their own dtype; computed in fp32, rounded once.
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
        tensor: Any shape with a batch and a token dimension.
        runs: int64 `[runs, 5]`: sequence, source, target, count, row of `rotations` (-1: none). Plain numbers
            let `torch.compile` see one graph.
        batch_dim: Which dimension is the batch.
        token_dim: Which dimension is the tokens.
        out_tokens: Size of the result's token dimension; what no run fills is 0.
        rotations: As `rotation_table` gives them; the last dimension is turned. None: nothing is.

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
    """The same in place: rows that no run moves to are left as they are."""
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
    """The same in a paged cache: row r of a sequence is slot r % block_size of its block r // block_size.

    Args:
        blocks: `[blocks, block_size, ...]`, changed in place.
        runs: As above, over the rows of each sequence.
        block_tables: int64 `[batch, blocks of a sequence]`.
        rotations: As above.
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
    """The gradient of `evict_reference`: what a token became gives it back, turned the other way.

    Args:
        gradient: Of the result.
        runs: As above.
        batch_dim: Which dimension is the batch.
        token_dim: Which dimension is the tokens.
        tokens: Tokens before the eviction; those that left get 0.
        rotations: As above.
    """
    rows = gradient.movedim((batch_dim, token_dim), (0, 1))
    out = rows.new_zeros((rows.shape[0], tokens, *rows.shape[2:]))
    for sequence, source, target, count, rotation in runs.tolist():
        kept = rows[sequence, target : target + count]
        if rotations is not None and rotation >= 0:
            kept = rotate(kept, rotations[rotation] * rotations.new_tensor([1.0, -1.0]))
        out[sequence, source : source + count] = kept
    return out.movedim((0, 1), (batch_dim, token_dim)).contiguous()
