"""The synthetic world: pairs of clips with planted defects, so that every label is true by construction.

One or two objects move through a small picture. *Events* are planted into the clips: for a few frames the
object has a wrong colour (text alignment), the picture is noisy (visual quality), or the object is off its
lane (motion quality). *Visible* events cover a frame of the first input. *Hidden* events lie between two such
frames, and a *hint* on one of the two says where to look, but not what is wrong. A judge that does not look
can only guess. `truth_reader.py` computes how much accuracy there is to win by looking.

The world is a test bench with planted truth, not a benchmark of real video.

Invariant: `sample_pair(config, seed, index)` is a pure function, and a `PairTruth` holds everything that its
pixels depend on (`pixels.py`). Judgments count events: the video with fewer defects of a kind is better in
that kind's dimension, and the video with fewer defects in total is better overall.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vrthinker.episode.dimensions import Dimension, Judgments, Preference
from vrthinker.episode.settings import SYNTHETIC_COMMENT

FIRST_FRAMES = 4
"""The number of first-input frames of each clip, which places the events (`initial_frames` is 8)."""
WORLD_COMMENT = SYNTHETIC_COMMENT
"""The comment in every clip's metadata, by which a judge of this world recognizes the world's clips."""
DEFECT_SHARE = 0.5
"""The probability of each kind of defect in an event."""
MIN_FRAMES, MAX_FRAMES = FIRST_FRAMES * 4, 4096
"""The fewest and most frames of a clip."""
ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""The pattern of a pair's id, which is part of file names."""
UNITS = 56
"""The number of units per side of the picture."""
TRAVEL = 11.0
"""The distance from a clip's first frame to its end in units, without the leaps of speed hints."""
LEAP = 7.0
"""The distance in units that an object leaps inside a gap that a speed hint marks: more than twice what it
comes in a gap otherwise."""
FIRST_ALONG = 12.0
"""The distance in units from the picture's edge at which an object starts, before its clip's `start`."""
LANES = {1: (28.0,), 2: (17.0, 39.0)}
"""The distance of each object's lane from the top edge (of a vertical lane, from the left one), in units."""
_STREAM = 20261121  # separates the world's random numbers from other uses of the same seed

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "cyan")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("right", "left", "down", "up")


class Defect(enum.StrEnum):
    """The kinds of defect in a frame, one kind per dimension."""

    COLOR = "color"
    """The object's colour differs from the caption's (TA)."""
    NOISE = "noise"
    """The picture has heavy noise (VQ)."""
    JUMP = "jump"
    """The object is off its lane (MQ)."""


DEFECTS = tuple(Defect)
DIMENSION_OF = {Defect.COLOR: Dimension.TA, Defect.NOISE: Dimension.VQ, Defect.JUMP: Dimension.MQ}


class Hint(enum.StrEnum):
    """The signs on a first-input frame that an event lies in the gap beside it."""

    BARS = "bars"
    """There are pale bars on the frame before the gap."""
    FADE = "fade"
    """There is faint noise on the frame before the gap."""
    SPEED = "speed"
    """On the frame after the gap, the object has moved further than its speed explains."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class WorldConfig(_Model):
    """The difficulty of a world. `PRESETS` has three named ones."""

    size: int = Field(112, ge=56, le=1024)
    """Width and height of the clips in pixels, an even number."""
    fps: int = Field(8, ge=1, le=60)
    frames: tuple[int, int] = (32, 32)
    """The fewest and most frames of a clip."""
    colors: int = Field(4, ge=2, le=len(COLORS))
    directions: int = Field(2, ge=1, le=len(DIRECTIONS))
    objects: Literal[1, 2] = 1
    hidden_events: tuple[float, ...] = (0.2, 0.5, 0.3)
    """Probability of 0, 1, 2, ... hidden events in a clip."""
    same_number: bool = True
    """Whether both clips have equally many hidden events."""
    visible_event: tuple[Probability, Probability] = (0.8, 0.3)
    """Probability of a visible event in a clip without hidden events, and in a clip with them."""
    span: tuple[float, float] = (0.25, 0.375)
    """Shortest and longest event, as a share of the gap between two first-input frames."""
    decoys: float = Field(0.0, ge=0.0, le=1.0)
    """Share of hints that mark an event without defects, besides those that have none by chance."""
    hints: tuple[Hint, ...] = (Hint.BARS,)
    bars: float = Field(0.45, gt=0.0, le=0.7)
    """How much brighter the pale bars are than the background (1 is white)."""
    noise: float = Field(0.3, gt=0.0, le=0.5)
    """Strength of the heavy noise, which is the absolute value of a normal with this standard deviation."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.size % 2:
            raise ValueError(f"size: got {self.size}, allowed: even numbers")
        if not MIN_FRAMES <= self.frames[0] <= self.frames[1] <= MAX_FRAMES:
            raise ValueError(f"frames: got {self.frames}, allowed: {MIN_FRAMES} to {MAX_FRAMES}, ascending")
        if self.colors <= self.objects:
            raise ValueError(f"colors: got {self.colors}, allowed: more than there are objects")
        total = math.fsum(self.hidden_events)
        if min(self.hidden_events, default=-1) < 0 or abs(total - 1) > 1e-9:
            raise ValueError(
                f"hidden_events: got {self.hidden_events}, allowed: probabilities that add up to 1"
            )
        if len(self.hidden_events) > FIRST_FRAMES:
            raise ValueError(f"hidden_events: got {len(self.hidden_events)}, allowed: up to {FIRST_FRAMES}")
        if not 0 < self.span[0] <= self.span[1] <= 0.5:
            raise ValueError(f"span: got {self.span}, allowed: above 0, up to 0.5, ascending")
        if not self.hints or (Hint.SPEED in self.hints and len(set(self.hints)) == 1):
            raise ValueError(
                "hints: got none that can mark a clip's last gap, allowed: bars or fade among them"
            )
        return self


Difficulty = Literal["easy", "medium", "hard"]
PRESETS: dict[Difficulty, WorldConfig] = {
    "easy": WorldConfig(),
    "medium": WorldConfig(
        frames=(24, 48),
        directions=4,
        hidden_events=(0.15, 0.35, 0.3, 0.2),
        same_number=False,
        hints=(Hint.BARS, Hint.FADE, Hint.SPEED),
        bars=0.2,
    ),
    "hard": WorldConfig(
        frames=(128, 256),
        colors=len(COLORS),
        directions=4,
        objects=2,
        hidden_events=(0.15, 0.35, 0.3, 0.2),
        same_number=False,
        span=(0.125, 0.25),
        decoys=0.25,
        hints=(Hint.BARS, Hint.FADE, Hint.SPEED),
        bars=0.15,
    ),
}


class Event(_Model):
    """One planted event. Frame indices are 0-based in the clip's file; the end of a range is exclusive."""

    first_index: int = Field(ge=0, lt=MAX_FRAMES)
    end_index: int = Field(ge=1, le=MAX_FRAMES)
    defects: tuple[Defect, ...] = Field(max_length=len(DEFECTS))
    """May be empty (planted as a decoy, or no defect was drawn). Then the event shows nothing."""
    gap: tuple[int, int]
    """The first-input frame at or before the event, and the next one (or the clip's end)."""
    hint: Hint | None
    """The hint at a hidden event; None for a visible event."""

    @model_validator(mode="after")
    def _lies_in_its_gap(self) -> Self:
        start, end = self.gap
        first_fits = self.first_index == start if self.hint is None else self.first_index > start
        if not (first_fits and self.first_index < self.end_index <= end):
            kind = "visible" if self.hint is None else "hidden"
            raise ValueError(
                f"got a {kind} event over frames {self.first_index} to {self.end_index} (half-open), "
                f"allowed: inside its gap {self.gap}, on its first frame exactly if it is visible"
            )
        if len(set(self.defects)) < len(self.defects):
            raise ValueError("defects: got one twice, allowed: each once")
        return self

    @property
    def hidden(self) -> bool:
        """Whether no frame of the first input shows the event."""
        return self.hint is not None

    def covers(self, frame_index: int) -> bool:
        """Whether the frame shows the event."""
        return self.first_index <= frame_index < self.end_index

    @property
    def hint_index(self) -> int | None:
        """The index of the frame on which the hint is seen."""
        if self.hint is None:
            return None
        return self.gap[1] if self.hint is Hint.SPEED else self.gap[0]


class ClipTruth(_Model):
    """One clip: its events, and all that its pixels are drawn from. A picture's side is `UNITS` long."""

    n_frames: int = Field(ge=MIN_FRAMES, le=MAX_FRAMES)
    events: tuple[Event, ...] = Field(max_length=FIRST_FRAMES)
    lane: float = Field(ge=-4, le=4)
    """Offset of the lane from the middle."""
    start: float = Field(ge=-2, le=2)
    """Offset of the object's first position."""
    jump: float = Field(ge=-16, le=16)
    """Distance of a jump from the lane, with its sign."""
    wrong_color: int = Field(ge=0, lt=len(COLORS))
    seed: int = Field(ge=0, lt=1 << 31)
    """Seed of the background and the noise."""

    @model_validator(mode="after")
    def _has_at_most_one_event_in_a_gap(self) -> Self:
        gaps = list(pairwise((*first_indices(self.n_frames), self.n_frames)))
        used = [event.gap for event in self.events]
        if any(gap not in gaps for gap in used) or any(a >= b for a, b in pairwise(used)):
            raise ValueError(f"events: got gaps {used}, allowed: among {gaps}, each once, ascending")
        if any(event.hint is Hint.SPEED and event.gap == gaps[-1] for event in self.events):
            raise ValueError("events: got a speed hint for the last gap, allowed: gaps with a frame behind")
        return self

    def event_at(self, frame_index: int) -> Event | None:
        """The event that the frame shows, if any. Events never overlap."""
        return next((event for event in self.events if event.covers(frame_index)), None)

    def defects_at(self, frame_index: int) -> tuple[Defect, ...]:
        """The defects of a frame."""
        event = self.event_at(frame_index)
        return event.defects if event is not None else ()

    def hints_at(self, frame_index: int) -> tuple[Hint, ...]:
        """The hints that are seen on a frame: about the gap behind it, and about the gap before it."""
        hints = [e.hint for e in self.events if e.hint is not None and e.hint_index == frame_index]
        return tuple(sorted(hints, key=lambda hint: hint is Hint.SPEED))

    def travelled(self, frame_index: int) -> float:
        """How far the objects have come in a frame: units from the edge at which they started."""
        leaps = sum(event.hint is Hint.SPEED and frame_index >= event.first_index for event in self.events)
        return FIRST_ALONG + self.start + TRAVEL * frame_index / self.n_frames + LEAP * leaps

    @property
    def counts(self) -> tuple[int, int, int]:
        """The number of events with each kind of defect, in the order of `DEFECTS`."""
        a, b, c = (sum(defect in event.defects for event in self.events) for defect in DEFECTS)
        return a, b, c


_ColorAndShape = tuple[
    Annotated[int, Field(ge=0, lt=len(COLORS))], Annotated[int, Field(ge=0, lt=len(SHAPES))]
]


class PairTruth(_Model):
    """The planted truth of one pair. It is stored beside the pairs; a prompt contains only the caption."""

    schema_version: Literal[1] = 1
    id: str = Field(pattern=f"^{ID_PATTERN}\\z")
    size: int = Field(ge=56, le=1024, multiple_of=2)
    fps: int = Field(ge=1, le=60)
    objects: tuple[_ColorAndShape, ...] = Field(min_length=1, max_length=2)
    """(colour, shape) of each object: indices into `COLORS` and `SHAPES`."""
    direction: int = Field(ge=0, lt=len(DIRECTIONS))
    bars: float = Field(gt=0.0, le=0.7)
    noise: float = Field(gt=0.0, le=0.5)
    clips: tuple[ClipTruth, ClipTruth]

    @model_validator(mode="after")
    def _tells_its_colors_apart(self) -> Self:
        for clip in self.clips:
            colors = [color for color, _ in self.objects] + [clip.wrong_color]
            if len(set(colors)) < len(colors):
                raise ValueError(
                    f"got colours {colors[:-1]} and wrong_color {colors[-1]}, allowed: different ones"
                )
        return self

    @property
    def caption(self) -> str:
        """The caption of both clips."""
        things = [f"{COLORS[color]} {SHAPES[shape]}" for color, shape in self.objects]
        verb = "moves" if len(things) == 1 else "move"
        return f"A {' and a '.join(things)} {verb} {DIRECTIONS[self.direction]}."

    @property
    def judgments(self) -> Judgments:
        """The true judgments."""
        return judgments_from_counts(self.clips[0].counts, self.clips[1].counts)

    @property
    def hidden_events(self) -> int:
        """The number of hidden events that show a defect, over both clips."""
        return sum(event.hidden and bool(event.defects) for clip in self.clips for event in clip.events)

    def swapped(self) -> PairTruth:
        """The same pair with its second clip as video 1."""
        return self.model_copy(update={"clips": self.clips[::-1]})

    @property
    def vertical(self) -> bool:
        """Whether the objects move down or up, and not to a side."""
        return self.direction >= 2

    def lanes(self, clip: ClipTruth) -> list[float]:
        """Where each object's lane is in one of the clips: units from the top edge, or from the left one."""
        return [lane + clip.lane for lane in LANES[len(self.objects)]]

    def centres(self, clip: ClipTruth, frame_index: int) -> list[tuple[float, float]]:
        """The (x, y) of each object's centre in a frame of one of the clips, in units from the top left."""
        along = clip.travelled(frame_index)
        if self.direction in (1, 3):
            along = UNITS - 1 - along
        jump = clip.jump if Defect.JUMP in clip.defects_at(frame_index) else 0.0
        lanes = self.lanes(clip)
        lanes[0] += jump
        return [(lane, along) if self.vertical else (along, lane) for lane in lanes]

    def locate(self, frame_number: int) -> tuple[int, int]:
        """The (clip 0 or 1, frame_index) of a frame number, if every frame is numbered."""
        first = self.clips[0].n_frames
        return (0, frame_number - 1) if frame_number <= first else (1, frame_number - 1 - first)


def judgments_from_counts(first: Sequence[int], second: Sequence[int]) -> Judgments:
    """Judges that fewer defects are better, kind by kind, and in total for the overall judgment."""

    def better(a: int, b: int) -> Preference:
        return Preference.TIE if a == b else Preference.VIDEO_1 if a < b else Preference.VIDEO_2

    by_kind = {DIMENSION_OF[d].value: better(a, b) for d, a, b in zip(DEFECTS, first, second, strict=True)}
    return Judgments(**by_kind, OA=better(sum(first), sum(second)))


def first_indices(n_frames: int) -> tuple[int, ...]:
    """The indices of a clip's first-input frames, the same that `Workspace.initial_frames` picks."""
    return tuple(i * n_frames // FIRST_FRAMES for i in range(FIRST_FRAMES))


def sample_pair(config: WorldConfig, seed: int, index: int, prefix: str = "world") -> PairTruth:
    """Draws pair number `index` of a seed."""
    rng = np.random.default_rng([_STREAM, seed, index])
    colors = rng.permutation(config.colors)
    objects = tuple((int(colors[i]), int(rng.integers(len(SHAPES)))) for i in range(config.objects))
    direction = int(rng.integers(config.directions))
    numbers = [int(rng.choice(len(config.hidden_events), p=config.hidden_events)) for _ in range(2)]
    if config.same_number:
        numbers[1] = numbers[0]
    # A wrong colour is a colour that no object has.
    wrong = [int(rng.choice(colors[config.objects :])) for _ in range(2)]
    clips = [sample_clip(config, rng, number, color) for number, color in zip(numbers, wrong, strict=True)]
    return PairTruth(
        id=f"{prefix}-{seed}-{index:06d}",
        size=config.size,
        fps=config.fps,
        objects=objects,
        direction=direction,
        bars=config.bars,
        noise=config.noise,
        clips=(clips[0], clips[1]),
    )


def sample_clip(
    config: WorldConfig, rng: np.random.Generator, hidden_events: int, wrong_color: int
) -> ClipTruth:
    """Draws a clip with a number of hidden events, and perhaps a visible one."""
    n_frames = int(rng.integers(config.frames[0], config.frames[1] + 1))
    bounds = (*first_indices(n_frames), n_frames)
    order = [int(i) for i in rng.permutation(FIRST_FRAMES)]
    events = [_hidden_event(config, rng, bounds[i], bounds[i + 1], n_frames) for i in order[:hidden_events]]
    if hidden_events < FIRST_FRAMES and rng.random() < config.visible_event[hidden_events > 0]:
        start, end = bounds[order[hidden_events]], bounds[order[hidden_events] + 1]
        defects = _defects(rng) or (DEFECTS[int(rng.integers(3))],)
        longest = max(2, math.floor(config.span[0] * (end - start)))
        events.append(
            Event(first_index=start, end_index=start + longest, defects=defects, gap=(start, end), hint=None)
        )
    return ClipTruth(
        n_frames=n_frames,
        events=tuple(sorted(events, key=lambda event: event.first_index)),
        lane=float(rng.uniform(-4, 4)) if config.objects == 1 else float(rng.uniform(-1, 1)),
        start=float(rng.uniform(-2, 2)),
        jump=float(rng.choice([-1, 1]) * rng.uniform(13, 16)) if config.objects == 1 else 10.0,
        wrong_color=wrong_color,
        seed=int(rng.integers(1 << 31)),
    )


def _hidden_event(
    config: WorldConfig, rng: np.random.Generator, start: int, end: int, n_frames: int
) -> Event:
    gap = end - start
    shortest, longest = span_limits(config, gap)
    length = int(rng.integers(shortest, longest + 1))
    first = start + int(rng.integers(1, gap - length + 1))
    defects = () if rng.random() < config.decoys else _defects(rng)
    hints = [hint for hint in config.hints if hint is not Hint.SPEED or end < n_frames]
    hint = hints[int(rng.integers(len(hints)))]
    return Event(first_index=first, end_index=first + length, defects=defects, gap=(start, end), hint=hint)


def _defects(rng: np.random.Generator) -> tuple[Defect, ...]:
    return tuple(defect for defect in DEFECTS if rng.random() < DEFECT_SHARE)


def span_limits(config: WorldConfig, gap: int) -> tuple[int, int]:
    """The fewest and most frames of a hidden event in a gap of `gap` frames."""
    shortest = max(2, math.ceil(config.span[0] * gap))
    return shortest, max(shortest, math.floor(config.span[1] * gap))
