"""The losses and metrics of a step's micro-batches, and their sums over the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

LOOP_METRICS = (
    "optim/learning_rate",
    "optim/grad_norm",
    "optim/skipped_steps",
    "perf/tokens_per_s",
    "perf/step_seconds",
    "perf/optimizer_seconds",
)
"""The metrics that the loop itself measures."""


@dataclass(frozen=True)
class MicroLoss:
    """The loss and metrics of one micro-batch of a step, after its forward pass.

    Attributes:
        loss: The loss, a scalar with gradient, already divided by the normaliser of the whole step: losses of
            a step are summed.
        n_tokens: The number of tokens that the forward pass computed, for tokens/s.
        sums: The metrics that are summed over the step, by slash name. Shares must be divided by the step's
            normaliser too. Scalar tensors may stay on their device until the end of the step.
        maxima: The metrics of which the step logs the maximum.
    """

    loss: torch.Tensor
    n_tokens: int
    sums: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    maxima: Mapping[str, float | torch.Tensor] = field(default_factory=dict)


class StepSums:
    """One step's metrics. They stay on their device until the step is over, to avoid waiting for each.

    Args:
        loss_name: The name of the metric of the summed loss.
    """

    def __init__(self, loss_name: str) -> None:
        self._loss_name = loss_name
        self.count = 0
        self.n_tokens = 0
        self._sums: dict[str, float | torch.Tensor] = {}
        self._maxima: dict[str, list[float | torch.Tensor]] = {}

    def add(self, micro: MicroLoss) -> None:
        """Adds one micro-batch.

        Raises:
            ValueError: The micro-batch has a metric whose name the loop uses.
        """
        if taken := ({*micro.sums, *micro.maxima} & {self._loss_name, *LOOP_METRICS}):
            raise ValueError(f"metrics: got {min(taken)!r}, which the loop writes; name it otherwise")
        self.count += 1
        self.n_tokens += micro.n_tokens
        for name, value in {self._loss_name: micro.loss, **micro.sums}.items():
            plain = value.detach() if isinstance(value, torch.Tensor) else value
            self._sums[name] = self._sums[name] + plain if name in self._sums else plain
        for name, value in micro.maxima.items():
            plain = value.detach() if isinstance(value, torch.Tensor) else value
            self._maxima.setdefault(name, []).append(plain)

    def report(self) -> dict[str, Any]:
        """The sums of this process, as JSON values."""
        return {
            "count": self.count,
            "n_tokens": self.n_tokens,
            "sums": {name: float(value) for name, value in self._sums.items()},
            "maxima": {name: max(map(float, values)) for name, values in self._maxima.items()},
        }


@dataclass(frozen=True)
class StepTotals:
    """One step's metrics over all processes.

    Attributes:
        count: The number of micro-batches.
        n_tokens: The number of tokens that the forward passes computed.
        values: The sums and maxima by name.
    """

    count: int
    n_tokens: int
    values: dict[str, float]


def step_totals(reports: Sequence[Mapping[str, Any]]) -> StepTotals:
    """Adds up what the processes report of a step (`StepSums.report`), in the order of their ranks."""
    values: dict[str, float] = {}
    for report in reports:
        for name, value in report["sums"].items():
            values[name] = values[name] + value if name in values else value
    maxima: dict[str, list[float]] = {}
    for report in reports:
        for name, value in report["maxima"].items():
            maxima.setdefault(name, []).append(value)
    return StepTotals(
        count=sum(report["count"] for report in reports),
        n_tokens=sum(report["n_tokens"] for report in reports),
        values=values | {name: max(found) for name, found in maxima.items()},
    )
