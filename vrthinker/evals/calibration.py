"""Whether a judge is as often right as it is sure: expected calibration error, and accuracy by confidence.

A verdict's confidence is either stated (`CF` = 1 high, 2 middle, 3 low), or sampled: the share of votes that
agree with the verdict. A stated level is no probability. To compare it with one, the levels are read as the
middles of the thirds of the scale (`STATED`), which is this package's convention and printed beside the
number; the accuracy of each level needs no convention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vrthinker.errors import InputError

STATED: Mapping[int, float] = {1: 5 / 6, 2: 1 / 2, 3: 1 / 6}
"""Stated confidence -> the probability that it is read as."""
BINS = 10


@dataclass(frozen=True)
class Bin:
    """The verdicts of one range of confidence.

    Attributes:
        confidence: The mean confidence.
        accuracy: The share of right verdicts.
        count: The number of verdicts.
    """

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """How well confidence and accuracy agree.

    Attributes:
        error: The expected calibration error: the mean of |accuracy - confidence| over the bins, weighted by
            their counts.
        bins: The bins that hold verdicts, by confidence.
        count: The number of verdicts.
    """

    error: float
    bins: tuple[Bin, ...]
    count: int


def calibration(
    confidences: Sequence[float], right: Sequence[bool], *, bins: int = BINS
) -> Calibration | None:
    """The expected calibration error over bins of equal width.

    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, equation 3.

    Args:
        confidences: The probability with which each verdict is said to be right, 0 to 1.
        right: Whether each verdict is right.
        bins: The number of bins; a confidence on a border belongs to the bin above, 1 to the last one.

    Returns:
        The calibration; None without a verdict.

    Raises:
        InputError: The lengths differ, or a confidence is no probability.
    """
    if len(confidences) != len(right):
        raise InputError(f"calibration: got {len(confidences)} confidences of {len(right)} verdicts")
    if not all(0 <= value <= 1 for value in confidences):
        raise InputError("calibration: got a confidence outside of 0 to 1, allowed: probabilities")
    if not confidences:
        return None
    members: dict[int, list[int]] = {}
    for place, value in enumerate(confidences):
        members.setdefault(min(int(value * bins), bins - 1), []).append(place)
    found = tuple(
        Bin(
            confidence=sum(confidences[place] for place in places) / len(places),
            accuracy=sum(right[place] for place in places) / len(places),
            count=len(places),
        )
        for _, places in sorted(members.items())
    )
    error = sum(abs(one.accuracy - one.confidence) * one.count for one in found) / len(right)
    return Calibration(error, found, len(right))
