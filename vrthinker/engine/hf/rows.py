"""The cache row of each session, and what runs on the rows: prefill, decode steps and eviction.

The sessions of one forward may have contexts of different lengths. Invariant: row r of the cache belongs to
`rows[r]`, and no row in between is unused (when a session closes, the last session moves to its row), so
that decoding reads a view of the cache and never a copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vrthinker.engine.hf.context import FramePiece
from vrthinker.engine.hf.features import FeatureCache
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import FrameFeatures, VisionLanguageModel
from vrthinker.engine.hf.session import SessionState
from vrthinker.kernels.evict.op import evict_cache
from vrthinker.kernels.evict.plan import plan_eviction
from vrthinker.visibility import MemoryMode


@dataclass
class _Prefill:
    """One session's share of a prefill.

    Attributes:
        row: The index of the session's cache row.
        start: The number of the session's tokens that the cache holds.
        ids: The token ids of the rest of its context, int64 `[new]`.
        positions: The positions of those tokens, int64 `[3, new]`.
        frames: For each frame among them, the index of its first placeholder, counted from `start` (negative
            if the cache holds a part of the frame), and its features.
    """

    row: int
    start: int
    ids: torch.Tensor
    positions: torch.Tensor
    frames: list[tuple[int, FrameFeatures]]

    def features_between(self, begin: int, end: int) -> list[FrameFeatures]:
        """The features whose placeholders lie in [begin, end), in order."""
        parts = []
        for first, features in self.frames:
            low, high = max(begin, first), min(end, first + len(features.embeds))
            if low < high:
                cut = slice(low - first, high - first)
                parts.append(FrameFeatures(features.embeds[cut], tuple(m[cut] for m in features.deepstack)))
        return parts


class SessionRows:
    """The key-value cache and the sessions that own its rows.

    Args:
        model: The model that runs the forwards.
        markup: The source of the ids of the image placeholder and of the padding token.
        features: The cache of encoded frames.
        most_rows: The most rows that are ever allocated.
        prefill_tokens: The most tokens of one context that a single forward takes.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        markup: Markup,
        features: FeatureCache,
        *,
        most_rows: int,
        prefill_tokens: int,
    ) -> None:
        self._model, self._markup, self._features = model, markup, features
        self._most_rows, self._prefill_tokens = most_rows, prefill_tokens
        self._pad = markup.newline[0]
        self.cache = model.new_cache()
        self.rows: list[SessionState] = []

    def enter(self, state: SessionState, capacity: int) -> int:
        """Gives a session a row (if it has none), and gives every row room for `capacity` positions."""
        count = len(self.rows) + (state.row is None)
        self.cache.reserve(count, capacity, most_rows=self._most_rows)
        if state.row is None:
            state.row = len(self.rows)
            self.rows.append(state)
        return state.row

    def leave(self, state: SessionState) -> None:
        """Frees a session's row; the last row moves into its place."""
        if state.row is None:
            return
        last = self.rows.pop()
        if last is not state:
            assert last.row is not None
            self.cache.copy_row(last.row, state.row, last.filled)
            last.row = state.row
            self.rows[state.row] = last
        state.row = None

    def new_frames(self, state: SessionState) -> list[tuple[int, FramePiece]]:
        """The frames that the cache does not fully hold yet, each with the index of its first placeholder."""
        frames = state.context.frames()
        return [(first, piece) for first, piece in frames if first + len(piece) - 2 > state.filled]

    def evict(self, states: Sequence[SessionState]) -> None:
        """Frees the rows in each session's `freed`: one call per memory mode, for the whole batch.

        The rows after them move forward in place (under `renumber`, their keys are also rotated to their new
        positions). The unused rows at the end are zeroed, so that no later forward reads what stood there.
        """
        for memory in ("evict", "renumber"):
            chosen = {state.row: state for state in states if state.context.memory == memory}
            if chosen:
                self._evict(chosen, memory)

    def _evict(self, chosen: Mapping[int | None, SessionState], memory: MemoryMode) -> None:
        spans: list[list[tuple[int, int]]] = [[] for _ in range(self.cache.rows)]
        freed_positions: list[list[int]] = [[] for _ in spans]
        lengths = [0] * len(spans)
        for row, state in chosen.items():
            assert row is not None
            spans[row] = [(rows.start, rows.end) for rows in state.freed]
            freed_positions[row] = [rows.n_positions for rows in state.freed]
            lengths[row] = state.filled
        plan = plan_eviction(spans, lengths, freed_positions=freed_positions)
        turned = self._model.inv_freq if memory == "renumber" else None
        # If memory ran out half-way through growing the cache, some layers have fewer rows than others.
        keys = [layer[: len(spans)] for layer in self.cache.keys]
        values = [layer[: len(spans)] for layer in self.cache.values]
        evict_cache(keys, values, plan, inv_freq=turned)
        for row, state in chosen.items():
            assert row is not None
            self.cache.clear_row(row, plan.new_lengths[row], state.filled)
            state.filled, state.freed = plan.new_lengths[row], []

    def prefill(self, states: Sequence[SessionState]) -> torch.Tensor:
        """Computes the missing tokens of each context.

        Returns:
            Logits `[batch, vocabulary]` after each context's last token.
        """
        longest = max(state.to_prefill for state in states)
        for state in states:
            room = state.writing.budget if state.writing is not None else 0
            # The padding of a short row is written after its own tokens, so the row needs room for it.
            self.enter(state, max(len(state.context) + room, state.filled + longest))
        batch = [self._share(state) for state in states]
        step = longest if len(batch) > 1 else self._prefill_tokens
        shape = (len(batch), self._model.hidden_size)
        last = torch.empty(shape, dtype=self._model.dtype, device=self._model.device)
        for begin in range(0, longest, step):
            hidden = self._prefill_chunk(batch, begin, min(longest, begin + step))
            for index, item in enumerate(batch):
                if begin < len(item.ids) <= begin + hidden.shape[1]:
                    last[index] = hidden[index, len(item.ids) - 1 - begin]
        for state, item in zip(states, batch, strict=True):
            state.filled = state.context.cached = item.start + len(item.ids)
            if state.writing is not None:
                state.writing.next_position = int(item.positions[0, -1]) + 1
        return self._model.logits(last)

    def decode(self) -> tuple[list[SessionState], torch.Tensor]:
        """Feeds every writing session its last token.

        Returns:
            The writing sessions, and logits `[sessions, vocabulary]` after those tokens.
        """
        used = 1 + max(index for index, state in enumerate(self.rows) if state.writing is not None)
        rows = self.rows[:used]
        starts = [state.filled for state in rows]
        # Sessions that wait between rounds stay in the batch. They get a dummy token, which is written past
        # their valid length and never read.
        ids = [s.writing.ids[-1] if s.writing is not None else self._pad for s in rows]
        positions = [s.writing.next_position if s.writing is not None else 0 for s in rows]
        device, read = self._model.device, max(starts) + 1
        self.cache.reserve(used, read, most_rows=self._most_rows)
        self.cache.plan(list(range(used)), starts, read)
        # A session that waits sees one key: whatever it attends to is thrown away.
        lengths = torch.tensor([s.filled + 1 if s.writing is not None else 1 for s in rows], device=device)
        mask = torch.arange(read, device=device) < lengths[:, None]
        hidden = self._model.run(
            torch.tensor(ids, device=device)[:, None],
            torch.tensor(positions, device=device).expand(3, -1)[..., None],
            mask[:, None, None],
            self.cache,
            row_lengths=lengths,
        )
        writing = [index for index, state in enumerate(rows) if state.writing is not None]
        for index in writing:
            state = rows[index]
            assert state.writing is not None
            state.filled += 1
            state.writing.next_position += 1
        return [rows[index] for index in writing], self._model.logits(hidden[writing, -1])

    def _share(self, state: SessionState) -> _Prefill:
        assert state.row is not None
        frames = self.new_frames(state)
        # The engine has loaded these frames before, so that a frame that does not decode fails only its
        # session.
        encoded = self._features.get([piece.segment for _, piece in frames], counted=False)
        return _Prefill(
            row=state.row,
            start=state.filled,
            ids=torch.from_numpy(state.context.token_ids()[state.filled :]),
            positions=torch.from_numpy(state.context.positions()[:, state.filled :].copy()),
            frames=[
                (first - state.filled, features) for (first, _), features in zip(frames, encoded, strict=True)
            ],
        )

    def _prefill_chunk(self, batch: list[_Prefill], begin: int, end: int) -> torch.Tensor:
        """Runs tokens [begin, end) of every share, right-padded.

        Returns:
            Hidden states `[batch, end - begin, hidden]`.
        """
        width, device = end - begin, self._model.device
        ids = torch.full((len(batch), width), self._pad)
        positions = torch.zeros(3, len(batch), width, dtype=torch.long)
        images = torch.zeros(len(batch), width, dtype=torch.bool)
        features: list[FrameFeatures] = []
        read = 1
        for index, item in enumerate(batch):
            part = item.ids[begin:end]
            ids[index, : len(part)] = part
            positions[:, index, : len(part)] = item.positions[:, begin:end]
            images[index, : len(part)] = part == self._markup.image_pad
            features += item.features_between(begin, end)
            read = max(read, item.start + begin + len(part))
        starts = [item.start + begin for item in batch]
        self.cache.plan([item.row for item in batch], starts, read)
        queries = torch.tensor(starts)[:, None] + torch.arange(width)
        mask = torch.arange(read)[None, None, :] <= queries[:, :, None]
        return self._model.run(
            ids.to(device),
            positions.to(device),
            mask[:, None].to(device),
            self.cache,
            images.to(device),
            features,
        )
