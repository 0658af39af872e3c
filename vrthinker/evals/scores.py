"""Scalar scorers: judges that give each clip a number instead of a verdict (method section 6).

A scorer prefers the clip with the higher number. When two numbers are close enough to be a tie, it cannot
say, so the threshold is searched that gives the highest accuracy, as in "Ties Matter" (Deutsch et al., arXiv
2305.14324, section 5). A threshold that was searched on the pairs that it is measured on flatters the scorer;
`cross_fitted` gives the accuracy on pairs that the threshold was not searched on.

Kendall's tau-b and Spearman's rho need no threshold. They compare the differences of the two clips' scores
with people's preferences, as +1 (video 1), 0 (tie) and -1 (video 2).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vrthinker.errors import InputError
from vrthinker.evals.intervals import FloatArray

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TieThreshold:
    """The threshold with the highest accuracy, and that accuracy.

    Attributes:
        threshold: The pairs whose scores differ by no more than this are ties; 0 and above.
        accuracy: The share of pairs that are then judged as labelled.
    """

    threshold: float
    accuracy: float


def judged_by_scores(differences: FloatArray, threshold: float = 0.0) -> IntArray:
    """The verdicts of a scorer: 0 (tie), 1 or 2.

    Args:
        differences: The score of video 1 minus that of video 2, float64 `[pairs]`.
        threshold: The largest difference that is a tie. With 0, only equal scores are.
    """
    tied = np.abs(differences) <= threshold
    return np.where(tied, 0, np.where(differences > 0, 1, 2)).astype(np.int64)


def best_tie_threshold(differences: FloatArray, labels: IntArray) -> TieThreshold:
    """The exact best threshold in O(n log n): 0, or the absolute difference of some pair.

    Between two neighbouring differences nothing changes, so no other threshold can be better. Of equally good
    ones, the smallest is taken.

    Source: "Ties Matter", arXiv 2305.14324, tie calibration.

    Args:
        differences: The score of video 1 minus that of video 2, float64 `[pairs]`, finite.
        labels: The labels 0 (tie), 1 and 2, int64 `[pairs]`.

    Raises:
        InputError: There is no pair, the lengths differ, or a difference is not finite.
    """
    _check(differences, labels)
    sizes = np.abs(differences)
    order = np.argsort(sizes, kind="stable")
    sizes, sorted_labels = sizes[order], labels[order]
    sides = judged_by_scores(differences[order])
    # A pair that becomes a tie is gained if people tied it, and lost if its side was right.
    gained = (sorted_labels == 0).astype(np.int64) - (sides == sorted_labels)
    # With threshold 0, pairs of equal scores are ties already, which `sides` says: they gain nothing.
    right = np.count_nonzero(sides == sorted_labels) + np.concatenate([[0], np.cumsum(gained)])
    # A threshold takes all pairs of the same difference at once.
    ends = np.concatenate([[True], np.append(sizes[1:] > sizes[:-1], True)])
    places = np.flatnonzero(ends)
    best = places[int(np.argmax(right[places]))]
    return TieThreshold(float(sizes[best - 1]) if best else 0.0, float(right[best] / len(labels)))


def cross_fitted(differences: FloatArray, labels: IntArray, clusters: Sequence[Hashable]) -> IntArray:
    """Verdicts by thresholds that were searched on other pairs: each half is judged by the other half's.

    Args:
        differences: The score of video 1 minus that of video 2, float64 `[pairs]`, finite.
        labels: The labels, int64 `[pairs]`.
        clusters: The cluster of each pair, such as its prompt. Halves never share one. Which half a cluster
            is in depends on its name only.

    Returns:
        The verdicts, int64 `[pairs]`. If all pairs fall into one half, its threshold is 0.
    """
    _check(differences, labels)
    halves = np.array([hashlib.sha256(repr(cluster).encode()).digest()[0] & 1 for cluster in clusters])
    verdicts = np.empty(len(labels), dtype=np.int64)
    for half in (0, 1):
        here, there = halves == half, halves != half
        threshold = best_tie_threshold(differences[there], labels[there]).threshold if there.any() else 0.0
        verdicts[here] = judged_by_scores(differences[here], threshold)
    return verdicts


def signed(labels: IntArray) -> FloatArray:
    """The labels as numbers that can be correlated: +1 (video 1), 0 (tie), -1 (video 2)."""
    return np.array([0.0, 1.0, -1.0])[labels]


def kendall_tau_b(first: FloatArray, second: FloatArray) -> float | None:
    """Kendall's tau-b, which corrects for ties, in O(n log n) (Knight's algorithm).

    Args:
        first: Numbers, float64 `[n]`.
        second: Numbers, float64 `[n]`.

    Returns:
        A value from -1 to 1; None with fewer than two numbers, or if one side has equal numbers only.
    """
    n = len(first)
    order = np.lexsort((second, first))
    first_ranks, second_ranks = (np.unique(side[order], return_inverse=True)[1] for side in (first, second))
    pairs = n * (n - 1) // 2
    tied_first, tied_second = (_tied_pairs(ranks) for ranks in (first_ranks, second_ranks))
    tied_both = _tied_pairs(first_ranks * (n + 1) + second_ranks)
    if n < 2 or pairs in (tied_first, tied_second):
        return None
    discordant = _inversions(second_ranks)
    balance = pairs - tied_first - tied_second + tied_both - 2 * discordant
    return balance / math.sqrt((pairs - tied_first) * (pairs - tied_second))


def spearman(first: FloatArray, second: FloatArray) -> float | None:
    """Spearman's rho: the correlation of ranks, where equal numbers share the mean of their ranks.

    Returns:
        A value from -1 to 1; None with fewer than two numbers, or if one side has equal numbers only.
    """
    if len(first) < 2:
        return None
    ranks = [_mean_ranks(side) for side in (first, second)]
    deviations = [side - side.mean() for side in ranks]
    squares = [float(side @ side) for side in deviations]
    if 0.0 in squares:
        return None
    return float(deviations[0] @ deviations[1]) / math.sqrt(squares[0] * squares[1])


def _mean_ranks(values: FloatArray) -> FloatArray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[places])


def _tied_pairs(ranks: npt.NDArray[np.int64]) -> int:
    counts = np.unique(ranks, return_counts=True)[1].astype(object)
    return int((counts * (counts - 1) // 2).sum()) if len(counts) else 0


def _inversions(ranks: npt.NDArray[np.int64]) -> int:
    """The number of pairs whose later rank is smaller, counted with a Fenwick tree."""
    size = int(ranks.max()) + 1
    tree = [0] * (size + 1)
    found = 0
    for seen, rank in enumerate(ranks.tolist()):
        not_larger, place = 0, rank + 1
        while place:
            not_larger += tree[place]
            place &= place - 1
        found += seen - not_larger
        place = rank + 1
        while place <= size:
            tree[place] += 1
            place += place & -place
    return found


def _check(differences: FloatArray, labels: IntArray) -> None:
    if not len(labels) or len(labels) != len(differences):
        raise InputError(
            f"scores: got {len(differences)} differences and {len(labels)} labels, allowed: equally many, "
            "at least one"
        )
    if not np.isfinite(differences).all():
        raise InputError("scores: got a difference that is not finite, allowed: finite numbers only")
