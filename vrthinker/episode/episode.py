"""One episode as a state machine, which decides what to ask the engine next and reads what the engine wrote.

It has no engine and no loop (those are in `runner.py`), so that many episodes can advance together and a
trainer can fork groups. Invariant: what is live or expired comes only from the visibility record.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from vrthinker.engine.base import (
    FinishReason,
    FrameKey,
    FrameSegment,
    Message,
    RoundLimits,
    RoundResult,
    TextSegment,
)
from vrthinker.episode.dimensions import DimensionText, dimension_texts
from vrthinker.episode.forms import round_form
from vrthinker.episode.grammar import (
    FinalAnswer,
    ParsedRound,
    ParseFailure,
    ToolCall,
    ToolRequest,
    parse_round,
)
from vrthinker.episode.probabilities import answer_probabilities
from vrthinker.episode.prompts import PromptContext, PromptFrame, PromptTemplates, clean
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolError, ToolOutcome
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.trajectory import (
    FailureRecord,
    FrameRecord,
    MessageRecord,
    Outcome,
    RecommendationRecord,
    RepairRecord,
    RoundRecord,
    StopReason,
    ToolRecord,
    Trajectory,
    VideoRecord,
)
from vrthinker.video.workspace import Workspace
from vrthinker.visibility import RoundVisibility, ShownFrame, VisibilityRecord, WindowMemory

QUOTED_NOTE = "the answer stands in the caption word by word; the judge may have copied it from there"
_TAGS = re.compile(r"<[^<>]*>")


@dataclass(frozen=True)
class EpisodeItem:
    """An item to judge: an id, a caption, and a function that opens its workspace (once, maybe in a thread).

    `dimensions` are the names of the dimensions in prompts, instead of the dataset's.
    `first_frames` are shown first, instead of `EpisodeSettings.initial_frames` evenly spaced frames. With
    `group_seeds`, one episode is sampled per seed, and `seed` is not used. The episodes share the first
    input, which is decoded, encoded and prefilled once. `id` is then the group's id, and `group_ids` are the
    ids of its episodes, one per seed; by default each has the group's. `given_up` says why nobody wants the
    result any more, or None; the runner asks it now and then, and ends the episode if there is a reason.
    """

    id: str
    prompt: str
    open_workspace: Callable[[], Workspace]
    dataset: str | None = None
    seed: int = 0
    first_frames: tuple[int, ...] | None = None
    group_seeds: tuple[int, ...] | None = None
    group_ids: tuple[str, ...] | None = None
    given_up: Callable[[], str | None] | None = None
    dimensions: tuple[DimensionText, ...] | None = None

    @property
    def n_episodes(self) -> int:
        """The number of its episodes."""
        return 1 if self.group_seeds is None else len(self.group_seeds)

    def members(self) -> list[EpisodeItem]:
        """The items of the single episodes, each with its seed."""
        if self.group_seeds is None:
            return [self]
        ids = self.group_ids or (self.id,) * len(self.group_seeds)
        return [
            replace(self, id=member_id, seed=seed, group_seeds=None, group_ids=None)
            for member_id, seed in zip(ids, self.group_seeds, strict=True)
        ]


def episode_seed(seed: int, item_id: str) -> int:
    """The seed of one item of many. It depends on the item's id, so that order and batch do not matter.

    With one seed for all items, every episode would draw the same random numbers, and their errors would be
    correlated.
    """
    digest = hashlib.sha256(f"{seed}:{item_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big")


@dataclass
class _Received:
    """A round that was read and is not recorded yet."""

    result: RoundResult
    text: str
    parsed: ParsedRound
    tool_outcomes: tuple[ToolOutcome, ...] = ()

    @property
    def shown(self) -> list[FramesShown]:
        """The outcomes that show frames."""
        return [outcome for outcome in self.tool_outcomes if isinstance(outcome, FramesShown)]


@dataclass
class Episode:
    """An episode in progress. Call `first_input`, then `enter_round` and `receive` in turn."""

    item: EpisodeItem
    workspace: Workspace
    settings: EpisodeSettings
    templates: PromptTemplates
    tools: ToolRegistry
    engine_name: str
    policy_version: int = 0
    watch: tuple[str, ...] = ()
    outcome: Outcome | None = None
    _rounds: list[RoundRecord] = field(default_factory=list)
    _first: tuple[Message, ...] = ()
    _pending: tuple[Message, ...] = ()
    _received: _Received | None = None
    _notes: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._visibility = VisibilityRecord(WindowMemory(self.settings.window))
        self._context = PromptContext(
            n_frames=self.workspace.n_frames,
            n_frames_1=self.workspace.n_frames_1,
            max_frames=self.settings.retrieved_frames,
            max_rounds=self.settings.max_rounds,
            window=self.settings.window,
            dimensions=self.item.dimensions or dimension_texts(self.item.dataset),
            tools=tuple(self.tools.schemas()),
        )

    @property
    def visibility(self) -> VisibilityRecord:
        """The record of what was live in each round."""
        return self._visibility

    def first_input(self, *, decode: bool = True) -> tuple[Message, ...]:
        """The first input X: the messages that open the session. The first frames are decoded if `decode`.

        Raises:
            VideoError: A first frame does not decode.
            InputError: The caption is too long or a template fails.
        """
        numbers = self.item.first_frames or self.workspace.initial_frames(self.settings.initial_frames)
        if decode:
            self.workspace.prefetch(numbers)
        shown = self._visibility.show(0, numbers)
        self._first = self.templates.first_input(
            self._context,
            self.item.prompt,
            self._prompt_frames(numbers),
            self._segments(shown),
            last_round=self.settings.max_rounds == 1,
        )
        return self._first

    def enter_round(self) -> tuple[RoundVisibility, tuple[Message, ...], RoundLimits]:
        """Opens the next round. Returns what it sees, the messages that it adds, and its sampling limits."""
        entry = self._visibility.enter()
        form = None
        if self.settings.guided:
            form = round_form(
                n_frames=self.workspace.n_frames,
                frames_per_call=min(4, self.settings.retrieved_frames),
                last_round=entry.round_number >= self.settings.max_rounds,
                max_tokens=self.settings.max_round_tokens,
            )
        limits = RoundLimits(
            *(self.settings.max_round_tokens, self.settings.temperature, self.settings.top_p),
            *(form, self.watch),
        )
        return entry, self._pending, limits

    def receive(self, result: RoundResult) -> list[FramesShown]:
        """Reads a round. Afterwards either `outcome` is set, or `show_outcome` must be called.

        Returns:
            The frames to decode before the next round.
        """
        if not all(map(math.isfinite, result.logprobs or ())):
            error = result.error or "the engine returned logprobs that are not finite"
            result = replace(result, logprobs=None, finish_reason=FinishReason.ERROR, error=error)
        text = clean(result.text)
        received = _Received(result, text, parse_round(text))
        self._received = received
        ended = self._ended(received.parsed, result)
        if ended is not None:
            self.outcome = ended
            self._record(())
            return []
        assert isinstance(received.parsed.ending, ToolRequest)
        context = ToolContext(
            self.workspace.n_frames,
            self.settings.retrieved_frames,
            self.workspace.n_frames_1,
            frozenset(shown.frame_number for entry in self._visibility.rounds for shown in entry.live),
            self.item.seed,
            1 + sum(len(record.tools) for record in self._rounds),
        )
        received.tool_outcomes = self.tools.execute_all(received.parsed.ending.calls, context)
        return received.shown

    def show_outcome(self) -> None:
        """Adds the message with the tool outcomes to the context of the next round."""
        assert self._received is not None
        round_number = len(self._visibility.rounds)
        outcomes = self._received.tool_outcomes
        messages = []
        place = 1
        for position, outcome in enumerate(outcomes, start=1):
            numbers = outcome.frame_numbers if isinstance(outcome, FramesShown) else ()
            view = outcome.view if isinstance(outcome, FramesShown) else None
            visible = self._visibility.show(round_number, numbers, view)
            message = self.templates.outcome(
                self._context,
                self._prompt_frames(numbers, place),
                self._segments(visible),
                error=outcome.message if isinstance(outcome, ToolError) else None,
                note=outcome.note if isinstance(outcome, FramesShown) else None,
                # Only the end of the message tells about the last round.
                last_round=position == len(outcomes) and round_number + 1 >= self.settings.max_rounds,
            )
            messages.append(message)
            place += len(numbers)
        self._pending = (_joined(messages),)
        self._record(self._pending)

    def fail(self, stop_reason: StopReason, reason: str) -> None:
        """Ends the episode without a verdict. The current round is recorded if its text was received."""
        if self._received is not None:
            try:
                self._record(())
            except ValueError:  # what the engine returned cannot be recorded, which may be the failure
                self._received = None
        self.outcome = Outcome(judgments=None, confidence=None, stop_reason=stop_reason, reason=clean(reason))

    def _ended(self, parsed: ParsedRound, result: RoundResult) -> Outcome | None:
        """The episode's outcome if this round ends it."""

        def without_verdict(stop: StopReason, reason: str) -> Outcome:
            return Outcome(judgments=None, confidence=None, stop_reason=stop, reason=clean(reason))

        round_number = len(self._visibility.rounds)
        if result.finish_reason is FinishReason.ERROR:
            return without_verdict(StopReason.ENGINE_ERROR, result.error or "the engine gave no reason")
        if result.finish_reason is FinishReason.REFUSED:
            return without_verdict(StopReason.REFUSED, result.error or "the model refused")
        if isinstance(parsed.ending, FinalAnswer):
            answer = parsed.ending.answer
            said = clean(result.text)[answer.span.start : answer.span.end]
            if _squeezed(_TAGS.sub("", said)) in _squeezed(self.item.prompt):
                self._notes.append(QUOTED_NOTE)
            probabilities, why_not = None, None
            if self.watch:
                probabilities, why_not = answer_probabilities(answer, result)
            return Outcome(
                judgments=answer.judgments,
                confidence=answer.confidence or self._last_confidence(),
                stop_reason=StopReason.ANSWERED,
                reason=None,
                probabilities=probabilities,
                probabilities_reason=why_not,
            )
        if result.finish_reason is FinishReason.CONTEXT:
            reason = result.error or f"round {round_number}: the context is full"
            return without_verdict(StopReason.CONTEXT_LIMIT, reason)
        if isinstance(parsed.ending, ParseFailure):
            if result.finish_reason is FinishReason.LENGTH:
                limit = self.settings.max_round_tokens
                reason = f"round {round_number} reached {limit} tokens without an ending"
                return without_verdict(StopReason.TOKEN_LIMIT, reason)
            return without_verdict(StopReason.UNPARSEABLE, f"round {round_number}: {parsed.ending.message}")
        if round_number >= self.settings.max_rounds:
            reason = f"round {round_number}, the last one allowed, asked for frames instead of answering"
            return without_verdict(StopReason.ROUND_LIMIT, reason)
        return None

    def _last_confidence(self) -> int | None:
        """The confidence of the last recommended answer, which a final answer without CF keeps."""
        for record in reversed(self._rounds):
            if record.recommendation is not None and record.recommendation.confidence is not None:
                return record.recommendation.confidence
        return None

    def _prompt_frames(self, numbers: tuple[int, ...], first_place: int = 1) -> list[PromptFrame]:
        frames = [self.workspace.frame(number) for number in numbers]
        ends = (self.workspace.n_frames_1 + 1, self.workspace.n_frames + 1)
        starts = sorted(set(numbers))
        following = [*starts, ends[1]][1:]
        gaps = {a: min(b, ends[a >= ends[0]]) - a - 1 for a, b in zip(starts, following, strict=True)}
        return [
            PromptFrame(f.frame_number, f.video, f.frame_index, f.pts_seconds, place, gaps[f.frame_number])
            for place, f in enumerate(frames, start=first_place)
        ]

    def _segments(self, shown: tuple[ShownFrame, ...]) -> dict[int, FrameSegment]:
        return {showing.frame_number: self._segment(showing) for showing in shown}

    def _segment(self, showing: ShownFrame) -> FrameSegment:
        # Without the episode in it, the segment makes no circle that would keep clips in memory for a while.
        workspace = self.workspace
        frame = workspace.frame(showing.frame_number, showing.view)
        return FrameSegment(
            shown=showing,
            key=FrameKey(frame.path, frame.frame_index, *frame.size, frame.view, frame.file_state),
            size=frame.size,
            load=lambda: workspace.pixels([showing.frame_number], showing.view)[0],
        )

    def _record(self, outcome_messages: tuple[Message, ...]) -> None:
        """Records the round that was just received."""
        assert self._received is not None
        entry, result, parsed = self._visibility.rounds[-1], self._received.result, self._received.parsed
        recommendation = parsed.ending.recommendation if isinstance(parsed.ending, ToolRequest) else None
        tools = _tool_records(parsed, self._received.tool_outcomes)
        self._rounds.append(
            RoundRecord(
                round_number=entry.round_number,
                live=entry.live,
                expired=entry.expired,
                text=self._received.text,
                token_ids=result.token_ids,
                logprobs=result.logprobs,
                finish_reason=result.finish_reason,
                prompt_tokens=result.prompt_tokens,
                prefilled_tokens=result.prefilled_tokens,
                failures=tuple(
                    FailureRecord(reason=f.reason, start=f.span.start, end=f.span.end, message=f.message)
                    for f in parsed.failures
                ),
                recommendation=recommendation
                and RecommendationRecord(
                    judgments=recommendation.judgments, confidence=recommendation.confidence
                ),
                tool=tools[0] if tools else None,
                further_tools=tools[1:],
                outcome_messages=tuple(MessageRecord.of(message) for message in outcome_messages),
                repairs=tuple(
                    RepairRecord(kind=repair.kind, start=repair.span.start, end=repair.span.end)
                    for repair in parsed.repairs
                ),
            )
        )
        self._received = None

    def trajectory(self) -> Trajectory:
        """The finished episode's record."""
        assert self.outcome is not None
        seen = {(s.frame_number, s.view) for entry in self._visibility.rounds for s in entry.live}
        asked = {(n, tool.view) for r in self._rounds for tool in r.tools for n in tool.frame_numbers}
        chosen = sorted(seen | asked, key=lambda frame: (frame[0], frame[1] or ()))
        frames = [self.workspace.frame(number, view) for number, view in chosen]
        return Trajectory(
            id=self.item.id,
            prompt=clean(self.item.prompt),
            dataset=self.item.dataset,
            videos=tuple(
                VideoRecord(
                    path=clean(info.path),
                    codec=info.codec,
                    width=info.width,
                    height=info.height,
                    n_frames=info.n_frames,
                    fps=info.fps,
                    duration_seconds=info.duration_seconds,
                    is_variable_frame_rate=info.is_variable_frame_rate,
                    truncated=info.truncated,
                    size_bytes=None if content is None else content.size_bytes,
                    sha256=None if content is None else content.sha256,
                    reader=reader,
                )
                for info, content, reader in zip(
                    self.workspace.infos, self.workspace.contents, self.workspace.readers, strict=True
                )
            ),
            n_frames=self.workspace.n_frames,
            n_frames_1=self.workspace.n_frames_1,
            frames=tuple(
                FrameRecord(
                    frame_number=f.frame_number,
                    video=f.video,
                    frame_index=f.frame_index,
                    pts_seconds=f.pts_seconds,
                    height=f.size[0],
                    width=f.size[1],
                    view=f.view,
                )
                for f in frames
            ),
            settings=self.settings,
            engine=self.engine_name,
            policy_version=self.policy_version,
            seed=self.item.seed,
            first_input=tuple(MessageRecord.of(message) for message in self._first),
            rounds=tuple(self._rounds),
            outcome=self.outcome,
            notes=(*self.workspace.notes, *self._notes),
            latency_seconds=time.monotonic() - self._started,
        )


def _squeezed(text: str) -> str:
    """A text without blanks and in lower case, to find quotations."""
    return "".join(text.split()).lower()


def _tool_records(parsed: ParsedRound, outcomes: tuple[ToolOutcome, ...]) -> tuple[ToolRecord, ...]:
    calls = parsed.ending.calls if isinstance(parsed.ending, ToolRequest) else ()
    return tuple(
        map(_tool_record, (*calls[: len(outcomes)], *[None] * (len(outcomes) - len(calls))), outcomes)
    )


def _tool_record(call: ToolCall | ParseFailure | None, outcome: ToolOutcome) -> ToolRecord:
    name = clean(call.name) if isinstance(call, ToolCall) and call.name is not None else None
    if isinstance(outcome, FramesShown):
        return ToolRecord(
            name=name,
            frame_numbers=outcome.frame_numbers,
            view=outcome.view,
            error_kind=None,
            error=None,
            note=None if outcome.note is None else clean(outcome.note),
        )
    return ToolRecord(name=name, frame_numbers=(), error_kind=outcome.kind, error=clean(outcome.message))


def _joined(messages: list[Message]) -> Message:
    """Messages of one role as one message, each on a line of its own."""
    segments = list(messages[0].segments)
    for message in messages[1:]:
        segments += [TextSegment("\n"), *message.segments]
    return Message(messages[0].role, tuple(segments))
