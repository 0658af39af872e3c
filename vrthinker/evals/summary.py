"""The summary of an evaluation, computed from its items alone: every table of the terminal and of the page.

Anybody's verdict file and this package's own runs are summed up by this one function, so that their numbers
mean the same. `PROTOCOL_VERSION` is raised when a number of an unchanged run would change.

Invariants:

- The denominator of an accuracy is the number of items with that label. Items without a verdict are in it.
- What always answering one thing would have got stands beside every accuracy.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vrthinker.data.splits import normalised
from vrthinker.episode.dimensions import Dimension
from vrthinker.evals.calibration import STATED, calibration
from vrthinker.evals.contradictions import Contradiction, contradiction
from vrthinker.evals.intervals import Estimate
from vrthinker.evals.items import scored_pairs, thresholds, verdict_of
from vrthinker.evals.metrics import MEASURES, Measure, ScoredPair, accuracy, as_json, measure, per_pair
from vrthinker.evals.scores import best_tie_threshold, cross_fitted, kendall_tau_b, signed, spearman
from vrthinker.records.eval_items import EvalItem, ItemStatus

PROTOCOL_VERSION = 2
ALL = "all"
LONG, COMPLEX, RESIDUAL = "long clips (top 10%)", "long prompts (top 10%)", "residual"
_SUBSET_SHARE = 0.1
_LENGTH_BINS = 5
_CODES = tuple(code.value for code in Dimension)
_COSTS = (
    "episodes",
    "rounds",
    "tool_calls",
    "frames_seen",
    "prompt_tokens",
    "sampled_tokens",
    "latency_seconds",
)

ITEM_MEASURES: Mapping[str, Measure] = {
    **{
        name: MEASURES[name]
        for name in ("oa/tau", "oa/diff", "all_four", "ta/accuracy", "vq/accuracy", "mq/accuracy")
    },
    "ta/diff": Measure("accuracy of TA over the pairs that people did not tie", accuracy("TA", ties=False)),
    "vq/diff": Measure("accuracy of VQ over the pairs that people did not tie", accuracy("VQ", ties=False)),
    "mq/diff": Measure("accuracy of MQ over the pairs that people did not tie", accuracy("MQ", ties=False)),
    **{name: MEASURES[name] for name in ("format/well_formed", "verdicts/share")},
}
"""The measures of an evaluation's items, in the order of tables."""
_UNTIED = ("oa/diff", "ta/diff", "vq/diff", "mq/diff")


def summarise(items: Sequence[EvalItem], *, left_out: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Everything that is said about a run, as JSON values.

    Args:
        items: The items, with or without a verdict.
        left_out: Reason -> how many rows or pairs are not among the items because of it.
    """
    limits = thresholds(items)
    verdicts = {item.id: verdict_of(item, limits) for item in items}
    columns = {name: members for name, members in _columns(items).items() if members}
    statuses = Counter(item.status for item in items)
    return {
        "protocol_version": PROTOCOL_VERSION,
        "items": len(items),
        "statuses": {status.value: statuses[status] for status in ItemStatus},
        "left_out": dict(left_out or {}),
        "labels": {code: _label_counts(items, code) for code in _CODES},
        "unanswered": {code: _unanswered(items, verdicts, code) for code in _CODES},
        "measures": as_json({name: measured(members, limits) for name, members in columns.items()}),
        "baselines": _baselines(items),
        "tie_kinds": _tie_kinds(items, limits),
        "scores": _scores(items),
        "contradictions": _contradictions(verdicts.values()),
        "calibration": _calibration(items, verdicts),
        "orders": _orders(items),
        "by_length": {
            name: bins
            for name, key in (("seconds of both clips", _seconds), ("characters of the prompt", _characters))
            if (bins := _by_length(items, limits, key))
        },
        "cost": _cost(items),
    }


def measured(items: Sequence[EvalItem], limits: Mapping[str, float]) -> dict[str, Estimate]:
    """The measures of items, without those that no item counts for.

    Args:
        items: The items.
        limits: Dimension code -> the tie threshold of scores. The measures without ties use none.
    """
    status = {item.id: item.status for item in items}

    def share(*wanted: ItemStatus) -> Measure:
        def term(pair: ScoredPair) -> tuple[float, float]:
            return float(status[pair.id] in wanted), 1.0

        return Measure(f"share of items that are {' or '.join(wanted)}", per_pair(term))

    measures = {
        **ITEM_MEASURES,
        "unparsed/share": share(ItemStatus.UNPARSED),
        "failed/share": share(ItemStatus.FAILED, ItemStatus.MISSING),
    }
    found = measure(scored_pairs(items, limits), measures=measures)
    if limits:
        untied = {name: measures[name] for name in _UNTIED}
        found |= measure(scored_pairs(items), measures=untied)
    return {name: estimate for name, estimate in found.items() if estimate.n}


# The columns: all items, those of each data set, and the hard ones


def _columns(items: Sequence[EvalItem]) -> dict[str, list[EvalItem]]:
    columns = {ALL: list(items)}
    names = sorted({item.dataset or "no dataset" for item in items})
    if len(names) > 1:
        for name in names:
            columns[name] = [item for item in items if (item.dataset or "no dataset") == name]
    if any(item.seconds is not None for item in items):
        long, complex_ = (_top(items, key) for key in (_seconds, _characters))
        columns[LONG] = [item for item in items if item.id in long]
        columns[COMPLEX] = [item for item in items if item.id in complex_]
        hard = long | complex_
        columns[RESIDUAL] = [item for item in items if item.id not in hard]
    return columns


def _seconds(item: EvalItem) -> float | None:
    return None if item.seconds is None else sum(item.seconds)


def _characters(item: EvalItem) -> float | None:
    return float(len(item.prompt))


Length = Callable[[EvalItem], float | None]


def _top(items: Sequence[EvalItem], length: Length) -> set[str]:
    """The ids of the tenth of the items with the greatest length; of equal ones, the first ids."""
    known = [(-value, item.id) for item in items if (value := length(item)) is not None]
    return {name for _, name in sorted(known)[: math.ceil(_SUBSET_SHARE * len(known))]}


def _by_length(
    items: Sequence[EvalItem], limits: Mapping[str, float], length: Length
) -> list[dict[str, Any]]:
    """The overall accuracy of the items in fifths of their length.

    Items of one length are in one bin, so there may be fewer than five, and none if all have one length.
    """
    known = sorted(
        ((value, item) for item in items if (value := length(item)) is not None and "OA" in item.labels),
        key=lambda entry: (entry[0], entry[1].id),
    )
    if len(known) < 2 * _LENGTH_BINS:
        return []
    values = [value for value, _ in known]
    fifths = [round(number * len(known) / _LENGTH_BINS) for number in range(1, _LENGTH_BINS)]
    # An edge within items of one length moves to the nearer end of them.
    runs = [(bisect_left(values, values[edge]), bisect_right(values, values[edge])) for edge in fifths]
    moved = [min(run, key=lambda end: abs(end - edge)) for edge, run in zip(fifths, runs, strict=True)]
    edges = sorted({0, *moved, len(known)})
    if len(edges) == 2:
        return []
    bins = []
    for start, end in itertools.pairwise(edges):
        members = [item for _, item in known[start:end]]
        found = measure(scored_pairs(members, limits), measures={"oa/tau": MEASURES["oa/tau"]})["oa/tau"]
        bins.append({"from": known[start][0], "to": known[end - 1][0], **asdict(found)})
    return bins


# What labels alone say


def _label_counts(items: Sequence[EvalItem], code: str) -> dict[str, int]:
    counts = Counter(item.labels.get(code) for item in items)
    return {"tie": counts[0], "video 1": counts[1], "video 2": counts[2], "missing": counts[None]}


def _unanswered(
    items: Sequence[EvalItem], verdicts: Mapping[str, Mapping[str, int] | None], code: str
) -> int:
    return sum(code in item.labels and code not in (verdicts[item.id] or {}) for item in items)


def _baselines(items: Sequence[EvalItem]) -> dict[str, dict[str, float | None]]:
    """What judges that look at nothing get on these labels, computed and not sampled."""
    found: dict[str, dict[str, float | None]] = {
        name: {} for name in ("always video 1", "always video 2", "always tie", "commonest", "fair coin")
    }
    for code in _CODES:
        counts = Counter(item.labels[code] for item in items if code in item.labels)
        total, untied = counts.total(), counts[1] + counts[2]
        measures = (
            ("oa/tau", "oa/diff") if code == "OA" else (f"{code.lower()}/accuracy", f"{code.lower()}/diff")
        )
        commonest = min(counts, key=lambda label: (-counts[label], label)) if counts else None
        for name, label in (
            ("always video 1", 1),
            ("always video 2", 2),
            ("always tie", 0),
            ("commonest", commonest),
        ):
            right = 0 if label is None else counts[label]
            found[name][measures[0]] = right / total if total else None
            found[name][measures[1]] = (right / untied if label else 0.0) if untied else None
        found["fair coin"][measures[0]] = untied / 2 / total if total else None
        found["fair coin"][measures[1]] = 0.5 if untied else None
    return found


def _tie_kinds(items: Sequence[EvalItem], limits: Mapping[str, float]) -> dict[str, Any]:
    kinds: dict[str, list[EvalItem]] = {}
    for item in items:
        if item.tie_kind is not None:
            kinds.setdefault(item.tie_kind, []).append(item)
    only = {"oa/tau": MEASURES["oa/tau"]}
    return {
        kind: asdict(measure(scored_pairs(members, limits), measures=only)["oa/tau"])
        for kind, members in sorted(kinds.items())
    }


# What verdicts say


def _scores(items: Sequence[EvalItem]) -> dict[str, Any]:
    found = {}
    for code in _CODES:
        scored = [item for item in items if code in (item.scores or {}) and code in item.labels]
        if not scored:
            continue
        differences = np.array([(item.scores or {})[code] for item in scored])
        labels = np.array([item.labels[code] for item in scored])
        best = best_tie_threshold(differences, labels)
        fitted = cross_fitted(differences, labels, [normalised(item.prompt) or item.id for item in scored])
        found[code] = {
            "items": len(scored),
            "tie_threshold": best.threshold,
            "accuracy_of_the_scored": best.accuracy,
            "accuracy_of_the_scored_cross_fitted": float(np.mean(fitted == labels)),
            "kendall_tau_b": kendall_tau_b(differences, signed(labels)),
            "spearman": spearman(differences, signed(labels)),
        }
    return found


def _contradictions(verdicts: Any) -> dict[str, int]:
    whole = [verdict for verdict in verdicts if verdict and len(verdict) == len(_CODES)]
    counts = Counter(contradiction(verdict) for verdict in whole)
    return {"verdicts": len(whole), **{kind.value: counts[kind] for kind in Contradiction}}


def _calibration(
    items: Sequence[EvalItem], verdicts: Mapping[str, Mapping[str, int] | None]
) -> dict[str, Any]:
    """Calibration of the overall verdict, by stated confidence and by the agreement of votes."""
    found: dict[str, Any] = {}
    answered = [
        (item, (verdicts[item.id] or {})["OA"] == item.labels["OA"])
        for item in items
        if "OA" in item.labels and "OA" in (verdicts[item.id] or {})
    ]
    stated = [(item.confidence, right) for item, right in answered if item.confidence is not None]
    if stated:
        result = calibration([STATED[level] for level, _ in stated], [right for _, right in stated])
        levels = {
            str(level): {
                "read_as": STATED[level],
                "count": len(members),
                "accuracy": sum(members) / len(members),
            }
            for level in STATED
            if (members := [right for other, right in stated if other == level])
        }
        found["stated"] = {"error": result.error if result else None, "count": len(stated), "levels": levels}
    sampled = [(item.agreement, right) for item, right in answered if item.agreement is not None]
    result = calibration([share for share, _ in sampled], [right for _, right in sampled])
    if result is not None:
        found["agreement"] = {
            "error": result.error,
            "count": result.count,
            "bins": [asdict(one) for one in result.bins],
        }
    return found


def _orders(items: Sequence[EvalItem]) -> dict[str, Any] | None:
    """What both orders of the clips say; None if only one was judged."""
    both = [item.orders for item in items if item.orders is not None]
    if not both:
        return None
    judged = [
        (first["OA"], second["OA"])
        for first, second in both
        if first and second and "OA" in first and "OA" in second
    ]
    return {
        "items": len(both),
        "judged_in_both": len(judged),
        "consistent": _share(judged, lambda a, b: a == b),
        "always_first": _share(judged, lambda a, b: (a, b) == (1, 2)),
        "always_second": _share(judged, lambda a, b: (a, b) == (2, 1)),
        "tie_in_both": _share(judged, lambda a, b: a == b == 0),
    }


def _share(pairs: Sequence[tuple[int, int]], holds: Callable[[int, int], bool]) -> float | None:
    return sum(holds(a, b) for a, b in pairs) / len(pairs) if pairs else None


def _cost(items: Sequence[EvalItem]) -> dict[str, dict[str, float]]:
    """Mean, median and sum of what items cost, over those of which it is known."""
    found = {}
    for name in _COSTS:
        values = [float(v) for item in items if (v := getattr(item.cost, name)) is not None]
        if values and _is_worth_a_line(name, values):
            found[name] = {
                "mean": sum(values) / len(values),
                "median": float(np.median(values)),
                "sum": sum(values),
                "items": float(len(values)),
            }
    return found


def _is_worth_a_line(name: str, values: Sequence[float]) -> bool:
    """Whether a cost is worth a line: judges that are no models have none."""
    return any(value > (1 if name == "episodes" else 0) for value in values)
