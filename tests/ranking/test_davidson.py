"""The model of strengths: it finds the maximum, recovers what was planted, and its intervals hold."""

from __future__ import annotations

import re

import numpy as np
import pytest

from vrthinker import InputError
from vrthinker.ranking.davidson import PRIOR_SD, Z_95, fit_strengths


def simulated(
    strengths: np.ndarray, tie: float, games: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Wins and ties of clips that meet each other `games` times."""
    n = len(strengths)
    wins, ties = np.zeros((n, n), np.int64), np.zeros((n, n), np.int64)
    for i in range(n):
        for j in range(i + 1, n):
            d = strengths[i] - strengths[j]
            weights = np.exp([d / 2, tie, -d / 2])
            wins[i, j], ties[i, j], wins[j, i] = rng.multinomial(games, weights / weights.sum())
            ties[j, i] = ties[i, j]
    return wins, ties


def log_posterior(values: np.ndarray, tie: float, wins: np.ndarray, ties: np.ndarray) -> float:
    """Written from the paper's probabilities, pi_i / (pi_i + pi_j + nu sqrt(pi_i pi_j))."""
    pi, nu, total = np.exp(values), np.exp(tie), 0.0
    for i in range(len(pi)):
        for j in range(len(pi)):
            below = pi[i] + pi[j] + nu * np.sqrt(pi[i] * pi[j])
            total += wins[i, j] * np.log(pi[i] / below)
            if i < j:
                total += ties[i, j] * np.log(nu * np.sqrt(pi[i] * pi[j]) / below)
    return float(total - (values @ values + tie**2) / (2 * PRIOR_SD**2))


def test_the_fit_is_the_maximum_of_the_posterior() -> None:
    rng = np.random.default_rng(1)
    wins, ties = simulated(rng.normal(0, 1.5, 5), -0.5, 3, rng)
    fit = fit_strengths(wins, ties)
    best = log_posterior(fit.values, fit.tie, wins, ties)
    for _ in range(50):
        moved = log_posterior(fit.values + rng.normal(0, 0.05, 5), fit.tie + rng.normal(0, 0.05), wins, ties)
        assert moved < best
    assert abs(fit.values.sum()) < 1e-9


def test_planted_strengths_are_recovered() -> None:
    rng = np.random.default_rng(2)
    planted = np.linspace(-2, 2, 8)
    wins, ties = simulated(planted, -0.7, 400, rng)
    fit = fit_strengths(wins, ties)
    assert np.abs(fit.values - planted).max() < 0.15
    assert abs(fit.tie + 0.7) < 0.1
    assert fit.is_above(7, 6)
    better, tie, worse = fit.probabilities(7, 0)
    assert better > 0.9 > 0.1 > tie > worse


def test_intervals_hold_the_planted_strengths_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(100):  # strengths drawn from the prior, so that the interval's share is exact
        planted = rng.normal(0, PRIOR_SD, 6)
        tie = float(rng.normal(0, PRIOR_SD))
        fit = fit_strengths(*simulated(planted, tie, 4, rng))
        centred = planted - planted.mean()
        for clip in range(6):
            low, high = fit.interval(clip)
            inside += low <= centred[clip] <= high
    assert 0.92 < inside / 600 < 0.98


def test_winners_of_everything_have_finite_strengths() -> None:
    wins, ties = np.zeros((4, 4), np.int64), np.zeros((4, 4), np.int64)
    for i in range(4):
        for j in range(i + 1, 4):
            wins[i, j] = 1
    fit = fit_strengths(wins, ties)
    assert (np.diff(fit.values) < 0).all()
    assert np.abs(fit.values).max() < 3 * PRIOR_SD
    thousand = fit_strengths(wins * 1000, ties)
    assert np.isfinite(thousand.values).all()
    assert thousand.values[0] > fit.values[0]


def test_only_ties_and_no_comparison_leave_all_equal() -> None:
    nothing = np.zeros((3, 3), np.int64)
    assert np.abs(fit_strengths(nothing, nothing).values).max() == 0
    tied = 1 - np.eye(3, dtype=np.int64)
    fit = fit_strengths(nothing, tied)
    assert np.abs(fit.values).max() < 1e-9
    assert fit.tie > 0
    low, high = fit.interval(0)
    assert high - low < 2 * Z_95 * PRIOR_SD, "ties say something about the strengths"


@pytest.mark.parametrize(
    ("wins", "ties", "message"),
    [
        (np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int64), "got shapes (2, 3)"),
        (np.eye(2, dtype=np.int64), np.zeros((2, 2), np.int64), "a clip beside itself"),
        (np.zeros((2, 2), np.int64), np.array([[0, 1], [0, 0]]), "ties that are not symmetric"),
        (np.array([[0, -1], [0, 0]]), np.zeros((2, 2), np.int64), "a negative count"),
    ],
)
def test_impossible_results_are_refused(wins: np.ndarray, ties: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        fit_strengths(wins, ties)
