"""A session's context as pieces: stored token ids and frames that can leave.

Invariant: the ids of the context are the concatenation of the pieces' ids, and nothing but expiry
(which removes whole frame pieces) and appending ever changes them. What the cache holds is always a
prefix of the context: `cached` tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vrthinker.engine.base import FrameSegment, Message
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.positions import Positions, mrope_positions
from vrthinker.visibility import ShownFrame


@dataclass(frozen=True)
class TokenPiece:
    """Token ids that stay."""

    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


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


Piece = TokenPiece | FramePiece


@dataclass
class Context:
    """What one session's next round is written from.

    Args:
        markup: Markers and encoding.
        frame_factor: (height, width) pixels of one merged patch.
    """

    markup: Markup
    frame_factor: tuple[int, int]
    pieces: list[Piece] = field(default_factory=list)
    cached: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def clone(self) -> Context:
        """An independent context over the same pieces, with nothing cached."""
        return Context(self.markup, self.frame_factor, list(self.pieces))

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
                    self.pieces.append(FramePiece(segment, grid))
                else:
                    ids += self.markup.encode(segment.text)
            ids += self.markup.turn_closing
        self._append_ids([*ids, *self.markup.generation_prompt])

    def append_round(self, ids: Sequence[int]) -> None:
        """Adds what the model wrote, closing its turn if it did not."""
        self._append_ids(ids)

    def close_turn(self, last_id: int | None) -> None:
        """Ends the assistant's turn before new messages."""
        closed = last_id == self.markup.turn_end
        self._append_ids(self.markup.newline if closed else self.markup.turn_closing)

    def expire(self, expired: Iterable[ShownFrame]) -> None:
        """Removes frames; the cache keeps what comes before the first of them.

        Raises:
            ValueError: One of them is not in the context.
        """
        gone = set(expired)
        missing = gone - {p.segment.shown for p in self.pieces if isinstance(p, FramePiece)}
        if missing:
            raise ValueError(f"expired: {sorted(missing)} are not in the context")
        kept: list[Piece] = []
        before = 0
        intact = True
        for piece in self.pieces:
            if isinstance(piece, FramePiece) and piece.segment.shown in gone:
                intact = False
                continue
            kept.append(piece)
            before += len(piece) if intact else 0
        self.pieces = kept
        if gone:
            self.cached = min(self.cached, before)

    def token_ids(self) -> np.ndarray:
        """int64 `[tokens]`."""
        ids: list[int] = []
        for piece in self.pieces:
            if isinstance(piece, TokenPiece):
                ids += piece.ids
            else:
                pads = [self.markup.image_pad] * (len(piece) - 2)
                ids += [self.markup.vision_start, *pads, self.markup.vision_end]
        return np.asarray(ids, dtype=np.int64)

    def positions(self) -> Positions:
        """int64 `[3, tokens]`, contiguous (`rerender`)."""
        parts: list[int | tuple[int, int]] = []
        for piece in self.pieces:
            parts += [len(piece)] if isinstance(piece, TokenPiece) else [1, piece.grid, 1]
        return mrope_positions(parts)

    def frames(self) -> Iterator[tuple[int, FramePiece]]:
        """Each live frame with the index of its first placeholder token."""
        offset = 0
        for piece in self.pieces:
            if isinstance(piece, FramePiece):
                yield offset + 1, piece
            offset += len(piece)

    def _append_ids(self, ids: Sequence[int]) -> None:
        if ids:
            self.pieces.append(TokenPiece(tuple(ids)))
