"""Confidence intervals for ratios of sums: the percentile bootstrap, over pairs or over clusters of them.

A measure is the sum of the pairs' numerators over the sum of their denominators. A resample draws as many
pairs as there are, with replacement, and computes the ratio again. The interval holds the middle `confidence`
of these ratios. Pairs that share a prompt are not independent of each other. If clusters are given, a
resample draws whole clusters, and pairs of one cluster come and go together.

Invariants:

- Resample r is a vector of counts that depends only on the number of pairs (or clusters) and the seed. All
  measures of a call, and both sides of a difference, see the same resamples.
- Nothing is divided by zero. A resample in which a denominator sums to zero is not used in the measure's
  interval. Such an interval is conditional on at least one pair counting. If few pairs count, it rests on
  fewer resamples.
- Terms that are whole numbers are summed exactly, so that a measure that is the same in every resample has an
  interval of zero width, without rounding errors.

If all pairs agree, the interval has zero width. With fewer than about 30 pairs (or clusters) it is too narrow
to be trusted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vrthinker.errors import InputError

FloatArray: TypeAlias = npt.NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95

_BLOCK_CELLS = 1 << 21
"""The most counts (resamples x pairs) in memory at once: tens of MiB, whatever the number of pairs."""


@dataclass(frozen=True)
class Estimate:
    """A measured value and its interval.

    Attributes:
        value: The measure; None if no pair counts.
        low: The lower end of the interval; None if there is no value, or no resample had one.
        high: The upper end of the interval; None if `low` is.
        n: The number of pairs that count, which are those in the denominator.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return f"{self.value:z.3f}"
        return f"{self.value:z.3f} [{self.low:z.3f}, {self.high:z.3f}]"


def ratio_estimates(
    numerators: FloatArray,
    denominators: FloatArray,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> list[Estimate]:
    """Several ratios of sums over the same pairs, each with its interval.

    Args:
        numerators: The numerators, float64 `[pairs, measures]`, finite.
        denominators: The denominators, float64 `[pairs, measures]`, not negative; 0 if a pair does not count.
        clusters: The cluster of each pair, such as its prompt. By default every pair is a cluster of its own.
        resamples: The number of resamples, at least 1.
        confidence: The share of the resampled ratios that the interval holds, between 0 and 1.
        seed: The seed of the resamples, not negative.

    Returns:
        One estimate per measure.

    Raises:
        InputError: A setting is out of its range, or the arrays are not what is described above.
    """
    _check_settings(resamples, confidence, seed)
    _check_terms(numerators, denominators)
    measures = numerators.shape[1]
    terms = _by_cluster(np.hstack([numerators, denominators]), clusters)
    sums = _resampled_sums(terms, resamples, seed)
    above, below = numerators.sum(axis=0), denominators.sum(axis=0)
    return [
        _estimate(
            _ratios(above[[m]], below[[m]]),
            _ratios(sums[:, m], sums[:, measures + m]),
            confidence,
            int(np.count_nonzero(denominators[:, m])),
        )
        for m in range(measures)
    ]


def ratio_difference(
    a: tuple[FloatArray, FloatArray],
    b: tuple[FloatArray, FloatArray],
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """The ratio of `a` minus that of `b`, where row i of both is the same pair (paired bootstrap).

    Args:
        a: The numerators and denominators of one side, each float64 `[pairs]`.
        b: The numerators and denominators of the other side.
        clusters: The cluster of each pair. By default every pair is a cluster of its own.
        resamples: The number of resamples. Each draws the same pairs on both sides, and is not used if either
            denominator sums to zero.
        confidence: The share of the resampled differences that the interval holds, between 0 and 1.
        seed: The seed of the resamples, not negative.

    Returns:
        The difference. Its `n` is the number of pairs that count on at least one side.

    Raises:
        InputError: A setting is out of its range, or the arrays are not what is described above.
    """
    _check_settings(resamples, confidence, seed)
    lengths = [len(side) for side in (*a, *b)]
    if len(set(lengths)) > 1:
        raise InputError(f"terms: got {lengths} pairs, allowed: equally many in each array")
    terms = np.stack([*a, *b], axis=1)
    _check_terms(terms[:, ::2], terms[:, 1::2])
    return _estimate(
        _differences(terms.sum(axis=0, keepdims=True)),
        _differences(_resampled_sums(_by_cluster(terms, clusters), resamples, seed)),
        confidence,
        int(np.count_nonzero(terms[:, 1::2].any(axis=1))),
    )


def _by_cluster(terms: FloatArray, clusters: Sequence[Hashable] | None) -> FloatArray:
    """The sums of the terms `[pairs, columns]` over each cluster, `[clusters, columns]`, in order.

    Raises:
        InputError: There are not as many clusters as pairs.
    """
    if clusters is None:
        return terms
    if len(clusters) != len(terms):
        raise InputError(f"clusters: got {len(clusters)}, allowed: one for each of {len(terms)} pairs")
    numbers: dict[Hashable, int] = {}
    places = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    sums = np.zeros((len(numbers), terms.shape[1]))
    np.add.at(sums, places, terms)
    return sums


def _resampled_sums(terms: FloatArray, resamples: int, seed: int) -> FloatArray:
    """The sums of the terms `[pairs, columns]` over each resample, `[resamples, columns]`."""
    pairs, columns = terms.shape
    if pairs == 0:
        return np.zeros((resamples, columns))
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_CELLS // pairs)
    sums = np.empty((resamples, columns))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(0, pairs, (rows, pairs))
        drawn += np.arange(rows)[:, None] * pairs
        counts = np.bincount(drawn.ravel(), minlength=rows * pairs).reshape(rows, pairs)
        sums[start : start + rows] = counts.astype(np.float64) @ terms
    return sums


def _ratios(above: FloatArray, below: FloatArray) -> FloatArray:
    """The ratios with a denominator above zero; the others are removed."""
    counted = below > 0
    return above[counted] / below[counted]


def _differences(sums: FloatArray) -> FloatArray:
    """Differences of two ratios from sums `[resamples, 4]`, without those whose denominators are zero."""
    above_a, below_a, above_b, below_b = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)].T
    return np.asarray(above_a / below_a - above_b / below_b)


def _estimate(value: FloatArray, resampled: FloatArray, confidence: float, n: int) -> Estimate:
    """An estimate from the value (`[1]`, or `[0]` if there is none) and its resamples."""
    if not len(value):
        return Estimate(None, None, None, n)
    if not len(resampled):
        return Estimate(float(value[0]), None, None, n)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(value[0]), float(low), float(high), n)


def _check_settings(resamples: int, confidence: float, seed: int) -> None:
    if resamples < 1:
        raise InputError(f"resamples: got {resamples}, allowed: 1 and more ({RESAMPLES} is usual)")
    if not 0 < confidence < 1:
        raise InputError(f"confidence: got {confidence}, allowed: between 0 and 1, as 0.95")
    if seed < 0:
        raise InputError(f"seed: got {seed}, allowed: 0 and more")


def _check_terms(numerators: FloatArray, denominators: FloatArray) -> None:
    if numerators.ndim != 2 or numerators.shape != denominators.shape:
        shapes = f"{numerators.shape} and {denominators.shape}"
        raise InputError(f"terms: got shapes {shapes}, allowed: [pairs, measures], the same for both")
    if not (np.isfinite(numerators).all() and np.isfinite(denominators).all() and (denominators >= 0).all()):
        raise InputError("terms: got a value that is not finite or a negative denominator, allowed: neither")
