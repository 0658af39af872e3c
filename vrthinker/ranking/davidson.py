"""The strengths of clips from wins, ties and losses: Davidson's extension of the Bradley-Terry model.

Clip i has a strength s_i (a log-odds), and t says how common ties are. With d = s_i - s_j, the three outcomes
of a comparison of i and j have probabilities in the proportion

    i is better : tie : j is better  =  exp(d / 2) : exp(t) : exp(-d / 2).

Source: R. R. Davidson (1970), "On extending the Bradley-Terry model to accommodate ties in paired comparison
experiments", eq. 2.3 and 2.4, with pi_i = exp(s_i) and nu = exp(t).

The strengths are the mode of a posterior. The prior of every strength and of t is a normal distribution with
mean 0 and standard deviation `PRIOR_SD`. It keeps the strengths of clips that won or lost every comparison
finite, and it gives them a mean of 0. The log-posterior is strictly concave, so Newton's method with halved
steps finds its only maximum. Intervals come from the information matrix there (Laplace's approximation).
They rest on comparisons that are independent of each other, and on few comparisons they are rough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vrthinker.errors import InputError
from vrthinker.ranking.comparisons import CountArray

FloatArray = npt.NDArray[np.float64]

PRIOR_SD = 2.0
"""The prior's standard deviation. A clip this much above another wins 7 of 8 pairs that are not tied."""
Z_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""

_MAX_STEPS = 100
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Strengths:
    """The fitted model of one group and dimension.

    Attributes:
        values: The strengths, float64 `[clips]`, with a mean of 0.
        covariance: Their covariance, float64 `[clips, clips]`, of strengths that are centred.
        tie: The parameter t of ties.
    """

    values: FloatArray
    covariance: FloatArray
    tie: float

    def interval(self, clip: int) -> tuple[float, float]:
        """The 95 % interval of a clip's strength."""
        half = Z_95 * float(np.sqrt(self.covariance[clip, clip]))
        return float(self.values[clip]) - half, float(self.values[clip]) + half

    def is_above(self, clip: int, other: int) -> bool:
        """Whether the 95 % interval of the difference of two strengths lies above 0."""
        terms = self.covariance
        variance = float(terms[clip, clip] + terms[other, other] - 2 * terms[clip, other])
        return bool(self.values[clip] - self.values[other] > Z_95 * np.sqrt(max(variance, 0.0)))

    def probabilities(self, clip: int, other: int) -> tuple[float, float, float]:
        """The probabilities that the first clip is better, that they tie, and that the other is better."""
        better, tie, worse = _probabilities(np.array(self.values[clip] - self.values[other]), self.tie)
        return float(better), float(tie), float(worse)


def fit_strengths(wins: CountArray, ties: CountArray, *, prior_sd: float = PRIOR_SD) -> Strengths:
    """Fits the strengths of a group to its results.

    Args:
        wins: How often the clip of the row was better than that of the column, int64 `[clips, clips]`.
        ties: How often two clips tied, int64 `[clips, clips]`, symmetric.
        prior_sd: The standard deviation of the prior, above 0.

    Raises:
        InputError: The arrays are not square and equally large, hold negative counts, or compare a clip with
            itself; the ties are not symmetric; or the prior's standard deviation is not above 0.
    """
    _check(wins, ties, prior_sd)
    n_clips = len(wins)
    first, second = np.triu_indices(n_clips, 1)
    met = (wins + wins.T + ties)[first, second] > 0
    first, second = first[met], second[met]
    better, worse = wins[first, second], wins[second, first]
    tied = ties[first, second]
    played = better + worse + tied
    # Row p of `design` maps the parameters to the difference of strengths of pair p.
    design = np.zeros((len(first), n_clips))
    design[np.arange(len(first)), first] = 1.0
    design[np.arange(len(first)), second] = -1.0
    precision = 1.0 / prior_sd**2

    def log_posterior(parameters: FloatArray) -> float:
        difference, tie = design @ parameters[:-1], parameters[-1]
        normaliser = np.logaddexp(np.logaddexp(difference / 2, -difference / 2), tie)
        likelihood = (better - worse) @ difference / 2 + tied.sum() * tie - played @ normaliser
        return float(likelihood - precision * parameters @ parameters / 2)

    def slopes(parameters: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The gradient `[clips + 1]` and the information matrix of the log-posterior."""
        p_better, p_tie, p_worse = _probabilities(design @ parameters[:-1], float(parameters[-1]))
        mean = (p_better - p_worse) / 2
        gradient = np.append(design.T @ ((better - worse) / 2 - played * mean), tied.sum() - played @ p_tie)
        variance = played * ((p_better + p_worse) / 4 - mean**2)
        information = np.zeros((n_clips + 1, n_clips + 1))
        information[:-1, :-1] = design.T @ (variance[:, None] * design)
        information[:-1, -1] = information[-1, :-1] = design.T @ (-played * mean * p_tie)
        information[-1, -1] = played @ (p_tie * (1 - p_tie))
        return gradient - precision * parameters, information + precision * np.eye(n_clips + 1)

    parameters = np.zeros(n_clips + 1)
    value = log_posterior(parameters)
    for _ in range(_MAX_STEPS):
        gradient, information = slopes(parameters)
        step = np.linalg.solve(information, gradient)
        size = 1.0
        while (reached := log_posterior(parameters + size * step)) < value - 1e-12 and size > _TOLERANCE:
            size /= 2
        parameters, value = parameters + size * step, reached
        if np.abs(size * step).max() < _TOLERANCE:
            break
    _, information = slopes(parameters)
    centring = np.eye(n_clips) - 1.0 / n_clips
    covariance = centring @ np.linalg.inv(information)[:-1, :-1] @ centring
    return Strengths(centring @ parameters[:-1], covariance, float(parameters[-1]))


def _probabilities(difference: FloatArray, tie: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    exponents = np.stack([difference / 2, np.full_like(difference, tie), -difference / 2])
    weights = np.exp(exponents - exponents.max(axis=0))
    better, tied, worse = weights / weights.sum(axis=0)
    return better, tied, worse


def _check(wins: CountArray, ties: CountArray, prior_sd: float) -> None:
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or wins.shape != ties.shape or not len(wins):
        raise InputError(
            f"results: got shapes {wins.shape} and {ties.shape}, allowed: [clips, clips], the same for both"
        )
    if (wins < 0).any() or (ties < 0).any() or np.diagonal(wins).any() or np.diagonal(ties).any():
        raise InputError("results: got a negative count or a clip beside itself, allowed: neither")
    if (ties != ties.T).any():
        raise InputError("results: got ties that are not symmetric, allowed: the same count both ways")
    if not prior_sd > 0:
        raise InputError(f"prior_sd: got {prior_sd}, allowed: above 0")
