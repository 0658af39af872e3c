"""`vrthinker train` runs the stages that train a judge."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vrthinker.commands.options import Flag, option
from vrthinker.commands.plan import TrainPlanCommand
from vrthinker.commands.train_cold_start import ColdStartCommand
from vrthinker.commands.train_grpo import GrpoCommand
from vrthinker.commands.train_rejection import RejectionCommand
from vrthinker.commands.train_traces import TracesCommand
from vrthinker.errors import InputError

_MEAN_STEPS = 10
_TRACES_FILE = "traces.json"
"""What a run of `vrthinker train cold-start` learns from, and how many steps its phases have."""
_MAX_TRACES_FILE_BYTES = 1 << 30


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
