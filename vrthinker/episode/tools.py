"""The tools a round may call, and what a call gets back.

A tool is a pydantic type for its arguments (the JSON schema in the prompt is generated from it, so the
two cannot differ) and a function from arguments to an outcome. A bad call is the model's mistake, so
it is data: a text outcome that says what was wrong, and the episode goes on (method section 2).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vrthinker.episode.grammar import ParseFailure, ToolCall


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


@dataclass(frozen=True)
class ToolError:
    """A call that showed nothing; `message` is what the model is told."""

    kind: ToolErrorKind
    message: str


@dataclass(frozen=True)
class FramesShown:
    """A call that shows frames: distinct frame numbers, ascending."""

    frame_numbers: tuple[int, ...]


ToolOutcome = FramesShown | ToolError


class Tool(Protocol):
    """One tool. `arguments_type` is the single source of its schema."""

    name: str
    description: str
    arguments_type: type[BaseModel]

    def run(self, arguments: Any, context: ToolContext) -> ToolOutcome:
        """Executes a call whose arguments are valid."""


class SelectFramesArguments(BaseModel):
    """Arguments of `select_frames`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    target_frames: list[int] = Field(
        description="Numbers of the frames to look at, from 1 to the last frame."
    )


class SelectFrames:
    """Shows the frames asked for, each with its number and video. Duplicates are dropped (ours)."""

    name = "select_frames"
    description = (
        "Shows frames of the two videos by their numbers. They stay visible for a limited number of rounds."
    )
    arguments_type: type[BaseModel] = SelectFramesArguments

    def run(self, arguments: Any, context: ToolContext) -> ToolOutcome:
        """Checks the numbers of a `SelectFramesArguments` against the workspace and the limit."""
        numbers = sorted(set(arguments.target_frames))
        if not numbers:
            return ToolError(ToolErrorKind.NOTHING_ASKED, "target_frames is empty: name at least one frame.")
        unknown = [number for number in numbers if not 1 <= number <= context.n_frames]
        if unknown:
            named = ", ".join(str(number)[:20] for number in unknown[:8])
            message = f"unknown frame {named}: frames are numbered 1 to {context.n_frames}."
            return ToolError(ToolErrorKind.UNKNOWN_FRAME, message)
        if len(numbers) > context.max_frames:
            message = f"{len(numbers)} frames asked for, at most {context.max_frames} are shown in one call."
            return ToolError(ToolErrorKind.TOO_MANY_FRAMES, message)
        return FramesShown(tuple(numbers))


class ToolRegistry:
    """The tools of an episode, by name."""

    def __init__(self, tools: Sequence[Tool] | None = None) -> None:
        chosen: Sequence[Tool] = (SelectFrames(),) if tools is None else tools
        self._tools = {tool.name: tool for tool in chosen}

    @property
    def names(self) -> tuple[str, ...]:
        """Registered names."""
        return tuple(self._tools)

    def schemas(self) -> list[dict[str, Any]]:
        """The tools as JSON-schema function descriptions, the form Qwen's and OpenAI's prompts use."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": _schema(tool.arguments_type),
                },
            }
            for tool in self._tools.values()
        ]

    def execute(self, call: ToolCall | ParseFailure, context: ToolContext) -> ToolOutcome:
        """Runs a call. Never raises on what the model wrote; see `ToolErrorKind` for what can be wrong."""
        if isinstance(call, ParseFailure):
            return ToolError(ToolErrorKind.SYNTAX, f"{call.message}.")
        tool = self._tools.get(call.name)
        if tool is None:
            message = f"unknown tool {call.name[:40]!r}: there is {', '.join(self._tools)}."
            return ToolError(ToolErrorKind.UNKNOWN_TOOL, message)
        try:
            arguments = tool.arguments_type.model_validate(call.arguments)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part)[:40] for part in first["loc"])
            message = f"bad arguments for {tool.name}: {where}: {first['msg']}."
            return ToolError(ToolErrorKind.BAD_ARGUMENTS, message)
        return tool.run(arguments, context)


def _schema(arguments_type: type[BaseModel]) -> dict[str, Any]:
    """JSON schema without pydantic's titles, which say nothing that the keys do not."""
    schema = arguments_type.model_json_schema()
    schema.pop("title", None)
    schema.pop("description", None)
    for value in schema.get("properties", {}).values():
        value.pop("title", None)
    return schema
