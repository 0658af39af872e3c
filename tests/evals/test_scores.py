"""Scalar scorers: the threshold search and the rank correlations against brute force, scipy and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.errors import InputError
from vrthinker.evals.scores import (
    best_tie_threshold,
    cross_fitted,
    judged_by_scores,
    kendall_tau_b,
    signed,
    spearman,
)

PAIRS = st.lists(
    st.tuples(
        st.one_of(st.integers(-4, 4).map(float), st.floats(-3, 3, allow_subnormal=False)),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=30,
)


def arrays(pairs: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([d for d, _ in pairs]), np.array([label for _, label in pairs])


def accuracy(differences: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    return float(np.mean(judged_by_scores(differences, threshold) == labels))


def test_verdicts_of_scores() -> None:
    differences = np.array([0.5, -0.5, 0.0, 0.2, -0.2])
    assert judged_by_scores(differences).tolist() == [1, 2, 0, 1, 2]
    assert judged_by_scores(differences, 0.2).tolist() == [1, 2, 0, 0, 0]


def test_the_threshold_by_hand() -> None:
    # Ties at 0.1 and 0.2, a right preference at 0.15 and at 0.9, a wrong one at 0.3.
    differences, labels = np.array([0.1, -0.2, 0.15, 0.9, 0.3]), np.array([0, 0, 1, 1, 2])
    found = best_tie_threshold(differences, labels)
    assert (found.threshold, found.accuracy) == (0.1, 3 / 5)
    assert accuracy(differences, labels, 0.0) == 2 / 5
    never = best_tie_threshold(np.array([1.0, -1.0]), np.array([1, 2]))
    assert (never.threshold, never.accuracy) == (0.0, 1.0)
    always = best_tie_threshold(np.array([1.0, -2.0]), np.array([0, 0]))
    assert (always.threshold, always.accuracy) == (2.0, 1.0)


@given(PAIRS)
def test_the_threshold_equals_brute_force(pairs: list[tuple[float, int]]) -> None:
    differences, labels = arrays(pairs)
    candidates = sorted({0.0, *np.abs(differences).tolist()})
    between = [(a + b) / 2 for a, b in itertools.pairwise(candidates)]
    best = max(accuracy(differences, labels, t) for t in [*candidates, *between, candidates[-1] + 1])
    found = best_tie_threshold(differences, labels)
    assert found.accuracy == pytest.approx(best)
    assert accuracy(differences, labels, found.threshold) == pytest.approx(best)
    assert found.threshold == next(t for t in candidates if accuracy(differences, labels, t) >= best - 1e-12)


def test_a_cross_fitted_threshold_never_saw_the_pairs_that_it_judges() -> None:
    clusters = [f"prompt {n // 2}" for n in range(40)]
    differences = np.linspace(-1, 1, 40)
    labels = judged_by_scores(differences, 0.3)
    before = cross_fitted(differences, labels, clusters)
    changed = labels.copy()
    changed[5] = (labels[5] + 1) % 3  # what a pair is labelled does not change its own verdict
    assert cross_fitted(differences, changed, clusters)[5] == before[5]
    assert cross_fitted(differences, changed, clusters)[4] == before[4], "nor that of its prompt"
    assert np.mean(before == labels) > 0.8
    alone = cross_fitted(differences, labels, ["one prompt"] * 40)
    assert alone.tolist() == judged_by_scores(differences).tolist()


@given(PAIRS)
def test_correlations_equal_brute_force(pairs: list[tuple[float, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    differences, labels = arrays(pairs)
    votes = signed(labels)
    signs = [
        (np.sign(differences[i] - differences[j]), np.sign(votes[i] - votes[j]))
        for i in range(len(pairs))
        for j in range(i)
    ]
    counted = [sum(1 for a, _ in signs if a), sum(1 for _, b in signs if b)]
    found = kendall_tau_b(differences, votes)
    if 0 in counted:
        assert found is None
        assert spearman(differences, votes) is None
        return
    assert found == pytest.approx(sum(a * b for a, b in signs) / np.sqrt(counted[0] * counted[1]))
    assert found == pytest.approx(stats.kendalltau(differences, votes).statistic)
    assert spearman(differences, votes) == pytest.approx(stats.spearmanr(differences, votes).statistic)


def test_correlations_by_hand() -> None:
    rising = np.arange(5.0)
    assert kendall_tau_b(rising, rising) == spearman(rising, rising) == 1.0
    assert kendall_tau_b(rising, -rising) == spearman(rising, -rising) == -1.0
    assert kendall_tau_b(rising[:1], rising[:1]) is spearman(rising[:1], rising[:1]) is None


def test_what_cannot_be_compared_is_refused() -> None:
    for differences, labels in (([], []), ([1.0], [0, 1]), ([np.nan], [0])):
        with pytest.raises(InputError, match="scores: got"):
            best_tie_threshold(np.array(differences, dtype=float), np.array(labels, dtype=np.int64))
