"""Prints the tables about a nano judge, for the README and its card, from the rows of its evaluations.

    python benchmarks/nano_tables.py --model nano [--rows benchmarks/results/nano_world.jsonl]

For every world, the latest greedy row with that model counts, and the latest sampled one for the line about
sampling. Rows come from `vrthinker eval world --model nano ... --row benchmarks/results/nano_world.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tables import interval, number, table

WORLDS = ("easy", "medium", "hard")
WAYS = {
    "own": "the model",
    "random": "chance",
    "uniform": "an even grid",
    "none": "nobody (first 8 frames only)",
}
MEASURES = {
    "oa/tau": "OA tau",
    "oa/diff": "OA diff",
    "all_four": "all four",
    "ta/accuracy": "TA",
    "vq/accuracy": "VQ",
    "mq/accuracy": "MQ",
    "hidden_events/seen": "hidden events seen",
    "tool_calls/mean": "calls an episode",
    "format/well_formed": "well formed",
}


def latest(rows: list[dict[str, Any]], model: str, *, sampled: bool) -> dict[str, dict[str, Any]]:
    """The last row of each world with this model, by the world's difficulty. Greedy ones have all ways."""
    wanted = set() if sampled else set(WAYS)
    return {
        row["difficulty"]: row
        for row in rows
        if row["model"] == model
        and (row["temperature"] > 0) is sampled
        and (row.get("memory", "rerender"), row.get("window", 1)) == ("rerender", 1)
        and wanted <= set(row["judged"])
    }


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/nano_world.jsonl"))
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.rows.read_text("utf-8").splitlines()]
    greedy, sampled = (latest(rows, given.model, sampled=kind) for kind in (False, True))
    told: list[str] = []

    def cell(world: str, way: str) -> str:
        row = greedy.get(world, {"judged": {}})
        if way not in row["judged"]:
            return ""
        reader = row["perfect_reader"][way]["oa/tau"]["value"]
        return f"{interval(row['judged'][way]['oa/tau'])} ({number(reader)})"

    told.append(
        table(["who picks the frames", *WORLDS], [[WAYS[w], *(cell(d, w) for d in WORLDS)] for w in WAYS])
    )
    lines = [
        [name, *(interval(greedy[world]["judged"]["own"][code]) for world in WORLDS if world in greedy)]
        for code, name in MEASURES.items()
    ]
    lines += [
        [f"OA tau, own above {way}", *(interval(gains[way]) if way in gains else "" for gains in found)]
        for found in [[greedy[world]["oa_tau_gain_of_own_over"] for world in WORLDS if world in greedy]]
        for way in ("random", "uniform", "none")
    ]
    if sampled:
        own = [sampled[w]["judged"]["own"]["oa/tau"] if w in sampled else None for w in WORLDS if w in greedy]
        lines.append(
            ["OA tau, sampled (T = 1)", *("" if value is None else interval(value) for value in own)]
        )
    told.append(table(["nano picks the frames", *(world for world in WORLDS if world in greedy)], lines))
    told += [
        f"{world}: {row['pairs']} pairs, commit {row['commit'][:7]}, {row['machine']['cpu']}"
        for world, row in [*greedy.items(), *sampled.items()]
    ]
    print("\n\n".join(told))  # noqa: T201 - a script's result


if __name__ == "__main__":
    main()
