"""Appends a result row about a finished nano training run: how long it took from nothing, and its loss.

    python benchmarks/nano_training.py RUN [--out benchmarks/results/nano_training.jsonl]

Wall time runs from the moment the run wrote its provenance, before it made any data, to the moment its
trained weights were written. Runs that were resumed are refused: their wall time means nothing.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.records.provenance import append_row

_LONGEST_STEP_SECONDS = 120.0
_KEPT = ("date", "command", "commit", "dirty", "machine", "versions")


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nano_training.jsonl"))
    given = parser.parse_args()
    config = json.loads((given.run / "config.json").read_text())
    trained_from = json.loads((given.run / "provenance.json").read_text())
    started = datetime.fromisoformat(trained_from["date"]).timestamp()
    ended = (given.run / "model" / "model.safetensors").stat().st_mtime
    lines = read_metrics(given.run / METRICS_FILE)
    times = [line["time_seconds"] for line in lines]
    gaps = [after - before for before, after in pairwise(times)]
    if max(gaps) > _LONGEST_STEP_SECONDS:
        raise SystemExit(f"{given.run}: was interrupted for {max(gaps):.0f} s; its wall time means nothing")
    row = {
        "training": "nano, from random weights",
        "seed": config["seed"],
        "steps": lines[-1]["step"],
        "wall_minutes": round((ended - started) / 60, 2),
        "of_which_before_the_first_step_minutes": round((times[0] - started) / 60, 2),
        "last_50_steps_loss": round(fmean(line["loss/sft"] for line in lines[-50:]), 4),
        "tokens_per_second": round(fmean(line["perf/tokens_per_s"] for line in lines), 0),
        "trained": {key: trained_from[key] for key in _KEPT},
    }
    append_row(given.out, row)
    print(json.dumps(row, indent=2))  # noqa: T201 - a script's result


if __name__ == "__main__":
    main()
