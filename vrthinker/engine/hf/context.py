"""A session's context as a list of pieces: stored token ids, and frames that can expire.

Invariant: the ids of the context are the concatenation of the pieces' ids, and nothing but expiry
(which removes whole frame pieces) and appending ever changes them. What the cache holds is always a
prefix of the context: its first `cached` tokens. Positions follow the memory mode: they are contiguous, or
(under `evict`) every token keeps the position it first got, with gaps where frames expired.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vrthinker.engine.base import FrameSegment, Message
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.positions import Positions, mrope_positions
from vrthinker.visibility import MemoryMode, ShownFrame


@dataclass(frozen=True)
class TokenPiece:
    """Token ids that never expire."""

    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_positions(self) -> int:
        """The number of positions that the piece takes."""
        return len(self.ids)

    @property
    def parts(self) -> list[int | tuple[int, int]]:
        """The parts of the piece, for `mrope_positions`."""
        return [len(self.ids)]


@dataclass(frozen=True)
class FramePiece:
    """`<|vision_start|>`, the placeholders, `<|vision_end|>`: what expiry removes.

    Attributes:
        segment: The frame.
        grid: (height, width) in merged patches.
    """

    segment: FrameSegment
    grid: tuple[int, int]

    def __len__(self) -> int:
        return self.grid[0] * self.grid[1] + 2

    @property
    def n_positions(self) -> int:
        """The number of positions that the piece takes, which is smaller than its number of tokens."""
        return max(self.grid) + 2

    @property
    def parts(self) -> list[int | tuple[int, int]]:
        """The parts of the piece, for `mrope_positions`."""
        return [1, self.grid, 1]


Piece = TokenPiece | FramePiece


@dataclass(frozen=True)
class FreedRows:
    """A range of consecutive rows of the cache that expiry frees.

    Attributes:
        start: The index of the first row.
        end: The index after the last row.
        n_positions: The number of positions that the rows' tokens took.
    """

    start: int
    end: int
    n_positions: int


@dataclass
class Context:
    """The tokens and frames that one session's next round is written from.

    Args:
        markup: The token ids of turn and frame markers, and the encoding of text.
        frame_factor: The (height, width) of one merged patch in pixels.
        memory: The memory mode, which decides how expired frames are removed.
        pieces: The pieces of the context, in order.
        starts: The position at which each piece starts.
        next_position: The position of the next token.
        cached: The number of the context's first tokens that the cache holds.
    """

    markup: Markup
    frame_factor: tuple[int, int]
    memory: MemoryMode = "rerender"
    pieces: list[Piece] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    next_position: int = 0
    cached: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def clone(self) -> Context:
        """An independent context over the same pieces, with nothing cached."""
        return Context(
            self.markup,
            self.frame_factor,
            self.memory,
            list(self.pieces),
            list(self.starts),
            self.next_position,
        )

    def append_messages(self, messages: Sequence[Message]) -> None:
        """Adds turns and the assistant's opening after them."""
        ids: list[int] = []
        for message in messages:
            ids += self.markup.turn_opening(message.role)
            for segment in message.segments:
                if isinstance(segment, FrameSegment):
                    self._append_ids(ids)
                    ids = []
                    height, width = segment.size
                    grid = (height // self.frame_factor[0], width // self.frame_factor[1])
                    self._append(FramePiece(segment, grid))
                else:
                    ids += self.markup.encode(segment.text)
            ids += self.markup.turn_closing
        self._append_ids([*ids, *self.markup.generation_prompt])

    def append_round(self, ids: Sequence[int]) -> None:
        """Adds the token ids that the model wrote."""
        self._append_ids(ids)

    def close_turn(self, last_id: int | None) -> None:
        """Ends the assistant's turn before new messages."""
        closed = last_id == self.markup.turn_end
        self._append_ids(self.markup.newline if closed else self.markup.turn_closing)

    def expire(self, expired: Iterable[ShownFrame]) -> list[FreedRows]:
        """Removes expired frames from the context.

        Under `rerender` the cache keeps what comes before the first removed frame. Otherwise it keeps
        everything else, and the caller has to free the returned rows.

        Returns:
            The rows of the cache to free, in order, with adjacent ranges joined. Always empty under
            `rerender`.

        Raises:
            ValueError: An expired frame is not in the context.
        """
        gone = set(expired)
        missing = gone - {p.segment.shown for p in self.pieces if isinstance(p, FramePiece)}
        if missing:
            shown = ", ".join(map(str, sorted(missing, key=lambda showing: showing.order)))
            raise ValueError(f"expired: {shown} are not in the context")
        if not gone:
            return []
        kept, starts = [], []
        freed: list[FreedRows] = []
        offset = 0
        for piece, start in zip(self.pieces, self.starts, strict=True):
            end = offset + len(piece)
            if isinstance(piece, FramePiece) and piece.segment.shown in gone:
                freed.append(FreedRows(offset, end, piece.n_positions))
            else:
                kept.append(piece)
                starts.append(start)
            offset = end
        self.pieces, self.starts = kept, starts
        if self.memory != "evict":
            self._close_up()
        if self.memory == "rerender":
            self.cached = min(self.cached, freed[0].start)
            return []
        assert freed[-1].end <= self.cached, "the cache holds whole rounds"
        self.cached -= sum(rows.end - rows.start for rows in freed)
        return _joined(freed)

    def token_ids(self) -> np.ndarray:
        """The ids of the whole context, int64 `[tokens]`."""
        ids: list[int] = []
        for piece in self.pieces:
            if isinstance(piece, TokenPiece):
                ids += piece.ids
            else:
                pads = [self.markup.image_pad] * (len(piece) - 2)
                ids += [self.markup.vision_start, *pads, self.markup.vision_end]
        return np.asarray(ids, dtype=np.int64)

    def positions(self) -> Positions:
        """The M-RoPE positions of the whole context, int64 `[3, tokens]`."""
        columns = [np.empty((3, 0), np.int64)]
        parts: list[int | tuple[int, int]] = []
        begin = position = 0
        for piece, start in zip(self.pieces, self.starts, strict=True):
            if start != position and parts:
                columns.append(mrope_positions(parts, begin))
                parts = []
            if not parts:
                begin = position = start
            parts += piece.parts
            position += piece.n_positions
        if parts:
            columns.append(mrope_positions(parts, begin))
        return np.concatenate(columns, axis=1)

    def frames(self) -> Iterator[tuple[int, FramePiece]]:
        """Each live frame with the index of its first placeholder token."""
        offset = 0
        for piece in self.pieces:
            if isinstance(piece, FramePiece):
                yield offset + 1, piece
            offset += len(piece)

    def _append_ids(self, ids: Sequence[int]) -> None:
        if ids:
            self._append(TokenPiece(tuple(ids)))

    def _append(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.starts.append(self.next_position)
        self.next_position += piece.n_positions

    def _close_up(self) -> None:
        """Gives all pieces contiguous positions, from 0."""
        self.next_position = 0
        for index, piece in enumerate(self.pieces):
            self.starts[index] = self.next_position
            self.next_position += piece.n_positions


def _joined(freed: list[FreedRows]) -> list[FreedRows]:
    """The same rows, with adjacent ranges joined into one."""
    joined: list[FreedRows] = []
    for rows in freed:
        if joined and joined[-1].end == rows.start:
            last = joined.pop()
            rows = FreedRows(last.start, rows.end, last.n_positions + rows.n_positions)
        joined.append(rows)
    return joined
