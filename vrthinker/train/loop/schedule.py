"""The learning rate of every step: a warm-up, then a curve. A pure function of the step.

Invariant: no step has a rate of zero unless `final_ratio` leads there beyond the last step, so no step is
computed for nothing.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

_ROUNDING = 1e-9
"""0.07 of 100 steps is 7 steps, although 0.07 * 100 is a little more than 7."""


class LearningRate(BaseModel):
    """A peak, a warm-up to it, and what follows (method section 5)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    peak: float = Field(gt=0.0)
    """The highest rate. The paper's: 1.5e-6 in the two SFT stages, 1e-6 in GRPO."""
    warmup_ratio: float = Field(0.2, ge=0.0, le=1.0)
    """The share of all steps, rounded up, in which the rate rises; 0.2 is the paper's for SFT."""
    shape: Literal["cosine", "constant", "linear"] = "cosine"
    """Ours: how the rate falls after the warm-up; `constant` stays at the peak."""
    final_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """Ours: where the fall ends, as a share of the peak; `constant` makes no use of it."""

    def warmup_steps(self, total: int) -> int:
        """How many of `total` steps the rate rises in."""
        return math.ceil(self.warmup_ratio * total - _ROUNDING)

    def at(self, step: int, total: int) -> float:
        """The rate of one step.

        It rises in equal parts from `peak / warmup_steps` at step 0 to `peak` at the last warm-up step.
        The step after it is at the peak too, and from there the rate falls so that `final_ratio * peak`
        would be the rate of step `total`, the first one that is not run.

        Args:
            step: 0-based.
            total: Steps of the whole run.

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
