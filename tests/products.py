"""Products of parameters for `pytest.mark.parametrize`, thinned out for the default run.

A full product of three parameters costs dozens of cases, and nearly every fault shows in one value, or in one
pair of values. So the default run takes cases that together cover every pair (or every value); the others are
`slow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def covering(*axes: Sequence[Any], strength: int = 2) -> list[Any]:
    """All combinations of the axes' values; those that a covering choice does without are marked slow.

    Args:
        axes: The values of each parameter.
        strength: 2 covers every pair of values of two parameters, 1 every value.

    Returns:
        The product in its usual order, as `pytest.param` with marks.
    """
    cases = list(product(*(range(len(axis)) for axis in axes)))
    places = list(combinations(range(len(axes)), strength))
    open_tuples = set().union(*(_tuples(case, places) for case in cases))
    chosen = set()
    while open_tuples:
        # Ties go to the case whose indices are spread most, so that a cover is no run of first values.
        gains = {case: len(_tuples(case, places) & open_tuples) for case in cases}
        best = max(cases, key=lambda case: (gains[case], len(set(case)), case))
        chosen.add(best)
        open_tuples -= _tuples(best, places)
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, case, strict=True)),
            marks=() if case in chosen else pytest.mark.slow,
        )
        for case in cases
    ]


def _tuples(case: tuple[int, ...], places: list[tuple[int, ...]]) -> set[tuple[Any, ...]]:
    """The values at each choice of places, with the places."""
    return {(place, tuple(case[i] for i in place)) for place in places}
