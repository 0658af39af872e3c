"""One pair judged in both orders of its clips, as one verdict.

A judge may prefer a place: the first clip, or the second. Judged in both orders, such a habit shows (the two
episodes disagree) and cancels out. Invariant: swapping the clips of the pair swaps the merged verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

from vrthinker.episode.dimensions import Judgments
from vrthinker.episode.probabilities import Probabilities, merge_orders
from vrthinker.episode.trajectory import StopReason, Trajectory

SWAPPED = "#swapped"
"""What the id of the second episode has behind that of the pair."""


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
    """

    judgments: Judgments | None
    reason: str | None
    stop_reason: StopReason
    probabilities: Probabilities | None
    probabilities_reason: str | None
    frames_seen: tuple[int, ...]


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
    return MergedOrders(
        judgments=judgments,
        reason=reason,
        stop_reason=stop_reason,
        probabilities=probabilities,
        probabilities_reason=why_not,
        frames_seen=tuple(sorted({*first.frames_seen, *turned})),
    )
