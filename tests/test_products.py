"""The cases that the default run keeps of a product of parameters."""

from __future__ import annotations

from itertools import combinations

from products import covering


def test_every_pair_is_covered() -> None:
    axes = (range(2), range(4), range(3))
    kept = [case.values for case in covering(*axes) if not case.marks]
    for one, other in combinations(range(3), 2):
        assert len({(case[one], case[other]) for case in kept}) == len(axes[one]) * len(axes[other])
    assert len(kept) < 24
    assert len([case for case in covering(*axes, strength=1) if not case.marks]) == 4
