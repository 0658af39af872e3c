"""Attention of the text model, with a kernel of our own for the step that decoding on a CPU consists of.

An engine decodes one token per session and step, over all that the session's cache holds. The attention that
transformers chooses reads every row as far as the longest one goes, and hides the rest by a mask. The op
`decode_attention` reads each row as far as it is filled. It runs where the forward says how long the rows are
(`row_lengths`), on a CPU in float32, for the head sizes that it is compiled for. Everything else is left to
transformers.
"""

from __future__ import annotations

from typing import Any

import torch

from vrthinker.kernels.decode_attention.op import FAST_HEAD_SIZES, decode_attention

_NAME = "vrthinker_text"


def use_text_attention(language_model: Any) -> None:
    """Makes a loaded text model attend with `text_attention`.

    Args:
        language_model: The text model of a Qwen2.5-VL or Qwen3-VL model.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_NAME, text_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    language_model.config._attn_implementation = _NAME


def text_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_lengths: torch.Tensor | None = None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers' attention interface defines it.

    Args:
        module: The attention layer.
        query: The queries, `[batch, heads, queries, head_dim]`.
        key: The keys, `[batch, kv_heads, keys, head_dim]`.
        value: The values, in the shape of `key`.
        attention_mask: What each query sees.
        row_lengths: If there is one query per row, how many of the row's first keys it sees, int64 `[batch]`.
            The mask has to say the same.
        scaling: The factor of the scores; 1 / sqrt(head_dim) by default.
        rest: What else the interface passes.

    Returns:
        The attended values, `[batch, queries, heads, head_dim]`, and None for the weights.
    """
    if row_lengths is not None and _is_for_the_op(query, key):
        return decode_attention(query[:, :, 0], key, value, row_lengths, scale=scaling)[:, None], None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **rest
    )
    return result


def _is_for_the_op(query: torch.Tensor, key: torch.Tensor) -> bool:
    exact = query.dtype == key.dtype == torch.float32
    fits = query.shape[2] == 1 and query.shape[3] in FAST_HEAD_SIZES
    return query.device.type == "cpu" and exact and fits
