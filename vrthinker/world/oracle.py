"""The oracle: an engine that reads the world's stored truth instead of pixels.

The oracle implements the same protocol as every engine, so that its episodes come from the same runner as all
others and serve as traces for cold start. It knows only what a judge could see: of a frame that its session
was not shown, it knows nothing. Each session draws one behaviour from a mixture, so that traces are not
perfect and later training stages can improve on them.

Invariant: a text depends only on the session's seed and on the frames that it was shown.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vrthinker.engine.base import (
    Engine,
    FinishReason,
    FrameSegment,
    Message,
    RoundRequest,
    RoundResult,
    Session,
)
from vrthinker.engine.context import LiveContext
from vrthinker.engine.sessions import SessionTable
from vrthinker.errors import EngineError
from vrthinker.visibility import MemoryMode
from vrthinker.world import words as words
from vrthinker.world.files import clip_paths
from vrthinker.world.truth_reader import CALL_FRAMES, hinted_call, probes
from vrthinker.world.world import PairTruth, first_indices, judgments_from_counts


class Behavior(enum.StrEnum):
    """The behaviour of one session."""

    ORACLE = "oracle"
    """The session looks into every gap that a hint marks, then answers."""
    RANDOM_SEGMENT = "random_segment"
    """The session looks into a random gap of each clip (or of one clip, if that takes a whole call)."""
    RANDOM_FRAMES = "random_frames"
    """The session looks at random frames, in one call or in all calls it may make, then answers."""
    IMMEDIATE = "immediate"
    """The session answers from the first frames."""


class BehaviorMix(BaseModel):
    """The weights with which behaviours are drawn. They need not add up to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    oracle: float = Field(1.0, ge=0.0)
    random_segment: float = Field(0.0, ge=0.0)
    random_frames: float = Field(0.0, ge=0.0)
    immediate: float = Field(0.0, ge=0.0)

    def draw(self, rng: np.random.Generator) -> Behavior:
        """Draws one behaviour."""
        weights = np.array([getattr(self, behavior.value) for behavior in Behavior])
        if not weights.any():
            raise EngineError("behaviours: all weights are 0, wanted at least one above")
        return list(Behavior)[int(rng.choice(len(weights), p=weights / weights.sum()))]


@dataclass
class _State:
    pair: PairTruth
    files: tuple[str, str]
    behavior: Behavior
    rng: np.random.Generator
    context: LiveContext
    new_frames: list[int]
    calls_left: int
    rounds: int = 0
    found: list[list[words.Found]] = field(default_factory=lambda: [[], []])
    pending: list[list[tuple[int, int]]] = field(default_factory=lambda: [[], []])
    shown: set[int] = field(default_factory=set)


class OracleEngine(Engine):
    """Implements `vrthinker.engine.base.Engine` over stored truth.

    Args:
        truths: The truths under the paths of their clips, as `truths_by_clip` gives them.
        mix: The behaviours, and how often each is drawn.
        calls: The most tool calls of a session. With 0, hints name no gaps.
        span: The value of `WorldConfig.span[0]`, which tells it how densely to look.
        max_sessions: The number of sessions that may be open at once.
    """

    def __init__(
        self,
        truths: Mapping[str, PairTruth],
        mix: BehaviorMix | None = None,
        *,
        calls: int = 2,
        span: float = 0.25,
        max_sessions: int = 64,
    ) -> None:
        self._truths, self._mix, self._calls, self._span = truths, mix or BehaviorMix(), calls, span
        self._sessions: SessionTable[_State] = SessionTable(max_sessions, name=self.name)
        self._finished: list[RoundResult] = []
        self._policy_version = 0

    @property
    def name(self) -> str:
        """The engine's name in records and error messages."""
        return "oracle"

    @property
    def policy_version(self) -> int:
        """The version that the last `update_weights` gave; 0 before."""
        return self._policy_version

    @property
    def max_sessions(self) -> int:
        """The number of sessions that may be open at once."""
        return self._sessions.max_sessions

    def open(self, messages: Sequence[Message], *, seed: int = 0, memory: MemoryMode = "rerender") -> Session:
        """Starts a session. The clips of its first frames, in either order, identify the pair.

        Raises:
            EngineError: `max_sessions` are open, the engine is shut down, or the messages show no frames, or
                frames that are not those of a pair of this world.
        """
        context = LiveContext().extended(messages)
        pair, files = self._pair(context.frames)
        rng = np.random.default_rng([seed & 0xFFFF_FFFF_FFFF_FFFF, 71])
        state = _State(
            pair=pair,
            files=files,
            behavior=self._mix.draw(rng),
            rng=rng,
            context=context,
            new_frames=[frame.shown.frame_number for frame in context.frames],
            calls_left=self._calls,
        )
        return self._sessions.add(state)

    def fork(self, session: Session, seeds: Sequence[int]) -> list[Session]:
        """Copies a session that has written nothing yet, once per seed.

        Raises:
            EngineError: The session is not open or has begun, or there is no room.
        """
        state = self._sessions.check_fork(session, len(seeds))
        return [self.open(state.context.messages, seed=seed) for seed in seeds]

    def submit(self, request: RoundRequest) -> None:
        """Writes a round, which `collect` then returns.

        Raises:
            EngineError: The session is not open or has a round under way, or the request asks for a guided
                round or shows frames of another pair.
        """
        state = self._sessions.check_submit(request.session)
        if request.limits.form is not None:
            raise EngineError("oracle: writes its own form; ask for rounds that are not guided")
        context = state.context.entered(request)
        new = [frame for message in request.new for frame in message.frames]
        if not are_where_they_belong(new, state.pair, state.files):
            raise EngineError(
                f"oracle: session {request.session.id} is shown frames of other clips than before"
            )
        state.new_frames += [frame.shown.frame_number for frame in new]
        text = self._write(state)
        state.new_frames = []
        state.context = context.written(text)
        self._sessions.begin_round(request.session)
        self._finished.append(RoundResult(request.session, text, FinishReason.STOP))

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        """Returns finished rounds; an empty list when nothing is under way."""
        results, self._finished = self._finished, []
        for result in results:
            self._sessions.end_round(result.session)
        return results

    def close(self, session: Session) -> None:
        """Forgets a session and its uncollected round. Closing twice is harmless.

        Raises:
            EngineError: The session was never opened here.
        """
        self._sessions.close(session)
        self._finished = [result for result in self._finished if result.session != session]

    def shutdown(self) -> None:
        """Closes every session."""
        self._sessions.shut_down()
        self._finished.clear()

    def update_weights(
        self, named_tensors: Iterable[tuple[str, Any]] | Mapping[str, Any], policy_version: int
    ) -> None:
        """Takes the version. The oracle has no weights.

        Raises:
            EngineError: A session is open, or the engine is shut down.
        """
        self._sessions.check_update_weights()
        self._policy_version = policy_version

    def _pair(self, frames: Sequence[FrameSegment]) -> tuple[PairTruth, tuple[str, str]]:
        """The truth, with its clips in the order in which they are shown, and the clips' files."""
        if not frames:
            raise EngineError("oracle: the first input shows no frame; it reads truths by the frames' clips")
        path = file_of(frames[0])
        pair = self._truths.get(path)
        if pair is None:
            raise EngineError(f"oracle: {path} is no clip of this world")
        first, second = (os.path.abspath(file) for file in clip_paths(Path(path).parents[1], pair))
        for order, files in ((pair, (first, second)), (pair.swapped(), (second, first))):
            if are_where_they_belong(frames, order, files):
                return order, files
        raise EngineError(
            f"oracle: the first frames are not those of {first} and {second}, numbered without gaps; give it "
            "both clips of one pair, in either order, without max_fps"
        )

    # Writing

    def _write(self, state: _State) -> str:
        before = [list(events) for events in state.found]
        self._read(state)
        new = [events[len(known) :] for events, known in zip(state.found, before, strict=True)]
        span = self._span if self._calls else None
        text = words.snapshot(state.pair, state.new_frames, first=state.rounds == 0, span=span)
        names = {number: name for name, number in enumerate(state.new_frames, start=1)}
        named = [[(names[number], defects) for number, defects in events] for events in new]
        text += "<think>" + words.findings(before, named)
        state.rounds += 1
        judgments = judgments_from_counts(*map(words.defect_counts, state.found))
        unresolved = sum(map(len, state.pending))
        decision, asked = self._decide(state)
        # Confidence is high if no hint is left to look into, middle for up to two, low for more.
        answer = words.answer(judgments, 1 if not unresolved else 2 if unresolved <= 2 else 3)
        text += f"\n{decision}</think>"
        if not asked:
            return f"{text}<answer>{answer}</answer>"
        return f"{text}<recommend answer>{answer}</recommend answer>{words.tool_call(asked)}"

    def _read(self, state: _State) -> None:
        """Reads the new frames: notes newly found events, and gaps that are now marked or resolved."""
        pair = state.pair
        before = {number for events in state.found for number, _ in events}
        known_events = {(clip, pair.clips[clip].event_at(i)) for clip, i in map(pair.locate, before)}
        for number in state.new_frames:
            clip, index = pair.locate(number)
            event = pair.clips[clip].event_at(index)
            if event is not None and event.defects and (clip, event) not in known_events:
                known_events.add((clip, event))
                state.found[clip].append((number, event.defects))
        state.shown.update(state.new_frames)
        for clip, truth in enumerate(pair.clips):
            offset = clip * pair.clips[0].n_frames + 1
            shown = {number - offset for number in state.shown}
            state.pending[clip] = [
                event.gap
                for event in truth.events
                if {event.hint_index, event.gap[0]} <= shown
                and not set(probes(event.gap, self._span)) <= shown
                and not (event.defects and any(map(event.covers, shown)))
            ]

    def _decide(self, state: _State) -> tuple[str, list[int]]:
        """The end of the thinking, and the frame numbers to request. Without any, the session answers."""
        looks: list[tuple[int, tuple[int, int]]] = []
        if not state.calls_left:
            return words.decision([], []), []
        if state.behavior is Behavior.ORACLE:
            looks = hinted_call(state.pending, self._span)
        elif state.calls_left == self._calls and state.behavior is Behavior.RANDOM_SEGMENT:
            looks = [(clip, self._random_gap(state, clip)) for clip in range(2)]
            if sum(len(probes(gap, self._span)) for _, gap in looks) > CALL_FRAMES:
                looks = [looks[int(state.rng.integers(2))]]
        elif state.behavior is Behavior.RANDOM_FRAMES and self._goes_on(state):
            state.calls_left -= 1
            return "look around", self._random_frames(state)
        if not looks:
            return words.decision([], []), []
        state.calls_left -= 1
        offsets = [1, 1 + state.pair.clips[0].n_frames]
        left = [(clip, gap) for clip, gaps in enumerate(state.pending) for gap in gaps]
        names = [
            [words.gap_name(state.pair, clip, gap, self._span) for clip, gap in gaps]
            for gaps in (looks, [gap for gap in left if gap not in looks])
        ]
        asked = [offsets[clip] + index for clip, gap in looks for index in probes(gap, self._span)]
        return words.decision(*names), sorted(asked)

    def _goes_on(self, state: _State) -> bool:
        if len(state.shown) == sum(clip.n_frames for clip in state.pair.clips):
            return False
        return state.calls_left == self._calls or bool(state.rng.integers(2))

    @staticmethod
    def _random_gap(state: _State, clip: int) -> tuple[int, int]:
        n_frames = state.pair.clips[clip].n_frames
        bounds = (*first_indices(n_frames), n_frames)
        number = int(state.rng.integers(len(bounds) - 1))
        return bounds[number], bounds[number + 1]

    @staticmethod
    def _random_frames(state: _State) -> list[int]:
        first = state.pair.clips[0].n_frames
        asked: list[int] = []
        for numbers in (range(1, first + 1), range(first + 1, first + state.pair.clips[1].n_frames + 1)):
            new = [number for number in numbers if number not in state.shown]
            asked += sorted(int(n) for n in state.rng.choice(new, min(4, len(new)), replace=False))
        return asked


def file_of(frame: FrameSegment) -> str:
    """The absolute path of a frame's clip."""
    return os.path.abspath(str(frame.key[0]))


def are_where_they_belong(frames: Iterable[FrameSegment], pair: PairTruth, files: tuple[str, str]) -> bool:
    """Whether the frames' numbers refer to the same frames as in the truth."""
    located = [(frame, *pair.locate(frame.shown.frame_number)) for frame in frames]
    return all(
        (file_of(frame), *frame.key[1:2]) == (files[clip], index) and index < pair.clips[clip].n_frames
        for frame, clip, index in located
    )


def truths_by_clip(folder: Path, truths: Iterable[PairTruth]) -> dict[str, PairTruth]:
    """The truths of a world folder by the absolute paths of their clips."""
    return {os.path.abspath(path): truth for truth in truths for path in clip_paths(folder, truth)}
