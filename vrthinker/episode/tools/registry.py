"""The tools of an episode by name: their schemas for the prompt, and the execution of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError

from vrthinker.episode.grammar import ParseFailure, ToolCall
from vrthinker.episode.tools.base import (
    FramesShown,
    Tool,
    ToolContext,
    ToolError,
    ToolErrorKind,
    ToolOutcome,
)
from vrthinker.episode.tools.select_frames import SelectFrames
from vrthinker.errors import first_problem

MAX_CALLS = 8
"""The most calls of one round that are run (ours)."""


class ToolRegistry:
    """The tools of an episode, by name."""

    def __init__(self, tools: Sequence[Tool] | None = None) -> None:
        chosen: Sequence[Tool] = (SelectFrames(),) if tools is None else tools
        self._tools = {tool.name: tool for tool in chosen}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tools."""
        return tuple(self._tools)

    def schemas(self) -> list[dict[str, Any]]:
        """The tools as JSON-schema function descriptions, in the form of Qwen's and OpenAI's prompts."""
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

    def execute_all(
        self, calls: Sequence[ToolCall | ParseFailure], context: ToolContext
    ) -> tuple[ToolOutcome, ...]:
        """Runs the calls of one round in order. Together they show at most `context.max_frames` frames.

        Returns:
            The outcome of each call, and one more if there are more than `MAX_CALLS`. No two outcomes show
            the same picture.
        """
        outcomes: list[ToolOutcome] = []
        for call in calls[:MAX_CALLS]:
            outcome = self.execute(call, context) if context.max_frames else _NO_FRAMES_LEFT
            outcomes.append(outcome)
            if isinstance(outcome, FramesShown):
                numbers = frozenset(outcome.frame_numbers)
                context = replace(
                    context,
                    max_frames=context.max_frames - len(numbers),
                    shown=context.shown | numbers,
                    in_round=context.in_round | (numbers if outcome.view is None else frozenset()),
                )
            context = replace(context, call_number=context.call_number + 1)
        if left := len(calls) - MAX_CALLS if len(calls) > MAX_CALLS else 0:
            message = f"{left} more calls are not run: a round may have {MAX_CALLS}."
            outcomes.append(ToolError(ToolErrorKind.TOO_MANY_CALLS, message))
        return tuple(outcomes)

    def execute(self, call: ToolCall | ParseFailure, context: ToolContext) -> ToolOutcome:
        """Runs a call. A bad call never raises; its outcome is a `ToolError` with a `ToolErrorKind`."""
        if isinstance(call, ParseFailure):
            return ToolError(ToolErrorKind.SYNTAX, f"{call.message}.")
        if call.name is None:
            return self._execute_bare(call.arguments, context)
        tool = self._tools.get(call.name)
        if tool is None:
            message = f"unknown tool {call.name[:40]!r}: there is {', '.join(self._tools)}."
            return ToolError(ToolErrorKind.UNKNOWN_TOOL, message)
        try:
            arguments = tool.arguments_type.model_validate(call.arguments)
        except ValidationError as error:
            message = f"bad arguments for {tool.name}: {first_problem(error, '')}."
            return ToolError(ToolErrorKind.BAD_ARGUMENTS, message)
        return tool.run(arguments, context)

    def _execute_bare(self, arguments: dict[str, Any], context: ToolContext) -> ToolOutcome:
        """Runs a call without a tool's name, if exactly one tool takes its arguments."""
        takers: list[tuple[Tool, BaseModel]] = []
        for tool in self._tools.values():
            try:
                takers.append((tool, tool.arguments_type.model_validate(arguments)))
            except ValidationError:
                continue
        if len(takers) != 1:
            fit = f"{len(takers)} tools take" if takers else "no tool takes"
            message = f'the call has no "name", and {fit} its arguments: there is {", ".join(self._tools)}.'
            return ToolError(ToolErrorKind.UNKNOWN_TOOL, message)
        tool, valid = takers[0]
        return tool.run(valid, context)


_NO_FRAMES_LEFT = ToolError(
    ToolErrorKind.TOO_MANY_FRAMES, "the calls before this one show as many frames as a round may."
)


def _schema(arguments_type: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema without pydantic's titles, which only repeat the keys."""
    schema = arguments_type.model_json_schema()
    schema.pop("title", None)
    schema.pop("description", None)
    for value in schema.get("properties", {}).values():
        value.pop("title", None)
    return schema
