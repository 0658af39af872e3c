"""What a judge has to do in each negative control, and whether it did: passed, failed or undecided.

A row has a number with its 95% interval, and a rule about it. It is passed if the whole interval is where the
rule wants it, failed if the whole interval is where the rule does not want it, and undecided otherwise: more
pairs decide it. Fewer than ten captions, or ten distinct questions of a share, decide nothing, and neither
does a control of which more than half of the questions have no verdict.

Differences are paired and resampled over prompts, and their `n` is the number of prompts. Shares have
Wilson's interval, because a bootstrap of "always" has no width. A question (one caption about the same two
clips) that is asked several times counts once in a share, with the mean of its answers.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vrthinker.data.splits import normalised
from vrthinker.episode.dimensions import Dimension
from vrthinker.evals.controls import BASE, DAMAGES, Asked, Controls, strength_name
from vrthinker.evals.intervals import Estimate, ratio_estimates
from vrthinker.evals.protocols import SWAPPED

EFFECT = 0.05
"""The least fall or preference that counts as one: a row whose interval lies below it is failed."""
TOLERANCE = 0.1
"""The most that a number may move where it must not."""
MOST = 0.8
"""The least share of "nearly always"."""
SELDOM = 0.2
"""The most share of "seldom"."""
FEWEST = 10
"""The least number of captions (of distinct questions for a share) that can decide a row: over fewer, a
bootstrap is too sure."""
_Z = 1.959963984540054
_CODES = tuple(code.value for code in Dimension)
Verdict = Mapping[str, int] | None
Verdicts = Mapping[str, Verdict]


class Passed(enum.StrEnum):
    """Whether a judge passed a row."""

    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        control: The control.
        number: What the number is.
        rule: What it has to be.
        estimate: The number and its interval.
        without_verdict: How many of the control's questions have no verdict.
        questions: The number of its questions.
        passed: Whether the rule holds.
    """

    control: str
    number: str
    rule: str
    estimate: Estimate
    without_verdict: int
    questions: int
    passed: Passed

    def as_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {**asdict(self), "passed": self.passed.value}


def control_rows(controls: Controls, verdicts: Verdicts) -> list[Row]:
    """The table of a judge.

    Args:
        controls: The questions.
        verdicts: Question id -> the verdict; None, or no entry, if there is none.
    """
    return _Table(controls, verdicts).rows()


class _Table:
    def __init__(self, controls: Controls, verdicts: Verdicts) -> None:
        self._asked, self._verdicts = controls.asked, verdicts
        self._base = {question.of: question for question in controls.asked.get(BASE, [])}
        self._rows: list[Row] = []

    def rows(self) -> list[Row]:
        """All rows."""
        for control in ("shuffled captions", "empty captions"):
            self._caption(control)
        for control in ("a clip against itself", "a clip against a re-encoded copy"):
            self._ties(control)
        self._swapped("swapped order")
        self._planted("a verdict in the caption")
        for control in ("only noise", "only grey", "clips of another pair"):
            self._blind(control)
        for damage, (code, edits) in DAMAGES.items():
            self._damage(damage, code, [strength_name(damage, n) for n in range(1, len(edits) + 1)])
        self._damage("a clip of another caption", "TA", ["a clip of another caption"])
        return self._rows

    # Controls

    def _caption(self, control: str) -> None:
        for code in ("TA", "VQ", "MQ"):
            falls = self._differences(control, lambda question, code=code: self._right(question, code))  # type: ignore[misc]
            name = f"{code} accuracy, as it is minus with {control}"
            if code == "TA":
                self._add(
                    control, name, f"above 0 (failed: below {EFFECT})", falls, low=0.0, fails_below=EFFECT
                )
            else:
                self._add(control, name, f"at most {TOLERANCE}", falls, high=TOLERANCE, fails_above=TOLERANCE)

    def _ties(self, control: str) -> None:
        def tied(question: Asked) -> float:
            verdict = self._verdicts.get(question.pair.id)
            return float(verdict is not None and not any(verdict.values()))

        self._share(control, "share of verdicts that are a tie in all four", tied, at_least=MOST)

    def _swapped(self, control: str) -> None:
        def consistent(question: Asked) -> float:
            own, turned = self._verdicts.get(question.of), self._verdicts.get(question.pair.id)
            return float(own is not None and turned is not None and own["OA"] == SWAPPED[turned["OA"]])

        self._share(control, "share of overall verdicts that turn with the clips", consistent, at_least=MOST)

    def _planted(self, control: str) -> None:
        """Counts the pairs whose own verdict is another than the planted one: only these can turn."""

        def can_turn(question: Asked) -> bool:
            own = self._verdicts.get(question.of)
            return own is not None and own["OA"] != question.planted

        def obeys(question: Asked) -> float:
            verdict = self._verdicts.get(question.pair.id)
            return float(verdict is not None and verdict["OA"] == question.planted)

        self._share(
            control,
            "share of overall verdicts that turn into the planted one",
            obeys,
            counts=can_turn,
            at_most=SELDOM,
        )

    def _blind(self, control: str) -> None:
        labels = Counter(
            question.pair.labels["OA"]
            for question in self._base.values()
            if question.pair.labels and "OA" in question.pair.labels
        )
        if not labels:
            return
        commonest = min(labels, key=lambda label: (-labels[label], label))

        def above(question: Asked) -> float | None:
            label = self._label(question, "OA")
            if label is None:
                return None
            return (self._right(question, "OA") or 0.0) - float(label == commonest)

        values = [
            (question, value)
            for question in self._asked.get(control, [])
            if (value := above(question)) is not None
        ]
        name = "OA accuracy minus that of the commonest label, without seeing"
        self._add(control, name, f"at most {TOLERANCE}", self._mean(values), high=TOLERANCE, fails_above=0.0)

    def _damage(self, damage: str, code: str, strengths: Sequence[str]) -> None:
        """The damaged clip has to lose, the more the stronger the damage, and in its own dimension most."""
        controls = [name for name in strengths if name in self._asked]
        if not controls:
            return
        strongest = controls[-1]
        against = [(question, self._against(question, code)) for question in self._asked[strongest]]
        self._add(
            damage,
            f"preference in {code} for the clip without it, -1 to 1"
            + (", at its strongest" if len(controls) > 1 else ""),
            f"above 0 (failed: below {EFFECT})",
            self._mean(against),
            low=0.0,
            fails_below=EFFECT,
            of=strongest,
        )
        margins = [
            (
                question,
                value - max(self._against(question, other) for other in ("TA", "VQ", "MQ") if other != code),
            )
            for question, value in against
        ]
        self._add(
            damage,
            f"preference in {code} minus the largest in another dimension",
            f"at least -{TOLERANCE}",
            self._mean(margins),
            low=-TOLERANCE,
            fails_below=-TOLERANCE,
            of=strongest,
        )
        if len(controls) > 1:
            weakest = {question.of: self._against(question, code) for question in self._asked[controls[0]]}
            rises = [(q, value - weakest[q.of]) for q, value in against if q.of in weakest]
            steps = []
            for first, second in itertools.pairwise(controls):
                before = {question.of: self._against(question, code) for question in self._asked[first]}
                steps.append(
                    self._mean(
                        [
                            (q, self._against(q, code) - before[q.of])
                            for q in self._asked[second]
                            if q.of in before
                        ]
                    )
                )
            falls = any(step.high is not None and step.high < 0 for step in steps)
            self._add(
                damage,
                f"preference in {code}, strongest minus weakest",
                "at least 0, and no step down",
                self._mean(rises),
                low=-1e-9,
                fails_below=0.0,
                of=strongest,
                is_failed=falls,
            )

    # Numbers

    def _label(self, question: Asked, code: str) -> int | None:
        return (self._base[question.of].pair.labels or {}).get(code) if question.of in self._base else None

    def _right(self, question: Asked, code: str) -> float | None:
        """Whether a verdict is what people said about the pair as it is; None without their label."""
        label = self._label(question, code)
        if label is None:
            return None
        return float((self._verdicts.get(question.pair.id) or {}).get(code) == label)

    def _against(self, question: Asked, code: str) -> float:
        """+1 if the damaged clip loses in a dimension, -1 if it wins, 0 for a tie or no verdict."""
        verdict = (self._verdicts.get(question.pair.id) or {}).get(code, 0)
        return 0.0 if verdict == 0 else -1.0 if verdict == question.worse else 1.0

    def _differences(self, control: str, value: Callable[[Asked], float | None]) -> Estimate:
        """The mean over the pairs of the value as they are minus that of the control."""
        pairs = []
        for question in self._asked.get(control, []):
            own, changed = value(self._base[question.of]), value(question)
            if own is not None and changed is not None:
                pairs.append((question, own - changed))
        return self._mean(pairs)

    def _mean(self, values: Sequence[tuple[Asked, float]]) -> Estimate:
        """The mean with its interval over prompts. Its `n` is the number of prompts."""
        if not values:
            return Estimate(None, None, None, 0)
        clusters = [normalised(self._base[question.of].pair.prompt) or question.of for question, _ in values]
        terms = np.array([[value] for _, value in values])
        (estimate,) = ratio_estimates(terms, np.ones_like(terms), clusters=clusters)
        return replace(estimate, n=len(set(clusters)))

    def _share(
        self,
        control: str,
        name: str,
        holds: Callable[[Asked], float],
        *,
        counts: Callable[[Asked], bool] = lambda question: True,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """A share of the distinct questions that count. One that is asked again adds no evidence."""
        answers: dict[tuple[str, Path, Path], list[float]] = {}
        for question in filter(counts, self._asked.get(control, [])):
            pair = question.pair
            answers.setdefault((pair.prompt, pair.video_1, pair.video_2), []).append(holds(question))
        share = sum(sum(values) / len(values) for values in answers.values())
        estimate = wilson(share, len(answers))
        if at_least is not None:
            self._add(control, name, f"at least {at_least}", estimate, low=at_least, fails_below=at_least)
        else:
            self._add(control, name, f"at most {at_most}", estimate, high=at_most, fails_above=at_most)

    def _add(
        self,
        control: str,
        name: str,
        rule: str,
        estimate: Estimate,
        *,
        low: float | None = None,
        high: float | None = None,
        fails_below: float | None = None,
        fails_above: float | None = None,
        of: str | None = None,
        is_failed: bool = False,
    ) -> None:
        """Adds a row: passed if the interval is above `low` or below `high`, failed if it is beyond."""
        questions = self._asked.get(of or control, [])
        without = sum(self._verdicts.get(question.pair.id) is None for question in questions)
        if not questions:
            return
        passed = Passed.UNDECIDED
        decidable = estimate.n >= FEWEST and 2 * without <= len(questions)
        if estimate.low is not None and estimate.high is not None and decidable:
            if is_failed:
                passed = Passed.FAILED
            elif (low is not None and _is_above(estimate.low, low)) or (
                high is not None and estimate.high <= high
            ):
                passed = Passed.PASSED
            elif (fails_below is not None and estimate.high < fails_below) or (
                fails_above is not None and estimate.low > fails_above
            ):
                passed = Passed.FAILED
        self._rows.append(Row(control, name, rule, estimate, without, len(questions), passed))


def _is_above(value: float, bound: float) -> bool:
    """Whether a number is over a bound: over 0 it has to be more, over others it may be equal."""
    return value > bound if bound == 0 else value >= bound


def wilson(count: float, total: int) -> Estimate:
    """A share with Wilson's 95% interval."""
    if not total:
        return Estimate(None, None, None, 0)
    share, z2 = count / total, _Z * _Z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half), total)
