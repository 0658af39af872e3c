"""Attention of the vision tower over many small pictures, in one call per size instead of one per picture.

transformers' plain path attends to every picture (or window) of a batch in a Python loop; at the sizes of
frames, the loop costs more than the arithmetic. An attention function that asks for the lengths gets them in
one call; this one stacks pictures of equal length into a batch. The same sums, picture by picture.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# transformers hands the lengths to implementations whose name says flash, and loops over pictures for others.
_NAME = "vrthinker_flash_frames"


def use_batched_attention(visual: Any) -> None:
    """Lets a loaded vision tower (Qwen2.5-VL, Qwen3-VL) attend in batches.

    Args:
        visual: The tower; its attention becomes `frame_attention`.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, frame_attention)
    visual.config._attn_implementation = _NAME


def frame_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Full attention within each stretch of a packed sequence.

    Args:
        module: Unused; part of the interface.
        query: `[1, heads, tokens, head_dim]`; `key` and `value` likewise.
        key: See `query`.
        value: See `query`.
        attention_mask: None; stretches are given by their bounds.
        cu_seq_lens_q: int `[stretches + 1]`, where each one begins, and the end.
        scaling: Of the scores.
        dropout: Share of attention weights dropped.

    Returns:
        `[1, tokens, heads, head_dim]`, and None for the weights.
    """
    bounds = cu_seq_lens_q.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    packed = torch.stack([query[0], key[0], value[0]]).transpose(1, 2)  # [3, tokens, heads, head_dim]
    if len(set(lengths)) == 1:
        return _attend(packed, lengths[0], scaling, dropout)[None], None
    parts = torch.split(packed, lengths, dim=1)
    pieces: list[torch.Tensor] = [packed[0, :0]] * len(lengths)
    for length in dict.fromkeys(lengths):
        chosen = [i for i, other in enumerate(lengths) if other == length]
        attended = _attend(torch.cat([parts[i] for i in chosen], dim=1), length, scaling, dropout)
        for place, piece in zip(chosen, torch.split(attended, length), strict=True):
            pieces[place] = piece
    return torch.cat(pieces)[None], None


def _attend(packed: torch.Tensor, length: int, scaling: float | None, dropout: float) -> torch.Tensor:
    """Attention within stretches of one length, `[3, tokens, heads, head_dim]`."""
    tokens, heads, size = packed.shape[1:]
    if not length:
        return packed[0]
    query, key, value = packed.view(3, tokens // length, length, heads, size).transpose(2, 3)
    attended = scaled_dot_product_attention(query, key, value, scale=scaling, dropout_p=dropout)
    return attended.transpose(1, 2).reshape(tokens, heads, size)
