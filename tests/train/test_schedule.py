"""The learning rate at its edges."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vrthinker.train.loop.schedule import LearningRate


def rates(rate: LearningRate, total: int) -> list[float]:
    return [rate.at(step, total) for step in range(total)]


def test_warm_up_is_linear_from_its_first_part_to_the_peak() -> None:
    found = rates(LearningRate(peak=4.0, warmup_ratio=0.4, shape="constant"), 10)
    assert found == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]


def test_linear_fall_would_end_at_the_step_after_the_last() -> None:
    assert rates(LearningRate(peak=1.0, warmup_ratio=0.2, shape="linear"), 5) == [1.0, 1.0, 0.75, 0.5, 0.25]
    found = rates(LearningRate(peak=1.0, warmup_ratio=0.0, shape="linear", final_ratio=0.5), 4)
    assert found == [1.0, 0.875, 0.75, 0.625]


def test_cosine_is_at_the_middle_half_way() -> None:
    rate = LearningRate(peak=2.0, warmup_ratio=0.2, final_ratio=0.1)
    assert rate.at(1, 10) == rate.at(2, 10) == 2.0
    assert rate.at(6, 10) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rate.at(9, 10) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 7 / 8)) / 2))


@pytest.mark.parametrize(
    ("ratio", "total", "steps"), [(0.07, 100, 7), (0.2, 38, 8), (1.0, 7, 7), (0.0, 7, 0)]
)
def test_warm_up_is_rounded_up_but_not_by_rounding_errors(ratio: float, total: int, steps: int) -> None:
    assert 0.07 * 100 > 7
    assert LearningRate(peak=1.0, warmup_ratio=ratio).warmup_steps(total) == steps


def test_a_run_of_one_step_is_at_the_peak() -> None:
    assert rates(LearningRate(peak=3.0), 1) == rates(LearningRate(peak=3.0, warmup_ratio=0.0), 1) == [3.0]


@given(
    total=st.integers(1, 400),
    ratio=st.floats(0, 1),
    final=st.floats(0, 1),
    shape=st.sampled_from(["cosine", "constant", "linear"]),
)
def test_rates_rise_to_the_peak_then_never_rise(total: int, ratio: float, final: float, shape: str) -> None:
    final = 0.0 if shape == "constant" else final
    rate = LearningRate.model_validate(
        {"peak": 1e-6, "warmup_ratio": ratio, "final_ratio": final, "shape": shape}
    )
    found = rates(rate, total)
    warmup = rate.warmup_steps(total)
    assert max(found) == 1e-6
    assert min(found) > 0
    assert all(a < b for a, b in pairwise(found[:warmup]))
    assert all(a >= b for a, b in pairwise(found[warmup:]))
    assert min([*found[warmup:], 1e-6]) >= 1e-6 * final * (1 - 1e-12)


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_steps_outside_the_run_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"got {step}, allowed: 0 to 9 "):
        LearningRate(peak=1.0).at(step, 10)


@pytest.mark.parametrize(
    "values",
    [
        {"peak": 0},
        {"peak": math.inf},
        {"warmup_ratio": 1.1},
        {"final_ratio": -0.1},
        {"shape": "step"},
        {"shape": "constant", "final_ratio": 0.5},
        {"a": 1},
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LearningRate.model_validate({"peak": 1.0, **values})
