"""`vrthinker world` makes pairs of the synthetic world with planted truth, and measures perfect readers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vrthinker.commands.options import Flag, option
from vrthinker.progress import counted


@dataclass(frozen=True)
class WorldMakeCommand:
    """Write pairs of clips with planted defects: mp4 files, pairs.jsonl, and the truth beside them."""

    out: Annotated[Path, option("DIR")]
    """The folder to write. The same command continues a killed run."""
    pairs: Annotated[int, option("N")] = 200
    """The number of pairs. 200 by default."""
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    """The difficulty of the world."""
    seed: int = 0
    """The seed of the world. Equal seeds write equal files."""
    workers: Annotated[int | None, option("N")] = None
    """The number of processes. The number of cores by default."""

    def run(self) -> int:
        """Writes the world."""
        from vrthinker.errors import InputError
        from vrthinker.report.terminal import plain
        from vrthinker.world.files import PAIRS_FILE, make_world
        from vrthinker.world.world import PRESETS

        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers: got {self.workers}, allowed: at least 1")
        make_world(
            self.out,
            PRESETS[self.difficulty],
            pairs=self.pairs,
            seed=self.seed,
            prefix=self.difficulty,
            workers=self.workers,
        )
        sys.stdout.write(f"{plain(str(self.out / PAIRS_FILE))}\n")
        return 0


@dataclass(frozen=True)
class WorldCeilingsCommand:
    """Print the accuracy of perfect readers who look nowhere, at random, at hints, or evenly."""

    difficulty: Literal["easy", "medium", "hard"] = "easy"
    """The difficulty of the world."""
    pairs: Annotated[int, option("N")] = 2000
    """The number of pairs to average over (no pixels are drawn). 2000 by default."""
    seed: int = 0
    """The seed of the pairs."""
    json: Flag = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Prints the table."""
        from vrthinker.world.files import check_size, sample_world
        from vrthinker.world.truth_reader import ceilings
        from vrthinker.world.world import PRESETS

        check_size(self.pairs, self.seed)
        config = PRESETS[self.difficulty]
        rows = ceilings(config, sample_world(config, self.pairs, self.seed), self.seed)
        if self.json:
            import json

            # JSON has no NaN.
            values = [{key: None if value != value else value for key, value in row.items()} for row in rows]
            sys.stdout.write(json.dumps(values, indent=2) + "\n")
            return 0
        from rich.console import Console
        from rich.table import Table

        title = f"perfect readers of the {self.difficulty} world, {counted(self.pairs, 'pair')}"
        table = Table(show_edge=False, pad_edge=False, title=title, title_justify="left")
        for name in ("looks at", "calls", "OA tau", "OA diff", "all four", "OA tau, best guess"):
            table.add_column(name)
        for row in rows:
            measured = [row[name] for name in ("oa_tau", "oa_diff", "all_four", "oa_tau_best_guess")]
            numbers = ["-" if value != value else f"{value:.3f}" for value in measured]
            table.add_row(str(row["looks"]), str(row["calls"]), *numbers)
        Console(highlight=False).print(table)
        return 0


WorldCommand = (
    Annotated[WorldMakeCommand, tyro.conf.subcommand("make", prefix_name=False)]
    | Annotated[WorldCeilingsCommand, tyro.conf.subcommand("ceilings", prefix_name=False)]
)
