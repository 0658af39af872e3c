"""One pair judged in both orders of its clips, as one verdict.

A judge may prefer a place: the first clip, or the second. Judged in both orders, such a habit shows (the two
episodes disagree) and cancels out. Invariant: swapping the clips of the pair swaps the merged verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vrthinker.episode.dimensions import Confidence, Judgments
from vrthinker.episode.probabilities import Probabilities, merge_orders
from vrthinker.episode.trajectory import StopReason, Trajectory

SWAPPED = "#swapped"
"""What the id of the second episode has behind that of the pair."""
_NAMED_VIDEO = re.compile(r"\Avideo ([12])(?= )")


@dataclass(frozen=True)
class MergedOrders:
    """What two episodes about one pair say together.

    Attributes:
        judgments: The judgments of both (`merge_orders`), as of the pair's own order; None if one of the
            episodes ended without any.
        reason: The reason why there are none.
        stop_reason: The stop reason of the episode that has none; `answered` if both have judgments.
        probabilities: The mean of both episodes' probabilities; None if either's are not known.
        probabilities_reason: The reason why some or all of them are not known.
        frames_seen: The distinct frame numbers that either episode saw, in the numbering of the first.
        confidence: The less sure one of both stated confidences; None if one is missing, or there are no
            judgments.
        rounds: The number of rounds of both.
        tool_calls: The number of tool calls of both that showed frames.
        notes: The notes of both, each once, with the videos in the numbering of the first.
    """

    judgments: Judgments | None
    reason: str | None
    stop_reason: StopReason
    probabilities: Probabilities | None
    probabilities_reason: str | None
    frames_seen: tuple[int, ...]
    confidence: Confidence | None
    rounds: int
    tool_calls: int
    notes: tuple[str, ...]


def turned_notes(notes: Iterable[str]) -> list[str]:
    """The notes of an episode as of the other order of its clips: videos 1 and 2 change places."""
    return [_NAMED_VIDEO.sub(lambda match: f"video {3 - int(match[1])}", note) for note in notes]


def turned_back(trajectory: Trajectory, is_swapped: bool) -> tuple[Judgments | None, Probabilities | None]:
    """The judgments and probabilities of an episode, as of the pair's own order."""
    judgments, probabilities = trajectory.outcome.judgments, trajectory.outcome.probabilities
    if not is_swapped:
        return judgments, probabilities
    return (
        None if judgments is None else judgments.swapped(),
        None if probabilities is None else probabilities.swapped(),
    )


def merged_orders(first: Trajectory, second: Trajectory) -> MergedOrders:
    """What two episodes about one pair say together.

    Args:
        first: The episode with the clips in the pair's order.
        second: The episode with the clips in the other order.
    """
    (a, p), (b, q) = turned_back(first, False), turned_back(second, True)
    judgments = probabilities = reason = why_not = None
    stop_reason = StopReason.ANSWERED
    if a is not None and b is not None:
        judgments, probabilities = merge_orders(a, b, p, q)
        why_not = first.outcome.probabilities_reason or second.outcome.probabilities_reason
    else:
        failed, which = (first, "the pair's") if a is None else (second, "the other")
        reason = f"in {which} order of the clips: {failed.outcome.reason}"
        stop_reason = failed.outcome.stop_reason
    # The second episode numbers the frames of its first clip, the pair's second, from 1 on.
    turned = (
        n + first.n_frames_1 if n <= second.n_frames_1 else n - second.n_frames_1 for n in second.frames_seen
    )
    confidences = [t.outcome.confidence for t in (first, second) if t.outcome.confidence is not None]
    return MergedOrders(
        judgments=judgments,
        reason=reason,
        stop_reason=stop_reason,
        probabilities=probabilities,
        probabilities_reason=why_not,
        frames_seen=tuple(sorted({*first.frames_seen, *turned})),
        confidence=max(confidences) if judgments is not None and len(confidences) == 2 else None,
        rounds=len(first.rounds) + len(second.rounds),
        tool_calls=first.tool_calls + second.tool_calls,
        notes=tuple(dict.fromkeys((*first.notes, *turned_notes(second.notes)))),
    )
