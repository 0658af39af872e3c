"""`vrthinker eval` measures how good a judge is, with confidence intervals."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vrthinker.commands.options import Flag, announce, check_device, check_writable, option
from vrthinker.errors import InputError

if TYPE_CHECKING:
    from vrthinker.evals.world import WorldReport


@dataclass(frozen=True)
class EvalWorldCommand:
    """Judge held-out pairs of the synthetic world, and measure how much the judge gains by choosing frames.

    vrthinker eval world --model M --difficulty easy --limit 512 --seed 1 --out RUN
    """

    model: Annotated[str, option("M")]
    """A checkpoint folder, a hub id, or nano."""
    out: Annotated[Path, option("RUN")]
    """The run's folder: the world, every episode, table.json. The same command continues a killed run."""
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    """The difficulty of the world."""
    limit: Annotated[int, option("N")] = 512
    """The number of pairs. 512 by default."""
    seed: int = 0
    """The seed of the world's pairs and of sampling."""
    retrieval: tuple[Literal["own", "random", "uniform"], ...] = ("own", "random", "uniform")
    """How retrieved frames are picked. own is always included; "none" is scored from its first rounds."""
    temperature: Annotated[float | None, option("T")] = None
    """The sampling temperature; 0 is greedy. The checkpoint's own by default."""
    memory: Annotated[Literal["rerender", "evict", "renumber"] | None, option("MODE")] = None
    """How expired frames are removed from the context (docs/memory.md). The checkpoint's own by default."""
    batch_size: int = 64
    """The number of episodes that advance together."""
    device: Annotated[str | None, option("DEVICE")] = None
    """cpu, cuda, cuda:1. By default a GPU if there is one."""
    json: Flag = False
    """Print JSON instead of tables."""
    row: Annotated[Path | None, option("FILE")] = None
    """Append a result row (measures, machine, versions, commit, command) to this JSONL file."""

    def run(self) -> int:
        """Evaluates and prints; returns 1 if an error ended an episode.

        A judge that gives no verdict is a result of the evaluation and no failure of the command.
        """
        from vrthinker.evals.retrieval import Retrieval
        from vrthinker.evals.world import evaluate_world
        from vrthinker.evals.world_table import EvalProgress
        from vrthinker.judge import Judge

        if self.limit < 1:
            raise InputError(f"--limit: got {self.limit}, allowed: at least 1")
        if "own" not in self.retrieval:
            raise InputError(
                f"--retrieval: got {' '.join(self.retrieval) or 'nothing'}, wanted own among them"
            )
        if self.batch_size < 1:
            raise InputError(f"--batch-size: got {self.batch_size}, allowed: at least 1")
        if self.seed < 0:
            raise InputError(f"--seed: got {self.seed}, allowed: 0 and above")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out: {self.out}: got a file, allowed: a folder")
        check_device(self.device)
        if self.row is not None:
            check_writable("--row", self.row)
        options = {"temperature": self.temperature, "memory": self.memory}
        overrides: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        Judge.configuration_of(self.model, **overrides)  # refused before torch loads, if it cannot be used
        announce(f"loading {self.model}")
        with (
            Judge.from_pretrained(
                self.model, device=self.device, batch_size=self.batch_size, **overrides
            ) as judge,
            EvalProgress() as progress,
        ):
            report = evaluate_world(
                judge,
                self.out,
                difficulty=self.difficulty,
                limit=self.limit,
                seed=self.seed,
                retrievals=[Retrieval(way) for way in self.retrieval],
                on_episode=progress.episode,
            )
        if self.row is not None:
            from vrthinker.records.provenance import append_row

            about = {
                "evaluation": "synthetic world",
                "model": self.model,
                "difficulty": self.difficulty,
                "pairs": self.limit,
                "seed": self.seed,
                "temperature": judge.settings.episode.temperature,
                "memory": judge.settings.episode.memory,
            }
            append_row(self.row, {**about, **report.as_json()})
        _print(report, difficulty=self.difficulty, model=judge.engine.name, as_json=self.json)
        return 1 if report.errors else 0


@dataclass(frozen=True)
class EvalShowCommand:
    """Print the tables of a run again, from the episodes that it recorded."""

    run_folder: Annotated[tyro.conf.Positional[Path], option("RUN")]
    """The folder that `vrthinker eval world` wrote."""
    json: Flag = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Prints what is there."""
        from vrthinker.evals.world import load_report

        report, run = load_report(self.run_folder)
        _print(report, difficulty=run["difficulty"], model=run["model"], as_json=self.json)
        return 0


def _print(report: WorldReport, *, difficulty: str, model: str, as_json: bool) -> None:
    if as_json:
        import json

        sys.stdout.write(json.dumps(report.as_json(), indent=2) + "\n")
    else:
        from vrthinker.evals.world_table import print_report

        print_report(report, difficulty=difficulty, model=model)


EvalCommand = (
    Annotated[EvalWorldCommand, tyro.conf.subcommand("world", prefix_name=False)]
    | Annotated[EvalShowCommand, tyro.conf.subcommand("show", prefix_name=False)]
)
