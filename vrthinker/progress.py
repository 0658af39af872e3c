"""The progress of long work on stderr: bars on a terminal, a line now and then elsewhere; counts in words.

This module imports nothing else of the package, and it imports rich only when something is shown.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, TaskID


_is_silent = False


def silence(silent: bool) -> None:
    """Shows nothing from here on, or everything again: of several processes with one job, one shows it."""
    global _is_silent
    _is_silent = silent


def counted(count: int, noun: str) -> str:
    """A number with its noun, in the plural unless the number is 1: `1 pair`, `2 pairs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


class Progress:
    """A context manager that shows the progress of one or more tasks.

    Args:
        figures: Whether a bar has room for a changing text beside it.
    """

    def __init__(self, *, figures: bool = False) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        self._bars: Bars | None = _bars(console, figures) if console.is_terminal and not _is_silent else None
        self._tasks: dict[str, TaskID] = {}

    @property
    def on_terminal(self) -> bool:
        """Whether bars are shown, rather than lines."""
        return self._bars is not None

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(
        self, name: str, done: int, total: int, *, figures: str = "", line: str = "", every: int = 0
    ) -> None:
        """Shows the progress of a task.

        Args:
            name: The text before the task's bar, which is made at the first call with this name.
            done: The number of finished parts.
            total: The number of all parts.
            figures: The text beside the bar.
            line: The line to `say` if there are no bars.
            every: The number of parts between two such lines; the last part always has one. By default there
                are no lines.
        """
        if self._bars is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, completed=done, figures=figures)
            self._bars.update(self._tasks[name], completed=done, figures=figures)
        elif every and done and (done == total or done % every == 0):
            self.say(line)

    def say(self, text: str) -> None:
        """Writes a line, above the bars if there are any."""
        if self._bars is not None:
            from rich.text import Text

            self._bars.console.print(Text(text))
        elif not _is_silent:
            sys.stderr.write(f"{text}\n")


def _bars(console: Console, figures: bool) -> Bars:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    if figures:
        columns.insert(-1, TextColumn("{task.fields[figures]}", markup=False))
    return Progress(*columns, console=console)
