"""The terminal output of an evaluation on labelled pairs: one table, and what has to be known to read it."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from vrthinker.episode.dimensions import Dimension, Preference
from vrthinker.evals.metrics import table
from vrthinker.evals.pairs import PairsReport
from vrthinker.evals.world_table import TABLE_WIDTH, print_failures
from vrthinker.progress import counted
from vrthinker.report.terminal import plain

_NAME_WIDTH, _CELL_WIDTH = 24, 24
"""The widths of the table's names and cells (`0.912 [0.886, 0.935]`), with room between them."""
_LISTED_NOTES = 5


def print_pairs_report(report: PairsReport, *, model: str, pairs_name: str, without_labels: int) -> None:
    """Prints the table of a report.

    Args:
        report: The report.
        model: The judge's name.
        pairs_name: The name of the pairs file.
        without_labels: The number of pairs of the file that have no label, and were not judged.
    """
    # Cells must not be cut, because a cut interval would be wrong.
    width = max(Console().width, TABLE_WIDTH, _NAME_WIDTH + _CELL_WIDTH * len(report.judged))
    console = Console(highlight=False, width=width)
    title = f"{model} on {counted(report.pairs, 'labelled pair')} of {pairs_name}"
    console.print(Text(plain(f"{title}; 95% bootstrap intervals over pairs")))
    console.print(table(report.judged))
    console.print()
    for code in Dimension:
        counts, share = report.labels[code], report.commonest[code]
        if share is None:
            console.print(Text(f"{code}: no pair has a label"))
            continue
        named = ", ".join(f"{preference} {counts[str(preference)]}" for preference in Preference)
        missing = f"; {counted(counts['missing'], 'pair')} without a label" if counts["missing"] else ""
        console.print(Text(f"{code}: {named}; always the commonest: {share:.3f}{missing}"))
    if without_labels:
        console.print(Text(f"{counted(without_labels, 'pair')} without any label: not judged"))
    if report.episodes:
        names = {
            "rounds": "rounds",
            "sampled_tokens_per_round": "tokens a round",
            "latency_seconds": "seconds",
        }
        means = [
            f"{report.episodes[key]:.1f} {name}" for key, name in names.items() if key in report.episodes
        ]
        console.print(Text(f"an episode, on average: {', '.join(means)}"))
    for note, count in list(report.notes.items())[:_LISTED_NOTES]:
        console.print(Text(plain(f"note on {counted(count, 'pair')}: {note}").replace("\n", " ")))
    print_failures(console, report.failures, report.errors, counted(report.pairs, "pair"), report.pairs)
