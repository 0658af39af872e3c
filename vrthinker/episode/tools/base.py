"""The common types of tools: what a tool may know, and the outcome of a call.

A tool consists of a pydantic type for its arguments and a function from arguments to an outcome. The JSON
schema in the prompt is generated from the type, so that the two cannot differ. A bad call is the model's
mistake, not an error: its outcome is a text that says what was wrong, and the episode goes on (method section
2).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from vrthinker.visibility import Region


@dataclass(frozen=True)
class ToolContext:
    """What a tool may know about the episode.

    Attributes:
        n_frames: N, the number of frames in the workspace (numbered 1..N).
        max_frames: The most frames that this call may show: N_ex, less what earlier calls of the round show.
        n_frames_1: N1, the number of frames of video 1, which come first.
        shown: The frame numbers that were shown earlier in this episode.
        seed: The episode's seed.
        call_number: The 1-based number of this call in the episode.
        in_round: The numbers of the frames that earlier calls of the same round show whole.
    """

    n_frames: int
    max_frames: int
    n_frames_1: int = 0
    shown: frozenset[int] = frozenset()
    seed: int = 0
    call_number: int = 1
    in_round: frozenset[int] = frozenset()


class ToolErrorKind(enum.StrEnum):
    """The reasons why a call shows nothing."""

    SYNTAX = "syntax"
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"
    NOTHING_ASKED = "nothing_asked"
    UNKNOWN_FRAME = "unknown_frame"
    TOO_MANY_FRAMES = "too_many_frames"
    """The round's earlier calls already show as many frames as a round may. (Version 0.1.0 recorded this kind
    for a single call above the limit, too.)"""
    SHOWN_BEFORE = "shown_before"
    """The round's earlier calls already show every frame that this call names."""
    TOO_MANY_CALLS = "too_many_calls"
    """The round has more calls than are run."""


@dataclass(frozen=True)
class ToolError:
    """The outcome of a call that shows nothing. The model is told `message`."""

    kind: ToolErrorKind
    message: str


@dataclass(frozen=True)
class FramesShown:
    """The outcome of a call that shows frames.

    Attributes:
        frame_numbers: The distinct frame numbers, ascending.
        view: The region of each frame that is shown; None for whole frames.
        note: What the model is told about requested frames that are not shown; None if all are shown.
    """

    frame_numbers: tuple[int, ...]
    view: Region | None = None
    note: str | None = None


ToolOutcome = FramesShown | ToolError


class Tool(Protocol):
    """A tool. Its schema is generated from `arguments_type`."""

    name: str
    description: str
    arguments_type: type[BaseModel]

    def run(self, arguments: Any, context: ToolContext) -> ToolOutcome:
        """Executes a call whose arguments are valid."""
