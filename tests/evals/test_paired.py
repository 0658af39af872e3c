"""McNemar's test, calibration and contradictions: by hand, and against scipy."""

from __future__ import annotations

import itertools

import pytest

from vrthinker.errors import InputError
from vrthinker.evals.calibration import STATED, calibration
from vrthinker.evals.contradictions import Contradiction, contradiction
from vrthinker.evals.paired import exact_binomial, mcnemar


def test_mcnemar_by_hand() -> None:
    first = [True, True, True, False, True, False]
    second = [True, False, False, True, False, False]
    found = mcnemar(first, second)
    assert (found.first_only, found.second_only) == (3, 1)
    assert found.p_value == 2 * (1 + 4) / 16
    assert mcnemar([], []).p_value == 1.0
    assert mcnemar(first, first).p_value == 1.0
    assert mcnemar([True] * 6, [False] * 6).p_value == 2 / 64
    with pytest.raises(InputError, match="got 1 and 0 pairs"):
        mcnemar([True], [])


@pytest.mark.parametrize(("heads", "tails"), [(0, 1), (3, 5), (7, 7), (40, 12), (600, 480)])
def test_the_exact_p_value_equals_scipys(heads: int, tails: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.binomtest(heads, heads + tails, 0.5).pvalue
    assert exact_binomial(heads, tails) == pytest.approx(wanted, rel=1e-9)


def test_a_p_value_of_many_pairs_is_a_number() -> None:
    assert 0.0 <= exact_binomial(9000, 2000) < 1e-300
    assert exact_binomial(5000, 5000) == 1.0


def test_calibration_by_hand() -> None:
    # Bin 0.5: two of four right; bin 0.9: one of two right.
    found = calibration([0.5, 0.5, 0.5, 0.5, 0.9, 0.9], [True, True, False, False, True, False])
    assert found is not None
    assert found.error == pytest.approx((0 * 4 + 0.4 * 2) / 6)
    assert [(b.accuracy, b.count) for b in found.bins] == [(0.5, 4), (0.5, 2)]
    certain = calibration([1.0, 1.0], [True, True])
    assert certain is not None
    assert (certain.error, certain.count) == (0.0, 2)
    assert calibration([], []) is None
    with pytest.raises(InputError, match="outside of 0 to 1"):
        calibration([1.1], [True])
    with pytest.raises(InputError, match="got 1 confidences of 2"):
        calibration([1.0], [True, False])


def test_stated_levels_are_the_middles_of_the_thirds() -> None:
    assert [STATED[level] for level in (3, 2, 1)] == pytest.approx([1 / 6, 3 / 6, 5 / 6])


def test_every_contradiction_is_named_and_nothing_else() -> None:
    counts = dict.fromkeys(Contradiction, 0)
    for ta, vq, mq, oa in itertools.product((0, 1, 2), repeat=4):
        found = contradiction({"TA": ta, "VQ": vq, "MQ": mq, "OA": oa})
        for_1, for_2 = (sum(side == n for side in (ta, vq, mq)) for n in (1, 2))
        if oa == 0:
            expected = Contradiction.WITHHELD if bool(for_1) != bool(for_2) else None
        else:
            own, other = (for_1, for_2) if oa == 1 else (for_2, for_1)
            expected = None if own else Contradiction.OPPOSED if other else Contradiction.UNSUPPORTED
        assert found is expected, (ta, vq, mq, oa)
        if found is not None:
            counts[found] += 1
    assert counts == {Contradiction.OPPOSED: 14, Contradiction.UNSUPPORTED: 2, Contradiction.WITHHELD: 14}
    assert contradiction({"TA": 1, "VQ": 1, "OA": 2}) is None, "a judgment is missing"
