"""The progress of a training run: steps, loss, speed and remaining time."""

from __future__ import annotations

from collections.abc import Mapping

from vrthinker.progress import Progress


class StepProgress(Progress):
    """Shows the steps of one run.

    Args:
        name: The name of what is running.
        total: The number of steps of the whole run.
        done: The number of steps that were finished before this process.
        every: The number of steps between two lines, if stderr is not a terminal.
        loss_name: The metric that is shown as the loss.
    """

    def __init__(self, name: str, total: int, *, done: int, every: int, loss_name: str) -> None:
        super().__init__(figures=True)
        self._name, self._total, self._every, self._loss_name = name, total, every, loss_name
        self._here, self._seconds = 0, 0.0
        self.show(name, done, total)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a finished step.

        Args:
            step: The number of finished steps.
            metrics: The step's metrics, under the loop's names.
        """
        self._here += 1
        self._seconds += metrics["perf/step_seconds"]
        figures = (
            f"loss {metrics[self._loss_name]:.4g}, lr {metrics['optim/learning_rate']:.3g}, "
            f"{metrics['perf/tokens_per_s']:,.0f} tokens/s"
        )
        left = _spell((self._total - step) * self._seconds / self._here)
        line = f"step {step} of {self._total}, {figures}, {left} left"
        self.show(self._name, step, self._total, figures=figures, line=line, every=self._every)

    def say(self, text: str) -> None:
        """Writes a line about the run, with its name in front."""
        super().say(f"{self._name}: {text}")


def _spell(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}"
