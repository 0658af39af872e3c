"""The terminal output of the world evaluation: progress on stderr, tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from vrthinker.evals.metrics import table
from vrthinker.evals.world import WorldReport
from vrthinker.progress import Progress, counted
from vrthinker.report.terminal import plain

_LISTED_FAILURES = 20
TABLE_WIDTH = 118
"""The least width of tables with intervals."""


class EvalProgress(Progress):
    """The progress of a world evaluation, for each retrieval."""

    def episode(self, retrieval: str, done: int, total: int) -> None:
        """Counts an episode that has just ended."""
        name = f"{retrieval} frames"
        line = f"{name}: {done} of {total} episodes"
        self.show(name, done, total, line=line, every=max(1, total // 8))


def print_report(report: WorldReport, *, difficulty: str, model: str) -> None:
    """Prints the tables of a report."""
    # Cells must not be cut, because a cut interval would be wrong. A narrower terminal wraps the lines
    # itself.
    console = Console(highlight=False, width=max(Console().width, TABLE_WIDTH))
    console.print(
        Text(plain(f"{model} on the synthetic world, {difficulty}; 95% bootstrap intervals over pairs"))
    )
    console.print(Text("retrieved frames picked by"))
    console.print(table(report.judged))
    console.print()
    console.print(Text("a perfect reader of the same frames"))
    measures = ("oa/tau", "oa/diff", "all_four")
    console.print(table({name: {m: column[m] for m in measures} for name, column in report.perfect.items()}))
    console.print()
    for name, gain in report.gains.items():
        console.print(Text(f"OA tau, own minus {name}: {gain}"))
    calls = ", ".join(f"{group}: {calls}" for group, calls in report.calls.items())
    console.print(Text(f"tool calls by hidden events a clip: {calls}"))
    print_failures(
        console, report.failures, report.errors, counted(report.episodes, "episode"), report.episodes
    )


def print_failures(
    console: Console, failures: Sequence[str], errors: Sequence[str], of_all: str, total: int
) -> None:
    """Prints who has no verdict and why; nothing if everybody has one.

    Args:
        console: The console to print to.
        failures: `id: reason`, one each.
        errors: Those of them that an error caused.
        of_all: What they are counted among, in words (`12 episodes`).
        total: The number of these.
    """
    if failures:
        share = f"{len(failures)} of {of_all} ({len(failures) / total:.0%})"
        console.print(Text(f"without a verdict: {share}; they count as wrong:"))
        for line in failures[:_LISTED_FAILURES]:
            console.print(Text("  " + plain(line).replace("\n", " ")))
        if len(failures) > _LISTED_FAILURES:
            console.print(Text(f"  and {len(failures) - _LISTED_FAILURES} more"))
    if errors:
        console.print(Text(f"{len(errors)} of them by an error or not judged yet, not by its words"))
