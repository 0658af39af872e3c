"""What the benchmarks about stages share: they train and evaluate by the package's own commands.

Everything can be stopped: the same call goes on where it was.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from vrthinker.evals.world import load_scores

MEASURES = ("oa/tau", "hidden_events/seen", "all_four", "tool_calls/mean", "format/well_formed")
WAYS = {"sampled": 1.0, "greedy": 0.0}


def vrthinker(*arguments: object) -> None:
    """Runs a command of the package, and ends this script if it fails."""
    command = [sys.executable, "-m", "vrthinker", *map(str, arguments)]
    print("$", *command[2:], flush=True)  # noqa: T201 - what a reader can repeat
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def train(stage: str, recipe: str, run: Path, *options: object) -> Path:
    """Trains a judge, or goes on where it stopped. Returns its checkpoint folder."""
    if not (run / "model").is_dir():
        what = ("--resume", run) if (run / "config.json").is_file() else ("--recipe", recipe, "--out", run)
        vrthinker("train", stage, *what, *(() if what[0] == "--resume" else options))
    return run / "model"


def evaluate(
    model: Path | str, folder: Path, pairs: int, seed: int, *options: object, difficulty: str = "easy"
) -> dict[str, Any]:
    """Judges held-out pairs in both ways. Returns the scored pairs by way."""
    for way, temperature in WAYS.items():
        where = ("--difficulty", difficulty, "--limit", pairs, "--seed", seed, "--out", folder / way)
        decoding = ("--retrieval", "own", "--temperature", temperature)
        vrthinker("eval", "world", "--model", model, *where, *decoding, *options)
    return {way: load_scores(folder / way) for way in WAYS}
