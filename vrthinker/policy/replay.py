"""The contexts of a trajectory's rounds, replayed through the engine's own context class, token by token.

Training sequences (`sequences.py`) and packs (`packing.py`) are both built on the paths that this replay
returns. What a round saw comes from the visibility record that the trajectory carries
(`RoundRecord.expired`), and is not decided again here.

Under `rerender` every round whose context was written anew is a separate path with its own positions. While
no frame expires, consecutive rounds share a path. Under `evict` an episode is one path, and a token sees its
ancestors except the frames that had expired when it was read. The engine runs the model on a round's last
sampled token only when the next round begins, after expired frames have been removed; so does the replay.

Rounds that were sampled bring their ids, and frames the sizes that they were sampled at. A teacher's rounds
are text: they are tokenised here, once, and its frames take the sizes at which the model to be trained sees
them.

Source: method section 3; docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vrthinker.engine.base import FinishReason, FrameKey, FrameSegment, Message, TextSegment
from vrthinker.engine.hf.context import Context, FramePiece
from vrthinker.engine.hf.markup import Markup
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.trajectory import MessageRecord, RoundRecord, TextRecord, Trajectory, VideoRecord
from vrthinker.errors import InputError, VideoError, one_line
from vrthinker.limits import MAX_TRACE_TOKENS
from vrthinker.policy.prefix_tree import NEVER, Stretch
from vrthinker.policy.record_checks import check_ids, check_record
from vrthinker.video.content import clip_content
from vrthinker.video.frame_cache import file_state
from vrthinker.video.resize import ResizeSettings
from vrthinker.visibility import Region, ShownFrame, WindowMemory


@dataclass
class Path:
    """One context, up to its last sampled token, and the rounds that were written in it.

    Attributes:
        trajectory: The number of the trajectory that it belongs to.
        stretches: The context without its last token, which predicts nothing.
        learned: (round index, first token, end) of each round that was written in it; the end is exclusive.
        tokens: The ids of the context, int64 `[tokens]`.
        next_position: The position of the last token plus one.
    """

    trajectory: int
    stretches: list[Stretch]
    learned: list[tuple[int, int, int]]
    tokens: np.ndarray
    next_position: int

    @property
    def n_learned(self) -> int:
        """The number of tokens that are learned."""
        return sum(end - start for _, start, end in self.learned)

    def without(self, skipped: Sequence[int]) -> Path:
        """The path without the first tokens of its rounds among those that are learned.

        It ends with the last token that is still learned. If none is, it is as long as before.

        Args:
            skipped: For each of `learned`, the number of tokens that are not.
        """
        learned = [
            (number, start + count, end)
            for (number, start, end), count in zip(self.learned, skipped, strict=True)
            if start + count < end
        ]
        if not learned or learned[-1][2] == len(self.tokens):
            return replace(self, learned=learned)
        end = learned[-1][2]
        stretches = _up_to(self.stretches, end - 1)
        return replace(
            self,
            stretches=stretches,
            learned=learned,
            tokens=self.tokens[:end],
            next_position=stretches[-1].next_position + 1,
        )


def round_ids(record: RoundRecord, markup: Markup) -> list[int]:
    """A round's ids as sampled; for a round stored as text, its tokens and the end of the turn."""
    if record.token_ids is not None:
        return list(record.token_ids)
    ended = [markup.turn_end] if record.finish_reason is FinishReason.STOP else []
    return [*markup.encode(record.text), *ended]


def replayed_paths(
    number: int,
    trajectory: Trajectory,
    markup: Markup,
    factor: tuple[int, int],
    *,
    resize: ResizeSettings | None = None,
    ids_of: Callable[[RoundRecord, Markup], list[int]] = round_ids,
    tools: ToolRegistry | None = None,
) -> list[Path]:
    """The contexts that a trajectory's rounds were written in.

    Args:
        number: The trajectory's number, which is stored in the paths.
        trajectory: The trajectory of an episode under `rerender` or `evict`.
        markup: The token ids of markers, and the encoding of text.
        factor: The (height, width) of one merged patch in pixels.
        resize: The resizing of frames for the model to be trained, for a trajectory whose rounds are texts.
            By default frames have the recorded sizes.
        ids_of: A function that returns the ids of a round that are learned.
        tools: The tools that the rounds could call; `select_frames` by default.

    Raises:
        InputError: The trajectory was sampled under `renumber`, contradicts itself (`record_checks.py`), or
            has a frame that is not on the model's grid.
        VideoError: A clip is not the one that was judged.
    """
    memory = trajectory.settings.memory
    if memory == "renumber":
        raise InputError(
            f"trajectory {trajectory.id!r}: memory: got 'renumber', allowed in training: rerender, evict; "
            "its cache holds keys that were turned, which no packed forward reproduces"
        )
    check_record(trajectory, tools)
    for record in trajectory.rounds:
        check_ids(trajectory.id, record, markup)
    first, outcomes = replayed_messages(trajectory, factor, resize)
    _check_size(trajectory.id, [first, *outcomes], factor)
    replay = _Replay(number, Context(markup, factor, memory), WindowMemory(trajectory.settings.window))
    replay.read(first)
    for index, record in enumerate(trajectory.rounds):
        if index:
            try:
                replay.next_round(record.expired, outcomes[index - 1])
            except ValueError as error:
                raise InputError(f"trajectory {trajectory.id!r}, round {index + 1}: {error}") from None
        replay.write(ids_of(record, markup))
    return replay.finish()


def replayed_messages(
    trajectory: Trajectory, frame_factor: tuple[int, int], resize: ResizeSettings | None = None
) -> tuple[list[Message], list[list[Message]]]:
    """The messages that the engine was given: those of the first input, and those after each round.

    Args:
        trajectory: The trajectory, under any memory mode.
        frame_factor: The (height, width) of one merged patch in pixels.
        resize: The resizing of frames for the model to be trained, as in `replayed_paths`.

    Raises:
        InputError: A shown frame has no record, or it is not on the model's grid.
    """
    frames = _frames(trajectory, frame_factor, resize)
    first = [_message(message, frames) for message in trajectory.first_input]
    return first, [[_message(m, frames) for m in record.outcome_messages] for record in trajectory.rounds]


@dataclass
class _Replay:
    """Runs a trajectory through the engine's context and keeps every stretch that was ever in it."""

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
        """Stores the context so far as a path, if anything was sampled in it."""
        if self.learned:
            last = [] if self.last is None else [self.last[0]]
            tokens = np.concatenate([*(s.ids for s in self.stretches), np.asarray(last, dtype=np.int64)])
            end = self.learned[-1][2]
            stretches = _up_to(self.stretches, end - 1)
            self.paths.append(
                Path(self.trajectory, stretches, self.learned, tokens[:end], stretches[-1].next_position + 1)
            )
        self.learned = []

    def _take(self, first: int) -> None:
        """Adds the stretches of the context's pieces from index `first` on."""
        markup = self.context.markup
        for piece, start in zip(self.context.pieces[first:], self.context.starts[first:], strict=True):
            if isinstance(piece, FramePiece):
                pads = [markup.image_pad] * (len(piece) - 2)
                ids = np.asarray([markup.vision_start, *pads, markup.vision_end], dtype=np.int64)
                key, expires = _key_of(piece.segment), self._expires(piece.segment.shown)
                self.stretches.append(Stretch(ids, start, self._round, expires, key, piece.grid))
                self.length += len(ids)
            else:
                self._text(np.asarray(piece.ids, dtype=np.int64), start)

    def _text(self, ids: np.ndarray, start: int, *, counted: bool = True) -> None:
        """Adds text. It is joined to the text before it if that was read in the same round."""
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
        """The first round to which a showing is hidden; the same for all episodes, whenever they end."""
        hidden_from = self.window.hidden_from(shown.outcome) if self.evicts else None
        return NEVER if hidden_from is None else hidden_from

    def _check_expiry(self, expired: set[ShownFrame]) -> None:
        """Checks that the record agrees with the window of the memory."""
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


def _frames(
    trajectory: Trajectory, factor: tuple[int, int], resize: ResizeSettings | None
) -> Mapping[tuple[int, Region | None], FrameKey]:
    """The key of each frame number and view."""
    states = [_judged_state(trajectory.id, video) for video in trajectory.videos]
    sampled = any(record.token_ids is not None for record in trajectory.rounds)
    keys = {}
    for frame in trajectory.frames:
        video, size = trajectory.videos[frame.video - 1], (frame.height, frame.width)
        if resize is not None and not sampled:
            size = resize.grid_size(*_shown_size(frame.view, video.height, video.width))
        if min(size) < 1 or size[0] % factor[0] or size[1] % factor[1]:
            raise InputError(
                f"trajectory {trajectory.id!r}: got frames of {size[1]}x{size[0]}, allowed: multiples of "
                f"{factor[1]}x{factor[0]}, the model's; judge again with its own frame sizes"
            )
        keys[frame.frame_number, frame.view] = FrameKey(
            video.path, frame.frame_index, *size, frame.view, states[frame.video - 1]
        )
    return keys


def _judged_state(name: str, video: VideoRecord) -> tuple[int, int] | None:
    """The state of a clip's file, if the file is the one that was judged.

    None if the record does not say which file that was and none is there now.

    Raises:
        VideoError: Another file is in its place, or none.
    """
    state = file_state(video.path)
    if video.sha256 is None:
        return None if state == (0, 0) else state
    content = clip_content(video.path)
    if content is None:
        raise VideoError(video.path, f"cannot be read; trajectory {one_line(name)!r} was judged on it")
    if content != (video.size_bytes, video.sha256):
        raise VideoError(
            video.path,
            f"not the clip that trajectory {one_line(name)!r} was judged on: got {content.size_bytes} bytes, "
            f"SHA-256 {content.sha256[:12]}, judged: {video.size_bytes} bytes, SHA-256 "
            f"{one_line(video.sha256)[:12]}; put that clip back, or judge the pair again",
        )
    return state


def _check_size(name: str, rounds: Sequence[Sequence[Message]], factor: tuple[int, int]) -> None:
    """Refuses a record that shows more pictures than any model takes, before their tokens are made."""
    sizes = [frame.size for messages in rounds for message in messages for frame in message.frames]
    tokens = sum((height // factor[0]) * (width // factor[1]) for height, width in sizes)
    if tokens > MAX_TRACE_TOKENS.value:
        raise InputError(
            f"trajectory {one_line(repr(name))}: its frames take {tokens} tokens, allowed: up to "
            f"{MAX_TRACE_TOKENS.value}; {MAX_TRACE_TOKENS.how_to_raise}"
        )


def _shown_size(view: Region | None, height: int, width: int) -> tuple[int, int]:
    return (height, width) if view is None else (view.bottom - view.top, view.right - view.left)


def _key_of(segment: FrameSegment) -> FrameKey:
    assert isinstance(segment.key, FrameKey), "replayed messages carry frame keys"
    return segment.key


def _message(record: MessageRecord, frames: Mapping[tuple[int, Region | None], FrameKey]) -> Message:
    segments = tuple(
        TextSegment(segment.text)
        if isinstance(segment, TextRecord)
        else _frame_segment(segment.shown, frames)
        for segment in record.segments
    )
    return Message(record.role, segments)


def _frame_segment(shown: ShownFrame, frames: Mapping[tuple[int, Region | None], FrameKey]) -> FrameSegment:
    key = frames.get((shown.frame_number, shown.view))
    if key is None:
        part = "" if shown.view is None else f", region {tuple(shown.view)},"
        raise InputError(f"trajectory: frame {shown.frame_number}{part} is shown, but not among its frames")
    return FrameSegment(shown, key, (key.height, key.width), _no_pixels)


def _no_pixels() -> np.ndarray:
    raise RuntimeError("frames of a replayed trajectory are loaded by their keys")
