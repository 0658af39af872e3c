"""A trajectory's rounds as paths of a prefix tree: replayed through the engine's own context.

What a round saw is read off the visibility record that the trajectory carries (`RoundRecord.expired`); here
nothing is decided again. Under `rerender` every round whose context was written anew is a path of its own, at
its own positions. Under `evict` an episode is one path, and a token sees its ancestors minus the frames that
had expired when it was read; a round's last token is read together with what follows it, after the expiry,
because that is when the engine feeds it. `renumber` turns keys in the cache, which no forward with one
position per token computes: it is refused.

Source: method section 3; docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vrthinker.engine.base import Message
from vrthinker.engine.hf.context import Context, FramePiece
from vrthinker.engine.hf.markup import Markup
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.policy.prefix_tree import NEVER, Stretch
from vrthinker.policy.sequences import frame_key, replayed_messages, round_ids
from vrthinker.visibility import ShownFrame, WindowMemory


@dataclass
class Path:
    """One context, up to its last sampled token, and what was sampled in it.

    Attributes:
        trajectory: Whose.
        stretches: The context without its last token, which predicts nothing.
        learned: (round index, first token, behind the last token) of each round that was sampled in it.
        tokens: The ids of the context.
    """

    trajectory: int
    stretches: list[Stretch]
    learned: list[tuple[int, int, int]]
    tokens: np.ndarray


def replayed_paths(
    number: int, trajectory: Trajectory, markup: Markup, factor: tuple[int, int]
) -> list[Path]:
    """The contexts that a trajectory's rounds were sampled from.

    Args:
        number: Goes into the paths, as whose they are.
        trajectory: Free rounds, under `rerender` or `evict`.
        markup: The model's tokenizer side.
        factor: (height, width) pixels of one merged patch.

    Raises:
        InputError: It was sampled under `renumber` or under a grammar, does not fit its own record, or has a
            frame that is not on the model's grid.
    """
    memory = trajectory.settings.memory
    if memory == "renumber":
        raise InputError(
            f"trajectory {trajectory.id!r}: memory: got 'renumber', allowed in training: rerender, evict; "
            "its cache holds keys that were turned, which no packed forward reproduces"
        )
    first, outcomes = replayed_messages(trajectory, factor)
    window = WindowMemory(trajectory.settings.window)
    if trajectory.settings.guided:
        raise InputError(
            f"trajectory {trajectory.id!r}: guided: got rounds under a grammar, allowed in training: free "
            "ones; forced tokens were not sampled from the policy"
        )
    replay = _Replay(number, Context(markup, factor, memory), window)
    replay.read(first)
    for index, record in enumerate(trajectory.rounds):
        if index:
            try:
                replay.next_round(record.expired, outcomes[index - 1])
            except ValueError as error:
                raise InputError(f"trajectory {trajectory.id!r}, round {index + 1}: {error}") from None
        replay.write(round_ids(record, markup))
    return replay.finish()


@dataclass
class _Replay:
    """A trajectory run through the engine's context, with every stretch kept that was ever in it."""

    trajectory: int
    context: Context
    window: WindowMemory
    stretches: list[Stretch] = field(default_factory=list)
    learned: list[tuple[int, int, int]] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    last: tuple[int, int] | None = None  # the last sampled token, read in the next round, and its position
    round: int = 1
    length: int = 0

    @property
    def evicts(self) -> bool:
        return self.context.memory == "evict"

    def read(self, messages: Sequence[Message]) -> None:
        seen = len(self.context.pieces)
        self.context.append_messages(messages)
        self._take(seen)

    def write(self, ids: Sequence[int]) -> None:
        if ids:
            self.learned.append((self.round - 1, self.length, self.length + len(ids)))
            start = self.context.next_position
            self.context.append_round(ids)
            self._text(np.asarray(ids[:-1], dtype=np.int64), start)
            self.last = ids[-1], start + len(ids) - 1
            self.length += 1
        else:
            self.last = None

    def next_round(self, expired: Sequence[ShownFrame], messages: Sequence[Message]) -> None:
        self.round += 1
        last_id = self.last[0] if self.last is not None else None
        anew = bool(expired) and not self.evicts
        if anew:
            self._end_path()
            self.context.expire(expired)
            self.stretches, self.length = [], 0
            self._take(0)
        elif self.evicts:
            self._check_expiry(set(expired))
            self.context.cached = len(self.context)
            self.context.expire(expired)
        if self.last is not None and not anew:
            self._text(np.asarray([self.last[0]], dtype=np.int64), self.last[1], counted=False)
        self.last = None
        seen = len(self.context.pieces)
        self.context.close_turn(last_id)
        self.context.append_messages(messages)
        self._take(seen)

    def finish(self) -> list[Path]:
        self._end_path()
        return self.paths

    def _end_path(self) -> None:
        """Files the context so far, if anything was sampled in it."""
        if self.learned:
            last = [] if self.last is None else [self.last[0]]
            tokens = np.concatenate([*(s.ids for s in self.stretches), np.asarray(last, dtype=np.int64)])
            end = self.learned[-1][2]
            self.paths.append(
                Path(self.trajectory, _up_to(self.stretches, end - 1), self.learned, tokens[:end])
            )
        self.learned = []

    def _take(self, first: int) -> None:
        """Adds the context's pieces from `first` on."""
        markup = self.context.markup
        for piece, start in zip(self.context.pieces[first:], self.context.starts[first:], strict=True):
            if isinstance(piece, FramePiece):
                pads = [markup.image_pad] * (len(piece) - 2)
                ids = np.asarray([markup.vision_start, *pads, markup.vision_end], dtype=np.int64)
                key, expires = frame_key(piece.segment), self._expires(piece.segment.shown)
                self.stretches.append(Stretch(ids, start, self._round, expires, key, piece.grid))
                self.length += len(ids)
            else:
                self._text(np.asarray(piece.ids, dtype=np.int64), start)

    def _text(self, ids: np.ndarray, start: int, *, counted: bool = True) -> None:
        """Adds text, joined to text before it that was read in the same round."""
        if not len(ids):
            return
        self.length += len(ids) if counted else 0
        if self.stretches:
            before = self.stretches[-1]
            if before.frame is None and before.round == self._round and before.start + len(before) == start:
                self.stretches[-1] = Stretch(np.concatenate([before.ids, ids]), before.start, before.round)
                return
        self.stretches.append(Stretch(ids, start, self._round))

    def _expires(self, shown: ShownFrame) -> int:
        """Known from the start: an episode that ends before shares the frame with one that goes on."""
        hidden_from = self.window.hidden_from(shown.outcome) if self.evicts else None
        return NEVER if hidden_from is None else hidden_from

    def _check_expiry(self, expired: set[ShownFrame]) -> None:
        """The record must say what the window says."""
        shown = {piece.segment.shown for _, piece in self.context.frames()}
        due = {one for one in shown if self._expires(one) == self.round}
        if expired != due:
            raise ValueError(f"expired: got {sorted(expired)}, the window says {sorted(due)}")

    @property
    def _round(self) -> int:
        return self.round if self.evicts else 0


def _up_to(stretches: Sequence[Stretch], length: int) -> list[Stretch]:
    """The first `length` tokens."""
    kept: list[Stretch] = []
    for stretch in stretches:
        if len(stretch) > length:
            if length:
                kept.append(stretch.cut(length)[0])
            break
        kept.append(stretch)
        length -= len(stretch)
    return kept
