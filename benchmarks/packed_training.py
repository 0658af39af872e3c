"""Packed against per-round forwards of a group: forward and backward, time, memory and FLOPs, side by side.

    python benchmarks/packed_training.py [--out benchmarks/results/packed_training_cpu.jsonl]

Competitors run over the same sampled tokens:

- `packed`: one forward over the group's prefix tree (under `rerender`, and under `evict`);
- `per round`: a forward of its own for every round, without padding (what a trainer of single rounds does);
- `padded`: all rounds of the group in one batch, padded to the longest.

Equality first: log-probabilities under `rerender` must agree, and so must the gradient's norm. FLOPs are
counted, not measured: matrix products of the text model, of the vision tower, and of attention over the pairs
of tokens that each competitor's mask lets through (`padded`: also what padding costs), forward and backward.
The bound on the speed-up is their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from midsize import Stage, make_midsize

from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.policy.batches import Batch, FrameLoader, collate
from vrthinker.policy.forward import learned_hidden
from vrthinker.policy.packed_attention import PackedAttention
from vrthinker.policy.packed_forward import packed_hidden
from vrthinker.policy.packing import Pack, pack_group
from vrthinker.policy.sequences import TrainingSequence, training_sequences
from vrthinker.records.provenance import append_row
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader

GROUP, ROUNDS, WINDOW = 8, 3, 1
NAMES = ("packed", "per round", "padded", "packed, evict")


class Setup:
    """The model, and the group in every form."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.policy = VisionLanguageModel(folder / "model", device=torch.device("cpu"), dtype=torch.float32)
        self.policy.model.requires_grad_(True).train()
        markup = Markup(self.policy.tokenizer, self.policy.vocabulary_size)
        stage = Stage(folder / "world", 1, seed)
        self.loader = FrameLoader(open_reader(), FrameCache(1 << 30))
        factor = (28, 28)
        how = {"size": GROUP, "rounds": ROUNDS, "window": WINDOW, "seed": seed}
        rerender = stage.group(markup, memory="rerender", **how)
        evict = stage.group(markup, memory="evict", **how)
        (self.pack,) = pack_group(rerender, markup, factor)
        (self.evicting,) = pack_group(evict, markup, factor)
        sequences = [one for t in rerender for one in training_sequences(t, markup, factor)]
        self.rounds = [piece for one in sequences for piece in _by_round(one)]
        self.single = [collate([one], self.loader.load) for one in self.rounds]
        self.padded = collate(self.rounds, self.loader.load)

    def runs(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Forward and backward of each competitor; each returns the summed log-probability."""
        return {
            "packed": lambda: self._backward(self._packed(self.pack)),
            "per round": self._per_round,
            "padded": lambda: self._backward(self._batched(self.padded)),
            "packed, evict": lambda: self._backward(self._packed(self.evicting)),
        }

    def _packed(self, pack: Pack) -> torch.Tensor:
        hidden = packed_hidden(self.policy, pack, self.loader.load)
        shown = torch.from_numpy(np.concatenate(pack.sampled))
        return self._logprobs(hidden, torch.from_numpy(pack.labels))[shown]

    def _batched(self, batch: Batch) -> torch.Tensor:
        return self._logprobs(*learned_hidden(self.policy, batch))

    def _per_round(self) -> torch.Tensor:
        self.policy.model.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for batch in self.single:
            logprob = self._batched(batch).sum()
            logprob.backward()  # type: ignore[no-untyped-call]
            total += logprob.detach()
        return total

    def _backward(self, logprobs: torch.Tensor) -> torch.Tensor:
        self.policy.model.zero_grad(set_to_none=True)
        logprobs.sum().backward()  # type: ignore[no-untyped-call]
        return logprobs.detach().sum()

    def _logprobs(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.policy.model.lm_head(hidden)
        return -torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def gradient_norm(self) -> float:
        """Of all parameters."""
        norms = [p.grad.norm() for p in self.policy.model.parameters() if p.grad is not None]
        return float(torch.stack(norms).norm())

    # FLOPs

    def flops(self) -> dict[str, dict[str, float]]:
        """Counted, in 1e9: linear layers, attention, vision tower."""
        lengths = [len(one) for one in self.rounds]
        longest = max(lengths)
        causal = [n * (n + 1) // 2 for n in lengths]
        frames = [len({key for _, key in one.frames}) for one in self.rounds]
        plan = PackedAttention(self.pack, torch.device("cpu"))
        evicting = PackedAttention(self.evicting, torch.device("cpu"))
        learned = sum(int(one.loss_mask.sum()) for one in self.rounds)
        padded = len(lengths) * longest, len(lengths) * longest * (longest + 1) // 2
        return {
            "packed": self._flops(
                self.pack.n_tokens, plan.n_scores, len(self.pack.frames), len(self.pack.labels)
            ),
            "per round": self._flops(sum(lengths), sum(causal), sum(frames), learned),
            "padded": self._flops(*padded, len(self.padded.frames), learned),
            "packed, evict": self._flops(
                self.evicting.n_tokens,
                evicting.n_scores,
                len(self.evicting.frames),
                len(self.evicting.labels),
            ),
        }

    def _flops(self, tokens: int, scores: int, frames: int, learned: int) -> dict[str, float]:
        model = self.policy.model
        layers = model.model.language_model.layers
        text = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
        head = model.lm_head.weight.numel()
        config = model.config.text_config
        attention = config.num_hidden_layers * config.hidden_size
        tower = model.model.visual
        patches = 256
        vision = sum(
            p.numel() for name, p in tower.named_parameters() if p.ndim == 2 and "merger" not in name
        )
        merger = sum(p.numel() for p in tower.merger.parameters() if p.ndim == 2)
        windows = [n in model.config.vision_config.fullatt_block_indexes for n in range(len(tower.blocks))]
        window = (model.config.vision_config.window_size // 14) ** 2
        seen = sum(patches * (patches if full else window) for full in windows)
        vision_hidden = model.config.vision_config.hidden_size
        # Forward 1, backward 2 per product of a linear layer; attention has 2 forward and 5 backward.
        linear = 6.0 * (tokens * text + learned * head)
        # The patch embedding is a convolution whose input takes no gradient.
        patch = tower.patch_embed.proj.weight.numel()
        products = 6.0 * (patches * vision + patches / 4 * merger) + 4.0 * patches * patch
        encoder = frames * (products + 14.0 * vision_hidden * seen)
        found = {"linear": linear, "attention": 14.0 * attention * scores, "encoder": encoder}
        return {name: value / 1e9 for name, value in found.items()}


def _by_round(sequence: TrainingSequence) -> list[TrainingSequence]:
    """A sequence whose rounds share a context, as one sequence per round."""
    edges = np.flatnonzero(np.diff(np.concatenate([sequence.loss_mask, [False]]).astype(int)) == -1) + 1
    found = []
    for begin, end in itertools.pairwise([0, *edges.tolist()]):
        mask = sequence.loss_mask[:end].copy()
        mask[:begin] = False
        frames = tuple(frame for frame in sequence.frames if frame[0] < end)
        found.append(
            TrainingSequence(sequence.id, sequence.token_ids[:end], sequence.positions[:, :end], mask, frames)
        )
    return found


def _peak(folder: str, seed: int, threads: int, name: str, queue: Any) -> None:
    """Resident memory that one call takes on top of what was there, in a process of its own."""
    torch.set_num_threads(threads)
    setup = Setup(Path(folder), seed)
    run = setup.runs()[name]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    run()
    queue.put(_resident("VmHWM") - before)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each competitor")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_midsize(folder / "model", given.seed % 1000)
        setup = Setup(folder, given.seed)
        runs = setup.runs()
        sums, norms = {}, {}
        for competitor, run in runs.items():
            sums[competitor] = float(run())
            norms[competitor] = setup.gradient_norm()
        for competitor in ("per round", "padded"):
            for found, wanted in ((sums[competitor], sums["packed"]), (norms[competitor], norms["packed"])):
                if abs(found - wanted) > 1e-4 * abs(wanted):
                    raise SystemExit(f"{competitor} differs from packed: {found} and {wanted}")
        times: dict[str, list[float]] = {competitor: [] for competitor in runs}
        for _ in range(given.rounds):
            for competitor, run in runs.items():
                start = time.perf_counter()
                run()
                times[competitor].append(time.perf_counter() - start)
        context = multiprocessing.get_context("spawn")
        peaks = {}
        for competitor in NAMES:
            queue: Any = context.Queue()
            about = (name, given.seed, given.threads, competitor, queue)
            process = context.Process(target=_peak, args=about)
            process.start()
            process.join(timeout=600)
            if process.exitcode != 0:
                raise SystemExit(f"{competitor}: its process ended with {process.exitcode}")
            peaks[competitor] = queue.get(timeout=10)
        flops = setup.flops()
    seconds = {competitor: statistics.median(values) for competitor, values in times.items()}
    totals = {competitor: sum(parts.values()) for competitor, parts in flops.items()}
    bounds = {c: totals[c] / totals["packed"] for c in ("per round", "padded")}
    # By round, so that a slow moment of the machine hits both sides of a ratio.
    gains = {
        c: statistics.median(b / a for a, b in zip(times["packed"], times[c], strict=True)) for c in bounds
    }
    row = {
        "benchmark": "packed training",
        "group": {"episodes": GROUP, "rounds": ROUNDS, "window": WINDOW},
        "model": "random Qwen2.5-VL, 6 layers of 384",
        "tokens": {
            "packed": setup.pack.n_tokens,
            "packed, evict": setup.evicting.n_tokens,
            "per round": sum(len(one) for one in setup.rounds),
            "padded": len(setup.rounds) * max(len(one) for one in setup.rounds),
        },
        "gflop": {c: {name: round(v, 2) for name, v in parts.items()} for c, parts in flops.items()},
        "seconds": {c: round(v, 4) for c, v in seconds.items()},
        "seconds_p20_p80": {
            c: [round(float(np.quantile(v, q)), 4) for q in (0.2, 0.8)] for c, v in times.items()
        },
        "speed_up_of_packed": {c: round(v, 3) for c, v in gains.items()},
        "flop_ratio": {c: round(v, 3) for c, v in bounds.items()},
        "share_of_flop_ratio": {c: round(gains[c] / bounds[c], 3) for c in bounds},
        "peak_bytes": peaks,
        "threads": given.threads,
        "seed": given.seed,
    }
    for key, value in row.items():
        print(f"{key}: {value}")  # noqa: T201 - a script's result
    if given.out is not None:
        append_row(given.out, row)


if __name__ == "__main__":
    main()
