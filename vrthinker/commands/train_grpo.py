"""`vrthinker train grpo` lets a model learn from which of its own episodes earn more than others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from vrthinker.commands.options import option
from vrthinker.commands.train_options import StageCommand
from vrthinker.errors import InputError


@dataclass(frozen=True)
class GrpoCommand(StageCommand):
    """Stage 3: sample groups of episodes, compare each episode with its group, and take clipped steps.

    From pairs: vrthinker train grpo --model M --pairs pairs.jsonl --steps 100 --out RUN

    On the synthetic world: vrthinker train grpo --recipe nano-grpo --out RUN

    Resuming a run that was stopped: vrthinker train grpo --resume RUN
    """

    model: Annotated[str | None, option("M")] = None
    """The model to start from, which is the reference too: a checkpoint folder or a hub id."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """The labelled pairs to sample episodes of (.jsonl, .csv, .parquet)."""
    groups: Annotated[int | None, option("N")] = None
    """The number of groups per step. 64 by default, as in the paper."""
    group_size: Annotated[int | None, option("N")] = None
    """The number of episodes per group. 8 by default, as in the paper."""
    refresh: Annotated[int | None, option("STEPS")] = None
    """The number of steps for which episodes are sampled at once. 4 by default, as in the paper."""
    engine: Annotated[Literal["hf", "vllm"] | None, option("hf|vllm")] = None
    """What samples: transformers, or vLLM. hf by default."""
    kl: Annotated[float | None, option("WEIGHT")] = None
    """The weight of the KL to the model that the run starts from. 0.01 by default; 0 saves its memory."""
    learning_rate: Annotated[float | None, option("LR")] = None
    """The learning rate. 1e-6 by default, as in the paper."""

    def _check(self) -> None:
        if self.recipe is None:
            for name, value, what in (
                ("--pairs", self.pairs, "labelled pairs, or --recipe"),
                ("--model", self.model, "the checkpoint folder or hub id to start from"),
                ("--steps", self.steps, "the number of optimizer steps"),
            ):
                if value is None:
                    raise InputError(f"{name}: missing; give {what}")

    def _train(self, out: Path) -> Path | None:
        from vrthinker.train.grpo import run_grpo
        from vrthinker.train.grpo_settings import grpo_settings, resume_settings

        settings = resume_settings(out) if self.resume is not None else grpo_settings(self._values())
        return run_grpo(settings, out)

    def _values(self) -> dict[str, Any]:
        values = self._recipe_values()
        if self.pairs is not None:
            values["items"] = {"kind": "file", "path": self.pairs}
        options = {
            "learn.steps": self.steps,
            "learn.groups_per_step": self.groups,
            "learn.steps_per_refresh": self.refresh,
            "learn.learning_rate.peak": self.learning_rate,
            "rollouts.group_size": self.group_size,
            "rollouts.engine": self.engine,
            "loss.kl_weight": self.kl,
        }
        return self._overridden(values, options)
