"""Conversations of several rounds with frames that expire, played the same way on any engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vrthinker.engine.base import (
    Engine,
    FrameSegment,
    Message,
    RoundLimits,
    RoundRequest,
    RoundResult,
    Session,
    TextSegment,
)
from vrthinker.visibility import VisibilityRecord, WindowMemory


@dataclass
class _Conversation:
    rng: np.random.Generator
    record: VisibilityRecord
    session: Session
    pending: tuple[Message, ...] = ()
    results: list[RoundResult] = field(default_factory=list)


def frame(pixels_of: int, side: tuple[int, int], outcome: int, number: int) -> FrameSegment:
    """A frame whose pixels follow from the clip's number and its own."""
    from vrthinker.visibility import ShownFrame

    def load() -> np.ndarray:
        drawn = np.random.default_rng([pixels_of, number, *side])
        return drawn.integers(0, 256, (*side, 3), dtype=np.uint8)

    return FrameSegment(ShownFrame(outcome, number), (f"clip-{pixels_of}", number, *side), side, load)


def shows(clip: int, sides: Sequence[tuple[int, int]], outcome: int, numbers: Sequence[int]) -> Message:
    """A message that shows frames of a clip."""
    segments: list[TextSegment | FrameSegment] = [TextSegment(f"Frames of clip {clip}, outcome {outcome}: ")]
    for number in numbers:
        side = sides[number % len(sides)]
        segments += [TextSegment(f"Frame {number}: "), frame(clip, side, outcome, number), TextSegment("\n")]
    return Message("user", tuple(segments))


def play(
    engine: Engine,
    *,
    factor: int,
    conversations: int,
    rounds: int = 3,
    group: int = 1,
    window: int | None = 1,
    temperature: float = 0.0,
    max_tokens: int = 8,
    seed: int = 0,
) -> list[list[RoundResult]]:
    """Plays conversations together, each at its own pace; returns the rounds of each.

    Args:
        engine: The engine.
        factor: The side of a token in pixels.
        conversations: Their number.
        rounds: The rounds of each.
        group: How many of them share their first input.
        window: For how many rounds a frame stays.
        temperature: The temperature.
        max_tokens: The most tokens of a round.
        seed: The seed of frames and sampling.
    """
    sides = [(factor * 2, factor * 2), (factor * 3, factor * 2), (factor, factor * 2)]
    limits = RoundLimits(max_tokens, temperature=temperature)
    active: dict[int, _Conversation] = {}
    everyone: list[_Conversation] = []
    for first in range(0, conversations, group):
        clip = seed * 1000 + first
        opening = [
            Message("system", (TextSegment("You judge videos."),)),
            shows(clip, sides, 0, range(1, 5)),
        ]
        sessions = [engine.open(opening, seed=clip)]
        if group > 1:
            sessions += engine.fork(sessions[0], [clip + member for member in range(1, group)])
        for member, session in enumerate(sessions):
            record = VisibilityRecord(WindowMemory(window))
            record.show(0, list(range(1, 5)))
            one = _Conversation(np.random.default_rng([seed, first, member]), record, session)
            everyone.append(one)
            active[session.id] = one

    def submit(one: _Conversation) -> None:
        entry = one.record.enter()
        engine.submit(RoundRequest(one.session, one.pending, entry.expired, limits))

    clips = {one.session.id: seed * 1000 + place - place % group for place, one in enumerate(everyone)}
    for one in everyone:
        submit(one)
    while active:
        for result in engine.collect():
            one = active[result.session.id]
            one.results.append(result)
            if len(one.results) == rounds or result.error is not None:
                engine.close(one.session)
                del active[result.session.id]
                continue
            outcome = len(one.results)
            numbers = sorted(int(n) for n in one.rng.choice(np.arange(100, 130), 2, replace=False))
            one.record.show(outcome, numbers)
            one.pending = (shows(clips[one.session.id], sides, outcome, numbers),)
            submit(one)
    return [one.results for one in everyone]
