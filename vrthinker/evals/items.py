"""From pairs and answers to the items of an evaluation, and from items to what is measured.

Invariant: the items are exactly the pairs. A pair without an answer is an item that counts as wrong, and an
answer about something else is counted by the caller and never measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vrthinker.data.pairs import Pair
from vrthinker.data.splits import normalised
from vrthinker.episode.trajectory import WRITTEN_STOPS
from vrthinker.evals.metrics import ScoredPair
from vrthinker.evals.scores import best_tie_threshold, judged_by_scores
from vrthinker.evals.verdict_files import Answer
from vrthinker.records.eval_items import EvalItem, ItemCost, ItemStatus
from vrthinker.records.verdicts import VerdictRecord

_WRITTEN = frozenset(reason.value for reason in WRITTEN_STOPS)
NOT_JUDGED = "there is no answer for this pair"


def item_of_answer(pair: Pair, answer: Answer | None, tie_kind: str | None = None) -> EvalItem:
    """The item of a pair and of what somebody's file says about it."""
    if answer is None:
        return _item(pair, tie_kind, status=ItemStatus.MISSING, reason=NOT_JUDGED)
    return _item(
        pair,
        tie_kind,
        status=answer.status,
        judgment=dict(answer.judgment) or None,
        scores=dict(answer.scores) or None,
        reason=answer.reason,
        confidence=answer.confidence,
    )


def item_of_record(
    pair: Pair, record: VerdictRecord | None, tie_kind: str | None = None, **more: Any
) -> EvalItem:
    """The item of a pair and of its record in a results file.

    Args:
        pair: The pair.
        record: Its record; None if it is not judged yet.
        tie_kind: The kind of its tie, where a set has several.
        **more: Further fields of the item (`orders`, `agreement`, `cost`, ...).
    """
    if record is None:
        return _item(pair, tie_kind, status=ItemStatus.MISSING, reason=NOT_JUDGED, **more)
    if record.judgment is not None:
        status, reason = ItemStatus.JUDGED, None
    else:
        written = record.stop_reason in _WRITTEN
        status = ItemStatus.UNPARSED if written else ItemStatus.FAILED
        reason = f"{record.stop_reason}: {record.reason}"
    fields: dict[str, Any] = {
        "status": status,
        "judgment": record.judgment,
        "reason": reason,
        "confidence": record.confidence if record.judgment is not None else None,
        "well_formed": record.well_formed,
        "notes": list(record.notes),
        "cost": cost_of([record]),
    }
    return _item(pair, tie_kind, **{**fields, **more})


def cost_of(records: Sequence[VerdictRecord]) -> ItemCost:
    """The cost of all episodes of an item. What one of them does not know, nobody knows of the sum."""

    def total(values: Sequence[Any]) -> Any:
        return sum(values) if values and None not in values else None

    return ItemCost(
        episodes=len(records),
        rounds=total([record.rounds for record in records]),
        tool_calls=total([record.tool_calls for record in records]),
        frames_seen=total([len(record.frames_seen) for record in records]),
        prompt_tokens=total([record.prompt_tokens for record in records]),
        sampled_tokens=total([record.sampled_tokens for record in records]),
        latency_seconds=total([record.latency_seconds for record in records]),
    )


def _item(pair: Pair, tie_kind: str | None, **fields: Any) -> EvalItem:
    return EvalItem(
        id=pair.id,
        prompt=pair.prompt,
        video_1=str(pair.video_1),
        video_2=str(pair.video_2),
        dataset=pair.dataset,
        labels=dict(pair.labels or {}),
        tie_kind=tie_kind,
        **fields,
    )


def thresholds(items: Sequence[EvalItem]) -> dict[str, float]:
    """Dimension code -> the tie threshold that suits these items' scores best (`best_tie_threshold`)."""
    found = {}
    for code in sorted({code for item in items for code in item.scores or {}}):
        scored = [item for item in items if code in (item.scores or {}) and code in item.labels]
        if scored:
            found[code] = best_tie_threshold(
                np.array([(item.scores or {})[code] for item in scored]),
                np.array([item.labels[code] for item in scored]),
            ).threshold
    return found


def verdict_of(item: EvalItem, tie_thresholds: Mapping[str, float]) -> dict[str, int] | None:
    """An item's verdict: as it was given, or as its scores say with these thresholds (0 by default)."""
    judgment = dict(item.judgment or {})
    for code, difference in (item.scores or {}).items():
        threshold = tie_thresholds.get(code, 0.0)
        judgment.setdefault(code, int(judged_by_scores(np.array([difference]), threshold)[0]))
    return judgment or None


def scored_pairs(
    items: Sequence[EvalItem], tie_thresholds: Mapping[str, float] | None = None
) -> list[ScoredPair]:
    """The items as the measures read them. Items of one prompt are resampled together.

    Args:
        items: The items.
        tie_thresholds: Dimension code -> the largest difference of scores that is a tie.
    """
    return [
        ScoredPair(
            id=item.id,
            label=item.labels,
            prediction=verdict_of(item, tie_thresholds or {}),
            well_formed=item.well_formed,
            tool_calls=item.cost.tool_calls,
            cluster=normalised(item.prompt) or None,
        )
        for item in items
    ]
