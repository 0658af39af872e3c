"""The learning rate of every step, as a pure function of the step: a warm-up, then a curve.

Invariant: no step has a rate of zero, so that no step is computed in vain. A `final_ratio` of 0 is only
reached after the last step.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_ROUNDING = 1e-9
"""Tolerance in counting steps: 0.07 of 100 steps is 7, although 0.07 * 100 is a little more than 7."""


class LearningRate(BaseModel):
    """A warm-up to a peak, and a curve after it (method section 5)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    peak: float = Field(gt=0.0)
    """The highest rate. The paper uses 1.5e-6 in the two SFT stages, 1e-6 in GRPO."""
    warmup_ratio: float = Field(0.2, ge=0.0, le=1.0)
    """The share of all steps in which the rate rises (rounded up to steps). The paper uses 0.2 for SFT."""
    shape: Literal["cosine", "constant", "linear"] = "cosine"
    """Ours: how the rate falls after the warm-up. `constant` stays at the peak."""
    final_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """Ours: the rate at the end of the fall, as a share of the peak. `constant` takes none."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.shape == "constant" and self.final_ratio != 0.0:
            raise ValueError(f"final_ratio: got {self.final_ratio} with shape constant, allowed: none")
        return self

    def warmup_steps(self, total: int) -> int:
        """The number of `total` steps in which the rate rises."""
        return math.ceil(self.warmup_ratio * total - _ROUNDING)

    def at(self, step: int, total: int) -> float:
        """The rate of one step.

        The rate rises in equal parts from `peak / warmup_steps` at step 0 to `peak` at the last warm-up step.
        The next step is at the peak too. From there the rate falls, so that it would be `final_ratio * peak`
        at step `total`, which is the first step that is not run.

        Args:
            step: The 0-based number of the step.
            total: The number of steps of the whole run.

        Raises:
            ValueError: `step` is not one of the run's steps.
        """
        if not 0 <= step < total:
            raise ValueError(f"step: got {step}, allowed: 0 to {total - 1} in a run of {total} steps")
        warmup = self.warmup_steps(total)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        if self.shape == "constant":
            return self.peak
        fallen = (step - warmup) / (total - warmup)
        left = 1 - fallen if self.shape == "linear" else (1 + math.cos(math.pi * fallen)) / 2
        return self.peak * (self.final_ratio + (1 - self.final_ratio) * left)
