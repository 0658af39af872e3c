"""Attention of the vision tower over many small pictures, with one call per size instead of one per picture.

By default, transformers attends to every picture (or window) of a batch in a Python loop, which for pictures
of the size of our frames takes longer than the arithmetic. transformers calls an attention function once for
all pictures if the function's signature accepts their lengths. Ours does, and stacks pictures of equal length
into a batch. The results for each picture are the same.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# transformers passes the lengths to implementations with "flash" in their name, and loops for all others.
_NAME = "vrthinker_flash_frames"


def use_batched_attention(visual: Any) -> None:
    """Makes a loaded vision tower attend in batches, with `frame_attention`.

    Args:
        visual: The vision tower of a Qwen2.5-VL or Qwen3-VL model.
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
    """Full attention within each picture (or window) of a packed sequence.

    Args:
        module: Unused; part of the interface.
        query: The queries, `[1, heads, tokens, head_dim]`.
        key: The keys, in the shape of `query`.
        value: The values, in the shape of `query`.
        attention_mask: None; `cu_seq_lens_q` gives the bounds.
        cu_seq_lens_q: The index of each picture's first token, and the end, int `[pictures + 1]`.
        scaling: The factor of the scores.
        dropout: The share of attention weights that is dropped.

    Returns:
        The attended values, `[1, tokens, heads, head_dim]`, and None for the weights.
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
    """Attention within pictures of one length; `packed` is `[3, tokens, heads, head_dim]`."""
    tokens, heads, size = packed.shape[1:]
    if not length:
        return packed[0]
    query, key, value = packed.view(3, tokens // length, length, heads, size).transpose(2, 3)
    attended = scaled_dot_product_attention(query, key, value, scale=scaling, dropout_p=dropout)
    return attended.transpose(1, 2).reshape(tokens, heads, size)
