"""Rejection sampling on the synthetic world, beside a control: further steps on the oracle's traces.

    python benchmarks/rejection_world.py --work FOLDER [--cold-start nano] [--seeds 0 1 2]

For every seed, two judges are trained from the cold-start model: by the recipe `nano-rejection` from its own
right episodes, and by the recipe `nano-more` from further traces of the oracle. The cold-start model and both
judges then judge the same held-out pairs, sampled at T = 1 and greedily. Differences are paired over pairs.

Everything is made by commands of the package and can be stopped: the same command goes on. One row per seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vrthinker.evals.metrics import difference, measure
from vrthinker.evals.world import load_scores
from vrthinker.records.provenance import append_row

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


def evaluate(model: Path | str, folder: Path, pairs: int, seed: int) -> dict[str, Any]:
    """Judges the held-out pairs in both ways. Returns the scored pairs by way."""
    for way, temperature in WAYS.items():
        options = ("--limit", pairs, "--seed", seed, "--retrieval", "own", "--temperature", temperature)
        vrthinker("eval", "world", "--model", model, "--out", folder / way, *options)
    return {way: load_scores(folder / way) for way in WAYS}


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and evaluations")
    parser.add_argument("--cold-start", default="nano", help="the model that both judges start from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=512, help="held-out pairs")
    parser.add_argument("--eval-seed", type=int, default=771_000, help="of the held-out pairs")
    parser.add_argument("--set", action="append", default=[], help="a setting of nano-rejection, KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rejection_world.jsonl"))
    given = parser.parse_args()
    start, work = given.cold_start, given.work
    before = evaluate(start, work / "cold-start", given.pairs, given.eval_seed)
    for seed in given.seeds:
        folder = work / f"seed-{seed}"
        common = ("--set", f"model={start}", "--seed", seed)
        own = ("--set", f"items.seed={9000 + 1000 * seed}", *(o for s in given.set for o in ("--set", s)))
        learned = train("rejection", "nano-rejection", folder / "rejection", *common, *own)
        control = train("cold-start", "nano-more", folder / "control", *common)
        after = evaluate(learned, folder / "rejection-eval", given.pairs, given.eval_seed)
        beside = evaluate(control, folder / "control-eval", given.pairs, given.eval_seed)
        traces = json.loads((folder / "rejection" / "traces.json").read_text())["phases"][0]
        row: dict[str, Any] = {
            "experiment": "rejection sampling on the synthetic world, easy",
            "cold_start": start,
            "seed": seed,
            "pairs": given.pairs,
            "eval_seed": given.eval_seed,
            "episodes": {key: traces[key] for key in ("read", "kept", "steps")},
            "settings": given.set,
        }
        for way in WAYS:
            arms = {"cold start": before[way], "rejection": after[way], "control": beside[way]}
            row[way] = {name: {m: vars(measure(arm)[m]) for m in MEASURES} for name, arm in arms.items()}
            for name, arm in (("rejection", after[way]), ("control", beside[way])):
                row[way][f"{name} minus cold start"] = {
                    m: vars(difference(arm, before[way], m)) for m in MEASURES
                }
        append_row(given.out, row)
        print(json.dumps(row, indent=1))  # noqa: T201 - a script's result


if __name__ == "__main__":
    main()
