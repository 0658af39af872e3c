"""Stage 1 and 2 on packs against padded batches: forward and backward over the same traces, side by side.

    python benchmarks/trace_packs.py [--difficulty hard] [--out benchmarks/results/trace_packs_cpu.jsonl]

The traces are the oracle's, of fresh worlds, with as many calls as the recipe `nano` has. Both sides learn
the same 8 traces in two forwards: of 4 traces each, or of half of the contexts each, sorted by length so that
padding is small. Equality first: the losses and the gradients must agree. Frames are decoded before the clock
starts. `bound_by_tokens` is the ratio of tokens; padding and attention are not in it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vrthinker.engine.hf.checkpoint import NANO_FOLDER
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import PROMPTS_FOLDER, load_judge_settings
from vrthinker.episode.trajectory import Trajectory
from vrthinker.policy.batches import FrameLoader, collate
from vrthinker.policy.forward import learned_hidden
from vrthinker.policy.losses import sft_loss_from_hidden
from vrthinker.policy.packing import pack_paths
from vrthinker.policy.sequences import learned_paths, training_sequences
from vrthinker.policy.trace_packs import PackedTraces, packed_sft_loss
from vrthinker.records.provenance import append_row
from vrthinker.train.trace_sources import WorldTraces
from vrthinker.train.world_traces import make_traces
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.world.world import PRESETS

TRACES, FORWARDS = 8, 2
CALLS = {"easy": 2, "medium": 3, "hard": 6}
TOLERANCE = 1e-4
_MOST_PAIRS = 64


class Setup:
    """The model, and the traces in both forms."""

    def __init__(self, folder: Path, difficulty: str, seed: int) -> None:
        self.policy = VisionLanguageModel(NANO_FOLDER, device=torch.device("cpu"), dtype=torch.float32)
        self.policy.model.requires_grad_(True).train()
        self.policy.model.model.visual.requires_grad_(False)
        markup = Markup(self.policy.tokenizer, self.policy.vocabulary_size)
        factor = (self.policy.patch_size * self.policy.merge_size,) * 2
        traces = self._traces(folder, difficulty, seed)
        loader = FrameLoader(open_reader(), FrameCache(1 << 30))
        own = [learned_paths(trace, markup, factor) for trace in traces]
        size = TRACES // FORWARDS
        packs = [pack for start in range(0, TRACES, size) for pack in pack_paths(own[start : start + size])]
        self.packs = [PackedTraces(pack, tuple(loader.load(pack.frames))) for pack in packs]
        rows = sorted((one for trace in traces for one in training_sequences(trace, markup, factor)), key=len)
        half = -(-len(rows) // FORWARDS)
        self.batches = [
            collate(rows[start : start + half], loader.load) for start in range(0, len(rows), half)
        ]
        loader.close()
        self.counts = {
            "contexts": len(rows),
            "tokens, packed": sum(one.n_tokens for one in self.packs),
            "tokens, padded": sum(map(len, rows)),
            "tokens, with padding": sum(batch.token_ids.numel() for batch in self.batches),
        }

    @staticmethod
    def _traces(folder: Path, difficulty: str, seed: int) -> Sequence[Trajectory]:
        settings = load_judge_settings(NANO_FOLDER)
        assert settings is not None
        values: dict[str, Any] = {
            "world": PRESETS[difficulty],
            "pairs": _MOST_PAIRS,
            "calls": CALLS[difficulty],
        }
        templates = PromptTemplates.load(NANO_FOLDER / PROMPTS_FOLDER)
        made = make_traces(WorldTraces(**values), folder, settings, templates, seed=seed, workers=1)
        if len(made.traces) < TRACES:
            raise SystemExit(f"{difficulty}: the oracle was right on {len(made.traces)} pairs; another seed")
        return made.traces[:TRACES]

    def runs(self) -> dict[str, Callable[[], float]]:
        """Forward and backward of each side; each returns the summed loss."""
        return {"packed": self._packed, "padded": self._padded}

    def _packed(self) -> float:
        return self._learn(
            [lambda one=one: packed_sft_loss(self.policy, one, freeze_vision=True)[0] for one in self.packs]
        )

    def _padded(self) -> float:
        def loss(batch: Any) -> torch.Tensor:
            hidden, labels = learned_hidden(self.policy, batch, freeze_vision=True)
            return sft_loss_from_hidden(hidden, self.policy.model.lm_head.weight, labels)[0]

        return self._learn([lambda batch=batch: loss(batch) for batch in self.batches])

    def _learn(self, losses: Sequence[Callable[[], torch.Tensor]]) -> float:
        self.policy.model.zero_grad(set_to_none=True)
        total = 0.0
        for compute in losses:
            loss = compute()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def gradient(self) -> torch.Tensor:
        """The gradient of all parameters."""
        return torch.cat([p.grad.flatten() for p in self.policy.model.parameters() if p.grad is not None])


def compare(difficulty: str, given: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as name:
        setup = Setup(Path(name), difficulty, given.seed)
    runs, losses, gradients = setup.runs(), {}, {}
    for side, run in runs.items():
        losses[side], gradients[side] = run(), setup.gradient()
    off = float((gradients["packed"] - gradients["padded"]).abs().max() / gradients["padded"].abs().max())
    if off > TOLERANCE or not np.isclose(losses["packed"], losses["padded"], rtol=TOLERANCE):
        raise SystemExit(f"{difficulty}: packs differ from padded batches: {losses}, gradients by {off}")
    times: dict[str, list[float]] = {side: [] for side in runs}
    for _ in range(given.rounds):
        for side, run in runs.items():
            start = time.perf_counter()
            run()
            times[side].append(time.perf_counter() - start)
    # By round, so that a slow moment of the machine hits both sides of a ratio.
    gains = [padded / packed for padded, packed in zip(times["padded"], times["packed"], strict=True)]
    return {
        "benchmark": "stage 1 and 2: packs of traces against padded batches",
        "model": "nano, frozen tower",
        "difficulty": difficulty,
        "calls": CALLS[difficulty],
        "traces": TRACES,
        "seed": given.seed,
        **setup.counts,
        "seconds": {side: statistics.median(values) for side, values in times.items()},
        "speed_up": statistics.median(gains),
        "speed_up_range": [min(gains), max(gains)],
        "bound_by_tokens": setup.counts["tokens, padded"] / setup.counts["tokens, packed"],
        "gradients_differ_by": off,
        "threads": given.threads,
    }


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--difficulty", nargs="+", choices=list(CALLS), default=list(CALLS))
    parser.add_argument("--rounds", type=int, default=5, help="timings of each side")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for difficulty in given.difficulty:
        row = compare(difficulty, given)
        print({key: row[key] for key in ("difficulty", "speed_up", "speed_up_range", "bound_by_tokens")})  # noqa: T201
        if given.out is not None:
            append_row(given.out, row)


if __name__ == "__main__":
    main()
