"""Verdicts whose overall judgment contradicts the other three. They are counted, and never repaired."""

from __future__ import annotations

import enum
from collections.abc import Mapping

_OTHERS = ("TA", "VQ", "MQ")


class Contradiction(enum.StrEnum):
    """The ways in which OA can contradict TA, VQ and MQ."""

    OPPOSED = "opposed"
    """OA prefers one video, and every dimension that has a preference prefers the other."""
    UNSUPPORTED = "unsupported"
    """OA prefers one video, and all three dimensions are ties."""
    WITHHELD = "withheld"
    """OA is a tie, and every dimension that has a preference (at least one) prefers the same video."""


def contradiction(judgment: Mapping[str, int]) -> Contradiction | None:
    """The contradiction in a verdict; None if there is none, or if it lacks one of the four judgments."""
    if not all(code in judgment for code in (*_OTHERS, "OA")):
        return None
    overall = judgment["OA"]
    preferred = {judgment[code] for code in _OTHERS} - {0}
    if not overall:
        return Contradiction.WITHHELD if len(preferred) == 1 else None
    if not preferred:
        return Contradiction.UNSUPPORTED
    return Contradiction.OPPOSED if overall not in preferred else None
