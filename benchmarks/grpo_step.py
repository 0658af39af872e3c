"""Where the time of GRPO goes: a run of the nano judge on the synthetic world, part by part.

    python benchmarks/grpo_step.py [--refreshes 4] [--groups 8] [--out FILE]

A run of the recipe `nano-grpo` is timed by its own metrics: sampling, the log-probabilities of the old policy
and of the reference, packing, the forward and backward passes, the optimizer, and copying the weights to the
sampler. The first refresh is left out, because it opens the clips for the first time.

`packed_training.py` compares the packed step with other ways of computing it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.records.provenance import append_row
from vrthinker.train.grpo import run_grpo
from vrthinker.train.grpo_settings import grpo_settings
from vrthinker.train.settings import load_recipe

PARTS = ("rollout", "logprobs", "pack", "weight_update")


def timed_run(refreshes: int, groups: int, out: Path) -> list[dict[str, Any]]:
    """The seconds of each refresh by part, and its episodes."""
    values = load_recipe("nano-grpo")
    values |= {"tracker": "none"}
    values["items"] = {**values["items"], "pairs": 64}
    per_refresh = values["learn"]["steps_per_refresh"]
    values["learn"] |= {"steps": refreshes * per_refresh, "groups_per_step": groups // per_refresh}
    run_grpo(grpo_settings(values), out)
    lines = [line for line in read_metrics(out / METRICS_FILE) if line["step"] > 0]
    found = []
    for first in range(0, len(lines), per_refresh):
        steps = lines[first : first + per_refresh]
        seconds = {part: float(steps[0][f"perf/{part}_seconds"]) for part in PARTS}
        whole = sum(float(line["perf/step_seconds"]) for line in steps)
        seconds["optimizer"] = sum(float(line["perf/optimizer_seconds"]) for line in steps)
        seconds["forward_backward"] = whole - sum(seconds.values())
        episodes = steps[0]["rollouts/groups_drawn"] * values["rollouts"]["group_size"]
        found.append({"seconds": seconds, "whole": whole, "episodes": episodes})
    return found


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--refreshes", type=int, default=4)
    parser.add_argument("--groups", type=int, default=8, help="groups per refresh")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/grpo_step.jsonl"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        refreshes = timed_run(given.refreshes, given.groups, Path(folder) / "run")[1:]
    shares = {
        part: statistics.median(refresh["seconds"][part] / refresh["whole"] for refresh in refreshes)
        for part in refreshes[0]["seconds"]
    }
    speeds = sorted(refresh["episodes"] / refresh["whole"] for refresh in refreshes)
    row = {
        "benchmark": "a refresh of GRPO, nano on the synthetic world (easy)",
        "groups": given.groups,
        "refreshes": len(refreshes),
        "shares": shares,
        "outside_rollout_and_forward_backward": 1 - shares["rollout"] - shares["forward_backward"],
        "episodes_per_second": {
            "least": speeds[0],
            "median": statistics.median(speeds),
            "most": speeds[-1],
        },
    }
    append_row(given.out, row)
    print(row)  # noqa: T201 - what the script is for


if __name__ == "__main__":
    main()
