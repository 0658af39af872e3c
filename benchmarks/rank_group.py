"""What a group costs: all pairs of a group of clips in one `Judge.rank`, against one call for each pair.

    python benchmarks/rank_group.py --out benchmarks/results/rank_group_cpu.jsonl

Both sides judge the same pairs, in the same order of clips, with the same seeds, by the same loaded model.
The texts of all rounds are compared first and have to be equal. The calls are what a loop over pairs does,
once by a judge whose caches a call leaves to the next (`calls`), and once with caches that are empty at each
call, as in a process of its own (`cold_calls`). Time is CPU seconds of the process. The sides take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vrthinker import Judge
from vrthinker.episode.episode import episode_seed
from vrthinker.ranking.comparisons import pair_name
from vrthinker.ranking.schedules import all_pairs
from vrthinker.records.provenance import append_row
from vrthinker.world.groups import sample_group, write_group
from vrthinker.world.world import PRESETS

SIDES = ("rank", "calls", "cold_calls")
Texts = dict[str, list[str]]


def main() -> None:
    """Measures, and appends a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--difficulty", choices=PRESETS, default="easy")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    group = sample_group(PRESETS[options.difficulty], 11, 0, options.clips)
    with (
        tempfile.TemporaryDirectory() as folder,
        Judge.from_pretrained(options.model, device="cpu", batch_size=options.batch_size) as judge,
    ):
        clips = write_group(Path(folder), group)
        pairs = next(all_pairs(len(clips), np.random.default_rng([0, len(clips)])))  # as `rank` draws them

        judge(group.caption, clips[0], clips[1])  # the first call of a process costs more than others

        def empty() -> None:
            judge._cache.clear()
            judge.engine.features.clear()  # type: ignore[attr-defined]

        def ranked() -> Texts:
            empty()
            comparisons = judge.rank(group.caption, clips).comparisons
            assert all(one.trajectory is not None for one in comparisons)
            return {
                one.name: [r.text for r in one.trajectory.rounds] for one in comparisons if one.trajectory
            }

        def called(cold: bool) -> Texts:
            empty()
            texts = {}
            for first, second in pairs:
                if cold:
                    empty()
                name = pair_name(first, second)
                verdict = judge(group.caption, clips[first], clips[second], seed=episode_seed(0, name))
                texts[name] = [record.text for record in verdict.trajectory.rounds]
            return texts

        sides: dict[str, Callable[[], Texts]] = {
            "rank": ranked,
            "calls": lambda: called(False),
            "cold_calls": lambda: called(True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in options.sides}
        expected: Texts | None = None
        for _ in range(options.repeats):
            for name in options.sides:
                run = sides[name]
                started = time.process_time()
                texts = run()
                seconds[name].append(time.process_time() - started)
                expected = texts if expected is None else expected
                if texts != expected:
                    raise SystemExit(f"{name}: other texts than the first side")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    row = {
        "benchmark": "rank_group",
        "model": options.model,
        "clips": options.clips,
        "pairs": len(pairs),
        "difficulty": options.difficulty,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "equal_texts": True,
        "cpu_seconds": {
            name: {"median": round(medians[name], 3), "all": [round(value, 3) for value in values]}
            for name, values in seconds.items()
        },
        **{
            f"rank_over_{name}": round(medians["rank"] / medians[name], 3)
            for name in options.sides
            if name != "rank"
        },
    }
    sys.stdout.write(json.dumps(row, indent=2) + "\n")
    if options.out is not None:
        append_row(options.out, row)


if __name__ == "__main__":
    main()
