"""One judge under every protocol and every negative control, on held-out pairs of a synthetic world.

    python benchmarks/nano_protocols.py --work FOLDER [--model nano] [--difficulty easy medium hard]

Each arm is a run of `vrthinker eval pairs` with other options, compared with the plain run pair by pair: how
much the accuracy changes, and how many verdicts flip. `controls` is a run of `vrthinker eval controls`. Runs
can be stopped and go on. An arm that has a row of these weights is skipped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from stages import vrthinker

from vrthinker.bounded_files import read_json
from vrthinker.engine.hf.checkpoint import resolve_checkpoint, weights_fingerprint
from vrthinker.evals.compare import compare
from vrthinker.evals.controls_run import CONTROLS_FILE
from vrthinker.evals.run_files import MAX_EVAL_BYTES, read_run
from vrthinker.records.provenance import append_row

ARMS: dict[str, tuple[object, ...]] = {
    "plain": (),
    "both orders": ("--both-orders", "--subsets"),
    "5 votes": ("--votes", 5),
    "redundant frames": ("--redundant",),
    "retrieval none": ("--retrieval", "none"),
    "retrieval random": ("--retrieval", "random"),
    "retrieval uniform": ("--retrieval", "uniform"),
    "first answer from high": ("--first-answer-from", "high"),
    "window 0": ("--window", 0),
    "window all": ("--window", "all"),
    "memory evict": ("--memory", "evict"),
    "4 first frames": ("--frames", 4),
    "16 first frames": ("--frames", 16),
    "half the frame rate": ("--max-fps", 4),
    "a quarter of the frame rate": ("--max-fps", 2),
    "2.25 times the pixels": ("--max-pixels", 84 * 84),
    "4 times the pixels": ("--max-pixels", 112 * 112),
}
"""Options of `vrthinker eval pairs`. Worlds have 8 frames a second of 112 x 112 pixels; nano sees 56 x 56."""
CONTROLS = "controls"
_KEPT = ("measures", "statuses", "baselines", "calibration", "orders", "cost", "contradictions")


def done(rows: Path, key: dict[str, Any]) -> bool:
    """Whether a row with these values is there."""
    lines = rows.read_text("utf-8").splitlines() if rows.is_file() else []
    return any(all(json.loads(line).get(name) == value for name, value in key.items()) for line in lines)


def judged(name: str, given: argparse.Namespace, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Judges under a protocol, or reads what is judged already."""
    run = folder / name.replace(" ", "-")
    vrthinker(
        *("eval", "pairs", "--pairs", folder / "world" / "pairs.jsonl", "--model", given.model),
        *("--seed", given.seed, "--batch-size", 64, "--out", run, *ARMS[name]),
    )
    return read_run(run)


def arm(name: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Judges under a protocol, and compares with the plain run."""
    items, about = judged(name, given, folder)
    row = {part: about["summary"][part] for part in _KEPT if about["summary"].get(part) is not None}
    if name != "plain":
        plain, _ = judged("plain", given, folder)
        (found,) = compare({"plain": plain, name: items})
        row["compared with plain"] = found.as_json()
    return row


def controls(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Asks the questions with known answers."""
    run = folder / CONTROLS
    vrthinker(
        *("eval", "controls", "--data", folder / "world" / "pairs.jsonl", "--model", given.model),
        *("--seed", given.seed, "--limit", given.control_pairs, "--batch-size", 64, "--out", run),
    )
    found = read_json(run / CONTROLS_FILE, MAX_EVAL_BYTES)
    return {"rows": found["rows"]}


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for worlds and runs")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--difficulty", nargs="+", default=["easy", "medium", "hard"])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, CONTROLS], default=[*ARMS, CONTROLS])
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--control-pairs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nano_protocols.jsonl"))
    given = parser.parse_args()
    weights = weights_fingerprint(resolve_checkpoint(given.model))
    for difficulty in given.difficulty:
        folder = given.work / difficulty
        if not (folder / "world" / "pairs.jsonl").is_file():
            vrthinker(
                *("world", "make", "--out", folder / "world", "--difficulty", difficulty),
                *("--pairs", given.pairs, "--seed", given.seed),
            )
        for name in given.arms:
            key = {
                "experiment": "protocols and controls on the synthetic world",
                "model": given.model,
                "weights": weights,
                "difficulty": difficulty,
                "arm": name,
                "pairs": given.control_pairs if name == CONTROLS else given.pairs,
                "seed": given.seed,
            }
            if not done(given.out, key):
                row = controls(given, folder) if name == CONTROLS else arm(name, given, folder)
                append_row(given.out, {**key, **row})


if __name__ == "__main__":
    main()
