"""`vrthinker train grpo` lets a model learn from which of its own episodes earn more than others."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from vrthinker.commands.options import announce, is_first_process, option
from vrthinker.commands.train_options import Set, with_watching
from vrthinker.errors import InputError
from vrthinker.records.trackers import TrackerName


@dataclass(frozen=True)
class GrpoCommand:
    """Stage 3: sample groups of episodes, compare each episode with its group, and take clipped steps.

    From pairs: vrthinker train grpo --model M --pairs pairs.jsonl --steps 100 --out RUN

    On the synthetic world: vrthinker train grpo --recipe nano-grpo --out RUN

    Resuming a run that was stopped: vrthinker train grpo --resume RUN
    """

    out: Annotated[Path | None, option("RUN")] = None
    """The run's folder: settings, episodes, checkpoints, metrics. The trained judge is in RUN/model."""
    resume: Annotated[Path | None, option("RUN")] = None
    """Resume this run. No other option is needed."""
    recipe: Annotated[str | None, option("NAME|FILE")] = None
    """The settings: a YAML file, or a recipe that ships with the package (nano-grpo)."""
    model: Annotated[str | None, option("M")] = None
    """The model to start from, which is the reference too: a checkpoint folder or a hub id."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """The labelled pairs to sample episodes of (.jsonl, .csv, .parquet)."""
    steps: Annotated[int | None, option("N")] = None
    """The number of optimizer steps."""
    groups: Annotated[int | None, option("N")] = None
    """The number of groups per step. 64 by default, as in the paper."""
    group_size: Annotated[int | None, option("N")] = None
    """The number of episodes per group. 8 by default, as in the paper."""
    refresh: Annotated[int | None, option("STEPS")] = None
    """The number of steps for which episodes are sampled at once. 4 by default, as in the paper."""
    kl: Annotated[float | None, option("WEIGHT")] = None
    """The weight of the KL to the model that the run starts from. 0.01 by default; 0 saves its memory."""
    learning_rate: Annotated[float | None, option("LR")] = None
    """The learning rate. 1e-6 by default, as in the paper."""
    seed: Annotated[int | None, option("N")] = None
    """The seed of sampling and of the clips' orders. The recipe's, or 0, by default."""
    set: Set = ()
    """Replace one setting, by its place in the recipe: --set loss.clip_high=0.28. May be given again."""
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
        from vrthinker.train.grpo import run_grpo
        from vrthinker.train.grpo_settings import grpo_settings, resume_settings

        settings = resume_settings(out) if self.resume is not None else grpo_settings(self._values())
        trained = run_grpo(settings, out)
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
        if self.recipe is None:
            for name, value, what in (
                ("--pairs", self.pairs, "labelled pairs, or --recipe"),
                ("--model", self.model, "the checkpoint folder or hub id to start from"),
                ("--steps", self.steps, "the number of optimizer steps"),
            ):
                if value is None:
                    raise InputError(f"{name}: missing; give {what}")
        for name, path in (("--pairs", self.pairs), ("--eval-pairs", self.eval_pairs)):
            if path is not None and not path.is_file():
                raise InputError(f"{name}: {path}: not a file; give a file")
        if self.model is not None and self.model != "nano":
            from vrthinker.engine.hf.checkpoint import resolve_checkpoint

            resolve_checkpoint(self.model)
        return self.out

    def _values(self) -> dict[str, Any]:
        from vrthinker.train.settings import load_recipe, with_overrides

        values: dict[str, Any] = {} if self.recipe is None else load_recipe(self.recipe)
        for name, value in (("model", self.model), ("seed", self.seed)):
            if value is not None:
                values[name] = value
        if self.pairs is not None:
            values["items"] = {"kind": "file", "path": self.pairs}
        assignments = [
            f"{key}={value!r}"
            for key, value in (
                ("learn.steps", self.steps),
                ("learn.groups_per_step", self.groups),
                ("learn.steps_per_refresh", self.refresh),
                ("learn.learning_rate.peak", self.learning_rate),
                ("rollouts.group_size", self.group_size),
                ("loss.kl_weight", self.kl),
            )
            if value is not None
        ]
        return with_watching(
            with_overrides(values, [*assignments, *self.set]),
            pairs=self.eval_pairs,
            every=self.eval_every,
            limit=self.eval_limit,
            tracker=self.tracker,
        )
