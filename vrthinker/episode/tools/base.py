"""What every operation shares: what it may know, and what a call gets back.

A tool is a pydantic type for its arguments (the JSON schema in the prompt is generated from it, so the
two cannot differ) and a function from arguments to an outcome. A bad call is the model's mistake, so
it is data: a text outcome that says what was wrong, and the episode goes on (method section 2).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from vrthinker.visibility import Region


@dataclass(frozen=True)
class ToolContext:
    """What a tool may know of the episode.

    Attributes:
        n_frames: N, frames in the workspace (numbered 1..N).
        max_frames: N_ex, how many frames one call may show.
        n_frames_1: N1, of which the first ones are video 1's.
        shown: Frame numbers that were shown in this episode before.
        seed: The episode's seed.
        call_number: 1-based count of the episode's calls, this one included.
    """

    n_frames: int
    max_frames: int
    n_frames_1: int = 0
    shown: frozenset[int] = frozenset()
    seed: int = 0
    call_number: int = 1


class ToolErrorKind(enum.StrEnum):
    """Why a call showed nothing."""

    SYNTAX = "syntax"
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"
    NOTHING_ASKED = "nothing_asked"
    UNKNOWN_FRAME = "unknown_frame"
    TOO_MANY_FRAMES = "too_many_frames"
    """In records of version 0.1.0 only: the frames up to the limit are shown since."""


@dataclass(frozen=True)
class ToolError:
    """A call that showed nothing; `message` is what the model is told."""

    kind: ToolErrorKind
    message: str


@dataclass(frozen=True)
class FramesShown:
    """A call that shows frames.

    Attributes:
        frame_numbers: Distinct, ascending.
        view: The region of each frame that is shown; None for whole frames.
        note: What was asked for and is not shown, and why, as the model is told; None where all is shown.
    """

    frame_numbers: tuple[int, ...]
    view: Region | None = None
    note: str | None = None


ToolOutcome = FramesShown | ToolError


class Tool(Protocol):
    """One tool. `arguments_type` is the single source of its schema."""

    name: str
    description: str
    arguments_type: type[BaseModel]

    def run(self, arguments: Any, context: ToolContext) -> ToolOutcome:
        """Executes a call whose arguments are valid."""
