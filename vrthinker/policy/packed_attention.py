"""Attention over a pack: every token sees its ancestors and itself, except those expired by its round.

There are three ways to compute it, with the same result. `dense_mask` defines it.

- `segments`, on a CPU: a segment's queries attend to their visible ancestors (without a mask) and to their
  own segment (causally), and the two results are combined by their log-sum-exps. Scores outside the mask are
  not computed, and no mask is built. A single autograd function contains the loop, so that gradients of
  shared keys are added in place, without a full-size tensor per slice. In the backward pass every part uses
  the combined log-sum-exp instead of its own. This gives exactly the gradient of attention over all keys at
  once.
- `flex`, on a GPU: FlexAttention, compiled once with dynamic shapes. The block mask reads four small tables.
- `dense`, anywhere: a dense mask, which tests compare the others with.

transformers calls this code through its attention interface. The pack's plan is passed as a keyword of the
text model's forward, so that one model serves the engine, padded and packed forwards.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vrthinker.engine.hf.text_attention import text_attention
from vrthinker.policy.packing import Pack

Implementation = Literal["auto", "segments", "flex", "dense"]

_NAME = "vrthinker_packed"
_DENSE_TOKENS = 4096


def use_packed_attention(language_model: Any) -> None:
    """Makes a Qwen2.5-VL or Qwen3-VL text model follow a `packed` plan if its forward is given one.

    Without a plan the model's attention is unchanged. Calling this function again has no effect.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if language_model.config._attn_implementation == _NAME:
        return
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    language_model.config._attn_implementation = _NAME


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedAttention | None = None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if packed is None:
        return text_attention(module, query, key, value, attention_mask, scaling=scaling, **rest)
    return packed(query, key, value, scaling).transpose(1, 2), None


@dataclass(frozen=True)
class _Part:
    """One segment's queries, and the ranges of ancestor keys that all of them see."""

    start: int
    end: int
    ranges: tuple[tuple[int, int], ...]


class PackedAttention:
    """The plan of one pack's attention, shared by all layers.

    Args:
        pack: The pack to attend over.
        device: The device that attention runs on.
        implementation: The implementation. `auto` is `flex` on a GPU and `segments` on a CPU.

    Raises:
        ValueError: `dense` is asked for above 4096 tokens, or an implementation cannot run on the device.
    """

    def __init__(self, pack: Pack, device: torch.device, implementation: Implementation = "auto") -> None:
        if implementation == "auto":
            implementation = {"cuda": "flex", "cpu": "segments"}.get(device.type, "dense")  # type: ignore[assignment]
        if implementation == "dense" and pack.n_tokens > _DENSE_TOKENS:
            raise ValueError(f"dense: got {pack.n_tokens} tokens, allowed: up to {_DENSE_TOKENS}")
        if implementation == "segments" and device.type != "cpu":
            raise ValueError(f"segments: got a tensor on {device}, allowed: cpu")
        self.implementation = implementation
        self.parts = tuple(
            _Part(segment.start, segment.end, tuple(pack.visible(index)))
            for index, segment in enumerate(pack.segments)
        )
        self._mask: Any = None
        if implementation == "dense":
            self._mask = dense_mask(pack).to(device)
        elif implementation == "flex":
            self._mask = block_mask(pack, device)

    @property
    def n_scores(self) -> int:
        """The number of query-key pairs of one head that the mask lets through."""
        total = 0
        for part in self.parts:
            length = part.end - part.start
            total += length * sum(end - start for start, end in part.ranges) + length * (length + 1) // 2
        return total

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None = None
    ) -> torch.Tensor:
        """Computes attention.

        Args:
            query: The queries, `[1, heads, tokens, head_dim]`.
            key: The keys, `[1, kv_heads, tokens, head_dim]`.
            value: The values, in the shape of `key`.
            scaling: The factor of the scores; 1 / sqrt(head_dim) by default.

        Returns:
            The attended values, `[1, heads, tokens, head_dim]`.
        """
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # Under autocast the rotary embedding returns float32 queries and keys, but values are half precision.
        key, value = key.to(query.dtype), value.to(query.dtype)
        if self.implementation == "segments":
            out: torch.Tensor = _Segments.apply(query, key, value, self.parts, scale)  # type: ignore[no-untyped-call]
            return out
        if self.implementation == "flex":
            return _flex(query, key, value, self._mask, scale)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=self._mask, scale=scale, enable_gqa=True
        )


def dense_mask(pack: Pack) -> torch.Tensor:
    """Which key (column) each query (row) sees, bool `[tokens, tokens]`. This mask defines the attention."""
    segment = torch.from_numpy(pack.segment_of).long()
    begin = torch.tensor([s.start for s in pack.segments])[segment]
    end = torch.tensor([s.subtree_end for s in pack.segments])[segment]
    place = torch.arange(pack.n_tokens)
    descends = (begin[None, :] <= place[:, None]) & (place[:, None] < end[None, :])
    live = torch.from_numpy(pack.rounds)[:, None] < torch.from_numpy(pack.expires)[None, :]
    return descends & live & (place[None, :] <= place[:, None])


# Segments


class _Segments(torch.autograd.Function):
    """The `segments` implementation. Query heads that share a key head form one batch; no key is repeated."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: tuple[_Part, ...],
        scale: float,
    ) -> torch.Tensor:
        heads, kv_heads = query.shape[1], key.shape[1]
        grouped = query[0].reshape(kv_heads, heads // kv_heads, *query.shape[2:])
        out = torch.empty_like(grouped)
        sums = grouped.new_empty(grouped.shape[:-1], dtype=_sum_dtype(query.dtype))
        for part in parts:
            span = slice(part.start, part.end)
            queries = grouped[:, :, span]
            itself, itself_sum = _flash(queries, key[0, :, span], value[0, :, span], True, scale)
            if part.ranges:
                keys, values = _gather(key[0], part.ranges), _gather(value[0], part.ranges)
                ancestors, ancestors_sum = _flash(queries, keys, values, False, scale)
                total = torch.logaddexp(itself_sum, ancestors_sum)
                shares = (itself_sum - total).exp()[..., None], (ancestors_sum - total).exp()[..., None]
                itself = shares[0] * itself + shares[1] * ancestors
                itself_sum = total
            out[:, :, span], sums[:, :, span] = itself, itself_sum
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.parts, ctx.scale = parts, scale
        return out.flatten(0, 1)[None]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        heads, kv_heads = query.shape[1], key.shape[1]
        grouped = query[0].reshape(kv_heads, heads // kv_heads, *query.shape[2:])
        grad = grads[0][0].reshape(grouped.shape)
        grad_query = torch.empty_like(grouped)
        # Keys that many segments see sum many small gradients, which needs more than half precision.
        exact = _sum_dtype(key.dtype)
        grad_key, grad_value = torch.zeros_like(key[0], dtype=exact), torch.zeros_like(value[0], dtype=exact)
        for part in ctx.parts:
            span = slice(part.start, part.end)
            incoming = grad[:, :, span], grouped[:, :, span]
            saved = out[:, :, span], sums[:, :, span]
            of_query, of_key, of_value = _flash_backward(
                *incoming, key[0, :, span], value[0, :, span], *saved, True, ctx.scale
            )
            grad_query[:, :, span] = of_query
            grad_key[:, span] += of_key
            grad_value[:, span] += of_value
            if part.ranges:
                keys, values = _gather(key[0], part.ranges), _gather(value[0], part.ranges)
                of_query, of_key, of_value = _flash_backward(
                    *incoming, keys, values, *saved, False, ctx.scale
                )
                grad_query[:, :, span] += of_query
                _scatter_add(grad_key, of_key, part.ranges)
                _scatter_add(grad_value, of_value, part.ranges)
        of_keys, of_values = grad_key.to(key.dtype)[None], grad_value.to(value.dtype)[None]
        return grad_query.flatten(0, 1)[None], of_keys, of_values, None, None


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _expanded(keys: torch.Tensor, groups: int) -> torch.Tensor:
    """`[kv_heads, tokens, head_dim]` as `[kv_heads, groups, tokens, head_dim]`, without a copy."""
    return keys[:, None].expand(-1, groups, -1, -1)


def _flash(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `[kv_heads, groups, queries, head_dim]`, and log-sum-exps `[kv_heads, groups, queries]`."""
    groups = queries.shape[1]
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, _expanded(keys, groups), _expanded(values, groups), 0.0, causal, scale=scale
    )
    return out, sums


def _flash_backward(
    grad: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = queries.shape[1]
    of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad,
        queries,
        _expanded(keys, groups),
        _expanded(values, groups),
        out,
        sums,
        0.0,
        causal,
        scale=scale,
    )
    return of_query, of_key.sum(1), of_value.sum(1)


def _gather(keys: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Selects rows of `[kv_heads, tokens, head_dim]`. The result is a view if there is only one range."""
    if len(ranges) == 1:
        return keys[:, ranges[0][0] : ranges[0][1]]
    return torch.cat([keys[:, start:end] for start, end in ranges], dim=1)


def _scatter_add(total: torch.Tensor, part: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> None:
    offset = 0
    for start, end in ranges:
        total[:, start:end] += part[:, offset : offset + end - start]
        offset += end - start


# FlexAttention


def block_mask(pack: Pack, device: torch.device) -> Any:
    """The pack's mask for FlexAttention, which skips blocks in which no query sees a key."""
    from torch.nn.attention.flex_attention import create_block_mask

    segment = torch.from_numpy(pack.segment_of).long()
    begin = torch.tensor([s.start for s in pack.segments], dtype=torch.int32)[segment].to(device)
    end = torch.tensor([s.subtree_end for s in pack.segments], dtype=torch.int32)[segment].to(device)
    rounds, expires = torch.from_numpy(pack.rounds).to(device), torch.from_numpy(pack.expires).to(device)

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        del batch, head
        descends = (begin[key] <= query) & (query < end[key])
        return descends & (key <= query) & (rounds[query] < expires[key])

    tokens = pack.n_tokens
    return create_block_mask(sees, None, None, tokens, tokens, device=device, _compile=device.type == "cuda")


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Shapes are dynamic because packs differ in length, and compiling for each would take seconds.
    return torch.compile(flex_attention, dynamic=True)


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float
) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    run = _compiled_flex() if query.is_cuda else flex_attention
    out: torch.Tensor = run(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    return out
