"""What the microbenchmarks share: equality before timing, timings, peak memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import torch

from vrthinker.kernels.measure import COPY, Comparison, format_row, measure, peak_bytes

MEGABYTE = 1_000_000


def comparison(
    competitors: dict[str, Callable[[], object]], check: Callable[[], None] = lambda: None
) -> Comparison:
    return Comparison("op", "tiny", 4096, competitors, check, {"tokens": 7})


def test_a_row_tells_apart_what_takes_longer() -> None:
    row = measure(
        comparison({"reference": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.002)}),
        "cpu",
        rounds=5,
        seed=3,
    )
    timings = row["milliseconds"]
    assert list(timings) == ["reference", "fast", COPY]
    assert all(0 < timing["p20"] <= timing["p50"] <= timing["p80"] for timing in timings.values())
    assert timings["reference"]["p20"] >= 20
    assert 2 <= timings["fast"]["p20"] < 20
    assert row["fraction_of_copy"]["reference"] == pytest.approx(
        timings[COPY]["p50"] / timings["reference"]["p50"], abs=1e-4
    )
    assert {key: row[key] for key in ("benchmark", "case", "device", "rounds", "seed", "tokens")} == {
        "benchmark": "op",
        "case": "tiny",
        "device": "cpu",
        "rounds": 5,
        "seed": 3,
        "tokens": 7,
    }
    table = format_row(row)
    assert table.startswith("op: tiny (cpu")
    assert all(name in table for name in timings)


def test_everything_is_called_in_turn_after_the_check() -> None:
    calls: list[str] = []
    measure(
        comparison(
            {"reference": lambda: calls.append("a"), "fast": lambda: calls.append("b")},
            lambda: calls.append("check"),
        ),
        "cpu",
        rounds=6,
        seed=0,
    )
    # Once each for the peak of memory, then two rounds of warm-up and six that count; what is quick is called
    # several times a turn.
    assert calls[:7] == ["check", *"ababab"]
    turns = [name for name, _ in itertools.groupby(calls[1:])]
    assert "".join(turns) == "ab" * (1 + 2 + 6)
    assert len(calls) > 1 + 2 * (1 + 2 + 6 * 10)


def test_a_competitor_that_differs_is_never_timed() -> None:
    def differ() -> None:
        raise RuntimeError("fast differs from the reference")

    def run() -> None:
        raise AssertionError("it was timed")

    with pytest.raises(RuntimeError, match=r"^fast differs from the reference$"):
        measure(comparison({"reference": run, "fast": run}, differ), "cpu", rounds=5, seed=0)


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds: got 4, allowed: 5 or more"):
        measure(comparison({"reference": lambda: None}), "cpu", rounds=4, seed=0)


def test_peak_sees_what_a_call_allocates_and_nothing_that_was_there() -> None:
    there = torch.ones(60 * MEGABYTE, dtype=torch.uint8)
    # Free memory that the process keeps: many small blocks, which no system call gives back one by one.
    held = [torch.ones(MEGABYTE // 10, dtype=torch.uint8) for _ in range(1000)]
    del held[:-1]
    if (nothing := peak_bytes(lambda: None, "cpu")) is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert nothing < 2 * MEGABYTE
    kept = peak_bytes(lambda: torch.ones(40 * MEGABYTE, dtype=torch.uint8), "cpu")
    # A temporary that is gone before the call ends counts too.
    gone = peak_bytes(lambda: torch.ones(80 * MEGABYTE, dtype=torch.uint8).max().item(), "cpu")
    in_place = peak_bytes(lambda: there.add_(1), "cpu")
    assert kept is not None
    assert gone is not None
    assert in_place is not None
    assert 38 * MEGABYTE < kept < 50 * MEGABYTE
    assert 78 * MEGABYTE < gone < 95 * MEGABYTE
    assert in_place < 5 * MEGABYTE


@pytest.mark.gpu
def test_cuda_timings_count_the_device_and_peaks_its_allocator() -> None:
    values = torch.ones(64 * MEGABYTE, device="cuda")
    run = {"reference": lambda: values * 2, "twice": lambda: (values * 2, values * 3)}
    row = measure(comparison(run), "cuda", rounds=10, seed=0)
    assert 1.5 < row["milliseconds"]["twice"]["p50"] / row["milliseconds"]["reference"]["p50"] < 2.6
    assert row["peak_bytes"]["reference"] == pytest.approx(4 * 64 * MEGABYTE, rel=0.05)
    assert row["peak_bytes"]["twice"] == pytest.approx(2 * 4 * 64 * MEGABYTE, rel=0.05)
