"""The reward of every episode of a group: the sum of the terms that its settings name.

Invariant: a failed episode has no reward (None) and does not count anywhere, neither in its group nor in a
metric but `reward/failed`. The terms of every other episode sum up to its total.

Source: method section 4, f = f_fmt + f_acc + f_cot + eta * f_explo.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.reward.group import EpisodeTruth, JudgedGroup, is_failed
from vrthinker.reward.settings import RewardSettings
from vrthinker.reward.terms import TERMS, Mean


@dataclass(frozen=True)
class GroupRewards:
    """The rewards of a group, with one entry per episode, in order; None for a failed episode.

    Attributes:
        totals: The rewards.
        terms: Kind of a term -> its weighted values, which sum up to the totals.
        accuracy: r_acc of the final answers, from 0 to 1, whichever terms there are. Dynamic sampling drops
            groups in which it is the same for all episodes.
        means: The metrics by name, as sums and numbers of episodes, so that those of several groups can be
            combined. A metric that no episode counts for has number 0.
    """

    totals: tuple[float | None, ...]
    terms: Mapping[str, tuple[float | None, ...]]
    accuracy: tuple[float | None, ...]
    means: Mapping[str, Mean]

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of this group."""
        return mean_metrics([self])


def score_group(
    settings: RewardSettings, trajectories: Sequence[Trajectory | None], truths: Sequence[EpisodeTruth]
) -> GroupRewards:
    """Scores the episodes of one pair.

    Args:
        settings: The terms of the reward.
        trajectories: The episodes of the group. None stands for an episode that could not start, which is
            failed.
        truths: The truth for each episode, in the order in which that episode saw the clips.

    Raises:
        InputError: There are not as many truths as episodes, the episodes are of different clips, or evidence
            lies outside an episode's workspace.
    """
    if len(truths) != len(trajectories):
        raise InputError(f"truths: got {len(truths)}, wanted one per episode, {len(trajectories)}")
    judged = [
        (place, trajectory)
        for place, trajectory in enumerate(trajectories)
        if trajectory is not None and not is_failed(trajectory)
    ]
    group = JudgedGroup.of([t for _, t in judged], [truths[place] for place, _ in judged], settings.alpha)
    means = {
        "reward/accuracy": Mean.of(group.accuracy),
        "reward/caption_repeated": Mean.of(group.repeats_caption),
        "reward/failed": Mean(len(trajectories) - len(judged), len(trajectories)),
    }
    values = {}
    for term in settings.terms:
        scores = TERMS[term.kind](term, group)
        values[term.kind] = scores.values
        if term.kind != "accuracy":
            means[f"reward/{term.kind}"] = Mean.of(scores.values)
        means.update(scores.metrics)
    totals = [math.fsum(of_episode) for of_episode in zip(*values.values(), strict=True)]
    means["reward/total"] = Mean.of(totals)

    def of_all(scored: Sequence[float]) -> tuple[float | None, ...]:
        by_place = {place: value for (place, _), value in zip(judged, scored, strict=True)}
        return tuple(by_place.get(place) for place in range(len(trajectories)))

    return GroupRewards(
        of_all(totals),
        {kind: of_all(scored) for kind, scored in values.items()},
        of_all(group.accuracy),
        means,
    )


def mean_metrics(groups: Iterable[GroupRewards]) -> dict[str, float]:
    """The metrics of several groups together: every episode that counts for a metric counts once.

    A metric that no episode counts for is left out.
    """
    totals: dict[str, Mean] = {}
    for group in groups:
        for name, mean in group.means.items():
            before = totals.get(name, Mean(0.0, 0))
            totals[name] = Mean(before.total + mean.total, before.number + mean.number)
    return {name: mean.total / mean.number for name, mean in totals.items() if mean.number}
