"""Trajectories as training sequences: the very token ids, positions and frames of each round's context.

A trajectory is replayed through the engine's own `Context`, so that what is trained is what was, or would be,
sampled from. Loss falls on a round's tokens, once, in the context in which they were written; tool
outcomes, prompts and frames carry none (eq. 1 of the paper). A round whose context is continued unchanged by
the next one shares its sequence; where frames expire (`rerender`), a new sequence begins, in which the
earlier rounds are context only.

Rounds that were sampled bring their ids, and frames the sizes that they were sampled at. A teacher's rounds
are text: they are tokenised here, once, and its frames take the sizes at which the model to be trained sees
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vrthinker.engine.base import FinishReason, FrameSegment, Message, TextSegment
from vrthinker.engine.hf.context import Context
from vrthinker.engine.hf.markup import Markup
from vrthinker.episode.grammar import parse_round
from vrthinker.episode.trajectory import MessageRecord, RoundRecord, TextRecord, Trajectory
from vrthinker.errors import InputError
from vrthinker.video.resize import ResizeSettings
from vrthinker.visibility import ShownFrame

FrameKey = tuple[str, int, int, int]
"""What makes a frame's pixels distinct: file, frame_index, height, width."""


@dataclass(frozen=True)
class TrainingSequence:
    """One context with the rounds that are learned in it.

    Attributes:
        id: The trajectory's.
        token_ids: int64 `[tokens]`.
        positions: int64 `[3, tokens]`, as the engine would pass them.
        loss_mask: bool `[tokens]`, True at the tokens to be predicted.
        frames: For each live frame the index of its first placeholder and its key, in order.
    """

    id: str
    token_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    frames: tuple[tuple[int, FrameKey], ...]

    def __len__(self) -> int:
        return len(self.token_ids)


def training_sequences(
    trajectory: Trajectory,
    markup: Markup,
    frame_factor: tuple[int, int],
    *,
    only_snapshots: bool = False,
    resize: ResizeSettings | None = None,
) -> list[TrainingSequence]:
    """The sequences of one trajectory; every round's tokens are learned in exactly one of them.

    Args:
        trajectory: Of an episode under `rerender` memory.
        markup: The model's tokenizer side.
        frame_factor: (height, width) pixels of one merged patch.
        only_snapshots: Learn of each round only what comes up to the end of its snapshot (reading lessons).
            Rounds must be texts, and there may be only one.
        resize: How the model to be trained sees frames, for a trajectory whose rounds are texts; the sizes on
            record by default.

    Raises:
        InputError: The trajectory uses another memory mode, shows a frame that it has no record of or that
            is not on the model's grid, or a frame expires that was not there.
    """
    if trajectory.settings.memory != "rerender":
        got = trajectory.settings.memory
        raise InputError(f"memory: got {got!r}, allowed here: rerender; `pack_group` takes evict too")
    first, outcomes = replayed_messages(trajectory, frame_factor, resize)
    context = Context(markup, frame_factor)
    context.append_messages(first)
    found: list[TrainingSequence] = []
    learned: list[tuple[int, int]] = []
    last_id: int | None = None
    for number, record in enumerate(trajectory.rounds):
        if number:
            if record.expired:
                found += _sequence(trajectory.id, context, learned)
                learned = []
                try:
                    context.expire(record.expired)
                except ValueError as error:
                    raise InputError(f"trajectory {trajectory.id!r}, round {number + 1}: {error}") from None
            context.close_turn(last_id)
            context.append_messages(outcomes[number - 1])
        ids = snapshot_ids(record, markup) if only_snapshots else round_ids(record, markup)
        learned.append((len(context), len(context) + len(ids)))
        context.append_round(ids)
        last_id = ids[-1] if ids else None
    return found + _sequence(trajectory.id, context, learned)


def replayed_messages(
    trajectory: Trajectory, frame_factor: tuple[int, int], resize: ResizeSettings | None = None
) -> tuple[list[Message], list[list[Message]]]:
    """The messages that the engine was given: the first input's, and those after each round.

    Args:
        trajectory: Any.
        frame_factor: (height, width) pixels of one merged patch.
        resize: See `training_sequences`.

    Raises:
        InputError: A frame is shown that it has no record of, or is not on the model's grid.
    """
    frames = _frames(trajectory, frame_factor, resize)
    first = [_message(message, frames) for message in trajectory.first_input]
    return first, [[_message(m, frames) for m in record.outcome_messages] for record in trajectory.rounds]


def frame_key(segment: FrameSegment) -> FrameKey:
    """A frame's key, of a replayed segment or of one that an engine was given."""
    path, index = str(segment.key[0]), segment.key[1]
    assert isinstance(index, int)
    return (path, index, *segment.size)


def round_ids(record: RoundRecord, markup: Markup) -> list[int]:
    """A round's ids as sampled; or, of a text, its tokens and the end of the turn."""
    if record.token_ids is not None:
        return list(record.token_ids)
    ended = [markup.turn_end] if record.finish_reason is FinishReason.STOP else []
    return [*markup.encode(record.text), *ended]


def snapshot_ids(record: RoundRecord, markup: Markup) -> list[int]:
    """The tokens of a round's text up to the end of its snapshot."""
    snapshot = parse_round(record.text).snapshot
    if record.token_ids is not None or snapshot is None or record.tool is not None:
        raise InputError("reading lessons: got a round that is sampled, goes on, or has no snapshot")
    return markup.encode(record.text[: snapshot.span.end])


def _sequence(name: str, context: Context, learned: Sequence[tuple[int, int]]) -> list[TrainingSequence]:
    """The sequence, if there is anything to learn in it (a round whose context was full wrote nothing)."""
    if all(start == end for start, end in learned):
        return []
    ids = context.token_ids()
    mask = np.zeros(len(ids), dtype=bool)
    for start, end in learned:
        mask[start:end] = True
    frames = tuple((first, frame_key(piece.segment)) for first, piece in context.frames())
    return [TrainingSequence(name, ids, np.ascontiguousarray(context.positions()), mask, frames)]


def _frames(
    trajectory: Trajectory, factor: tuple[int, int], resize: ResizeSettings | None
) -> Mapping[int, FrameKey]:
    """Frame number to key."""
    sampled = any(record.token_ids is not None for record in trajectory.rounds)
    found = {}
    for frame in trajectory.frames:
        video, size = trajectory.videos[frame.video - 1], (frame.height, frame.width)
        if resize is not None and not sampled:
            size = resize.grid_size(video.height, video.width)
        if min(size) < 1 or size[0] % factor[0] or size[1] % factor[1]:
            raise InputError(
                f"trajectory {trajectory.id!r}: got frames of {size[1]}x{size[0]}, allowed: multiples of "
                f"{factor[1]}x{factor[0]}, the model's; judge again with its own frame sizes"
            )
        found[frame.frame_number] = (video.path, frame.frame_index, *size)
    return found


def _message(record: MessageRecord, frames: Mapping[int, FrameKey]) -> Message:
    segments = tuple(
        TextSegment(segment.text)
        if isinstance(segment, TextRecord)
        else _frame_segment(ShownFrame(segment.outcome, segment.frame_number), frames)
        for segment in record.segments
    )
    return Message(record.role, segments)


def _frame_segment(shown: ShownFrame, frames: Mapping[int, FrameKey]) -> FrameSegment:
    key = frames.get(shown.frame_number)
    if key is None:
        raise InputError(f"trajectory: frame {shown.frame_number} is shown, but not among its frames")
    return FrameSegment(shown, key, key[2:], _no_pixels)


def _no_pixels() -> np.ndarray:
    raise RuntimeError("frames of a replayed trajectory are loaded by their keys")
