"""The specification of `decode_attention`, in plain torch.

A sequence's query sees the first `length` keys of its row of the cache, and nothing behind them, whatever
stands there. A row of length 0 attends to nothing and gets zeros. Query heads share the key heads in order:
with 6 query and 2 key heads, the first three queries read the first key head (grouped-query attention).
"""

from __future__ import annotations

import torch


def decode_attention_reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax of scaled scores, times the values. Arguments and result as in `decode_attention`."""
    batch, heads, size = query.shape
    longest = int(lengths.max()) if batch else 0
    seen = torch.arange(longest, device=query.device) < lengths[:, None]
    unseen = ~seen[:, None, :, None]
    key, value = (cache[:, :, :longest].masked_fill(unseen, 0.0) for cache in (keys, values))
    grouped = query.reshape(batch, keys.shape[1], heads // keys.shape[1], size) * scale
    scores = (grouped @ key.transpose(2, 3)).masked_fill(~seen[:, None, None], float("-inf"))
    weights = scores.softmax(-1).masked_fill((lengths == 0)[:, None, None, None], 0.0)
    return (weights @ value).reshape(batch, heads, size)
