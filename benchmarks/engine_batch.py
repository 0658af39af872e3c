"""How much faster 64 sessions together are than one by one, on the `hf` engine with a tiny checkpoint.

Equality first: both ways must write the same greedy texts, or the run stops. Then both are timed in turn,
several times, on the same contexts (fresh random frames and captions for every repeat), and the ratio of
the two times of each repeat is reported with its spread. The ratio says what batching saves on this
machine for this model; it says nothing of the absolute speed of a real checkpoint.

    python benchmarks/engine_batch.py --out benchmarks/results/engine_batch_cpu.jsonl
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from vrthinker.engine.base import (
    FrameSegment,
    Message,
    RoundLimits,
    RoundRequest,
    Session,
    TextSegment,
    write_rounds,
)
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.hf.tiny import make_tiny
from vrthinker.records.provenance import append_row
from vrthinker.visibility import ShownFrame, VisibilityRecord, WindowMemory

SESSIONS = 64
ROUNDS = 2
TOKENS = 48
FIRST_FRAMES, MORE_FRAMES = 8, 4


def message(label: str, outcome: int, count: int, factor: int, rng: np.random.Generator) -> Message:
    """A turn with `count` random frames of 2x2 to 4x4 merged patches."""
    segments: list[TextSegment | FrameSegment] = [TextSegment(f"{label} {rng.integers(1 << 30)}: ")]
    for number in range(1, count + 1):
        size = (factor * int(rng.integers(2, 5)), factor * int(rng.integers(2, 5)))
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        key = (f"clip-{rng.integers(1 << 60)}", number, *size)
        segments.append(FrameSegment(ShownFrame(outcome, number), key, size, lambda pixels=pixels: pixels))
    return Message("user", tuple(segments))


def conversations(seed: int, factor: int) -> list[list[Message]]:
    """What is said to each session: the first input, then one outcome per later round."""
    rng = np.random.default_rng(seed)
    return [
        [message("caption", 0, FIRST_FRAMES, factor, rng)]
        + [message("outcome", k, MORE_FRAMES, factor, rng) for k in range(1, ROUNDS)]
        for _ in range(SESSIONS)
    ]


def judge(engine: HFEngine, talks: list[list[Message]]) -> list[list[str]]:
    """Writes every session's rounds, `engine.max_sessions` sessions at a time; returns the texts."""
    texts: list[list[str]] = []
    for start in range(0, len(talks), engine.max_sessions):
        part = talks[start : start + engine.max_sessions]
        sessions: list[Session] = [engine.open(talk[:1]) for talk in part]
        records = [VisibilityRecord(WindowMemory(1)) for _ in part]
        written: list[list[str]] = [[] for _ in part]
        for number in range(ROUNDS):
            requests = []
            for session, talk, record in zip(sessions, part, records, strict=True):
                record.show(number, [frame.shown.frame_number for frame in talk[number].frames])
                new = (talk[number],) if number else ()
                requests.append(RoundRequest(session, new, record.enter().expired, RoundLimits(TOKENS)))
            for result, text in zip(write_rounds(engine, requests), written, strict=True):
                text.append(result.text)
        for session in sessions:
            engine.close(session)
        texts += written
    return texts


def main() -> None:
    """Runs the benchmark; `--out` appends a row per model family."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSONL file to append the rows to")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    options = parser.parse_args()
    for family in ("qwen2.5-vl", "qwen3-vl"):
        with tempfile.TemporaryDirectory() as folder:
            model = make_tiny(Path(folder) / "tiny", family)
            together = HFEngine(model, device=options.device, dtype="float32", max_sessions=SESSIONS)
            alone = HFEngine(model, device=options.device, dtype="float32", max_sessions=1)
        factor = together.model.patch_size * together.model.merge_size
        ratios, seconds_together, seconds_alone = [], [], []
        for repeat in range(options.repeats + 1):
            talks = conversations(options.seed + repeat, factor)
            begun = time.perf_counter()
            batched = judge(together, talks)
            between = time.perf_counter()
            single = judge(alone, talks)
            ended = time.perf_counter()
            if batched != single:
                raise SystemExit(
                    f"{family}, seed {options.seed + repeat}: the texts differ; nothing is reported"
                )
            if repeat:  # the first one warms up
                seconds_together.append(between - begun)
                seconds_alone.append(ended - between)
                ratios.append(seconds_alone[-1] / seconds_together[-1])
        low, middle, high = (
            statistics.quantiles(ratios, n=5)[0],
            statistics.median(ratios),
            statistics.quantiles(ratios, n=5)[3],
        )
        row = {
            "benchmark": "engine_batch",
            "model": f"tiny random {family}, float32",
            "device": options.device,
            "sessions": SESSIONS,
            "rounds": ROUNDS,
            "tokens_per_round": TOKENS,
            "frames": FIRST_FRAMES + MORE_FRAMES * (ROUNDS - 1),
            "texts_equal": True,
            "repeats": options.repeats,
            "threads": torch.get_num_threads(),
            "seed": options.seed,
            "speedup": {"p20": round(low, 2), "p50": round(middle, 2), "p80": round(high, 2)},
            "seconds_together_p50": round(statistics.median(seconds_together), 3),
            "seconds_alone_p50": round(statistics.median(seconds_alone), 3),
        }
        spread = f"p20 {low:.1f}, p80 {high:.1f}"
        sys.stdout.write(
            f"{family}: {SESSIONS} together are {middle:.1f}x faster than one by one ({spread})\n"
        )
        if options.out is not None:
            append_row(options.out, row)


if __name__ == "__main__":
    main()
