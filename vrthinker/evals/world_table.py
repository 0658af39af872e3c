"""The terminal output of the world evaluation: progress on stderr, tables on stdout."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from vrthinker.evals.metrics import table
from vrthinker.evals.world import WorldReport
from vrthinker.progress import Progress, counted
from vrthinker.report.terminal import plain

_LISTED_FAILURES = 20
_TABLE_WIDTH = 118


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
    console = Console(highlight=False, width=max(Console().width, _TABLE_WIDTH))
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
    if report.failures:
        share = f"{len(report.failures)} of {counted(report.episodes, 'episode')}"
        percent = f"{len(report.failures) / report.episodes:.0%}"
        console.print(Text(f"without a verdict: {share} ({percent}); they count as wrong:"))
        for line in report.failures[:_LISTED_FAILURES]:
            console.print(Text("  " + plain(line).replace("\n", " ")))
        if len(report.failures) > _LISTED_FAILURES:
            console.print(Text(f"  and {len(report.failures) - _LISTED_FAILURES} more"))
    if report.errors:
        console.print(Text(f"{len(report.errors)} of them by an error or not judged yet, not by its words"))
