"""`vrthinker train cold-start` teaches a model the form of thinking, from a teacher's traces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from vrthinker.commands.options import option
from vrthinker.commands.train_options import Set, StageCommand
from vrthinker.errors import InputError


@dataclass(frozen=True)
class ColdStartCommand(StageCommand):
    """Stage 1: supervised fine-tuning on a teacher's traces.

    From traces: vrthinker train cold-start --model M --traces traces.jsonl --pairs pairs.jsonl --out RUN

    The nano judge from random weights: vrthinker train cold-start --recipe nano --out RUN

    Resuming a run that was stopped: vrthinker train cold-start --resume RUN
    """

    traces: Annotated[Path | None, option("FILE")] = None
    """Train on these trajectories (`vrthinker judge --trajectories` writes them)."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """The pairs file with the labels of --traces: only traces with four right judgments are kept."""
    steps: Annotated[int | None, option("N")] = None
    """The number of optimizer steps. One pass over the traces by default."""
    batch_size: Annotated[int | None, option("N")] = None
    """The number of traces per step. The recipe's, or 32 as in the paper, by default."""
    learning_rate: Annotated[float | None, option("LR")] = None
    """The peak learning rate. The recipe's, or 1.5e-6 as in the paper, by default."""
    set: Set = ()
    """Replace one setting, by its place in the recipe: --set phases.0.steps=100. May be given again."""

    def _check(self) -> None:
        if self.traces is None:
            if self.pairs is not None:
                raise InputError("--pairs: goes with --traces; a recipe has its own")
            if self.recipe is None:
                raise InputError("cold start: got nothing to learn from; give --traces or --recipe")
        elif self.recipe is None and self.model is None:
            raise InputError("--model: missing; give the checkpoint folder or hub id to start from")
        self._check_numbers(steps=1, batch_size=1)
        self._check_files("traces")

    def _train(self, out: Path) -> Path | None:
        from vrthinker.train.cold_start import cold_start_settings, resume_settings, run_cold_start

        settings = resume_settings(out) if self.resume is not None else cold_start_settings(self._values())
        return run_cold_start(settings, out)

    def _values(self) -> dict[str, Any]:
        values = self._recipe_values()
        if self.traces is not None:
            source = {"kind": "file", "path": self.traces, "pairs": self.pairs}
            phases = values.get("phases")
            only = phases[0] if isinstance(phases, list) and len(phases) == 1 else {"name": "traces"}
            values["phases"] = [{**only, "traces": source} if isinstance(only, dict) else only]
        if "phases" not in values:
            raise InputError("cold start: got nothing to learn from; give --traces or --recipe")
        options = {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate.peak": self.learning_rate,
        }
        self._check_phases(values["phases"], [name for name, value in options.items() if value is not None])
        return self._overridden(values, {f"phases.0.{name}": value for name, value in options.items()})

    @staticmethod
    def _check_phases(phases: object, changed: list[str]) -> None:
        """Refuses options that change the only phase if there are several."""
        if changed and isinstance(phases, list) and len(phases) != 1:
            name = changed[0]
            option = name.removesuffix(".peak").replace("_", "-")
            raise InputError(
                f"--{option}: the recipe has {len(phases)} phases; name one of them, like "
                f"--set phases.{len(phases) - 1}.{name}=..."
            )
