"""Microbenchmark of `patchify`: the versions side by side, in one run, on the same fresh random frames.

Equality comes first: a version that differs from the reference (or the Hugging Face processor, where it
takes part) stops the run. Then every version is timed in turn, round after round, so that a slow moment
of the machine hits all of them, and p20, p50 and p80 are reported. Each call allocates its output, as the
engine's calls do. The yardstick is torch's `copy_` of as many bytes as `patchify` moves (half read, half
written) into fresh memory, and into memory that was touched before.

    python -m vrthinker.kernels.patchify.bench --out benchmarks/results/patchify_cpu.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vrthinker import provenance
from vrthinker.kernels import ENVIRONMENT_VARIABLE
from vrthinker.kernels.patchify.op import patchify
from vrthinker.kernels.patchify.reference import patchify_reference

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Case:
    """One size to measure: a model's patch layout, and how many frames of which size."""

    name: str
    frames: int
    height: int
    width: int
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    merge_size: int = 2
    temporal_patch_size: int = 2

    @property
    def layout(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        return {
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "temporal_patch_size": self.temporal_patch_size,
            "mean": self.mean,
            "std": self.std,
        }


CASES = (
    Case("qwen2.5-vl, 8 frames of 448x784", 8, 448, 784, 14, CLIP_MEAN, CLIP_STD),
    Case("qwen3-vl, 8 frames of 448x768", 8, 448, 768, 16, (0.5,) * 3, (0.5,) * 3),
    Case("qwen2.5-vl, 8 frames of 112x112", 8, 112, 112, 14, CLIP_MEAN, CLIP_STD),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints a table, appends one row per case and thread count to `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", help="JSONL file to append the rows to; none are written without it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU thread counts")
    parser.add_argument("--rounds", type=int, default=25, help="timings of each version")
    parser.add_argument("--seed", type=int, default=None, help="of the random frames; the clock by default")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if options.rounds < 5:
        parser.error(f"--rounds: got {options.rounds}, allowed: 5 or more (percentiles need them)")
    seed = time.time_ns() % 2**31 if options.seed is None else options.seed
    thread_counts = options.threads if options.device == "cpu" else [torch.get_num_threads()]
    for case in CASES:
        for threads in thread_counts:
            row = measure(case, options.device, threads, options.rounds, seed)
            _print_row(row)
            if options.out:
                provenance.append_row(options.out, row)
    return 0


def measure(case: Case, device: str, threads: int, rounds: int, seed: int) -> dict[str, Any]:
    """Checks equality, then times every version of one case.

    Returns:
        The result row: milliseconds by version and percentile, bytes moved, gigabytes per second, and
        the speed as a fraction of `copy_`'s (above 1 is faster than copying).

    Raises:
        RuntimeError: A version's result differs from the reference's.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    shape = (case.frames, case.height, case.width, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    expected = patchify_reference(frames, **case.layout)
    versions = _versions(case, frames)
    for name, run in versions.items():
        if not torch.equal(run(), expected):
            raise RuntimeError(f"patchify: {name} differs from the reference at {case.name}, seed {seed}")

    bytes_moved = frames.nbytes + expected.nbytes
    source = torch.randint(0, 256, (bytes_moved // 2,), dtype=torch.uint8, device=device)
    touched = torch.empty_like(source).copy_(source)
    runs: dict[str, Callable[[], object]] = {
        **versions,
        "copy_": lambda: torch.empty_like(source).copy_(source),
        "copy_ (memory touched before)": lambda: touched.copy_(source),
    }
    del expected
    timings = _time(runs, device, rounds)
    copy_p50 = timings["copy_"]["p50"]
    return {
        "benchmark": "patchify",
        "case": case.name,
        "device": device,
        "threads": threads,
        "rounds": rounds,
        "seed": seed,
        "out_dtype": "float32",
        "bytes_moved": bytes_moved,
        "milliseconds": timings,
        "gigabytes_per_second": {k: round(bytes_moved / t["p50"] / 1e6, 2) for k, t in timings.items()},
        "fraction_of_copy": {k: round(copy_p50 / timings[k]["p50"], 3) for k in versions},
        "equal_to_reference": True,
    }


def _versions(case: Case, frames: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """What is compared: the reference, the op's native version, and on a CPU the HF processor's code."""
    native = "cpp" if frames.device.type == "cpu" else "cuda"
    versions: dict[str, Callable[[], torch.Tensor]] = {
        "reference": lambda: patchify_reference(frames, **case.layout),
        native: lambda: patchify(frames, **case.layout),
    }
    if frames.device.type == "cpu":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        processor = Qwen2VLImageProcessorPil(
            do_resize=False,
            patch_size=case.patch_size,
            merge_size=case.merge_size,
            temporal_patch_size=case.temporal_patch_size,
            image_mean=list(case.mean),
            image_std=list(case.std),
        )
        images = list(frames.numpy())

        def run_processor() -> torch.Tensor:
            result: torch.Tensor = processor(images, return_tensors="pt")["pixel_values"]
            return result

        versions["transformers"] = run_processor
    return versions


def _time(runs: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, interleaved; two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = run()
            if device == "cuda":
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            del result
            if turn >= 2:
                seconds[name].append(elapsed)
    percentiles = {}
    for name, samples in seconds.items():
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        percentiles[name] = {
            "p20": round(cuts[1] * 1e3, 4),
            "p50": round(cuts[4] * 1e3, 4),
            "p80": round(cuts[7] * 1e3, 4),
        }
    return percentiles


def _print_row(row: dict[str, Any]) -> None:
    lines = [f"{row['case']}, {row['device']}, {row['threads']} threads: milliseconds (p20 p50 p80), GB/s"]
    for name, timing in row["milliseconds"].items():
        numbers = " ".join(f"{timing[key]:9.3f}" for key in ("p20", "p50", "p80"))
        fraction = row["fraction_of_copy"].get(name)
        against = "" if fraction is None else f"  {fraction:.2f}x the speed of copy_"
        lines.append(f"  {name:30s}{numbers} {row['gigabytes_per_second'][name]:8.1f}{against}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    import os

    if os.environ.get(ENVIRONMENT_VARIABLE, "auto") not in ("", "auto"):
        sys.stderr.write(f"bench: {ENVIRONMENT_VARIABLE} is set; unset it to compare the versions\n")
        raise SystemExit(2)
    raise SystemExit(main())
