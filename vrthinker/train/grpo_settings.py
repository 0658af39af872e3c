"""The settings of GRPO: how it samples, what episodes earn, the loss of a step, and how long it learns.

Invariant: a setting that does not fit the others is refused here, before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from vrthinker.reward.settings import AdvantageSettings, GrpoAdvantage, RewardSettings
from vrthinker.train.items import Items
from vrthinker.train.loop.schedule import LearningRate
from vrthinker.train.rollouts import RolloutSettings
from vrthinker.train.settings import (
    MAX_STEPS,
    RunSettings,
    Stage,
    StageSettings,
    stage_settings,
    stored_settings,
)

GRPO = Stage("GRPO", "grpo")


class LossSettings(StageSettings):
    """The clipped loss of a step. Defaults are the paper's where it says something."""

    model_config = ConfigDict(allow_inf_nan=False)

    clip_low: float = Field(0.2, ge=0.0, le=1.0)
    """The ratio to the old policy is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0.0)
    """The ratio is clipped above 1 + clip_high."""
    kl_weight: float = Field(0.01, ge=0.0)
    """Weight of the KL to the reference, the policy that the run starts from. With 0 there is no reference in
    memory and no KL is measured."""
    aggregation: Literal["episode_mean", "token_mean", "fixed_length"] = "episode_mean"
    """How tokens add up: the mean over episodes of their means (the paper's), the mean over all tokens of the
    batch, or the sum divided by `fixed_length` per episode (Dr. GRPO)."""
    fixed_length: int | None = Field(None, ge=1)
    """The number of tokens for the aggregation of that name, and only for it."""
    importance_cap: float | None = Field(None, gt=0.0)
    """Ours: weight each token's advantage by the ratio of the old policy to the sampler's own probability, at
    most this. None does not weight."""
    most_drift: float = Field(0.5, gt=0.0)
    """The largest mean difference between the old policy's and the sampler's log-probabilities, in nats. A
    larger one means that training computes something else than was sampled, and ends the run."""
    most_kl: float | None = Field(None, gt=0.0)
    """End the run, and keep what it has learned, once the mean KL to the reference is above this."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.fixed_length is None) != (self.aggregation != "fixed_length"):
            raise ValueError("fixed_length: wanted with aggregation fixed_length, and only with it")
        if self.most_kl is not None and self.kl_weight == 0.0:
            raise ValueError("most_kl: got a limit with kl_weight 0, which measures no KL; give a weight")
        return self


class GrpoRate(LearningRate):
    """A constant rate, unless it is told otherwise."""

    peak: float = Field(1e-6, gt=0.0)
    """The highest rate. The paper uses 1e-6."""
    warmup_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """The share of all steps in which the rate rises."""
    shape: Literal["cosine", "constant", "linear"] = "constant"
    """How the rate falls after the warm-up."""


class GrpoPhase(StageSettings):
    """How long and how fast the policy learns."""

    steps: int = Field(ge=1, le=MAX_STEPS)
    """Number of optimizer steps."""
    groups_per_step: int = Field(64, ge=1)
    """Number of groups per step. The paper uses 64."""
    steps_per_refresh: int = Field(4, ge=1)
    """Number of steps between two refreshes of the sampler and of the old policy. The paper uses 4."""
    learning_rate: GrpoRate = GrpoRate()
    max_pack_tokens: int | None = Field(None, ge=1)
    """The most tokens of a forward pass. A larger group is split. By default a group is one pack."""


class GrpoSettings(RunSettings):
    """All settings of GRPO."""

    items: Items
    rollouts: RolloutSettings = RolloutSettings()
    reward: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = GrpoAdvantage()
    loss: LossSettings = LossSettings()
    learn: GrpoPhase

    @model_validator(mode="after")
    def _computes_one_policy(self) -> Self:
        if self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                f"lora.dropout: got {self.lora.dropout}, allowed in GRPO: 0; with it, two forwards of one "
                "policy differ, and so would the ratio to the old one"
            )
        return self


def grpo_settings(values: Mapping[str, Any]) -> GrpoSettings:
    """Validates settings. An error names the first wrong key.

    Raises:
        InputError: A key is unknown, missing or out of range.
    """
    return stage_settings(GRPO, GrpoSettings, values)


def resume_settings(run: Path) -> GrpoSettings:
    """The settings that a run was started with.

    Raises:
        InputError: The folder does not hold a run of this stage.
    """
    return stored_settings(GRPO, GrpoSettings, run)
