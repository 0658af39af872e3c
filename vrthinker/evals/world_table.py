"""The world evaluation on a terminal: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from vrthinker.evals.metrics import table
from vrthinker.evals.world import WorldReport
from vrthinker.report.terminal import plain

_LISTED_FAILURES = 20
_TABLE_WIDTH = 118


class EvalProgress:
    """A bar per retrieval on a terminal, a line every so often elsewhere."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> EvalProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def episode(self, retrieval: str, done: int, total: int) -> None:
        """Counts an episode that has just ended."""
        if self._bar is not None:
            if retrieval not in self._tasks:
                self._tasks[retrieval] = self._bar.add_task(f"{retrieval} frames", total=total)
            self._bar.update(self._tasks[retrieval], completed=done)
        elif done and (done == total or done % max(1, total // 8) == 0):
            sys.stderr.write(f"{retrieval} frames: {done} of {total} episodes\n")


def print_report(report: WorldReport, *, difficulty: str, model: str) -> None:
    """The tables of a report."""
    # A cut interval is no interval: a narrower terminal wraps the lines itself.
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
        console.print(Text(f"{len(report.failures)} episodes without a verdict (they count as wrong):"))
        for line in report.failures[:_LISTED_FAILURES]:
            console.print(Text("  " + plain(line).replace("\n", " ")))
