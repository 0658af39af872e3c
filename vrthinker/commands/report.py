"""`vrthinker report` writes the page of a training run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vrthinker.commands.options import announce, option
from vrthinker.errors import InputError


@dataclass(frozen=True)
class ReportCommand:
    """Write one page about a training run: its curves, evaluations, settings, and some of its episodes.

    vrthinker report RUN
    """

    run_folder: Annotated[tyro.conf.Positional[Path], option("RUN")]
    """The run's folder, finished or not."""
    out: Annotated[Path | None, option("FILE")] = None
    """The HTML file. RUN/report.html by default."""
    episodes: Annotated[int, option("N")] = 6
    """The most episodes that get an evidence page, in a folder beside the file. 6 by default."""

    def run(self) -> int:
        """Writes the page and prints its path."""
        if self.episodes < 0:
            raise InputError(f"--episodes: got {self.episodes}, allowed: 0 and above")
        if not self.run_folder.is_dir():
            raise InputError(f"{self.run_folder}: no folder of a run; name the folder that --out named")
        from vrthinker.report.run_page.page import write_run_page

        out = self.run_folder / "report.html" if self.out is None else self.out
        if self.episodes:
            announce("writing the pages of sampled episodes")
        write_run_page(self.run_folder, out, episodes=self.episodes)
        sys.stdout.write(f"{out}\n")
        return 0
