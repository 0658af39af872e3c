"""Two judges on the same pairs: where they differ, and McNemar's exact test of which is right more often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vrthinker.errors import InputError


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test.

    Only pairs on which exactly one judge is right tell the two apart. If neither judge were better, each of
    these would be a fair coin.

    Attributes:
        first_only: The number of pairs that only the first judge has right.
        second_only: The number of pairs that only the second judge has right.
        p_value: The two-sided p-value: how probable so uneven a split, or a more uneven one, would be.
    """

    first_only: int
    second_only: int
    p_value: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Tests whether one of two judges is right more often, pair by pair.

    Args:
        first: Whether the first judge is right, a value for each pair.
        second: Whether the second judge is right, for the same pairs in the same order.

    Raises:
        InputError: The lengths differ.
    """
    if len(first) != len(second):
        raise InputError(f"McNemar: got {len(first)} and {len(second)} pairs, allowed: the same pairs")
    first_only = sum(a and not b for a, b in zip(first, second, strict=True))
    second_only = sum(b and not a for a, b in zip(first, second, strict=True))
    return McNemar(first_only, second_only, exact_binomial(first_only, second_only))


def exact_binomial(heads: int, tails: int) -> float:
    """The two-sided p-value of a fair coin that fell so. Whole numbers are summed, so nothing is rounded."""
    tosses = heads + tails
    term = total = 1
    for count in range(min(heads, tails)):
        term = term * (tosses - count) // (count + 1)
        total += term
    return min(1.0, 2 * total / (1 << tosses))
