"""The terms of a reward: pure functions of the judged episodes of a group, one number for each.

The values are weighted already, so that an episode's reward is the sum over its terms. A call counts if it
was executed: it showed frames. `docs/rewards.md` has a table of the terms.

Source: method section 4. The paper's terms are format, accuracy, CoT gain and exploration; the others are
ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from vrthinker.episode.dimensions import Preference
from vrthinker.episode.trajectory import Trajectory
from vrthinker.reward.group import JudgedGroup, answer_accuracy
from vrthinker.reward.settings import (
    AccuracyTerm,
    AgreementTerm,
    CallCostTerm,
    CotGainTerm,
    EvidenceTerm,
    ExplorationTerm,
    FormatTerm,
    NecessityTerm,
    TermSettings,
)


class Mean(NamedTuple):
    """A mean as a sum and the number of its values, so that means of several groups can be combined."""

    total: float
    number: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """The mean of values, of which there may be none."""
        kept = list(values)
        return cls(float(sum(kept)), len(kept))


@dataclass(frozen=True)
class TermScores:
    """The result of a term.

    Attributes:
        values: The weighted value of each episode.
        metrics: Metrics beside the mean of the values, by name. One that is named `reward/<kind>` replaces
            that mean.
    """

    values: tuple[float, ...]
    metrics: Mapping[str, Mean] = field(default_factory=dict)


TERMS: dict[str, Callable[[TermSettings, JudgedGroup], TermScores]] = {}
"""Kind of a term -> its function, which takes the settings of that kind."""
_Term = TypeVar("_Term", bound=TermSettings)
_Function = Callable[[_Term, JudgedGroup], TermScores]


def _registers(settings_type: type[_Term]) -> Callable[[_Function[_Term]], _Function[_Term]]:
    """Registers a function under the kind of its settings."""

    def register(function: _Function[_Term]) -> _Function[_Term]:
        def run(settings: TermSettings, group: JudgedGroup) -> TermScores:
            assert isinstance(settings, settings_type)
            return function(settings, group)

        TERMS[settings_type.model_fields["kind"].default] = run
        return function

    return register


@_registers(FormatTerm)
def format_reward(settings: FormatTerm, group: JudgedGroup) -> TermScores:
    """f_fmt: 1 if every round is well formed and the last one answers, else 0.

    A repaired round does not earn it. Ours: the scale from 0 to 1, and that an episode without a verdict
    earns nothing, although each of its rounds may have the right form (at the round limit).
    """
    return TermScores(
        tuple(
            settings.weight * (trajectory.well_formed and trajectory.outcome.judgments is not None)
            for trajectory in group.trajectories
        )
    )


@_registers(AccuracyTerm)
def accuracy_reward(settings: AccuracyTerm, group: JudgedGroup) -> TermScores:
    """f_acc: r_acc of the final answer (`group.answer_accuracy`)."""
    return TermScores(group.accuracy)


@_registers(CotGainTerm)
def cot_gain(settings: CotGainTerm, group: JudgedGroup) -> TermScores:
    """f_cot = k * sum over i of (r_acc of answer i+1 - r_acc of answer i).

    The answers are the recommended ones and the final one, as far as they can be read, in order. The sum is
    r_acc of the last answer minus that of the first, and is computed so, because rounding would otherwise
    make equal gains differ. An episode without a recommended answer gains nothing, nor does one whose verdict
    only repeats the caption.
    """
    values = []
    for trajectory, truth, repeats in zip(
        group.trajectories, group.truths, group.repeats_caption, strict=True
    ):
        answers = [r.recommendation.judgments for r in trajectory.rounds if r.recommendation is not None]
        if trajectory.outcome.judgments is not None and answers:
            answers.append(trajectory.outcome.judgments)
        gain = 0.0
        if answers and not repeats:
            first, last = (answer_accuracy(a, truth.labels, group.alpha) for a in (answers[0], answers[-1]))
            gain = last - first
        values.append(settings.k * gain)
    return TermScores(tuple(values))


@_registers(ExplorationTerm)
def exploration(settings: ExplorationTerm, group: JudgedGroup) -> TermScores:
    """The weighted f_explo: eta * max(omega - R(X), 0) for episodes that used visual reasoning, else 0.

    R(X) is the share of the group's judged episodes with at least one call that showed frames, which is what
    using visual reasoning means here. The metric `reward/visual_share` is its mean.
    """
    used = [trajectory.tool_calls > 0 for trajectory in group.trajectories]
    share = Mean.of(used)
    bonus = max(settings.omega - share.total / max(share.number, 1), 0.0)
    return TermScores(tuple(settings.eta * bonus * u for u in used), {"reward/visual_share": share})


@_registers(CallCostTerm)
def call_cost(settings: CallCostTerm, group: JudgedGroup) -> TermScores:
    """Ours: minus the cost, for every call that showed frames."""
    return TermScores(tuple(0.0 - settings.cost * t.tool_calls for t in group.trajectories))


@_registers(AgreementTerm)
def agreement(settings: AgreementTerm, group: JudgedGroup) -> TermScores:
    """Ours: the weight if OA is what TA, VQ and MQ say together, else 0.

    They say together what the sign of (number of dimensions for video 1 - number for video 2) says; equal
    numbers are a tie. Without a verdict, or with one that only repeats the caption, it is 0.
    """
    values = []
    for trajectory, repeats in zip(group.trajectories, group.repeats_caption, strict=True):
        judgments = trajectory.outcome.judgments
        agrees = False
        if judgments is not None and not repeats:
            together = _said_together((judgments.TA, judgments.VQ, judgments.MQ))
            agrees = together == judgments.OA
        values.append(settings.weight * agrees)
    return TermScores(tuple(values))


def _said_together(dimensions: Sequence[Preference]) -> Preference:
    """The sign of (number of dimensions for video 1 - number for video 2), as a preference."""
    first, second = map(dimensions.count, (Preference.VIDEO_1, Preference.VIDEO_2))
    if first == second:
        return Preference.TIE
    return Preference.VIDEO_1 if first > second else Preference.VIDEO_2


@_registers(EvidenceTerm)
def evidence(settings: EvidenceTerm, group: JudgedGroup) -> TermScores:
    """Ours: the weight times the share of evidence ranges of which a call showed at least one frame.

    An episode without ranges gets 0 and is left out of the metrics. `reward/evidence_seen` is the share
    itself. What the first input showed does not count.
    """
    shares: list[float | None] = []
    for trajectory, truth in zip(group.trajectories, group.truths, strict=True):
        asked = _asked_frames(trajectory)
        hits = [any(first <= n < end for n in asked) for first, end in truth.evidence or ()]
        shares.append(sum(hits) / len(hits) if hits else None)
    known = [share for share in shares if share is not None]
    return TermScores(
        tuple(settings.weight * (share or 0.0) for share in shares),
        {
            "reward/evidence": Mean.of(settings.weight * share for share in known),
            "reward/evidence_seen": Mean.of(known),
        },
    )


def _asked_frames(trajectory: Trajectory) -> set[int]:
    """The frame numbers that the episode's calls showed."""
    return {
        number
        for record in trajectory.rounds
        for tool in record.tools
        if tool.error_kind is None
        for number in tool.frame_numbers
    }


@_registers(NecessityTerm)
def necessity(settings: NecessityTerm, group: JudgedGroup) -> TermScores:
    """Ours: minus the weight if calls led to the overall verdict that the group reaches without calls.

    That verdict is the one of more than half of the group's verdicts without a call. If there is none (no
    such episode, or no majority), nobody loses anything. `reward/needless_calls` is the share of such
    episodes among those with calls, in groups that have that verdict. Verdicts are compared in one order of
    the clips.
    """
    called = [trajectory.tool_calls > 0 for trajectory in group.trajectories]
    without = Counter(
        verdict for verdict, c in zip(group.overall, called, strict=True) if verdict is not None and not c
    )
    majority = next((verdict for verdict, n in without.items() if 2 * n > without.total()), None)
    needless = [
        majority is not None and c and verdict == majority
        for verdict, c in zip(group.overall, called, strict=True)
    ]
    decided = [n for n, c in zip(needless, called, strict=True) if c and majority is not None]
    return TermScores(
        tuple(0.0 - settings.weight * n for n in needless), {"reward/needless_calls": Mean.of(decided)}
    )
