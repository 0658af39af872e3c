"""What it costs to look at an evaluation of 10,000 items: loading, summing up, comparing, drawing its page.

    python benchmarks/large_evaluation.py [--items 10000] [--out FILE]

Two judges that are no models (a coin, and whoever has the sharper picture) judge 10,000 labelled pairs of a
few clips of the synthetic world. Then `eval show`, `eval compare` and `eval page` run as a user would run
them, each in a process of its own, and each process's CPU seconds and peak memory are measured, imports
included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vrthinker.records.provenance import append_row

CLIPS = 16
PROMPTS = 500
DIMENSIONS = ("TA", "VQ", "MQ", "OA")
JUDGES = ("coin", "sharpness")
LIMITS = {"cpu_seconds": 20.0, "peak_bytes": 1e9}
"""What loading, comparing and rendering may cost together, and at most at a time."""


def measured(*arguments: object) -> dict[str, float]:
    """Runs a command of the package. Its wall and CPU seconds, and its peak memory in bytes."""
    command = [sys.executable, "-m", "vrthinker", *map(str, arguments)]
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"vrthinker {' '.join(command[3:])}: exit code {process.returncode}")
    return {
        "wall_seconds": round(time.monotonic() - begun, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def write_pairs(folder: Path, items: int, seed: int) -> Path:
    """Labelled pairs of a few clips. Prompts repeat, as in real sets, and some labels are missing."""
    measured("world", "make", "--out", folder / "world", "--pairs", CLIPS // 2, "--seed", seed)
    clips = sorted(str(path) for path in (folder / "world").rglob("*.mp4"))
    rng = random.Random(seed)
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(items):
            first, second = rng.sample(clips, 2)
            labels = {name: rng.choice((1, 2, 0)) for name in DIMENSIONS if rng.random() < 0.95}
            pair = {"id": f"item-{number}", "prompt": f"prompt {number % PROMPTS}"}
            pair |= {"video_1": first, "video_2": second, "labels": labels}
            file.write(json.dumps(pair) + "\n")
    return path


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSONL file to append the row to")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = write_pairs(folder, given.items, given.seed)
        costs: dict[str, dict[str, float]] = {}
        for judge in JUDGES:
            command = ("eval", "pairs", "--pairs", pairs, "--model", f"baseline:{judge}")
            costs[f"judge by {judge}"] = measured(*command, "--out", folder / judge)
        runs = [folder / judge for judge in JUDGES]
        looks = {
            "show": ("eval", "show", runs[0]),
            "compare": ("eval", "compare", *runs),
            "page": ("eval", "page", runs[0], "--out", folder / "page.html"),
        }
        costs |= {look: measured(*command) for look, command in looks.items()}
        page_bytes = (folder / "page.html").stat().st_size
    total = round(sum(costs[look]["cpu_seconds"] for look in looks), 2)
    peak = max(costs[look]["peak_bytes"] for look in looks)
    print(f"{given.items} items: {total} CPU seconds to show, compare and draw; {peak / 1e9:.2f} GB")  # noqa: T201
    if given.out is not None:
        row: dict[str, Any] = {
            "benchmark": "large_evaluation",
            "items": given.items,
            "seed": given.seed,
            "costs": costs,
            "show, compare and page": {"cpu_seconds": total, "peak_bytes": peak},
            "page_bytes": page_bytes,
        }
        append_row(given.out, row)
    if total > LIMITS["cpu_seconds"] or peak > LIMITS["peak_bytes"]:
        raise SystemExit(f"over what is allowed: {LIMITS}")


if __name__ == "__main__":
    main()
