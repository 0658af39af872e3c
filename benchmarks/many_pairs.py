"""A thousand pairs of clips of 4 seconds, judged in one run: waiting for pixels, and resident memory.

    python benchmarks/many_pairs.py [--pairs 1000] [--size 112] [--out FILE]

The clips are those of the synthetic world (easy: 32 frames at 8 frames a second), `--size` pixels wide and
high, and are written before the run. They are judged as `vrthinker judge --pairs` does it: a results file,
episodes, clips of later pairs opened ahead. The share of time in which every episode waited for pixels is the
run's own metric. Resident memory is read after each pair; the medians of the first and of the last hundred
pairs are compared, and those of every hundred are listed: a leak grows to the end, a cache until it is full.
The caches of decoded and of encoded frames are smaller than those of the command (they have room for some 50
pairs), so that they are full early and later growth is none of theirs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from vrthinker.data.pairs import load_pairs
from vrthinker.judge import Judge
from vrthinker.judge_file import judge_file, run_configuration
from vrthinker.records.provenance import append_row
from vrthinker.records.verdict_log import VerdictLog, VerdictRecord
from vrthinker.world.files import PAIRS_FILE, make_world
from vrthinker.world.world import PRESETS

ENDS = 100
"""The pairs at each end of the run whose memory is compared."""
FRAME_BYTES = 3 * 56 * 56
"""What a frame takes as nano sees it."""
FRAME_FEATURE_BYTES = 4 * 128 * 4
"""What nano's features of a frame take: 4 tokens of 128 floats."""


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--size", type=int, default=112, help="width and height of the clips in pixels")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the clips")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/many_pairs_cpu.jsonl"))
    given = parser.parse_args()
    if given.pairs < 2 * ENDS:
        parser.error(f"--pairs: got {given.pairs}, allowed: at least {2 * ENDS}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = PRESETS["easy"].model_copy(update={"size": given.size})
        make_world(folder / "world", config, pairs=given.pairs, seed=given.seed)
        pairs = load_pairs(folder / "world" / PAIRS_FILE)
        resident: list[int] = []
        failed = 0
        cache_bytes = 50 * 16 * FRAME_BYTES
        feature_bytes = 50 * 16 * FRAME_FEATURE_BYTES

        def note(record: VerdictRecord) -> None:
            nonlocal failed
            failed += record.judgment is None
            resident.append(resident_bytes())

        loaded = Judge.from_pretrained(
            given.model,
            batch_size=given.batch_size,
            engine_options={"feature_cache_bytes": feature_bytes},
        )
        with Judge(
            loaded.engine, loaded.settings, templates=loaded.templates, frame_cache_bytes=cache_bytes
        ) as judge:
            run, ignored = run_configuration(judge, pairs_file=folder / "world" / PAIRS_FILE, seed=0)
            with VerdictLog(folder / "verdicts.jsonl", run, ignore=ignored) as log:
                started, cpu = time.monotonic(), time.process_time()
                judge_file(judge, pairs, log, trajectories=folder / "trajectories.jsonl", on_record=note)
                seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu
            metrics = judge.decode_metrics
        hundreds = [
            statistics.median(resident[at : at + ENDS]) for at in range(0, len(resident) - ENDS + 1, ENDS)
        ]
        first, last = hundreds[0], statistics.median(resident[-ENDS:])
        row = {
            "benchmark": "many pairs judged in one run",
            "model": given.model,
            "clips": f"{config.frames[0]} frames, {config.fps} a second, {given.size} x {given.size} pixels",
            "pairs": given.pairs,
            "batch_size": given.batch_size,
            "frame_cache_bytes": cache_bytes,
            "feature_cache_bytes": feature_bytes,
            "without_a_verdict": failed,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "pairs_per_second": round(given.pairs / seconds, 3),
            **{name: round(value, 4) for name, value in metrics.items()},
            "resident_bytes": {"first hundred": int(first), "last hundred": int(last), "most": max(resident)},
            "resident_bytes_by_hundred": [int(hundred) for hundred in hundreds],
            "last_to_first": round(last / first, 4),
            "seed": given.seed,
        }
        append_row(given.out, row)
        print(row)  # noqa: T201 - what the script is for


if __name__ == "__main__":
    main()
