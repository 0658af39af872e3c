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
from pathlib import Path
from typing import Any

from stages import MEASURES, WAYS, evaluate, train

from vrthinker.evals.metrics import difference, measure
from vrthinker.records.provenance import append_row


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
