"""Two generators compared over many prompts: win, tie and loss per dimension, with intervals over prompts.

Each prompt's two clips are one pair. Which generator is shown as video 1 is drawn, in balance: half of the
prompts have the one, half the other, so that a judge's habit of preferring a place favours nobody on average.
Invariant: a prompt without a verdict is a failure. It is counted apart and is in no share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vrthinker.data.matching import Sample
from vrthinker.data.pairs import Pair
from vrthinker.episode.dimensions import Dimension, Preference
from vrthinker.episode.probabilities import Probabilities
from vrthinker.evals.intervals import Estimate, ratio_estimates
from vrthinker.records.verdicts import VerdictRecord

_PROBABILITIES = tuple(
    (f"{dimension.value}_p_{end}", dimension.value, label)
    for dimension in Dimension
    for end, label in (("a", "video_1"), ("tie", "tie"), ("b", "video_2"))
)
COLUMNS = (
    *("id", "prompt", "clip_a", "clip_b", "shown_first", *(dimension.value for dimension in Dimension)),
    *("confidence", "rounds", "tool_calls", "stop_reason", "reason", "notes", "consistent"),
    *(column for column, _, _ in _PROBABILITIES),
    "probabilities_reason",
)
"""The columns of the table of verdicts. `OA_p_a` is the probability that the first generator's clip is better
overall, as the judge finds it; it is empty where that is not known."""

_STREAM = 20261201  # separates the draw of places from other uses of the same seed


@dataclass(frozen=True)
class Compared:
    """One prompt and its verdict, told of the generators.

    Attributes:
        sample: The prompt and both clips.
        swapped: Whether the second generator's clip was shown as video 1.
        judgment: Dimension code -> 0 (tie), 1 (the first generator is better) or 2; None without a verdict.
        record: The verdict as it was recorded, told of the videos.
        probabilities: How likely the judge finds each label, with the first generator as video 1; None where
            that is not known.
    """

    sample: Sample
    swapped: bool
    judgment: Mapping[str, int] | None
    record: VerdictRecord
    probabilities: Probabilities | None = None

    @property
    def dimensions_disagree(self) -> bool:
        """Whether one dimension prefers the one generator and another dimension the other."""
        return self.judgment is not None and {1, 2} <= set(self.judgment.values())

    @property
    def overall_probability(self) -> float | None:
        """How likely the judge finds its own overall label; None where that is not known."""
        known = None if self.probabilities is None else self.probabilities[Dimension.OA]
        return None if known is None or self.judgment is None else known[Preference(self.judgment["OA"])]


@dataclass(frozen=True)
class Shares:
    """The first generator's shares in one dimension, over the prompts with a verdict, with 95 % intervals.

    Attributes:
        win: The share of prompts at which it is better.
        tie: The share of ties.
        loss: The share at which the second generator is better.
        lead: Wins minus losses.
    """

    win: Estimate
    tie: Estimate
    loss: Estimate
    lead: Estimate


def drawn_places(ids: Sequence[str], seed: int) -> frozenset[str]:
    """The ids whose second generator's clip is shown as video 1: one half of them, drawn by the seed."""
    order = np.random.default_rng([_STREAM, seed, len(ids)]).permutation(len(ids))
    return frozenset(ids[place] for place in order[: len(ids) // 2])


def pairs_of(samples: Sequence[Sample], swapped: frozenset[str], dataset: str | None = None) -> list[Pair]:
    """The pairs to judge, each with its clips in the order in which they are shown."""
    pairs = []
    for sample in samples:
        first, second = (path.absolute() for path in sample.clips)
        if sample.id in swapped:
            first, second = second, first
        pairs.append(Pair(id=sample.id, prompt=sample.prompt, video_1=first, video_2=second, dataset=dataset))
    return pairs


def compared(
    samples: Sequence[Sample], swapped: frozenset[str], records: Mapping[str, VerdictRecord]
) -> list[Compared]:
    """The verdicts told of the generators. Prompts without a record are left out."""
    told = []
    for sample in samples:
        record = records.get(sample.id)
        if record is None:
            continue
        is_swapped = sample.id in swapped
        judgment = None
        if record.judgment is not None:
            judgment = {
                code: (0, 2, 1)[value] if is_swapped else value for code, value in record.judgment.items()
            }
        known = record.probabilities
        if known is not None and is_swapped:
            known = known.swapped()
        told.append(Compared(sample, is_swapped, judgment, record, known))
    return told


def shares(verdicts: Sequence[Compared], *, seed: int = 0) -> dict[str, Shares]:
    """Win, tie and loss of the first generator per dimension code.

    Args:
        verdicts: The verdicts. Failures are left out.
        seed: The seed of the bootstrap over prompts.
    """
    judged = [one.judgment for one in verdicts if one.judgment is not None]
    told = {}
    for dimension in Dimension:
        values = np.array([judgment[dimension.value] for judgment in judged], np.int64)
        terms = np.stack([values == 1, values == 0, values == 2], axis=1).astype(np.float64)
        terms = np.hstack([terms, terms[:, :1] - terms[:, 2:]])
        told[dimension.value] = Shares(*ratio_estimates(terms, np.ones_like(terms), seed=seed))
    return told


def rows_of(verdicts: Sequence[Compared], names: tuple[str, str]) -> list[dict[str, Any]]:
    """The verdicts as rows of a table, with the generators' names as judgments."""
    spelled = ("tie", *names)
    return [
        {
            "id": one.sample.id,
            "prompt": one.sample.prompt,
            "clip_a": str(one.sample.clips[0]),
            "clip_b": str(one.sample.clips[1]),
            "shown_first": names[one.swapped],
            **{
                dimension.value: None if one.judgment is None else spelled[one.judgment[dimension.value]]
                for dimension in Dimension
            },
            "confidence": one.record.confidence,
            "rounds": one.record.rounds,
            "tool_calls": one.record.tool_calls,
            "stop_reason": one.record.stop_reason,
            "reason": one.record.reason,
            "notes": list(one.record.notes),
            "consistent": one.record.consistent,
            **{column: _share(one.probabilities, code, label) for column, code, label in _PROBABILITIES},
            "probabilities_reason": one.record.probabilities_reason,
        }
        for one in verdicts
    ]


def _share(known: Probabilities | None, code: str, label: str) -> float | None:
    of_dimension = None if known is None else known[code]
    return None if of_dimension is None else float(getattr(of_dimension, label))


def as_json(
    verdicts: Sequence[Compared], names: tuple[str, str], folders: tuple[Path, Path], missing: Sequence[str]
) -> dict[str, Any]:
    """The comparison as JSON values."""
    failed = [one for one in verdicts if one.judgment is None]
    return {
        "names": list(names),
        "folders": [str(folder) for folder in folders],
        "prompts": len(verdicts),
        "judged": len(verdicts) - len(failed),
        "shares_of_the_first": {code: asdict(share) for code, share in shares(verdicts).items()},
        "dimensions_disagree": sum(one.dimensions_disagree for one in verdicts),
        "failed": [
            {"id": one.sample.id, "stop_reason": one.record.stop_reason, "reason": one.record.reason}
            for one in failed
        ],
        "missing": list(missing),
    }
