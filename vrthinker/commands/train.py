"""`vrthinker train` runs the stages that train a judge."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from vrthinker.commands.options import Flag, announce, is_first_process, option
from vrthinker.commands.plan import TrainPlanCommand
from vrthinker.commands.train_grpo import GrpoCommand
from vrthinker.commands.train_options import Set, phase_overrides, with_watching
from vrthinker.commands.train_rejection import RejectionCommand
from vrthinker.commands.train_traces import TracesCommand
from vrthinker.errors import InputError
from vrthinker.records.trackers import TrackerName

_MEAN_STEPS = 10
_TRACES_FILE = "traces.json"
"""What a run of `vrthinker train cold-start` learns from, and how many steps its phases have."""
_MAX_TRACES_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class ColdStartCommand:
    """Stage 1: supervised fine-tuning on a teacher's traces.

    From traces: vrthinker train cold-start --model M --traces traces.jsonl --pairs pairs.jsonl --out RUN

    The nano judge from random weights: vrthinker train cold-start --recipe nano --out RUN

    Resuming a run that was stopped: vrthinker train cold-start --resume RUN
    """

    out: Annotated[Path | None, option("RUN")] = None
    """The run's folder, with settings, data, checkpoints and metrics. The trained judge is in RUN/model."""
    resume: Annotated[Path | None, option("RUN")] = None
    """Resume this run. No other option is needed."""
    recipe: Annotated[str | None, option("NAME|FILE")] = None
    """The settings: a YAML file, or a recipe that ships with the package (nano)."""
    model: Annotated[str | None, option("M")] = None
    """The model to start from: a checkpoint folder or a hub id. The recipe's by default."""
    traces: Annotated[Path | None, option("FILE")] = None
    """Train on these trajectories (`vrthinker judge --trajectories` writes them)."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """The pairs file with the labels of --traces: only traces with four right judgments are kept."""
    steps: Annotated[int | None, option("N")] = None
    """The number of optimizer steps. One pass over the traces by default."""
    batch_size: Annotated[int | None, option("N")] = None
    """The number of sequences per step. The recipe's, or 32 as in the paper, by default."""
    learning_rate: Annotated[float | None, option("LR")] = None
    """The peak learning rate. The recipe's, or 1.5e-6 as in the paper, by default."""
    seed: Annotated[int | None, option("N")] = None
    """The seed of data, order and random initial weights. The recipe's, or 0, by default."""
    set: Set = ()
    """Replace one setting, by its place in the recipe: --set phases.0.steps=100. May be given again."""
    eval_pairs: Annotated[Path | None, option("FILE")] = None
    """Judge these labelled pairs now and then, and keep the best judge in RUN/best. Do not train on them."""
    eval_every: Annotated[int | None, option("STEPS")] = None
    """The number of steps between evaluations on --eval-pairs. 100 by default."""
    eval_limit: Annotated[int | None, option("N")] = None
    """Use only N of --eval-pairs, drawn by --seed. All by default."""
    tracker: Annotated[TrackerName | None, option("trackio|wandb|tensorboard|none")] = None
    """Where metrics go besides RUN/metrics.jsonl. By default trackio, if it is installed."""

    def run(self) -> int:
        """Trains; returns 130 if a signal ended the run early (its last step is kept)."""
        out = self._checked_out()
        announce("starting to train: torch is loading")
        from vrthinker.train.cold_start import cold_start_settings, resume_settings, run_cold_start

        settings = resume_settings(out) if self.resume is not None else cold_start_settings(self._values())
        trained = run_cold_start(settings, out)
        if trained is None:  # the loop has printed how to resume
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
        if self.traces is None:
            if self.pairs is not None:
                raise InputError("--pairs: goes with --traces; a recipe has its own")
            if self.recipe is None:
                raise InputError("cold start: got nothing to learn from; give --traces or --recipe")
        elif self.recipe is None and self.model is None:
            raise InputError("--model: missing; give the checkpoint folder or hub id to start from")
        for name, value, least in (
            ("--steps", self.steps, 1),
            ("--batch-size", self.batch_size, 1),
            ("--seed", self.seed, 0),
            ("--eval-every", self.eval_every, 1),
            ("--eval-limit", self.eval_limit, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name}: got {value}, allowed: at least {least}")
        if self.eval_pairs is None:
            for name in ("eval_every", "eval_limit"):
                if name in given and self.recipe is None:
                    raise InputError(
                        f"--{name.replace('_', '-')}: goes with --eval-pairs; give a file of pairs"
                    )
        files = (("--traces", self.traces), ("--pairs", self.pairs), ("--eval-pairs", self.eval_pairs))
        for name, path in files:
            if path is not None and not path.is_file():
                raise InputError(f"{name}: {path}: not a file; give a file")
        if self.model is not None and self.model != "nano":
            from vrthinker.engine.hf.checkpoint import resolve_checkpoint

            resolve_checkpoint(self.model)
        return self.out

    def _values(self) -> dict[str, Any]:
        from vrthinker.train.settings import load_recipe, with_overrides

        values: dict[str, Any] = {} if self.recipe is None else load_recipe(self.recipe)
        if self.model is not None:
            values["model"] = self.model
        if self.seed is not None:
            values["seed"] = self.seed
        if self.traces is not None:
            source = {"kind": "file", "path": self.traces, "pairs": self.pairs}
            phases = values.get("phases")
            only = phases[0] if isinstance(phases, list) and len(phases) == 1 else {"name": "traces"}
            values["phases"] = [{**only, "traces": source} if isinstance(only, dict) else only]
        if "phases" not in values:
            raise InputError("cold start: got nothing to learn from; give --traces or --recipe")
        return with_watching(
            with_overrides(values, [*self._of_the_phase(values["phases"]), *self.set]),
            pairs=self.eval_pairs,
            every=self.eval_every,
            limit=self.eval_limit,
            tracker=self.tracker,
        )

    def _of_the_phase(self, phases: object) -> list[str]:
        """The options that change a phase, as settings of the only one."""
        given = phase_overrides("phases.0.", self.steps, self.batch_size, self.learning_rate)
        if given and isinstance(phases, list) and len(phases) != 1:
            name = given[0].partition("=")[0].removeprefix("phases.0.")
            option = name.removesuffix(".peak").replace("_", "-")
            raise InputError(
                f"--{option}: the recipe has {len(phases)} phases; name one of them, like "
                f"--set phases.{len(phases) - 1}.{name}=..."
            )
        return given


@dataclass(frozen=True)
class TrainShowCommand:
    """Print how far a training run is: its last step's metrics, and their means over the last ten steps."""

    run_folder: Annotated[tyro.conf.Positional[Path], option("RUN")]
    """The run's folder."""
    json: Flag = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Prints the last step and the means of the last ten."""
        from vrthinker.records.metrics_file import METRICS_FILE, read_metrics

        path = self.run_folder / METRICS_FILE
        lines = read_metrics(path) if path.is_file() else []
        if not lines:
            raise InputError(f"{self.run_folder}: no run that has finished a step")
        last, recent = lines[-1], lines[-_MEAN_STEPS:]
        metrics = {name: value for name, value in last.items() if name not in ("step", "time_seconds")}
        means: dict[str, float | None] = {}
        for name in metrics:
            values = [line[name] for line in recent if line.get(name) is not None]
            means[name] = sum(values) / len(values) if values else None
        steps = _all_steps(self.run_folder)
        hours = (last["time_seconds"] - lines[0]["time_seconds"]) / 3600
        if self.json:
            import json

            summary = {
                "step": last["step"],
                "steps": steps,
                "hours_since_step_1": hours,
                "last": metrics,
                "mean_over_steps": len(recent),
                "means": means,
            }
            sys.stdout.write(json.dumps(summary, indent=2) + "\n")
            return 0
        of_all = "" if steps is None else f" of {steps}"
        over = f"mean of the last {len(recent)} steps" if len(recent) > 1 else "mean of this step"
        table = [(name, _spelled(metrics[name]), _spelled(means[name])) for name in metrics]
        sys.stdout.write(f"step {last['step']}{of_all}, {hours:.2f} hours after the run's first step\n")
        for name, value, mean in [("", "last step", over), *table]:
            sys.stdout.write(f"{name:24} {value:>12}   {mean}\n")
        return 0


def _all_steps(run: Path) -> int | None:
    """The number of steps of a whole run; None if the run's folder does not say it."""
    from vrthinker.bounded_files import read_json

    path = run / _TRACES_FILE
    record = read_json(path, _MAX_TRACES_FILE_BYTES) if path.is_file() else None
    phases = record.get("phases") if isinstance(record, dict) else None
    phases = phases if isinstance(phases, list) else []
    steps = [phase.get("steps") if isinstance(phase, dict) else None for phase in phases]
    counts = [number for number in steps if type(number) is int]
    return sum(counts) if counts and len(counts) == len(steps) else None


def _spelled(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


TrainCommand = (
    Annotated[TracesCommand, tyro.conf.subcommand("traces", prefix_name=False)]
    | Annotated[ColdStartCommand, tyro.conf.subcommand("cold-start", prefix_name=False)]
    | Annotated[RejectionCommand, tyro.conf.subcommand("rejection", prefix_name=False)]
    | Annotated[GrpoCommand, tyro.conf.subcommand("grpo", prefix_name=False)]
    | Annotated[TrainShowCommand, tyro.conf.subcommand("show", prefix_name=False)]
    | Annotated[TrainPlanCommand, tyro.conf.subcommand("plan", prefix_name=False)]
)
