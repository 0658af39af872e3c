"""The terminal output of an evaluation's summary: one table, and what has to be known to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from vrthinker.episode.dimensions import Dimension
from vrthinker.evals.intervals import Estimate
from vrthinker.evals.metrics import table
from vrthinker.evals.world_table import TABLE_WIDTH, print_failures
from vrthinker.progress import counted
from vrthinker.report.terminal import plain

_NAME_WIDTH, _CELL_WIDTH = 24, 24
_LISTED_NOTES = 5
_COSTS = {
    "episodes": "episodes",
    "rounds": "rounds",
    "tool_calls": "tool calls",
    "frames_seen": "frames seen",
    "prompt_tokens": "prompt tokens",
    "sampled_tokens": "sampled tokens",
    "latency_seconds": "seconds",
}


def print_summary(
    summary: Mapping[str, Any],
    *,
    judge: str,
    data: str,
    protocol: Mapping[str, Any] | None = None,
    failures: Sequence[str] = (),
    errors: Sequence[str] = (),
    notes: Mapping[str, int] | None = None,
) -> None:
    """Prints a summary (`summarise`).

    Args:
        summary: The summary.
        judge: The judge's name.
        data: The name of what it was evaluated on.
        protocol: What departs from the default protocol.
        failures: `id: reason` of the items without a verdict.
        errors: Those of them that an error caused.
        notes: Note -> the number of items whose verdict has it.
    """
    columns = summary["measures"]
    # Cells must not be cut, because a cut interval would be wrong.
    width = max(Console().width, TABLE_WIDTH, _NAME_WIDTH + _CELL_WIDTH * len(columns))
    console = Console(highlight=False, width=width)

    def say(text: str) -> None:
        console.print(Text(plain(text).replace("\n", " ")), soft_wrap=True)

    say(
        f"{judge} on {counted(summary['items'], 'item')} of {data}; 95% bootstrap intervals over prompts; "
        f"protocol {summary['protocol_version']}"
    )
    if protocol:
        say(f"protocol: {', '.join(f'{name} {value}' for name, value in protocol.items())}")
    console.print(
        table(
            {
                column: {name: Estimate(**estimate) for name, estimate in measures.items()}
                for column, measures in columns.items()
            }
        )
    )
    console.print()
    _say_denominators(summary, say)
    _say_baselines(summary, say)
    for kind, estimate in summary["tie_kinds"].items():
        say(f"ties that are {kind}: {estimate['n']}, accuracy {Estimate(**estimate)}")
    for code, scores in summary["scores"].items():
        say(
            f"{code}: scores of {counted(scores['items'], 'item')}; a difference up to "
            f"{scores['tie_threshold']:.4g} is a tie (searched on these items); with thresholds searched on "
            f"other prompts the accuracy is {scores['accuracy_of_the_scored_cross_fitted']:.3f} instead of "
            f"{scores['accuracy_of_the_scored']:.3f}; Kendall tau-b {_number(scores['kendall_tau_b'])}, "
            f"Spearman {_number(scores['spearman'])}"
        )
    _say_orders(summary["orders"], say)
    _say_calibration(summary["calibration"], say)
    kinds = {name: count for name, count in summary["contradictions"].items() if name != "verdicts"}
    if any(kinds.values()):
        named = ", ".join(f"{count} {name}" for name, count in kinds.items() if count)
        of_all = summary["contradictions"]["verdicts"]
        say(f"OA contradicts TA, VQ and MQ in {sum(kinds.values())} of {of_all} verdicts: {named}")
    if summary["cost"]:
        means = [
            f"{summary['cost'][key]['mean']:.1f} {name}"
            for key, name in _COSTS.items()
            if key in summary["cost"]
        ]
        say(f"an item, on average: {', '.join(means)}")
    for note, count in list((notes or {}).items())[:_LISTED_NOTES]:
        say(f"note on {counted(count, 'item')}: {note}")
    if failures:
        print_failures(console, failures, errors, counted(summary["items"], "item"), summary["items"])


def _say_denominators(summary: Mapping[str, Any], say: Any) -> None:
    statuses = summary["statuses"]
    without = {name: statuses[name] for name in ("unparsed", "failed", "missing") if statuses[name]}
    if without:
        named = ", ".join(f"{count} {name}" for name, count in without.items())
        total = sum(without.values())
        share = f"{total} of {summary['items']} ({total / summary['items']:.0%})"
        say(f"without a verdict: {share}: {named}; they count as wrong")
    for code in Dimension:
        labels, unanswered = summary["labels"][code.value], summary["unanswered"][code.value]
        total = summary["items"] - labels["missing"]
        if not total:
            say(f"{code}: no item has a label")
            continue
        lacking = f"; {unanswered} of them without a verdict, counted as wrong" if unanswered else ""
        missing = (
            f"; {counted(labels['missing'], 'item')} without this label left out" if labels["missing"] else ""
        )
        sides = f"{labels['tie']} ties, {labels['video 1']} video 1, {labels['video 2']} video 2"
        say(f"{code}: out of {total}: {sides}{lacking}{missing}")
    for reason, count in summary["left_out"].items():
        say(f"left out: {count} {reason}")


def _say_baselines(summary: Mapping[str, Any], say: Any) -> None:
    for measure in ("oa/tau", "oa/diff"):
        values = {name: found.get(measure) for name, found in summary["baselines"].items()}
        if any(value is not None for value in values.values()):
            named = ", ".join(f"{name} {_number(value)}" for name, value in values.items())
            say(f"beside {measure}: {named}")


def _say_orders(orders: Mapping[str, Any] | None, say: Any) -> None:
    if orders is None:
        return
    say(
        f"both orders: {orders['judged_in_both']} of {counted(orders['items'], 'item')} have a verdict in "
        f"both; of these {_number(orders['consistent'])} say the same, {_number(orders['always_first'])} "
        f"always the first video, {_number(orders['always_second'])} always the second, "
        f"{_number(orders['tie_in_both'])} a tie in both"
    )


def _say_calibration(found: Mapping[str, Any], say: Any) -> None:
    if "stated" in found:
        names = {"1": "high", "2": "middle", "3": "low"}
        levels = ", ".join(
            f"{names[level]} (read as {values['read_as']:.2f}) {values['accuracy']:.3f} of {values['count']}"
            for level, values in found["stated"]["levels"].items()
        )
        say(
            f"stated confidence: expected calibration error {found['stated']['error']:.3f}; accuracy {levels}"
        )
    if "agreement" in found:
        say(
            f"agreement of votes: expected calibration error {found['agreement']['error']:.3f} over "
            f"{counted(found['agreement']['count'], 'item')}"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
