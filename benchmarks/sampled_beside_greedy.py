"""What sampling could teach a judge that its greedy answers do not know: two evaluations of the same pairs.

    python benchmarks/sampled_beside_greedy.py RUN... [--out FILE]

Each RUN is a folder that `reproduce.py` wrote for an arm (`ARM-eval`), with an evaluation `sampled` and one
`greedy`. Counted are overall verdicts: how often the sampled one is the greedy one, and how often it is right
where the greedy one is wrong. Between two runs, in the order given: how many greedy verdicts changed, and how
many of these became right or wrong. Prints and appends one row a run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vrthinker.evals.world import load_scores
from vrthinker.records.provenance import append_row


def overall(run: Path) -> dict[str, tuple[int | None, int]]:
    """The overall verdict (None without one) and the label of every pair."""
    return {
        pair.id: (None if pair.prediction is None else pair.prediction["OA"], pair.label["OA"])
        for pair in load_scores(run)
    }


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sampled_beside_greedy.jsonl"))
    given = parser.parse_args()
    before: dict[str, tuple[int | None, int]] | None = None
    for run in given.runs:
        sampled, greedy = overall(run / "sampled"), overall(run / "greedy")
        if set(sampled) != set(greedy):
            raise SystemExit(f"{run}: its two evaluations are not of the same pairs")
        judged = json.loads((run / "greedy" / "run.json").read_text("utf-8"))
        wrong = [pair for pair, (verdict, label) in greedy.items() if verdict != label]
        row: dict[str, Any] = {
            "experiment": "sampled beside greedy",
            "run": f"{run.parent.parent.name}/{run.parent.name}/{run.name}",
            "weights": judged["weights"],
            "pairs": len(greedy),
            "sampled_is_greedy": sum(sampled[p][0] == greedy[p][0] for p in greedy) / len(greedy),
            "greedy_wrong": len(wrong),
            "sampled_right_where_greedy_is_wrong": sum(sampled[p][0] == sampled[p][1] for p in wrong),
        }
        if before is not None and set(before) == set(greedy):
            changed = [pair for pair in greedy if greedy[pair][0] != before[pair][0]]
            row["greedy_changed"] = {
                "verdicts": len(changed),
                "to_right": sum(greedy[pair][0] == greedy[pair][1] for pair in changed),
                "from_right": sum(before[pair][0] == before[pair][1] for pair in changed),
            }
        before = greedy
        append_row(given.out, row)
        print(row)  # noqa: T201 - what the script is for


if __name__ == "__main__":
    main()
