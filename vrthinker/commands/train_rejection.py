"""`vrthinker train rejection` lets a model learn from its own right episodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from vrthinker.commands.options import option
from vrthinker.commands.train_options import StageCommand
from vrthinker.errors import InputError


@dataclass(frozen=True)
class RejectionCommand(StageCommand):
    """Stage 2: sample episodes from a model, and fine-tune it on those that are well formed and right.

    From pairs: vrthinker train rejection --model M --pairs pairs.jsonl --out RUN

    On the synthetic world: vrthinker train rejection --recipe nano-rejection --out RUN

    Resuming a run that was stopped: vrthinker train rejection --resume RUN
    """

    model: Annotated[str | None, option("M")] = None
    """The model to start from, which writes the episodes: a checkpoint folder or a hub id."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """The labelled pairs to sample episodes of (.jsonl, .csv, .parquet)."""
    steps: Annotated[int | None, option("N")] = None
    """The number of optimizer steps. One pass over what is kept by default."""
    samples: Annotated[int | None, option("N")] = None
    """The number of episodes per pair. 8 by default."""
    keep_per_item: Annotated[int | None, option("N")] = None
    """The most episodes that are learned per pair. 1 by default."""
    temperature: Annotated[float | None, option("T")] = None
    """The sampling temperature. 1 by default."""
    engine: Annotated[Literal["hf", "vllm"] | None, option("hf|vllm")] = None
    """What samples: transformers, or vLLM. hf by default."""
    for_grpo: Annotated[Path | None, option("FILE")] = None
    """Write the pairs without a right episode to this pairs file, for the stage that follows."""
    batch_size: Annotated[int | None, option("N")] = None
    """The number of traces per step. 32 by default, as in the paper."""
    learning_rate: Annotated[float | None, option("LR")] = None
    """The peak learning rate. 1.5e-6 by default, as in the paper."""

    def _check(self) -> None:
        if self.recipe is None and self.pairs is None:
            raise InputError("rejection sampling: got nothing to sample; give --pairs or --recipe")
        if self.recipe is None and self.model is None:
            raise InputError("--model: missing; give the checkpoint folder or hub id to start from")
        self._check_numbers(batch_size=1)

    def _train(self, out: Path) -> Path | None:
        from vrthinker.train.rejection import rejection_settings, resume_settings, run_rejection

        settings = resume_settings(out) if self.resume is not None else rejection_settings(self._values())
        return run_rejection(settings, out)

    def _values(self) -> dict[str, Any]:
        values = self._recipe_values()
        if self.for_grpo is not None:
            values["for_grpo"] = self.for_grpo
        if self.pairs is not None:
            values["items"] = {"kind": "file", "path": self.pairs}
        options = {
            "sampling.samples": self.samples,
            "sampling.keep_per_item": self.keep_per_item,
            "sampling.temperature": self.temperature,
            "sampling.engine": self.engine,
            "learn.steps": self.steps,
            "learn.batch_size": self.batch_size,
            "learn.learning_rate.peak": self.learning_rate,
        }
        return self._overridden(values, options)
