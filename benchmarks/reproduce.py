"""What each stage is worth on planted truth: the stages' matrix on the synthetic world.

    python benchmarks/reproduce.py --work FOLDER [--seeds 1 2 3] [--difficulty easy]
        [--cold-start 'build/nano-{seed}/model']

Arms, per seed, all from the cold-start model of that seed (`make nano NANO_SEED=1`):

- `rejection`: rejection sampling (recipe `nano-rejection`);
- `rejection+grpo`: GRPO (recipe `nano-grpo`) from there;
- `grpo`: GRPO from the cold start;
- `control`: as many supervised steps as rejection sampling, on the oracle's traces (recipe `nano-more`);
- `rejection+grpo, calls cost`: as `rejection+grpo`, but every call costs a little of the reward.

Every model judges the same held-out pairs, sampled at T = 1 and greedily. Differences to the models that it
started from are paired over pairs. The model after all stages then judges them once more in other ways:
frames picked by chance or by a grid, another memory mode, another window.

Everything is made by commands of the package and can be stopped: the same command goes on. An arm's row is
appended when it is done, and an arm that has a row is skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import MEASURES, WAYS, evaluate, evaluate_once, train

from vrthinker.engine.hf.checkpoint import resolve_checkpoint, weights_fingerprint
from vrthinker.evals.metrics import difference, measure
from vrthinker.evals.world import load_report, load_scores
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.records.provenance import append_row
from vrthinker.reward.settings import CallCostTerm, RewardSettings
from vrthinker.world.world import PRESETS

CURVES = ("rollouts/oa_tau", "rollouts/tool_calls", "rollouts/sampled_tokens_per_round", "kl/ref")


@dataclass(frozen=True)
class Arm:
    """How a model is trained.

    Attributes:
        stage: The command; None for the model that all others start from.
        start: The arm that it starts from.
        settings: Settings that replace the recipe's.
    """

    stage: str | None
    start: str = "cold start"
    settings: tuple[str, ...] = ()


def _reward_with_cost() -> str:
    terms = (*RewardSettings().terms, CallCostTerm())
    return json.dumps([term.model_dump() for term in terms])


ARMS = {
    "cold start": Arm(None),
    "rejection": Arm("rejection"),
    "rejection+grpo": Arm("grpo", "rejection"),
    "grpo": Arm("grpo"),
    "control": Arm("cold-start"),
    "rejection+grpo, calls cost": Arm("grpo", "rejection", (f"reward.terms={_reward_with_cost()}",)),
}
CALLS = {"easy": 2, "medium": 3, "hard": 6}
"""The most calls of the oracle's traces, as in the recipe `nano`."""
COLD_START = "build/nano-{seed}/model"
"""Where `make nano` puts the cold-start model of a seed."""
FINAL = "rejection+grpo"
"""The arm with all stages, which is looked at in other ways too."""
VIEWS: dict[str, tuple[object, ...]] = {
    "frames picked in other ways": ("--retrieval", "own", "random", "uniform"),
    "memory evict": ("--memory", "evict"),
    "memory renumber": ("--memory", "renumber"),
    "window 0": ("--window", 0),
    "window 2": ("--window", 2),
    "window all": ("--window", "all"),
}
"""Options of `vrthinker eval world`, by what they show. All decode greedily."""


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
        self.start = str(given.cold_start).format(seed=seed)
        if given.cold_start == COLD_START and not Path(self.start).is_dir():
            raise SystemExit(
                f"{self.start}: no such folder; make nano NANO_SEED={seed} trains this first model"
            )
        self.start_weights = weights_fingerprint(resolve_checkpoint(self.start))
        # What was trained or judged in other ways is in other folders.
        ways = [self.start_weights, given.pairs, given.eval_seed, given.set_grpo, given.set_rejection]
        name = hashlib.sha256(json.dumps(ways).encode()).hexdigest()[:8]
        self.folder = given.work / given.difficulty / f"seed-{seed}-{name}"

    def model(self, name: str) -> Path | str:
        """Trains the model of an arm, after those that it starts from."""
        given, arm, seed = self.given, ARMS[name], self.seed
        if arm.stage is None:
            return self.start
        common: list[object] = ["--set", f"model={self.model(arm.start)}", "--seed", seed]
        if arm.stage == "cold-start":
            recipe, world = "nano-more", "phases.0.traces.world"
            common += ["--set", f"phases.0.traces.calls={CALLS[given.difficulty]}"]
        else:
            first = 100_000 if arm.stage == "rejection" else 200_000
            common += ["--set", f"items.seed={first + 1000 * seed}"]
            world, recipe = "items.world", f"nano-{arm.stage}"
        if given.difficulty != "easy":
            # The recipes have the default world; another one has the settings of its preset.
            common += ["--set", f"{world}={PRESETS[given.difficulty].model_dump_json()}"]
        more = {"grpo": given.set_grpo, "rejection": given.set_rejection}.get(arm.stage, [])
        for assignment in (*arm.settings, *more):
            common += ["--set", assignment]
        return train(arm.stage, recipe, self.folder / name, *common)

    def scores(self, name: str) -> dict[str, Any]:
        """The scored pairs of an arm's model."""
        given = self.given
        return evaluate(
            self.model(name),
            self.folder / f"{name}-eval",
            given.pairs,
            given.eval_seed,
            difficulty=given.difficulty,
            clips=given.work / "clips",
        )

    def row(self, name: str) -> dict[str, Any]:
        """Trains and evaluates an arm."""
        found = self.scores(name)
        row: dict[str, Any] = {}
        before, at = [], name
        while ARMS[at].stage is not None:
            at = ARMS[at].start
            before.append(at)
        for way in WAYS:
            row[way] = {measured: vars(estimate) for measured, estimate in measure(found[way]).items()}
            report, _ = load_report(self.folder / f"{name}-eval" / way)
            row[way]["calls_by_hidden_events"] = {n: vars(e) for n, e in report.calls.items()}
            for other in before:
                earlier = self.scores(other)[way]
                row[f"{way} minus {other}"] = {m: vars(difference(found[way], earlier, m)) for m in MEASURES}
        if ARMS[name].stage == "grpo":
            lines = read_metrics(self.folder / name / METRICS_FILE)
            row["curves"] = {
                curve: [[line["step"], line[curve]] for line in lines if line.get(curve) is not None]
                for curve in CURVES
            }
        return row

    def view(self, name: str) -> dict[str, Any]:
        """Evaluates the model after all stages in another way, greedily."""
        given = self.given
        usual = self.scores(FINAL)["greedy"]
        run = self.folder / f"{FINAL}-views" / name
        evaluate_once(
            self.model(FINAL),
            run,
            given.pairs,
            given.eval_seed,
            *("--temperature", 0.0, *VIEWS[name]),
            difficulty=given.difficulty,
            clips=given.work / "clips",
        )
        report, _ = load_report(run)
        scores = load_scores(run)
        return {
            "judged": {way: {m: vars(e) for m, e in found.items()} for way, found in report.judged.items()},
            "perfect_reader": {way: vars(found["oa/tau"]) for way, found in report.perfect.items()},
            "own above": {way: vars(estimate) for way, estimate in report.gains.items()},
            "minus the usual way": {m: vars(difference(scores, usual, m)) for m in MEASURES},
        }


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and evaluations")
    parser.add_argument("--cold-start", default=COLD_START, help="the first model; {seed} is the seed")
    parser.add_argument("--difficulty", choices=list(PRESETS), default="easy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--views", nargs="*", choices=list(VIEWS), default=list(VIEWS))
    parser.add_argument("--pairs", type=int, default=512, help="held-out pairs")
    parser.add_argument("--eval-seed", type=int, default=771_000, help="of the held-out pairs")
    parser.add_argument("--set-grpo", action="append", default=[], help="a setting of nano-grpo, KEY=VALUE")
    parser.add_argument("--set-rejection", action="append", default=[], help="a setting of nano-rejection")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reproduction.jsonl"))
    given = parser.parse_args()
    for matrix in [Matrix(given, seed) for seed in given.seeds]:
        for name in (*given.arms, *(given.views if FINAL in given.arms else ())):
            key = {
                "experiment": "stages on the synthetic world",
                "difficulty": given.difficulty,
                "arm" if name in ARMS else "view": name,
                "seed": matrix.seed,
                "pairs": given.pairs,
                "eval_seed": given.eval_seed,
                "cold_start": given.cold_start,
                "cold_start_weights": matrix.start_weights,
                "settings": [*given.set_grpo, *given.set_rejection],
            }
            if not done(given.out, key):
                found = matrix.row(name) if name in ARMS else matrix.view(name)
                append_row(given.out, {**key, **found})


if __name__ == "__main__":
    main()
