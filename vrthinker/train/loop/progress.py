"""Where a training run stands: a bar on a terminal, a line every so often elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


class StepProgress:
    """Shows the steps of one run.

    Args:
        name: What is running.
        total: Steps of the whole run.
        done: Steps that were finished before this process.
        every: Steps between two lines, where stderr is no terminal.
        loss_name: The metric that is shown as the loss.
    """

    def __init__(self, name: str, total: int, *, done: int, every: int, loss_name: str) -> None:
        self._name, self._total, self._every, self._loss_name = name, total, every, loss_name
        self._here, self._seconds = 0, 0.0
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(name, total=total, completed=done, figures="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a finished step.

        Args:
            step: Finished steps.
            metrics: The step's, under the loop's names.
        """
        self._here += 1
        self._seconds += metrics["perf/step_seconds"]
        figures = (
            f"loss {metrics[self._loss_name]:.4g}, lr {metrics['optim/learning_rate']:.3g}, "
            f"{metrics['perf/tokens_per_s']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step % self._every == 0 or step == self._total:
            left = _spell((self._total - step) * self._seconds / self._here)
            sys.stderr.write(f"{self._name}: step {step} of {self._total}, {figures}, {left} left\n")

    def say(self, text: str) -> None:
        """Writes a line about the run."""
        if self._bar is not None:
            self._bar.console.print(Text(f"{self._name}: {text}"))
        else:
            sys.stderr.write(f"{self._name}: {text}\n")


def _spell(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}"
