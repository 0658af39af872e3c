"""A preallocated key-value cache with one row per session.

The cache layers of transformers concatenate on every token and know one length for the whole batch. Here
every row has its own length, new keys and values are written in place after the row's last token, and
shortening a row costs nothing: entries past a row's length are stale. The mask hides them, and later tokens
overwrite them.

The cache itself does not store the lengths. Before each forward, `KVCache.plan` says where each row is
written and how much of it is read. Invariant: a forward reads only positions below `read_length`, and all of
those have been written since the last reallocation. Stale entries must be finite, because 0 times NaN is NaN.
For that reason storage starts as zeros, a row whose logits were not finite is cleared, and an eviction zeroes
the rows that it frees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_GROWTH = 1.5
_ROUND_TO = 128


@dataclass(frozen=True)
class ForwardPlan:
    """Where one forward writes and reads.

    Attributes:
        rows: Indices of the cache rows that take part, in batch order, int64 `[batch]`.
        starts: The position in its row at which each row's first new token is written, int64 `[batch]`.
        read_length: The number of positions of each row that attention reads (the mask hides some of them).
        contiguous: The first row, if `rows` is a run of consecutive rows, which are read as a view; else
            None.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    read_length: int
    contiguous: int | None


class KVCache:
    """Keys and values of all layers, `[rows, kv_heads, capacity, head_dim]` each.

    The cache is passed to transformers as `past_key_values`. The text model only calls its `update` and
    `get_seq_length`.
    """

    is_compileable = False

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.dtype, self.device = dtype, device
        self.keys = [self._new(0, 0) for _ in range(layers)]
        self.values = [self._new(0, 0) for _ in range(layers)]
        self._plan: ForwardPlan | None = None

    @property
    def rows(self) -> int:
        """The number of rows that every layer has."""
        return min(int(t.shape[0]) for t in (*self.keys, *self.values))

    @property
    def capacity(self) -> int:
        """The number of positions per row that every layer has."""
        return min(int(t.shape[2]) for t in (*self.keys, *self.values))

    @property
    def size_bytes(self) -> int:
        """The number of bytes allocated for the keys and values of all layers."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def reserve(self, rows: int, capacity: int, *, most_rows: int) -> None:
        """Makes room for at least `rows` rows of `capacity` positions, keeping what is stored.

        Layers grow one by one, so that the old and the new storage of only one layer exist at a time. If
        memory runs out half-way, what is stored is intact, and the next call continues with the remaining
        layers.
        """
        if rows <= self.rows and capacity <= self.capacity:
            return
        if rows > self.rows:
            rows = min(most_rows, max(rows, int(self.rows * _GROWTH)))
        if capacity > self.capacity:
            capacity = max(capacity, int(self.capacity * _GROWTH) if self.capacity else capacity)
            capacity = -(-capacity // _ROUND_TO) * _ROUND_TO
        rows, capacity = max(rows, self.rows), max(capacity, self.capacity)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if old.shape[0] >= rows and old.shape[2] >= capacity:
                    continue
                new = self._new(max(rows, old.shape[0]), max(capacity, old.shape[2]))
                new[: old.shape[0], :, : old.shape[2]] = old
                tensors[layer] = new

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of a row onto another row."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]

    def clear_row(self, row: int, start: int = 0, end: int | None = None) -> None:
        """Zeroes positions [start, end) of a row, which could hold NaN; a mask does not hide NaN."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[row, :, start:end].zero_()

    def plan(self, rows: list[int], starts: list[int], read_length: int) -> ForwardPlan:
        """Sets up the next forward."""
        run = rows == list(range(rows[0], rows[0] + len(rows)))
        self._plan = ForwardPlan(
            torch.tensor(rows, device=self.device),
            torch.tensor(starts, device=self.device),
            read_length,
            rows[0] if run else None,
        )
        return self._plan

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new keys and values `[batch, kv_heads, new, head_dim]` and returns what attention reads."""
        plan = self._plan
        assert plan is not None, "plan() comes before a forward"
        return (
            self._write(self.keys[layer_idx], keys, plan),
            self._write(self.values[layer_idx], values, plan),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0. transformers would derive positions from it, but we pass positions explicitly."""
        return self._plan.read_length if self._plan is not None else 0

    def _write(self, store: torch.Tensor, new: torch.Tensor, plan: ForwardPlan) -> torch.Tensor:
        count = new.shape[2]
        where = plan.starts[:, None] + torch.arange(count, device=self.device)
        store[plan.rows[:, None], :, where] = new.transpose(1, 2)
        if plan.contiguous is not None:
            return store[plan.contiguous : plan.contiguous + len(plan.rows), :, : plan.read_length]
        return store[:, :, : plan.read_length].index_select(0, plan.rows)

    def _new(self, rows: int, capacity: int) -> torch.Tensor:
        shape = (rows, self.kv_heads, capacity, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)
