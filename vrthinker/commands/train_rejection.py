"""`vrthinker train rejection` lets a model learn from its own right episodes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from vrthinker.commands.options import announce, is_first_process, option
from vrthinker.commands.train_options import Set, phase_overrides, with_watching
from vrthinker.errors import InputError
from vrthinker.records.trackers import TrackerName


@dataclass(frozen=True)
class RejectionCommand:
    """Stage 2: sample episodes from a model, and fine-tune it on those that are well formed and right.

    From pairs: vrthinker train rejection --model M --pairs pairs.jsonl --out RUN

    On the synthetic world: vrthinker train rejection --recipe nano-rejection --out RUN

    Resuming a run that was stopped: vrthinker train rejection --resume RUN
    """

    out: Annotated[Path | None, option("RUN")] = None
    """The run's folder: settings, episodes, checkpoints, metrics. The trained judge is in RUN/model."""
    resume: Annotated[Path | None, option("RUN")] = None
    """Resume this run. No other option is needed."""
    recipe: Annotated[str | None, option("NAME|FILE")] = None
    """The settings: a YAML file, or a recipe that ships with the package (nano-rejection)."""
    model: Annotated[str | None, option("M")] = None
    """The model to start from, which writes the episodes: a checkpoint folder or a hub id."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """The labelled pairs to sample episodes of (.jsonl, .csv, .parquet)."""
    samples: Annotated[int | None, option("N")] = None
    """The number of episodes per pair. 8 by default."""
    keep_per_item: Annotated[int | None, option("N")] = None
    """The most episodes that are learned per pair. 1 by default."""
    temperature: Annotated[float | None, option("T")] = None
    """The sampling temperature. 1 by default."""
    for_grpo: Annotated[Path | None, option("FILE")] = None
    """Write the pairs without a right episode to this pairs file, for the stage that follows."""
    steps: Annotated[int | None, option("N")] = None
    """The number of optimizer steps. One pass over what is kept by default."""
    batch_size: Annotated[int | None, option("N")] = None
    """The number of sequences per step. 32 by default, as in the paper."""
    learning_rate: Annotated[float | None, option("LR")] = None
    """The peak learning rate. 1.5e-6 by default, as in the paper."""
    seed: Annotated[int | None, option("N")] = None
    """The seed of sampling, of the clips' orders and of the batches. The recipe's, or 0, by default."""
    set: Set = ()
    """Replace one setting, by its place in the recipe: --set sampling.batch_size=16. May be given again."""
    eval_pairs: Annotated[Path | None, option("FILE")] = None
    """Judge these labelled pairs now and then, and keep the best judge in RUN/best. Do not train on them."""
    eval_every: Annotated[int | None, option("STEPS")] = None
    """The number of steps between evaluations on --eval-pairs. 100 by default."""
    eval_limit: Annotated[int | None, option("N")] = None
    """Use only N of --eval-pairs, drawn by --seed. All by default."""
    tracker: Annotated[TrackerName | None, option("trackio|wandb|tensorboard|none")] = None
    """Where metrics go besides RUN/metrics.jsonl. By default trackio, if it is installed."""

    def run(self) -> int:
        """Samples and trains; returns 130 if a signal ended the run early (what is recorded is kept)."""
        out = self._checked_out()
        announce("starting to train: torch is loading")
        from vrthinker.train.rejection import rejection_settings, resume_settings, run_rejection

        settings = resume_settings(out) if self.resume is not None else rejection_settings(self._values())
        trained = run_rejection(settings, out)
        if trained is None:  # a line has said how to resume
            return 130
        if is_first_process():
            sys.stdout.write(f"{trained}\n")
        return 0

    def _checked_out(self) -> Path:
        """The run's folder. What can be refused without torch is refused here."""
        given = [name for name, value in vars(self).items() if value not in (None, ())]
        if self.resume is not None:
            if given != ["resume"]:
                options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
                raise InputError(f"--resume: got {options}; it goes alone, the run has its settings")
            if not self.resume.is_dir():
                raise InputError(f"{self.resume}: no run to resume; name the folder that --out named")
            return self.resume
        if self.out is None:
            raise InputError("--out: missing; name the run's folder, or --resume one")
        if self.recipe is None and self.pairs is None:
            raise InputError("rejection sampling: got nothing to sample; give --pairs or --recipe")
        if self.recipe is None and self.model is None:
            raise InputError("--model: missing; give the checkpoint folder or hub id to start from")
        for name, path in (("--pairs", self.pairs), ("--eval-pairs", self.eval_pairs)):
            if path is not None and not path.is_file():
                raise InputError(f"{name}: {path}: not a file; give a file")
        if self.model is not None and self.model != "nano":
            from vrthinker.engine.hf.checkpoint import resolve_checkpoint

            resolve_checkpoint(self.model)
        phase_overrides("", self.steps, self.batch_size, self.learning_rate)
        return self.out

    def _values(self) -> dict[str, Any]:
        from vrthinker.train.settings import load_recipe, with_overrides

        values: dict[str, Any] = {} if self.recipe is None else load_recipe(self.recipe)
        for name, value in (("model", self.model), ("seed", self.seed), ("for_grpo", self.for_grpo)):
            if value is not None:
                values[name] = value
        if self.pairs is not None:
            values["items"] = {"kind": "file", "path": self.pairs}
        assignments = [
            f"sampling.{name}={value}"
            for name, value in (
                ("samples", self.samples),
                ("keep_per_item", self.keep_per_item),
                ("temperature", self.temperature),
            )
            if value is not None
        ]
        assignments += phase_overrides("learn.", self.steps, self.batch_size, self.learning_rate)
        return with_watching(
            with_overrides(values, [*assignments, *self.set]),
            pairs=self.eval_pairs,
            every=self.eval_every,
            limit=self.eval_limit,
            tracker=self.tracker,
        )
