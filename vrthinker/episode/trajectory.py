"""Trajectories: versioned records of episodes, one JSON line each.

A trajectory has what a report, a reward and a training forward need, but no pixels: the texts, the sampled
ids with their logprobs (never re-tokenised), the frames that were live in each round (copied from the
visibility record), the tool outcomes, and the verdict. Frames are references: file, frame index, time. A
record that is written and read again equals the original.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vrthinker.bounded_files import read_lines
from vrthinker.engine.base import FinishReason, FrameSegment, Message, Role
from vrthinker.episode.dimensions import Confidence, Judgments
from vrthinker.episode.grammar import FailureReason
from vrthinker.episode.probabilities import Probabilities
from vrthinker.episode.repairs import RepairKind
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.tools.base import ToolErrorKind
from vrthinker.errors import EngineError, InputError, MachineError, VideoError, VRThinkerError, first_problem
from vrthinker.visibility import Region, ShownFrame

MAX_LINE_BYTES = 64 << 20


class StopReason(enum.StrEnum):
    """The reasons why an episode ended. Only `ANSWERED` comes with judgments."""

    ANSWERED = "answered"
    """A round gave a final answer."""
    ROUND_LIMIT = "round_limit"
    """The last allowed round requested frames instead of answering."""
    TOKEN_LIMIT = "token_limit"
    """A round reached its token limit before its ending."""
    UNPARSEABLE = "unparseable"
    """A round has neither a readable answer nor a tool call, or more than one."""
    CONTEXT_LIMIT = "context_limit"
    """The context reached the model's limit."""
    REFUSED = "refused"
    """The model, or a filter in front of it, refused to answer, as a server says in a field of its own."""
    VIDEO_ERROR = "video_error"
    """A requested frame does not decode."""
    ENGINE_ERROR = "engine_error"
    """The engine failed."""
    MACHINE_ERROR = "machine_error"
    """The machine ran out of something, such as memory."""
    INTERNAL_ERROR = "internal_error"
    """An unexpected error occurred; the log has the traceback."""
    BAD_INPUT = "bad_input"
    """The item could not start: its caption, dataset or prompt template cannot be used."""


WRITTEN_STOPS = frozenset(
    {
        StopReason.ROUND_LIMIT,
        StopReason.TOKEN_LIMIT,
        StopReason.UNPARSEABLE,
        StopReason.CONTEXT_LIMIT,
        StopReason.REFUSED,
    }
)
"""The reasons of episodes that ended without judgments because of what the model wrote, not by an error."""


def stop_reason_of(error: VRThinkerError) -> StopReason:
    """The stop reason of an episode that ended with an error."""
    kinds: tuple[tuple[type[VRThinkerError], StopReason], ...] = (
        (VideoError, StopReason.VIDEO_ERROR),
        (InputError, StopReason.BAD_INPUT),
        (EngineError, StopReason.ENGINE_ERROR),
        (MachineError, StopReason.MACHINE_ERROR),
    )
    return next((reason for kind, reason in kinds if isinstance(error, kind)), StopReason.INTERNAL_ERROR)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_SELDOM = ("view", "note", "size_bytes", "sha256")


class _Viewed(_Record):
    """A record with fields that are written only if they have a value, so that old readers still work."""

    @model_serializer(mode="wrap")
    def _without_the_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        return {name: value for name, value in written.items() if name not in _SELDOM or value is not None}


def _written_showings(showings: tuple[ShownFrame, ...]) -> list[list[Any]]:
    return [[shown.outcome, shown.frame_number, *([shown.view] if shown.view else [])] for shown in showings]


Showings = Annotated[tuple[ShownFrame, ...], PlainSerializer(_written_showings)]
"""Showings, written as [outcome, frame_number], or as [outcome, frame_number, region] for a region."""


class VideoRecord(_Viewed):
    """One clip as it was judged.

    `size_bytes` and `sha256` say which content was judged (`ClipContent`), so that training refuses another
    clip in its place, also on another machine. `reader` is the name of the reader that showed its frames.
    Records of version 0.1.0 do not have them.
    """

    path: str
    codec: str
    width: int
    height: int
    n_frames: int
    fps: float
    duration_seconds: float
    is_variable_frame_rate: bool
    truncated: str | None
    size_bytes: int | None = None
    sha256: str | None = None
    reader: str | None = None


class FrameRecord(_Viewed):
    """The origin of a frame number of the workspace, and the size at which it or a region of it was shown."""

    frame_number: int
    video: Literal[1, 2]
    frame_index: int
    pts_seconds: float
    height: int
    width: int
    view: Region | None = None

    @property
    def label(self) -> str:
        """The frame's number, with the region if only a region was shown."""
        if self.view is None:
            return str(self.frame_number)
        top, left, bottom, right = self.view
        return f"{self.frame_number} (rows {top} to {bottom - 1}, columns {left} to {right - 1})"

    @property
    def picture_id(self) -> str:
        """A name of its picture that can be a CSS class. Equal pictures have equal names."""
        return "-".join(map(str, (self.frame_number, *(self.view or ()))))


class TextRecord(_Record):
    """A text segment of a message."""

    text: str


class FrameSegmentRecord(_Viewed):
    """A frame segment of a message; `frame_number` and `view` refer to `Trajectory.frames`."""

    outcome: int
    frame_number: int
    view: Region | None = None

    @property
    def shown(self) -> ShownFrame:
        """The showing of the segment."""
        return ShownFrame(self.outcome, self.frame_number, self.view)


class MessageRecord(_Record):
    """A turn that the model did not write."""

    role: Role
    segments: tuple[TextRecord | FrameSegmentRecord, ...]

    @classmethod
    def of(cls, message: Message) -> MessageRecord:
        """The record of an engine message."""
        return cls(
            role=message.role,
            segments=tuple(
                FrameSegmentRecord(**segment.shown._asdict())
                if isinstance(segment, FrameSegment)
                else TextRecord(text=segment.text)
                for segment in message.segments
            ),
        )


class FailureRecord(_Record):
    """One departure of a round from the form."""

    reason: FailureReason
    start: int
    end: int
    message: str


class RepairRecord(_Record):
    """Something that was not in the right form and was read in the only possible way."""

    kind: RepairKind
    start: int
    end: int


class RecommendationRecord(_Record):
    """A recommended answer."""

    judgments: Judgments
    confidence: Confidence | None


class ToolRecord(_Viewed):
    """The outcome of a tool call. `error` is null if frames were shown; `note` names those that were not."""

    name: str | None
    frame_numbers: tuple[int, ...]
    view: Region | None = None
    error_kind: ToolErrorKind | None
    error: str | None
    note: str | None = None


class RoundRecord(_Record):
    """One round: what was visible, what was written, and the outcome.

    `live` and `expired` are showings, copied from the visibility record. `tool` is the outcome of the first
    tool call, `further_tools` are those of the others; `tools` has them all. `outcome_messages` are the
    messages that are added to the next round's context.
    """

    round_number: int
    live: Showings
    expired: Showings
    text: str
    token_ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    prompt_tokens: int | None
    prefilled_tokens: int | None
    failures: tuple[FailureRecord, ...]
    recommendation: RecommendationRecord | None
    tool: ToolRecord | None
    outcome_messages: tuple[MessageRecord, ...]
    repairs: tuple[RepairRecord, ...] = ()
    further_tools: tuple[ToolRecord, ...] = ()

    @property
    def tools(self) -> tuple[ToolRecord, ...]:
        """The outcomes of the round's tool calls, in order."""
        return self.further_tools if self.tool is None else (self.tool, *self.further_tools)

    @property
    def well_formed(self) -> bool:
        """Whether the round has no departure from the form, and no repairs."""
        return not self.failures and not self.repairs

    @model_serializer(mode="wrap")
    def _without_what_is_rare(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        for name in ("repairs", "further_tools"):
            if not written.get(name):
                written.pop(name, None)
        return written


class Outcome(_Record):
    """How the episode ended. If judgments are null, `reason` says why, and only then.

    `probabilities` are those of the final answer's labels. If a dimension's are not known,
    `probabilities_reason` says why. Both are null if nobody asked.
    """

    judgments: Judgments | None
    confidence: Confidence | None
    stop_reason: StopReason
    reason: str | None
    probabilities: Probabilities | None = None
    probabilities_reason: str | None = None

    @model_serializer(mode="wrap")
    def _without_unknown_probabilities(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        for name in ("probabilities", "probabilities_reason"):
            if written.get(name) is None:
                written.pop(name, None)
        return written

    @model_validator(mode="after")
    def _null_has_a_reason(self) -> Outcome:
        if (self.judgments is None) != (self.reason is not None):
            raise ValueError("judgments and reason: exactly one of them must be null")
        if (self.stop_reason is StopReason.ANSWERED) != (self.judgments is not None):
            raise ValueError(f"stop_reason: {self.stop_reason} does not fit the judgments")
        return self


class Trajectory(_Record):
    """One episode of rounds, from the first input to the outcome."""

    schema_version: Literal[1] = 1
    id: str
    prompt: str
    dataset: str | None
    videos: tuple[VideoRecord, VideoRecord]
    n_frames: int
    n_frames_1: int
    frames: tuple[FrameRecord, ...]
    settings: EpisodeSettings
    engine: str
    policy_version: int
    seed: int
    first_input: tuple[MessageRecord, ...]
    rounds: tuple[RoundRecord, ...]
    outcome: Outcome
    notes: tuple[str, ...]
    latency_seconds: float

    def __repr_args__(self) -> Iterator[tuple[str, object]]:
        """What `repr` shows: one line, without the rounds."""
        yield "id", self.id
        yield "engine", self.engine
        yield "rounds", len(self.rounds)
        yield "frames_seen", len(self.frames_seen)
        yield "outcome", self.outcome

    @property
    def tool_calls(self) -> int:
        """The number of tool calls that showed frames."""
        return sum(tool.error_kind is None for r in self.rounds for tool in r.tools)

    @property
    def frames_seen(self) -> tuple[int, ...]:
        """The distinct frame numbers that were live in some round, ascending."""
        return tuple(sorted({shown.frame_number for r in self.rounds for shown in r.live}))

    @property
    def prompt_tokens(self) -> int | None:
        """The number of context tokens of all rounds; None if the engine did not count them."""
        return sum_or_none([record.prompt_tokens for record in self.rounds])

    @property
    def sampled_tokens(self) -> int | None:
        """The number of tokens that the engine wrote; None if it does not know them."""
        ids = [record.token_ids for record in self.rounds]
        return sum_or_none([None if round_ids is None else len(round_ids) for round_ids in ids])

    @property
    def repairs(self) -> int:
        """The number of repairs in all rounds."""
        return sum(len(record.repairs) for record in self.rounds)

    @property
    def well_formed(self) -> bool:
        """Whether every round has the right form (the condition of the format reward, method section 4)."""
        return bool(self.rounds) and all(r.well_formed for r in self.rounds)


def sum_or_none(counts: Sequence[int | None]) -> int | None:
    """The sum of counts; None if one of them is not known, or if there are none."""
    known = [count for count in counts if count is not None]
    return sum(known) if counts and len(known) == len(counts) else None


def dump_line(trajectory: Trajectory) -> str:
    """A trajectory as one JSON line, with its newline."""
    return trajectory.model_dump_json() + "\n"


def load_trajectories(path: Path | str) -> Iterator[Trajectory]:
    """Reads a JSONL file of trajectories, one at a time.

    Raises:
        InputError: The file is missing or no regular file, or a line is too long or not a trajectory of a
            known version; the message names file and line.
    """
    for number, line in read_lines(path, MAX_LINE_BYTES):
        if not line.strip():
            continue
        try:
            yield Trajectory.model_validate_json(line)
        except ValidationError as error:
            raise InputError(f"{path}:{number}: {first_problem(error, '(line)')}") from None
