"""What the benchmarks about stages share: they train and evaluate by the package's own commands.

Everything can be stopped: the same call goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vrthinker.errors import InputError
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
    model: Path | str,
    folder: Path,
    pairs: int,
    seed: int,
    *options: object,
    difficulty: str = "easy",
    clips: Path | None = None,
) -> dict[str, Any]:
    """Judges held-out pairs in both ways. Returns the scored pairs by way.

    Args:
        model: The judge's model.
        folder: The folder for the evaluations, with a folder for each way.
        pairs: The number of pairs.
        seed: The seed of the pairs.
        options: More options of `vrthinker eval world`.
        difficulty: The difficulty of the world.
        clips: A folder that keeps the clips of worlds that were evaluated on, so that they are drawn once.
    """
    for way, temperature in WAYS.items():
        run = folder / way
        evaluate_once(
            model,
            run,
            pairs,
            seed,
            "--temperature",
            temperature,
            *options,
            difficulty=difficulty,
            clips=clips,
        )
    return {way: load_scores(folder / way) for way in WAYS}


def evaluate_once(
    model: Path | str,
    run: Path,
    pairs: int,
    seed: int,
    *options: object,
    difficulty: str = "easy",
    clips: Path | None = None,
) -> None:
    """Judges held-out pairs in one way, into a run's folder. What is judged already is not judged again."""
    if "--retrieval" not in options:
        with contextlib.suppress(InputError):
            load_scores(run)
            return
    kept = None if clips is None else clips / f"{difficulty}-{seed}-{pairs}"
    if kept is not None and kept.is_dir():
        _link_tree(kept, run / "world")
    where = ("--difficulty", difficulty, "--limit", pairs, "--seed", seed, "--out", run)
    if "--retrieval" not in options:
        options = ("--retrieval", "own", *options)
    vrthinker("eval", "world", "--model", model, *where, *options)
    if kept is not None and not kept.is_dir():
        spare = kept.with_name(f"{kept.name}.{os.getpid()}")
        _link_tree(run / "world", spare)
        with contextlib.suppress(OSError):  # another process was faster
            spare.rename(kept)


def _link_tree(source: Path, target: Path) -> None:
    """Hard links to all files of a folder. What is there is kept."""
    for path in sorted(source.rglob("*")):
        link = target / path.relative_to(source)
        if path.is_file() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)
