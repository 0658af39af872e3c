"""The bootstrap: against every resample there is, against scipy, and against the truth it should cover."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from vrthinker.errors import InputError
from vrthinker.evals import intervals
from vrthinker.evals.intervals import Estimate, FloatArray, ratio_difference, ratio_estimates


def column(*values: float) -> FloatArray:
    return np.array(values, dtype=np.float64)[:, None]


def one(numerators: FloatArray, denominators: FloatArray, **settings: Any) -> Estimate:
    (estimate,) = ratio_estimates(numerators[:, None], denominators[:, None], **settings)
    return estimate


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def ratio(above: FloatArray, below: FloatArray, axis: int = -1) -> Any:
    return above.sum(axis=axis) / below.sum(axis=axis)


def test_the_interval_is_that_of_every_resample_there_is() -> None:
    above, below = np.array([1.0, 0.0, 2.0, 5.0]), np.array([1.0, 0.0, 3.0, 0.0])
    found = [
        (above[list(drawn)].sum(), below[list(drawn)].sum())
        for drawn in itertools.product(range(4), repeat=4)
    ]
    ratios = [a / b for a, b in found if b > 0]
    assert len(ratios) == 4**4 - 2**4, "those with no denominator are left out"
    estimate = one(above, below, resamples=50_000, confidence=0.8)
    assert estimate.value == 8 / 4
    assert estimate.n == 2
    assert ends(estimate) == tuple(np.quantile(ratios, [0.1, 0.9]))
    shifted = one(above, below, resamples=50_000, confidence=0.5)
    assert ends(shifted) == tuple(np.quantile(ratios, [0.25, 0.75]))
    assert ends(shifted) != ends(estimate)


def test_a_difference_is_that_of_every_resample_there_is() -> None:
    a = np.array([1.0, 0.0, 2.0, 1.0]), np.array([1.0, 0.0, 3.0, 0.0])
    b = np.array([0.0, 1.0, 1.0, 0.0]), np.array([0.0, 1.0, 2.0, 0.0])
    resampled = [
        tuple(array[list(drawn)].sum() for array in (*a, *b))
        for drawn in itertools.product(range(4), repeat=4)
    ]
    ratios = [p / q - r / s for p, q, r, s in resampled if q and s]
    estimate = ratio_difference(a, b, resamples=50_000, confidence=0.8)
    assert estimate.value == 4 / 4 - 2 / 3
    assert estimate.n == 3, "pairs that count on either side"
    assert ends(estimate) == pytest.approx(np.quantile(ratios, [0.1, 0.9]))


def test_scipy_agrees_on_ratios() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    below = rng.integers(0, 4, 300).astype(np.float64)
    above = rng.binomial(below.astype(int), 0.6).astype(np.float64)
    for confidence in (0.8, 0.95):
        ours = one(above, below, resamples=10_000, confidence=confidence, seed=1)
        theirs = stats.bootstrap(
            (above, below),
            ratio,
            n_resamples=10_000,
            confidence_level=confidence,
            paired=True,
            method="percentile",
            rng=np.random.default_rng(2),
        ).confidence_interval
        # Of a width near 0.09, the ends of 10,000 resamples vary by about 0.0007.
        assert ends(ours) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_scipy_agrees_on_paired_differences() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(4)
    below = rng.integers(0, 2, 250).astype(np.float64)
    a = below * (rng.random(250) < 0.8)
    b = below * np.where(rng.random(250) < 0.7, a, 1 - a)
    ours = ratio_difference((a, below), (b, below), resamples=10_000, seed=1)
    theirs = stats.bootstrap(
        (a, b, below),
        lambda a, b, below, axis=-1: ratio(a, below, axis) - ratio(b, below, axis),
        n_resamples=10_000,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ends(ours) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    unpaired = np.hypot(*(np.diff(ends(one(x, below)))[0] for x in (a, b)))
    assert np.diff(ends(ours))[0] < 0.9 * unpaired, "pairing takes out what both sides share"


@pytest.mark.parametrize("counted", [1.0, 0.6], ids=["all pairs count", "some do"])
def test_the_interval_covers_the_truth_as_often_as_it_says(counted: float) -> None:
    truth, pairs, repetitions = 0.7, 200, 200
    rng = np.random.default_rng(11)
    below = (rng.random((pairs, repetitions)) < counted).astype(np.float64)
    above = below * (rng.random((pairs, repetitions)) < truth)
    estimates = ratio_estimates(above, below, seed=5)
    covered = np.mean([low <= truth <= high for low, high in map(ends, estimates)])
    assert 0.90 <= covered <= 0.99, f"covered {covered}"
    halves = ratio_estimates(above, below, confidence=0.5, seed=5)
    assert 0.4 <= np.mean([low <= truth <= high for low, high in map(ends, halves)]) <= 0.62


def test_pairs_of_one_cluster_come_and_go_together() -> None:
    """Ten pairs of each of 40 prompts that are all right or all wrong say no more than 40 pairs."""
    right = np.array([float(n % 2) for n in range(40)])
    alone = ratio_estimates(right[:, None], np.ones((40, 1)))[0]
    terms, ones = np.repeat(right, 10)[:, None], np.ones((400, 1))
    prompts = [f"prompt {n // 10}" for n in range(400)]
    clustered = ratio_estimates(terms, ones, clusters=prompts)[0]
    assert (clustered.value, clustered.low, clustered.high) == (alone.value, alone.low, alone.high)
    assert (clustered.n, alone.n) == (400, 40), "the number of pairs, not of clusters"
    naive = ratio_estimates(terms, ones)[0]
    assert naive.low > clustered.low
    assert ratio_estimates(terms, ones, clusters=list(range(400)))[0] == naive, "each pair its own cluster"
    difference = ratio_difference((terms[:, 0], ones[:, 0]), (1 - terms[:, 0], ones[:, 0]), clusters=prompts)
    assert difference.high - difference.low == pytest.approx(2 * (clustered.high - clustered.low))
    with pytest.raises(InputError, match="clusters: got 3, allowed: one for each of 400"):
        ratio_estimates(terms, ones, clusters=["a", "b", "c"])


def test_nothing_measured_is_none_and_never_a_division_by_zero() -> None:
    with np.errstate(all="raise"):
        nothing = ratio_estimates(np.zeros((3, 1)), np.zeros((3, 1)), resamples=50)
        no_pairs = ratio_estimates(np.zeros((0, 2)), np.zeros((0, 2)))
        rare = one(np.array([1.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0]), resamples=200)
        unlucky = [one(np.eye(1, 3)[0], np.eye(1, 3)[0], resamples=1, seed=seed) for seed in range(30)]
        neither = ratio_difference((np.ones(3), np.ones(3)), (np.zeros(3), np.zeros(3)))
    assert nothing == [Estimate(None, None, None, 0)]
    assert no_pairs == [Estimate(None, None, None, 0)] * 2
    assert rare == Estimate(1.0, 1.0, 1.0, 1)
    assert set(unlucky) == {Estimate(1.0, 1.0, 1.0, 1), Estimate(1.0, None, None, 1)}
    assert neither == Estimate(None, None, None, 3)


def test_what_never_varies_has_no_width() -> None:
    values = np.full(37, 3.0)
    assert one(values, values * 7, resamples=300) == Estimate(3 / 21, 3 / 21, 3 / 21, 37)
    assert ratio_difference((values, values), (values, values)) == Estimate(0.0, 0.0, 0.0, 37)


def test_all_measures_see_the_same_resamples() -> None:
    rng = np.random.default_rng(6)
    above, below = rng.integers(0, 3, (60, 5)).astype(float), rng.integers(0, 3, (60, 5)).astype(float)
    together = ratio_estimates(above, below, resamples=300, seed=9)
    assert together == [one(above[:, m], below[:, m], resamples=300, seed=9) for m in range(5)]
    twice = ratio_estimates(above[:, [0, 0]], below[:, [0, 0]], resamples=300)
    assert twice[0] == twice[1]


def test_the_seed_decides() -> None:
    above = np.random.default_rng(7).integers(0, 9, 80).astype(float)
    ones = np.ones(80)
    assert one(above, ones, seed=1) == one(above, ones, seed=1)
    assert one(above, ones, seed=1) != one(above, ones, seed=2)
    assert one(above, ones, seed=1).value == one(above, ones, seed=2).value


def test_blocks_bound_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    above = np.random.default_rng(8).integers(0, 9, 81).astype(float)
    whole = one(above, np.ones(81), resamples=201)
    for cells in (81 * 50, 100, 1):
        monkeypatch.setattr(intervals, "_BLOCK_CELLS", cells)
        assert one(above, np.ones(81), resamples=201) == whole


def test_more_resamples_than_fit_a_block_are_all_drawn() -> None:
    pairs = intervals._BLOCK_CELLS // 40
    above = (np.arange(pairs) % 10 < 7).astype(float)
    low, high = ends(one(above, np.ones(pairs), resamples=100))
    width = 2 * 1.96 * (0.21 / pairs) ** 0.5
    assert high - low == pytest.approx(width, rel=0.4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resamples": 0}, "resamples: got 0, allowed: 1 and more"),
        ({"confidence": 0.0}, "confidence: got 0.0, allowed: between 0 and 1"),
        ({"confidence": 95}, "confidence: got 95"),
        ({"confidence": float("nan")}, "confidence: got nan"),
        ({"seed": -1}, "seed: got -1, allowed: 0 and more"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    side = (np.ones(3), np.ones(3))
    with pytest.raises(InputError, match=message):
        one(*side, **settings)
    with pytest.raises(InputError, match=message):
        ratio_difference(side, side, **settings)


def test_terms_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match=r"got shapes \(2, 1\) and \(3, 1\)"):
        ratio_estimates(column(1, 2), column(1, 2, 3))
    with pytest.raises(InputError, match=r"got shapes \(2,\) and \(2,\)"):
        ratio_estimates(np.ones(2), np.ones(2))
    for above, below in ((np.nan, 1.0), (1.0, np.inf), (1.0, -1.0)):
        with pytest.raises(InputError, match="not finite or a negative denominator"):
            ratio_estimates(column(above, 1), column(below, 1))
    with pytest.raises(InputError, match=r"got \[2, 2, 2, 3\] pairs, allowed: equally many"):
        ratio_difference((np.ones(2), np.ones(2)), (np.ones(2), np.ones(3)))


def test_estimates_read_well() -> None:
    assert str(Estimate(0.9119, 0.886, 0.9351, 512)) == "0.912 [0.886, 0.935]"
    assert str(Estimate(None, None, None, 0)) == "-"
    assert str(Estimate(0.5, None, None, 1)) == "0.500"
    assert str(Estimate(-0.0001, -0.02, 0.0, 9)) == "0.000 [-0.020, 0.000]"
