"""What every round of a trajectory was sampled from, the slow, obvious way: one token after the other.

The reference for packs and caches. It shares no code with them: it reads the trajectory's messages, and which
frames its rounds say were live.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sampled import written_ids

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.markup import Markup
from vrthinker.episode.trajectory import MessageRecord, TextRecord, Trajectory
from vrthinker.video.frame_cache import file_state
from vrthinker.visibility import ShownFrame


@dataclass(frozen=True)
class Token:
    """One token of a context.

    Attributes:
        id: Its id.
        position: Temporal, height, width.
        read: The round (from 1) in which the model read it.
        showing: Whose frame it is one of.
        frame: That frame's key.
        sampled: The round (from 1) that it was sampled in.
    """

    id: int
    position: tuple[int, int, int]
    read: int
    showing: ShownFrame | None = None
    frame: FrameKey | None = None
    sampled: int | None = None


@dataclass(frozen=True)
class RoundView:
    """The context of one round, up to its last sampled token.

    Attributes:
        tokens: All that was ever read, also what had expired.
        mask: bool `[tokens, tokens]`: which (column) each (row) saw.
        sampled: Places of the round's own tokens.
    """

    tokens: Sequence[Token]
    mask: np.ndarray
    sampled: Sequence[int]

    @property
    def frames(self) -> list[FrameKey]:
        """One key per showing, in order."""
        found: list[tuple[ShownFrame, FrameKey]] = []
        for token in self.tokens:
            if token.showing is not None and token.frame is not None:
                pair = (token.showing, token.frame)
                if not found or found[-1] != pair:
                    found.append(pair)
        return [key for _, key in found]


class _Writer:
    """Writes tokens one behind the other."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.position = 0

    def text(self, ids: Sequence[int], read: int, sampled: int | None = None) -> None:
        for token_id in ids:
            self.tokens.append(Token(token_id, (self.position,) * 3, read, sampled=sampled))
            self.position += 1

    def frame(self, shown: ShownFrame, key: FrameKey, markup: Markup, factor: int, read: int) -> None:
        height, width = key[2] // factor, key[3] // factor
        begin = self.position
        self.tokens.append(Token(markup.vision_start, (begin,) * 3, read, shown, key))
        for row in range(height):
            for column in range(width):
                where = (begin + 1, begin + 1 + row, begin + 1 + column)
                self.tokens.append(Token(markup.image_pad, where, read, shown, key))
        end = begin + 1 + max(height, width)
        self.tokens.append(Token(markup.vision_end, (end,) * 3, read, shown, key))
        self.position = end + 1


def round_views(trajectory: Trajectory, markup: Markup, factor: int) -> list[RoundView]:
    """Every round that sampled something."""
    rounds = trajectory.rounds
    if trajectory.settings.memory == "rerender":
        contexts = [_written(trajectory, markup, factor, number) for number in range(1, len(rounds) + 1)]
    else:
        whole = _written(trajectory, markup, factor, None)
        contexts = []
        for number in range(1, len(rounds) + 1):
            own = [place for place, token in enumerate(whole) if token.sampled == number]
            contexts.append(whole[: own[-1] + 1] if own else [])
    views = []
    for number, tokens in enumerate(contexts, start=1):
        sampled = [place for place, token in enumerate(tokens) if token.sampled == number]
        if sampled:
            tokens = tokens[: sampled[-1] + 1]
            views.append(RoundView(tokens, _mask(trajectory, tokens), sampled))
    return views


def _written(trajectory: Trajectory, markup: Markup, factor: int, only: int | None) -> list[Token]:
    """Everything in order; `only`: as the context of that round was rendered, at one go."""
    live = [set(record.live) for record in trajectory.rounds]
    frames = {frame.frame_number: frame for frame in trajectory.frames}
    writer = _Writer()

    def message(record: MessageRecord, read: int) -> None:
        writer.text([markup.turn_start, *markup.encode(f"{record.role}\n")], read)
        for segment in record.segments:
            if isinstance(segment, TextRecord):
                writer.text(markup.encode(segment.text), read)
                continue
            shown = ShownFrame(segment.outcome, segment.frame_number)
            if shown in live[(read if only is None else only) - 1]:
                frame = frames[segment.frame_number]
                path = trajectory.videos[frame.video - 1].path
                size = (frame.height, frame.width)
                key = FrameKey(path, frame.frame_index, *size, None, file_state(path))
                writer.frame(shown, key, markup, factor, read)
        writer.text([markup.turn_end, *markup.encode("\n")], read)

    for first in trajectory.first_input:
        message(first, 1)
    writer.text([markup.turn_start, *markup.encode("assistant\n")], 1)
    for number, record in enumerate(trajectory.rounds[:only], start=1):
        ids = written_ids(record, markup)
        writer.text(ids[:-1], number, number)
        # The engine feeds a round's last token when the next round begins.
        writer.text(ids[-1:], number + 1, number)
        if number == (only or len(trajectory.rounds)):
            break
        if ids and ids[-1] != markup.turn_end:
            writer.text([markup.turn_end], number + 1)
        writer.text(markup.encode("\n"), number + 1)
        for outcome in record.outcome_messages:
            message(outcome, number + 1)
        writer.text([markup.turn_start, *markup.encode("assistant\n")], number + 1)
    return writer.tokens


def _mask(trajectory: Trajectory, tokens: Sequence[Token]) -> np.ndarray:
    causal = np.tril(np.ones((len(tokens), len(tokens)), dtype=bool))
    if trajectory.settings.memory == "rerender":
        return causal
    # By round and token: whether the token is live then. What is read behind the last round is asked nothing.
    live = [set(record.live) for record in trajectory.rounds]
    shown = np.array([[t.showing is None or t.showing in now for t in tokens] for now in live])
    read = np.array([min(token.read, len(live)) for token in tokens])
    return causal & shown[read - 1]


def tensors_of(view: RoundView) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids `[1, tokens]`, positions `[3, 1, tokens]`, mask `[1, 1, tokens, tokens]`."""
    ids = torch.tensor([[token.id for token in view.tokens]])
    positions = torch.tensor([token.position for token in view.tokens]).T[:, None]
    return ids, positions, torch.from_numpy(view.mask)[None, None]
