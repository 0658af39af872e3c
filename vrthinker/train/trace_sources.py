"""The settings that say where traces to train on come from: the oracle of a synthetic world, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vrthinker.policy.parts import LearnedPart
from vrthinker.world.oracle import Behavior, BehaviorMix
from vrthinker.world.world import FIRST_FRAMES, WorldConfig

MAX_TRACE_PAIRS, MAX_SEED = 10_000_000, 1 << 40


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class WorldTraces(_Settings):
    """Traces that the oracle makes in a synthetic world, which is generated for them."""

    kind: Literal["world"] = "world"
    world: WorldConfig = WorldConfig()
    pairs: int = Field(ge=1, le=MAX_TRACE_PAIRS)
    """Number of pairs, each of which gives one trace, before filtering."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the pairs, added to the run's seed. The sum should differ from seeds that are evaluated on."""
    mix: BehaviorMix = BehaviorMix()
    """The oracle's behaviours and their weights."""
    calls: int = Field(2, ge=0)
    """The most tool calls of a trace."""
    lesson_frames: int | None = Field(None, ge=1, le=FIRST_FRAMES)
    """Make reading lessons instead: episodes of one round about this many chosen frames of each clip."""
    filter: bool = True
    """Keep only traces whose four judgments are all right."""
    learned: LearnedPart = "rounds"
    """The part of each round that is learned: `rounds` (all of it), `snapshots` (lessons only), or `calls`
    (how a round asks for frames: the last line of the thinking, the recommended answer and the call)."""

    @model_validator(mode="after")
    def _behaves(self) -> Self:
        drawn = {name for name, weight in self.mix.model_dump().items() if weight}
        if not drawn:
            raise ValueError("mix: got only zeros, wanted at least one behavior above")
        if self.lesson_frames is not None and self.most_calls:
            got = ", ".join(sorted(drawn))
            raise ValueError(f"mix: got {got}, allowed in a lesson: immediate alone, or calls: 0")
        return self

    @model_validator(mode="after")
    def _has_what_is_learned(self) -> Self:
        if self.learned == "snapshots" and self.most_calls:
            raise ValueError("learned: got snapshots, allowed with tool calls: rounds, calls")
        return self

    @property
    def most_calls(self) -> int:
        """The most tool calls that the oracle's behaviours can make."""
        looks = any(weight for name, weight in self.mix.model_dump().items() if name != Behavior.IMMEDIATE)
        return self.calls if looks else 0


class FileTraces(_Settings):
    """Traces from a trajectories file, written by a teacher (`vrthinker judge --trajectories`)."""

    kind: Literal["file"] = "file"
    path: Path
    pairs: Path | None = None
    """The pairs file with the labels. Without it, traces are filtered by their form only."""

    @field_validator("path", "pairs")
    @classmethod
    def _from_anywhere(cls, path: Path | None) -> Path | None:
        """Makes a path absolute, because a run may be resumed from another folder."""
        return None if path is None else path.absolute()


OneSource = WorldTraces | FileTraces


class MixedTraces(_Settings):
    """Traces from several sources, which are shuffled together."""

    kind: Literal["mixed"] = "mixed"
    of: tuple[Annotated[OneSource, Field(discriminator="kind")], ...] = Field(min_length=1)
    """The sources."""


TraceSource = OneSource | MixedTraces


def sources_of(source: TraceSource) -> tuple[OneSource, ...]:
    """The sources that a phase's traces come from."""
    return source.of if isinstance(source, MixedTraces) else (source,)
