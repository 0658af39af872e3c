"""`select_frames`, the paper's tool, which shows frames by their numbers (method section 2)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolError, ToolErrorKind, ToolOutcome

_NAMED = 8
"""The most frames that a message names."""


class SelectFramesArguments(BaseModel):
    """Arguments of `select_frames`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    target_frames: list[int] = Field(
        description="Numbers of the frames to look at, from 1 to the last frame."
    )


class SelectFrames:
    """Shows the requested frames, each with its number and video. Duplicates are dropped (ours)."""

    name = "select_frames"
    description = (
        "Shows frames of the two videos by their numbers. They stay visible for a limited number of rounds."
    )
    arguments_type: type[BaseModel] = SelectFramesArguments

    def run(self, arguments: Any, context: ToolContext) -> ToolOutcome:
        """Shows the first existing frames up to the limit. The outcome's note tells about the others."""
        asked = list(dict.fromkeys(arguments.target_frames))
        if not asked:
            return ToolError(ToolErrorKind.NOTHING_ASKED, "target_frames is empty: name at least one frame.")
        known = [number for number in asked if 1 <= number <= context.n_frames]
        new = [number for number in known if number not in context.in_round]
        problems = []
        if unknown := [number for number in asked if not 1 <= number <= context.n_frames]:
            problems.append(f"unknown frame {_named(unknown)}: frames are numbered 1 to {context.n_frames}.")
        if again := [number for number in known if number in context.in_round]:
            problems.append(f"frame {_named(again)} is shown by a call before this one.")
        if not new:
            kind = ToolErrorKind.SHOWN_BEFORE if again else ToolErrorKind.UNKNOWN_FRAME
            return ToolError(kind, " ".join(problems))
        if left := new[context.max_frames :]:
            problems.append(
                f"frame {_named(left)} not shown: at most {context.max_frames} are shown"
                f"{' after the calls before this one' if context.in_round else ' in one round'}."
            )
        shown = tuple(sorted(new[: context.max_frames]))
        return FramesShown(shown, note=" ".join(problems) or None)


def _named(numbers: list[int]) -> str:
    """The first few numbers in words."""
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return ", ".join(str(number)[:20] for number in numbers[:_NAMED]) + more
