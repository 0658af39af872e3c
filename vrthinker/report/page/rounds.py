"""The rounds of a trajectory as the evidence page shows them: film strips, texts, answers, tool calls.

Invariant: what was live and what had expired comes from the record's `live` and `expired`, and every part of
a round's text is shown: as a section, as the answer, as the tool call, or raw.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vrthinker.episode.dimensions import Confidence, Judgments
from vrthinker.episode.grammar import FinalAnswer, ParsedRound, Span, ToolCall, ToolRequest, parse_round
from vrthinker.episode.trajectory import FrameRecord, FrameSegmentRecord, RoundRecord, Trajectory
from vrthinker.errors import InputError
from vrthinker.report.page.truth import PlantedEvent
from vrthinker.visibility import Region, ShownFrame


@dataclass(frozen=True)
class Tile:
    """One showing of one frame in a film strip."""

    frame: FrameRecord
    expired: bool
    events: tuple[PlantedEvent, ...]

    @property
    def label(self) -> str:
        """The tile in words, for people who cannot see it."""
        words = f"frame {self.frame.label}, video {self.frame.video}, {self.frame.pts_seconds:.3f} s"
        shows = "".join(f", shows {event.text}" for event in self.events)
        return words + (", expired" if self.expired else "") + shows


@dataclass(frozen=True)
class Group:
    """The frames of one outcome: of the first input (0), or of the tool's answer to round k.

    Attributes:
        outcome: The number of the outcome: 0 for the first input, k for the tool outcome of round k.
        seen: The rounds that saw it, such as "round 2" or "rounds 2 to 4".
        is_new: Whether this round is the first to see it.
        expired: Whether it has expired.
        rows: The tiles of video 1 and of video 2; either may be missing.
    """

    outcome: int
    seen: str
    is_new: bool
    expired: bool
    rows: tuple[tuple[Tile, ...], ...]

    @property
    def title(self) -> str:
        """The heading of the group."""
        return "First input" if self.outcome == 0 else f"Asked for in round {self.outcome}"


@dataclass(frozen=True)
class Section:
    """A part of a round's text. `raw` is text that does not fit the grammar."""

    kind: Literal["snapshot", "think", "raw"]
    text: str


@dataclass(frozen=True)
class Call:
    """A tool call and its outcome.

    Attributes:
        name: The name of the tool; None if the call cannot be read (its text is then among the sections).
        arguments: The arguments as JSON.
        frames: The frames that it showed.
        failure: The reason why it showed nothing.
        note: The note about requested frames that were not shown.
    """

    name: str | None
    arguments: str
    frames: tuple[FrameRecord, ...]
    failure: str | None
    note: str | None = None


@dataclass(frozen=True)
class RoundView:
    """One round, ready for the template."""

    record: RoundRecord
    live: tuple[Group, ...]
    expired: tuple[Group, ...]
    sections: tuple[Section, ...]
    judgments: Judgments | None
    confidence: Confidence | None
    is_final: bool
    changed: frozenset[str]
    calls: tuple[Call, ...]

    @property
    def n_expired(self) -> int:
        """The number of expired showings."""
        return sum(len(row) for group in self.expired for row in group.rows)


def round_views(trajectory: Trajectory, events: Sequence[PlantedEvent] = ()) -> tuple[RoundView, ...]:
    """All rounds of a trajectory.

    Args:
        trajectory: The trajectory.
        events: The planted events, which are marked on the frames that show them.

    Raises:
        InputError: The record refers to frames that are not in it.
    """
    strips = _Strips(trajectory, events)
    views: list[RoundView] = []
    gone: list[ShownFrame] = []
    before: Judgments | None = None
    for record in trajectory.rounds:
        gone += record.expired
        parsed = parse_round(record.text)
        judgments, confidence = _answer(trajectory, record)
        views.append(
            RoundView(
                record=record,
                live=strips.groups(record.live, record.round_number, expired=False),
                expired=strips.groups(gone, record.round_number, expired=True),
                sections=_sections(record, parsed),
                judgments=judgments,
                confidence=confidence,
                is_final=judgments is not None and record.recommendation is None,
                changed=_changed(before, judgments),
                calls=_calls(trajectory, record, parsed, strips),
            )
        )
        before = judgments or before
    return tuple(views)


class _Strips:
    """The film strips of one trajectory."""

    def __init__(self, trajectory: Trajectory, events: Sequence[PlantedEvent]) -> None:
        self._trajectory, self._events = trajectory, events
        self._frames = {(frame.frame_number, frame.view): frame for frame in trajectory.frames}
        self._rounds_of: dict[int, list[int]] = {}
        for record in trajectory.rounds:
            for outcome in {showing.outcome for showing in record.live}:
                self._rounds_of.setdefault(outcome, []).append(record.round_number)

    def frame(self, number: int, view: Region | None) -> FrameRecord:
        if (number, view) not in self._frames:
            raise InputError(
                f"trajectory {self._trajectory.id}: shows frame {number}, which is not among its frames; "
                "give the record as it was written"
            )
        return self._frames[number, view]

    def groups(
        self, showings: Iterable[ShownFrame], round_number: int, *, expired: bool
    ) -> tuple[Group, ...]:
        tiles: dict[int, list[Tile]] = {}
        for showing in showings:
            frame = self.frame(showing.frame_number, showing.view)
            shown = tuple(event for event in self._events if event.covers(frame.video, frame.frame_index))
            tiles.setdefault(showing.outcome, []).append(Tile(frame, expired, shown))
        return tuple(
            Group(
                outcome=outcome,
                seen=_in_words(self._rounds_of.get(outcome, [])),
                is_new=self._rounds_of.get(outcome, [0])[0] == round_number,
                expired=expired,
                rows=tuple(
                    row
                    for video in (1, 2)
                    if (row := tuple(tile for tile in tiles[outcome] if tile.frame.video == video))
                ),
            )
            for outcome in sorted(tiles)
        )


def _in_words(rounds: Sequence[int]) -> str:
    if not rounds:
        return "no round"
    return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]} to {rounds[-1]}"


def _answer(trajectory: Trajectory, record: RoundRecord) -> tuple[Judgments | None, Confidence | None]:
    """The round's answer: the final answer if it ended the episode, else the recommended answer."""
    if record.recommendation is not None:
        return record.recommendation.judgments, record.recommendation.confidence
    outcome = trajectory.outcome
    if record is trajectory.rounds[-1] and outcome.judgments is not None:
        return outcome.judgments, outcome.confidence
    return None, None


def _changed(before: Judgments | None, now: Judgments | None) -> frozenset[str]:
    if before is None or now is None:
        return frozenset()
    earlier = before.as_dict()
    return frozenset(code for code, value in now.as_dict().items() if earlier[code] != value)


def _sections(record: RoundRecord, parsed: ParsedRound) -> tuple[Section, ...]:
    """The text cut at the elements that were read. The text between them is raw."""
    text, shown_elsewhere = record.text, _told_elsewhere(record, parsed)
    pieces: list[tuple[Span, Section | None]] = [(span, None) for span in shown_elsewhere]
    for kind, element in (("snapshot", parsed.snapshot), ("think", parsed.think)):
        if element is not None:
            content = text[element.content.start : element.content.end].strip()
            pieces.append((element.span, Section("snapshot" if kind == "snapshot" else "think", content)))
    sections: list[Section] = []
    position = 0
    for span, section in sorted(pieces, key=lambda piece: piece[0]):
        sections += _raw(text[position : span.start])
        sections += [section] if section is not None else []
        position = span.end
    return (*sections, *_raw(text[position:]))


def _raw(text: str) -> list[Section]:
    return [Section("raw", text.strip())] if text.strip() else []


def _told_elsewhere(record: RoundRecord, parsed: ParsedRound) -> list[Span]:
    """The spans of the answer and the tool call, if the page shows them in another form."""
    ending = parsed.ending
    if isinstance(ending, FinalAnswer):
        return [ending.answer.span]
    if not isinstance(ending, ToolRequest):
        return []
    read = zip(ending.calls, ending.spans, strict=True)
    spans = [span for call, span in read if isinstance(call, ToolCall)]
    if ending.recommendation is not None and record.recommendation is not None:
        spans.append(ending.recommendation.span)
    return spans


def _calls(
    trajectory: Trajectory, record: RoundRecord, parsed: ParsedRound, strips: _Strips
) -> tuple[Call, ...]:
    written = parsed.ending.calls if isinstance(parsed.ending, ToolRequest) else ()
    seen = {
        (segment.frame_number, segment.view)
        for message in record.outcome_messages
        for segment in message.segments
        if isinstance(segment, FrameSegmentRecord)
    }
    calls = []
    for call, tool in itertools.zip_longest(written, record.tools):
        name, arguments = None, ""
        if isinstance(call, ToolCall):
            name = call.name or "a call without a name"
            arguments = json.dumps(call.arguments, ensure_ascii=False)
        frames: tuple[FrameRecord, ...] = ()
        failure = note = None
        if tool is None:
            failure = f"not carried out: {trajectory.outcome.reason or _NOT_RUN}"
        elif tool.error is not None:
            failure = tool.error
        else:
            frames = tuple(strips.frame(number, tool.view) for number in tool.frame_numbers)
            note = tool.note
            if not seen.issuperset((frame.frame_number, frame.view) for frame in frames):
                failure = (
                    "no round saw these frames: retrieved frames stay for 0 rounds"
                    if record.outcome_messages
                    else f"not shown: {trajectory.outcome.reason or 'the episode ended'}"
                )
        calls.append(Call(name, arguments, frames, failure, note))
    return tuple(calls)


_NOT_RUN = "the episode ended, or the round has more calls than are run"
