"""What the microbenchmarks share: equality before timing, timings, peak memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from vrthinker.kernels import measure as measure_module
from vrthinker.kernels.measure import COPY, Comparison, format_row, measure, peak_bytes

MEGABYTE = 1_000_000


def comparison(
    competitors: dict[str, Callable[[], object]], check: Callable[[], None] = lambda: None
) -> Comparison:
    return Comparison("op", "tiny", 4096, competitors, check, {"tokens": 7})


class Clock:
    """Stands in for `time`: looking at it takes time, and whoever works moves it on."""

    def __init__(self, look_seconds: float) -> None:
        self.now = 0.0
        self.look_seconds = look_seconds

    def perf_counter(self) -> float:
        self.now += self.look_seconds
        return self.now

    def work(self, *milliseconds: float) -> Callable[[], None]:
        """Takes so long, one duration after the other."""
        durations = itertools.cycle(milliseconds)

        def run() -> None:
            self.now += next(durations) / 1e3

        return run


def test_a_row_tells_apart_what_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1e-3)
    monkeypatch.setattr(measure_module, "time", clock)
    # Called once for the peak of memory, then twice to warm up and five times that count.
    competitors = {"reference": clock.work(20), "fast": clock.work(9, 9, 9, 2, 3, 4, 5, 6)}
    row = measure(comparison(competitors), "cpu", rounds=5, seed=3)
    timings = row["milliseconds"]
    assert list(timings) == ["reference", "fast", COPY]
    assert timings["reference"] == pytest.approx({"p20": 21.0, "p50": 21.0, "p80": 21.0})
    assert timings["fast"] == pytest.approx({"p20": 3.8, "p50": 5.0, "p80": 6.2})
    assert timings[COPY] == pytest.approx({"p20": 1.0, "p50": 1.0, "p80": 1.0})
    assert row["fraction_of_copy"] == {"reference": round(1 / 21, 4), "fast": 0.2}
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


def test_everything_is_called_in_turn_after_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "time", Clock(1e-6))
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
    assert len(calls) == 1 + 2 * (1 + 2 + 6 * 50)


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
    # Beside these sizes it does not matter that the system drops pages of libraries and reads them again.
    size = 100 * MEGABYTE
    there = torch.ones(size, dtype=torch.uint8)
    if peak_bytes(lambda: None, "cpu") is None:
        pytest.skip("this system does not tell the peak of resident memory")

    def peak_is_about(wanted: int, run: Callable[[], object]) -> bool:
        tries = (peak_bytes(run, "cpu") for _ in range(5))  # other threads take and give back memory too
        return any(peak is not None and abs(peak - wanted) < size // 8 for peak in tries)

    def small_blocks() -> list[torch.Tensor]:
        return [torch.ones(MEGABYTE // 10, dtype=torch.uint8) for _ in range(10 * size // MEGABYTE)]

    assert peak_is_about(0, lambda: None)
    assert peak_is_about(size, lambda: torch.ones(size, dtype=torch.uint8))
    # A temporary that is gone before the call ends counts too.
    assert peak_is_about(2 * size, lambda: torch.ones(2 * size, dtype=torch.uint8).max().item())
    assert peak_is_about(0, lambda: there.add_(1))
    # Free memory that the process keeps hides nothing. The last block stays, or all would be given back.
    last = small_blocks()[-1]
    assert peak_is_about(size, small_blocks)
    assert last.sum() == MEGABYTE // 10


@pytest.mark.gpu
def test_cuda_timings_count_the_device_and_peaks_its_allocator() -> None:
    values = torch.ones(64 * MEGABYTE, device="cuda")
    run = {"reference": lambda: values * 2, "twice": lambda: (values * 2, values * 3)}
    row = measure(comparison(run), "cuda", rounds=10, seed=0)
    assert 1.5 < row["milliseconds"]["twice"]["p50"] / row["milliseconds"]["reference"]["p50"] < 2.6
    assert row["peak_bytes"]["reference"] == pytest.approx(4 * 64 * MEGABYTE, rel=0.05)
    assert row["peak_bytes"]["twice"] == pytest.approx(2 * 4 * 64 * MEGABYTE, rel=0.05)
