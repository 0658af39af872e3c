"""The bar under each clip on the evidence page, with the shown frames and the planted events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vrthinker.episode.trajectory import Trajectory
from vrthinker.report.page.truth import PlantedEvent

_NARROWEST = 1 / 110
"""The smallest width of a mark as a share of the bar, so that it can be seen and clicked."""


@dataclass(frozen=True)
class Mark:
    """A mark on the bar. Its ends are counted in frames from the clip's first frame."""

    kind: Literal["first", "asked", "event", "hidden"]
    start: float
    width: float
    title: str


@dataclass(frozen=True)
class EventView:
    """A planted event in words.

    Attributes:
        event: The planted event.
        where: The event's frame numbers, and its times, if they are known.
        seen: The rounds that saw a frame of it.
    """

    event: PlantedEvent
    where: str
    seen: str


def marks(trajectory: Trajectory, video: int, events: Sequence[PlantedEvent]) -> tuple[Mark, ...]:
    """All marks on one clip's bar, those underneath first."""
    n_frames = trajectory.videos[video - 1].n_frames
    placed = [
        _mark("hidden" if event.hidden else "event", event.first_index, event.end_index, n_frames, event.text)
        for event in events
        if event.video == video and event.first_index < n_frames
    ]
    frames = {frame.frame_number: frame for frame in trajectory.frames if frame.video == video}
    shown = sorted({(s.outcome, s.frame_number) for record in trajectory.rounds for s in record.live})
    done: set[tuple[str, int]] = set()
    for outcome, number in shown:
        kind: Literal["first", "asked"] = "asked" if outcome else "first"
        if number not in frames or (kind, number) in done:
            continue
        done.add((kind, number))
        index = frames[number].frame_index
        how = f"asked for in round {outcome}" if outcome else "first input"
        placed.append(_mark(kind, index, index + 1, n_frames, f"frame {number}, {how}"))
    return tuple(placed)


def event_views(
    trajectory: Trajectory, video: int, events: Sequence[PlantedEvent], times: Sequence[float]
) -> tuple[EventView, ...]:
    """One clip's planted events in words, in order. `times` are those of `PageClip`; empty if unknown."""
    return tuple(
        EventView(event, _where(trajectory, event, times), _seen(trajectory, event))
        for event in sorted(events, key=lambda event: event.first_index)
        if event.video == video
    )


def _mark(
    kind: Literal["first", "asked", "event", "hidden"], start: int, end: int, n_frames: int, title: str
) -> Mark:
    end = min(end, n_frames)
    width = max(float(end - start), n_frames * _NARROWEST)
    left = min(max(0.0, (start + end - width) / 2), n_frames - width)
    return Mark(kind, round(left, 4), round(width, 4), title)


def _where(trajectory: Trajectory, event: PlantedEvent, times: Sequence[float]) -> str:
    first, last = event.first_index, event.end_index - 1
    if trajectory.settings.numbers_all_frames:
        before = 0 if event.video == 1 else trajectory.n_frames_1
        named = (
            f"frame {before + first + 1}"
            if first == last
            else f"frames {before + first + 1} to {before + last + 1}"
        )
    else:  # in this case not every frame of the file has a number
        named = f"frame_index {first}" if first == last else f"frame_index {first} to {last}"
    if event.end_index < len(times):
        return f"{named}, {times[first]:.2f} to {times[event.end_index]:.2f} s"
    return named


def _seen(trajectory: Trajectory, event: PlantedEvent) -> str:
    showing = {
        frame.frame_number for frame in trajectory.frames if event.covers(frame.video, frame.frame_index)
    }
    rounds = [
        record.round_number
        for record in trajectory.rounds
        if any(shown.frame_number in showing for shown in record.live)
    ]
    if not rounds:
        return "never seen"
    return f"seen in round{'s' if len(rounds) > 1 else ''} {', '.join(map(str, rounds))}"
