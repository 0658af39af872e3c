"""Training samples of a trajectory, before they are spelled in a trainer's format.

A sample is a list of turns and says which of them are learned. There are two kinds:

- *round*: one sample per round, whose context is what that round was written from. Frames that had expired
  are not in it; their labels and all texts are. Only the sample's last turn is learned.
- *episode*: one sample per trajectory, in which every round is learned and every frame stays. It is exact
  only if no frame expired.

Invariants: only rounds are learned, never prompts or tool outcomes; a round is learned once. What a round saw
comes from the trajectory's copy of the visibility record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from vrthinker.episode.trajectory import FrameRecord, MessageRecord, TextRecord, Trajectory
from vrthinker.errors import InputError, one_line
from vrthinker.visibility import Region, ShownFrame

SampleKind = Literal["round", "episode"]
IMAGE = "<image>"
"""The place of a picture in a text, as LLaMA-Factory, ms-swift and verl write it."""
_SPACE = "\u200b"
_AHEAD = rf"(?={_SPACE}*+(?:(?:image|video|audio)>|\|[^\s<>|]{{1,64}}\|>))"
_PLAIN, _HIDDEN = re.compile(f"<{_AHEAD}"), re.compile(f"<{_SPACE}{_AHEAD}")

Part = str | FrameRecord
"""A part of a turn: text, or the frame that is shown there."""


@dataclass(frozen=True)
class Turn:
    """One turn of a sample.

    Attributes:
        role: Who speaks. Tool outcomes are the user's.
        parts: Texts and frames, in order.
        learned: Whether the loss falls on it.
        outcome: Whether it is a tool outcome.
    """

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]
    learned: bool = False
    outcome: bool = False

    @property
    def frames(self) -> tuple[FrameRecord, ...]:
        """The frames that are shown in the turn."""
        return tuple(part for part in self.parts if isinstance(part, FrameRecord))

    @property
    def text(self) -> str:
        """The turn as one text with a placeholder for each frame."""
        return "".join(IMAGE if isinstance(part, FrameRecord) else hidden(part) for part in self.parts)


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        trajectory: The trajectory that it comes from.
        turns: The turns. The last one is a round.
        round_number: The round that it ends with, if it is of the kind *round*.
    """

    trajectory: Trajectory
    turns: tuple[Turn, ...]
    round_number: int | None

    @property
    def frames(self) -> tuple[FrameRecord, ...]:
        """The frames in the order of their places."""
        return tuple(frame for turn in self.turns for frame in turn.frames)


def hidden(text: str) -> str:
    """A text in which nothing is taken for a placeholder or a special token: a zero-width space breaks it up.

    `revealed` gives the text back.
    """
    return _PLAIN.sub(f"<{_SPACE}", text)


def revealed(text: str) -> str:
    """The text that `hidden` was given."""
    return _HIDDEN.sub("<", text)


def expires(trajectory: Trajectory) -> bool:
    """Whether some round could not see a frame that an earlier round saw."""
    return any(record.expired for record in trajectory.rounds)


def samples_of(trajectory: Trajectory, kind: SampleKind) -> Iterator[Sample]:
    """The samples of a trajectory.

    Raises:
        InputError: The record shows a frame that it does not describe, or its turns do not alternate.
    """
    rounds = trajectory.rounds
    if kind == "episode":
        shown = {showing for record in rounds for showing in record.live}
        yield Sample(trajectory, _turns(trajectory, len(rounds), shown, learn_all=True), None)
        return
    for number, record in enumerate(rounds, start=1):
        yield Sample(trajectory, _turns(trajectory, number, set(record.live), learn_all=False), number)


def _turns(trajectory: Trajectory, last: int, live: set[ShownFrame], *, learn_all: bool) -> tuple[Turn, ...]:
    """The turns up to a round, with the frames that are live."""
    frames = {(frame.frame_number, frame.view): frame for frame in trajectory.frames}
    place = f"trajectory {one_line(repr(trajectory.id))}"
    turns = [_message(message, frames, live, place) for message in trajectory.first_input]
    if [turn.role for turn in turns] not in (["user"], ["system", "user"]):
        raise InputError(f"{place}: its first input is not a task, or a system message and a task")
    for number, record in enumerate(trajectory.rounds[:last], start=1):
        turns.append(Turn("assistant", (record.text,), learned=learn_all or number == last))
        if number < last:
            if len(record.outcome_messages) != 1:
                raise InputError(
                    f"{place}, round {number}: got {len(record.outcome_messages)} messages as its outcome, "
                    "wanted 1"
                )
            turns.append(_message(record.outcome_messages[0], frames, live, place, outcome=True))
    return tuple(turns)


def _message(
    message: MessageRecord,
    frames: dict[tuple[int, Region | None], FrameRecord],
    live: set[ShownFrame],
    place: str,
    *,
    outcome: bool = False,
) -> Turn:
    parts: list[Part] = []
    for segment in message.segments:
        if isinstance(segment, TextRecord):
            parts.append(segment.text)
        elif segment.shown in live:
            frame = frames.get((segment.frame_number, segment.view))
            if frame is None:
                raise InputError(f"{place}: shows frame {segment.frame_number}, which it does not describe")
            parts.append(frame)
    return Turn(message.role, _merged(parts), outcome=outcome)


def _merged(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Parts with neighbouring texts as one, because two of them could spell a placeholder together."""
    merged: list[Part] = []
    for part in parts:
        before = merged[-1] if merged else None
        if isinstance(part, str) and isinstance(before, str):
            merged[-1] = before + part
        else:
            merged.append(part)
    return tuple(merged)
