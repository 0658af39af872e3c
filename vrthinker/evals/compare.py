"""Several runs on the same items: paired differences, McNemar's test, and how many verdicts flip.

The first run is what the others are compared with. Only items that both runs have are compared, and how many
are left out on either side is a part of the result.
Invariant: two runs that label an item differently are refused, because they were not measured on the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vrthinker.episode.dimensions import Dimension
from vrthinker.errors import InputError, one_line
from vrthinker.evals.intervals import Estimate
from vrthinker.evals.items import scored_pairs, thresholds
from vrthinker.evals.metrics import MEASURES, ScoredPair, difference, measure
from vrthinker.evals.paired import McNemar, mcnemar
from vrthinker.evals.world_table import TABLE_WIDTH
from vrthinker.progress import counted
from vrthinker.records.eval_items import EvalItem
from vrthinker.report.terminal import plain

COMPARED = ("oa/tau", "oa/diff", "all_four", "ta/accuracy", "vq/accuracy", "mq/accuracy", "verdicts/share")
_WITHOUT_TIES = "oa/diff"


@dataclass(frozen=True)
class Comparison:
    """A run beside the first one.

    Attributes:
        name: The run's name.
        items: The number of items that both runs have.
        left_out: How many items only the first run has, and how many only this one.
        values: Measure -> its value on the common items, of the first run and of this one.
        differences: Measure -> this run's minus the first one's, paired, with its interval.
        overall: McNemar's test of who is right overall; None if no common item has an overall label.
        flips: Dimension code -> the share of common items about which the two say something else. An item
            without a verdict says something else than any verdict.
    """

    name: str
    items: int
    left_out: tuple[int, int]
    values: Mapping[str, tuple[Estimate, Estimate]]
    differences: Mapping[str, Estimate]
    overall: McNemar | None
    flips: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "name": self.name,
            "items": self.items,
            "left_out": list(self.left_out),
            "values": {name: [asdict(one) for one in both] for name, both in self.values.items()},
            "differences": {name: asdict(one) for name, one in self.differences.items()},
            "mcnemar_overall": None if self.overall is None else asdict(self.overall),
            "flips": dict(self.flips),
        }


def compare(runs: Mapping[str, Sequence[EvalItem]]) -> list[Comparison]:
    """Compares runs with the first of them.

    Args:
        runs: Name -> items, at least two.

    Raises:
        InputError: There are fewer than two runs, or two runs have no item in common or label one
            differently.
    """
    if len(runs) < 2:
        raise InputError(f"compare: got {counted(len(runs), 'run')}, allowed: two and more")
    (first_name, first), *others = runs.items()
    return [_compared(first_name, first, name, items) for name, items in others]


def _compared(
    first_name: str, first: Sequence[EvalItem], name: str, second: Sequence[EvalItem]
) -> Comparison:
    ids = {item.id: item for item in second}
    common = [item for item in first if item.id in ids]
    if not common:
        raise InputError(
            f"compare: {one_line(first_name)} and {one_line(name)} have no item in common, allowed: runs on "
            "the same pairs"
        )
    for item in common:
        if item.labels != ids[item.id].labels:
            raise InputError(
                f"compare: {one_line(item.id)} is labelled {item.labels} in {one_line(first_name)} and "
                f"{ids[item.id].labels} in {one_line(name)}, allowed: runs on the same labels"
            )
    others = [ids[item.id] for item in common]
    sides = [_sides(common, thresholds(first)), _sides(others, thresholds(second))]
    values, differences = {}, {}
    for keys in ([key for key in COMPARED if key != _WITHOUT_TIES], [_WITHOUT_TIES]):
        a, b = (untied if keys == [_WITHOUT_TIES] else with_ties for with_ties, untied in sides)
        found = [measure(side, measures={key: MEASURES[key] for key in keys}) for side in (a, b)]
        for key in keys:
            if found[0][key].n:
                values[key] = found[0][key], found[1][key]
                differences[key] = difference(b, a, key)
    right = [
        [(pair.prediction or {}).get("OA") == pair.label["OA"] for pair in with_ties if "OA" in pair.label]
        for with_ties, _ in sides
    ]
    told = {
        code.value: sum(
            (a.prediction or {}).get(code.value) != (b.prediction or {}).get(code.value)
            for a, b in zip(sides[0][0], sides[1][0], strict=True)
        )
        for code in Dimension
    }
    return Comparison(
        name=name,
        items=len(common),
        left_out=(len(first) - len(common), len(second) - len(common)),
        values=values,
        differences=differences,
        overall=mcnemar(*right) if right[0] else None,
        flips={code: count / len(common) for code, count in told.items()},
    )


def _sides(
    items: Sequence[EvalItem], limits: Mapping[str, float]
) -> tuple[list[ScoredPair], list[ScoredPair]]:
    """The items with their tie thresholds, and without any."""
    return scored_pairs(items, limits), scored_pairs(items)


def print_comparisons(first: str, comparisons: Sequence[Comparison]) -> None:
    """Prints a table for each comparison.

    Args:
        first: The name of the run that the others are compared with.
        comparisons: The comparisons.
    """
    console = Console(highlight=False, width=max(Console().width, TABLE_WIDTH))
    for found in comparisons:
        console.print(Text(plain(f"{found.name} minus {first}, on {counted(found.items, 'common item')}")))
        shown = Table(show_edge=False, pad_edge=False)
        shown.add_column("")
        for heading in (first, found.name, "difference, paired 95% interval"):
            shown.add_column(Text(plain(heading)), justify="right", no_wrap=True)
        for key in COMPARED:
            if key not in found.values:
                continue
            a, b = found.values[key]
            shown.add_row(key, _value(a), _value(b), Text(str(found.differences[key])))
        console.print(shown)
        if found.overall is not None:
            console.print(
                Text(
                    f"overall, only {plain(first)} right: {found.overall.first_only}; only "
                    f"{plain(found.name)} right: {found.overall.second_only}; McNemar exact "
                    f"p = {found.overall.p_value:.4g}"
                ),
                soft_wrap=True,
            )
        named = ", ".join(f"{code} {share:.3f}" for code, share in found.flips.items())
        console.print(Text(f"share of verdicts that differ: {named}"))
        if any(found.left_out):
            console.print(
                Text(
                    f"left out: {counted(found.left_out[0], 'item')} of the first run only, "
                    f"{counted(found.left_out[1], 'item')} of the second only"
                )
            )
        console.print()


def _value(estimate: Estimate) -> Text:
    return Text("-" if estimate.value is None else f"{estimate.value:.3f}")
