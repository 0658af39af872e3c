"""The shared code of the microbenchmarks: competitors are checked for equal results, then timed in one run.

An op's `bench.py` gives comparisons, each of which is one case with fresh random data and its competitors.
Before anything is timed, every competitor's result is compared with the reference's. Then they are timed in
turn, round after round, so that a slow moment of the machine affects all of them. A row has p20, p50 and p80,
the peak of additional memory, the bytes that have to move, and the speed as a fraction of torch's `copy_` of
as many bytes (half read, half written, into memory that was touched before), measured in the same run.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vrthinker.errors import VRThinkerError
from vrthinker.progress import counted

COPY = "copy_"
_WARM_UP = 2
_LEAST_SECONDS = 1e-3
_MOST_CALLS = 50


@dataclass(frozen=True)
class Comparison:
    """One case of an op, ready to be timed.

    Attributes:
        op: The name of the op.
        case: The case in words that name its sizes.
        bytes_moved: The bytes that any version has to read plus those that it has to write.
        competitors: Name -> a function to time, each call of which does the whole job once. One is
            `reference`.
        facts: Further facts for the row, such as shapes and dtypes.
        check: A function that compares all competitors' results, and raises `RuntimeError` if one differs.
    """

    op: str
    case: str
    bytes_moved: int
    competitors: Mapping[str, Callable[[], object]]
    check: Callable[[], None]
    facts: Mapping[str, Any] = field(default_factory=dict)


Cases = Callable[[str, int], Iterator[Callable[[], Comparison]]]
"""An op's `comparisons(device, seed)`: it yields a function per case, which makes its data when called."""


def measure(comparison: Comparison, device: str, *, rounds: int, seed: int) -> dict[str, Any]:
    """Checks that all competitors agree, then times them.

    Args:
        comparison: The case to time.
        device: The device, `cpu` or `cuda`.
        rounds: The number of timings of each competitor, at least 5.
        seed: The seed that the data were made with, for the row.

    Returns:
        The result row, without provenance.

    Raises:
        RuntimeError: A result differs from the reference's.
    """
    if rounds < 5:
        raise ValueError(f"rounds: got {rounds}, allowed: 5 or more (percentiles need them)")
    comparison.check()
    source = torch.randint(0, 256, (max(1, comparison.bytes_moved // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    runs = {**comparison.competitors, COPY: lambda: target.copy_(source)}
    peaks = {name: peak_bytes(run, device) for name, run in comparison.competitors.items()}
    timings = _time(runs, device, rounds)
    copy = timings[COPY]["p50"]
    return {
        "benchmark": comparison.op,
        "case": comparison.case,
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "seed": seed,
        **comparison.facts,
        "bytes_moved": comparison.bytes_moved,
        "milliseconds": timings,
        "peak_bytes": peaks,
        "fraction_of_copy": {name: round(copy / timings[name]["p50"], 4) for name in comparison.competitors},
        "equal_to_reference": True,
    }


def measure_op(op: str, device: str, *, rounds: int, seed: int) -> Iterator[dict[str, Any]]:
    """Measures every case of an op's benchmark, and names each on stderr.

    Args:
        op: The name of a folder of `vrthinker.kernels` with a `bench.py`.
        device: The device, `cpu` or `cuda`.
        rounds: The number of timings of each competitor.
        seed: The seed of the random data.

    Yields:
        A row per case (see `measure`).

    Raises:
        VRThinkerError: A result differs from the reference's.
    """
    bench = importlib.import_module(f"vrthinker.kernels.{op}.bench")
    measured = False
    for make in bench.comparisons(device, seed):
        measured = True
        comparison = make()
        sys.stderr.write(f"{op}: {comparison.case}\n")
        try:
            yield measure(comparison, device, rounds=rounds, seed=seed)
        except RuntimeError as error:
            raise VRThinkerError(f"bench {op}: {comparison.case}, seed {seed}: {error}") from error
        del comparison
    if not measured:
        sys.stderr.write(f"{op}: nothing to measure on {device}; it has no version of its own there\n")


def why_not_compiled(device: str) -> str | None:
    """The reason why `torch.compile` does not take part, for a row's facts; None if it does."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") is not None else "triton is not installed"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) is not None else f"no C++ compiler ({compiler})"


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """The peak of the memory that one call takes in addition; None if it is unknown.

    On a CPU this is resident memory. With glibc, free memory that the process still holds is returned to the
    system first. With other C libraries, reused memory is not counted.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated() - before)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        result = run()
        peak = _resident("VmHWM")
    except (OSError, ValueError):
        return None
    del result
    return max(0, peak - before)


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(key)


def _time(runs: Mapping[str, Callable[[], object]], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Times the competitors in turn, in milliseconds.

    On a CPU, a competitor that takes less than a millisecond is called several times a turn, and the turn's
    mean counts. A single call would mainly measure how cold the caches and the interpreter are after the
    previous turn.
    """
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, int] = {}
    most = 1 if device == "cuda" else _MOST_CALLS
    for turn in range(rounds + _WARM_UP):
        for name, run in runs.items():
            if turn < _WARM_UP:
                calls[name] = max(1, min(most, int(_LEAST_SECONDS / max(clock(run, 1), 1e-9))))
            else:
                seconds[name].append(clock(run, calls[name]))
    percentiles = {}
    for name, samples in seconds.items():
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        percentiles[name] = {
            "p20": round(cuts[1] * 1e3, 5),
            "p50": round(cuts[4] * 1e3, 5),
            "p80": round(cuts[7] * 1e3, 5),
        }
    return percentiles


def _cpu_seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    elapsed = time.perf_counter() - start
    del result
    return elapsed / calls


def _cuda_seconds(run: Callable[[], object], calls: int) -> float:
    """The time on the device, measured by events. Earlier work has ended, and queueing is not counted.

    A short spin before the first event lets the host queue all calls before the device starts.
    """
    make: Callable[..., torch.cuda.Event] = torch.cuda.Event
    start, end = make(enable_timing=True), make(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        result = run()
    end.record()
    torch.cuda.synchronize()
    del result
    return float(start.elapsed_time(end)) / 1e3 / calls


def format_row(row: Mapping[str, Any]) -> str:
    """A row as readable lines."""
    lines = [f"{row['benchmark']}: {row['case']} ({row['device']}, {counted(row['threads'], 'thread')})"]
    copy = row["milliseconds"][COPY]["p50"]
    lines.append(f"  {'':28} {'p20':>10} {'p50':>10} {'p80':>10} ms   of copy_   peak memory")
    for name, timing in row["milliseconds"].items():
        numbers = " ".join(f"{timing[key]:10.4f}" for key in ("p20", "p50", "p80"))
        peak = row["peak_bytes"].get(name)
        memory = "" if peak is None else f"{peak / 1e6:10.1f} MB"
        lines.append(f"  {name:28} {numbers}      {copy / timing['p50']:6.3f}   {memory}")
    return "\n".join(lines)
