"""What each stage is worth on planted truth: the stages' matrix on the synthetic world.

    python benchmarks/reproduce.py --work FOLDER [--seeds 0 1 2] [--difficulty easy]

Arms, per seed, all from one cold-start model:

- `rejection`: rejection sampling (recipe `nano-rejection`);
- `rejection+grpo`: GRPO (recipe `nano-grpo`) from there;
- `grpo`: GRPO from the cold start;
- `control`: as many supervised steps as rejection sampling, on the oracle's traces (recipe `nano-more`).

Every model judges the same held-out pairs, sampled at T = 1 and greedily. Differences to the cold start are
paired over pairs. Everything is made by commands of the package and can be stopped: the same command goes on.
An arm's row is appended when it is done, and an arm that has a row is skipped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages import MEASURES, WAYS, evaluate, train

from vrthinker.evals.metrics import difference, measure
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.records.provenance import append_row

ARMS = ("cold start", "rejection", "rejection+grpo", "grpo", "control")
CURVES = ("rollouts/oa_tau", "rollouts/tool_calls", "rollouts/sampled_tokens_per_round", "kl/ref")


def done(rows: Path, key: Mapping[str, Any]) -> bool:
    """Whether a row with these values is there."""
    lines = rows.read_text("utf-8").splitlines() if rows.is_file() else []
    return any(all(json.loads(line).get(k) == v for k, v in key.items()) for line in lines if line.strip())


class Matrix:
    """The arms of one seed.

    Args:
        given: The command's options.
        seed: The seed.
    """

    def __init__(self, given: argparse.Namespace, seed: int) -> None:
        self.given, self.seed = given, seed
        self.folder = given.work / given.difficulty / f"seed-{seed}"

    def model(self, arm: str) -> Path | str:
        """Trains the model of an arm, after those that it starts from."""
        given, folder = self.given, self.folder / arm
        if arm == "cold start":
            return str(given.cold_start)
        start = self.model("rejection" if arm == "rejection+grpo" else "cold start")
        common: list[object] = ["--set", f"model={start}", "--seed", self.seed]
        if arm == "control":
            return train("cold-start", "nano-more", folder, *common)
        stage = "rejection" if arm == "rejection" else "grpo"
        first = 9000 if stage == "rejection" else 11_000
        common += ["--set", f"items.seed={first + 1000 * self.seed}"]
        if given.difficulty != "easy":
            # The recipes have the default world; another one has the settings of its preset.
            from vrthinker.world.world import PRESETS

            common += ["--set", f"items.world={PRESETS[given.difficulty].model_dump_json()}"]
        for assignment in given.set_grpo if stage == "grpo" else given.set_rejection:
            common += ["--set", assignment]
        return train(stage, f"nano-{stage}", folder, *common)

    def row(self, arm: str) -> dict[str, Any]:
        """Trains and evaluates an arm."""
        given = self.given
        where = {"difficulty": given.difficulty}
        before = evaluate(
            given.cold_start,
            given.work / given.difficulty / "cold start",
            given.pairs,
            given.eval_seed,
            **where,
        )
        model = self.model(arm)
        after = before
        if arm != "cold start":
            after = evaluate(model, self.folder / f"{arm}-eval", given.pairs, given.eval_seed, **where)
        row: dict[str, Any] = {}
        for way in WAYS:
            row[way] = {name: vars(estimate) for name, estimate in measure(after[way]).items()}
            if arm != "cold start":
                row[f"{way} minus cold start"] = {
                    name: vars(difference(after[way], before[way], name)) for name in MEASURES
                }
        if arm.endswith("grpo"):
            lines = read_metrics(self.folder / arm / METRICS_FILE)
            row["curves"] = {
                name: [[line["step"], line[name]] for line in lines if line.get(name) is not None]
                for name in CURVES
            }
        return row


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and evaluations")
    parser.add_argument("--cold-start", default="nano", help="the model that all arms start from")
    parser.add_argument("--difficulty", choices=["easy", "medium", "hard"], default="easy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--pairs", type=int, default=512, help="held-out pairs")
    parser.add_argument("--eval-seed", type=int, default=771_000, help="of the held-out pairs")
    parser.add_argument("--set-grpo", action="append", default=[], help="a setting of nano-grpo, KEY=VALUE")
    parser.add_argument("--set-rejection", action="append", default=[], help="a setting of nano-rejection")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reproduction.jsonl"))
    given = parser.parse_args()
    for seed in given.seeds:
        matrix = Matrix(given, seed)
        for arm in given.arms:
            key = {
                "experiment": "stages on the synthetic world",
                "difficulty": given.difficulty,
                "arm": arm,
                "seed": seed,
                "cold_start": str(given.cold_start),
                "pairs": given.pairs,
                "settings": [*given.set_grpo, *given.set_rejection],
            }
            if not done(given.out, key):
                append_row(given.out, {**key, "eval_seed": given.eval_seed, **matrix.row(arm)})


if __name__ == "__main__":
    main()
