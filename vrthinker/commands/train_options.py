"""What the stages of `vrthinker train` share: options, checks before torch is loaded, and the run itself."""

from __future__ import annotations

import abc
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from vrthinker.commands.options import announce, is_first_process, option
from vrthinker.errors import InputError
from vrthinker.records.trackers import TrackerName

Set = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, option("KEY=VALUE")]
"""An option that replaces one setting, and may be given again."""


@dataclass(frozen=True)
class StageCommand(abc.ABC):
    """A stage of training. A stage adds its own options, and says how they become settings."""

    out: Annotated[Path | None, option("RUN")] = None
    """The run's folder: settings, data, checkpoints, metrics. The trained judge is in RUN/model."""
    resume: Annotated[Path | None, option("RUN")] = None
    """Resume this run. No other option is needed."""
    recipe: Annotated[str | None, option("NAME|FILE")] = None
    """The settings: a YAML file, or a recipe that ships with the package."""
    model: Annotated[str | None, option("M")] = None
    """The model to start from: a checkpoint folder or a hub id. The recipe's by default."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """The labelled pairs (.jsonl, .csv, .parquet)."""
    steps: Annotated[int | None, option("N")] = None
    """The number of optimizer steps."""
    seed: Annotated[int | None, option("N")] = None
    """The seed of everything that is drawn. The recipe's, or 0, by default."""
    set: Set = ()
    """Replace one setting, by its place in the recipe: --set learn.steps=100. May be given again."""
    eval_pairs: Annotated[Path | None, option("FILE")] = None
    """Judge these labelled pairs now and then, and keep the best judge in RUN/best. Do not train on them."""
    eval_every: Annotated[int | None, option("STEPS")] = None
    """The number of steps between evaluations on --eval-pairs. 100 by default."""
    eval_limit: Annotated[int | None, option("N")] = None
    """Use only N of --eval-pairs, drawn by --seed. All by default."""
    tracker: Annotated[TrackerName | None, option("trackio|wandb|tensorboard|none")] = None
    """Where metrics go besides RUN/metrics.jsonl. By default trackio, if it is installed."""

    @abc.abstractmethod
    def _check(self) -> None:
        """Refuses what the stage cannot use. Called for a new run, before torch is loaded."""

    @abc.abstractmethod
    def _train(self, out: Path) -> Path | None:
        """Runs the stage. Returns the trained judge's folder; None if a signal ended it early."""

    def run(self) -> int:
        """Trains; returns 130 if a signal ended the run early (what is recorded is kept)."""
        out = self._checked_out()
        announce("starting to train: torch is loading")
        trained = self._train(out)
        if trained is None:  # a line has said how to resume
            return 130
        if is_first_process():
            sys.stdout.write(f"{trained}\n")
        return 0

    def _given(self, name: str) -> bool:
        return getattr(self, name) not in (None, ())

    def _checked_out(self) -> Path:
        """The run's folder. What can be refused without torch is refused here."""
        if self.resume is not None:
            given = [name for name in vars(self) if self._given(name)]
            if given != ["resume"]:
                options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
                raise InputError(f"--resume: got {options}; it goes alone, the run has its settings")
            if not self.resume.is_dir():
                raise InputError(f"{self.resume}: no run to resume; name the folder that --out named")
            return self.resume
        if self.out is None:
            raise InputError("--out: missing; name the run's folder, or --resume one")
        self._check()
        self._check_numbers(steps=1, seed=0, eval_every=1, eval_limit=1)
        if self.eval_pairs is None and self.recipe is None:
            for name in ("eval_every", "eval_limit"):
                if self._given(name):
                    raise InputError(
                        f"--{name.replace('_', '-')}: goes with --eval-pairs; give a file of pairs"
                    )
        self._check_files("pairs", "eval_pairs")
        if self.model is not None and self.model != "nano":
            from vrthinker.engine.hf.checkpoint import resolve_checkpoint

            resolve_checkpoint(self.model)
        return self.out

    def _check_numbers(self, **least: int) -> None:
        """Refuses options below their least values."""
        for name, allowed in least.items():
            value = getattr(self, name)
            if value is not None and value < allowed:
                raise InputError(f"--{name.replace('_', '-')}: got {value}, allowed: at least {allowed}")

    def _check_files(self, *names: str) -> None:
        """Refuses options that name no file."""
        for name in names:
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise InputError(f"--{name.replace('_', '-')}: {path}: not a file; give a file")

    def _recipe_values(self) -> dict[str, Any]:
        """The recipe's settings with the model and the seed that were given."""
        from vrthinker.train.settings import load_recipe

        values: dict[str, Any] = {} if self.recipe is None else load_recipe(self.recipe)
        given = {"model": self.model, "seed": self.seed}
        return {**values, **{name: value for name, value in given.items() if value is not None}}

    def _overridden(self, values: dict[str, Any], changes: Mapping[str, object]) -> dict[str, Any]:
        """Settings with the stage's options, `--set`, and how the run is watched. None is no option."""
        from vrthinker.train.settings import with_overrides

        assignments = [f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
        values = with_overrides(values, [*assignments, *self.set])
        watched = {"pairs": self.eval_pairs, "every": self.eval_every, "limit": self.eval_limit}
        evaluation = {name: value for name, value in watched.items() if value is not None}
        if evaluation:
            stored = values.get("evaluation")
            values = {**values, "evaluation": {**(stored if isinstance(stored, dict) else {}), **evaluation}}
        return values if self.tracker is None else {**values, "tracker": self.tracker}
