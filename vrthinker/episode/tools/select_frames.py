"""`select_frames`, the paper's operation: shows frames by their numbers (method section 2)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolError, ToolErrorKind, ToolOutcome


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
