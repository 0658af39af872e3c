"""Guided rounds: the grammar as a constraint on sampling.

Guided rounds are for models that do not keep to the grammar by themselves (a base model before cold start, a
random checkpoint). Such a model still writes its snapshot and thoughts freely, and chooses every judgment,
whether to look again, and at which frames. Only the rest is forced. Guided sampling is a different policy
from free sampling: never train on it.
"""

from __future__ import annotations

from vrthinker.engine.base import Choice, Form, Free
from vrthinker.episode.dimensions import Dimension

_FORCED_TOKENS = 160
"""Number of tokens reserved for the forced parts of a round, enough even for a small vocabulary."""


def round_form(*, n_frames: int, frames_per_call: int, last_round: bool, max_tokens: int) -> Form:
    """The form of one round. The last round can only end with a final answer.

    Args:
        n_frames: N, the number of frames in the workspace: only existing frames can be requested.
        frames_per_call: The number of frame numbers in a tool call. (Duplicates may make it show fewer
            frames.)
        last_round: Whether the round must end with a final answer.
        max_tokens: The round's token limit. Snapshot and think share what remains after the forced parts.
    """
    room = max(2, max_tokens - _FORCED_TOKENS - 4 * frames_per_call)
    opening: Form = (
        Choice(("<snapshot>",)),
        Free(room // 2),
        Choice(("</snapshot><think>",)),
        Free(room // 2),
        Choice(("</think>",)),
    )
    answer: Form = (*_judgments(), Choice(("</answer>",)))
    if last_round:
        return (*opening, Choice(("<answer>",)), *answer)
    call: Form = (
        *_judgments(),
        Choice((", CF=",)),
        Choice(("1", "2", "3")),
        *_call(n_frames, frames_per_call),
    )
    return (*opening, Choice(("<answer>", "<recommend answer>"), then=(answer, call)))


def _judgments() -> Form:
    parts: list[Free | Choice] = []
    for index, dimension in enumerate(Dimension):
        parts += [Choice((f"{', ' if index else ''}{dimension.value}=",)), Choice(("0", "1", "2"))]
    return tuple(parts)


def _call(n_frames: int, frames_per_call: int) -> Form:
    def numbers(terminator: str) -> Choice:
        return Choice(tuple(f"{number}{terminator}" for number in range(1, n_frames + 1)))

    return (
        Choice(('</recommend answer><tool_call>{"name": "select_frames", "arguments": {"target_frames": [',)),
        *(numbers(", ") for _ in range(min(frames_per_call, n_frames) - 1)),
        numbers("]"),
        Choice(("}}</tool_call>",)),
    )
