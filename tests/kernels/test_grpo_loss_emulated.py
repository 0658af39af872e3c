"""The CUDA kernels of `grpo_loss` on a CPU: equal to the C++ version under every order, bugs caught."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from emulated import EMULATOR, FAULT, SANITIZER, WRONG, build, plant, run

DRIVER = EMULATOR / "grpo_loss_driver.cpp"
HEADER = "grpo_loss/grpo_loss_kernel.h"
SHARED = "grpo_loss/grpo_loss.h"


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DRIVER, tmp_path_factory.mktemp("right"))


@pytest.mark.parametrize("seeds", [8, pytest.param(48, marks=pytest.mark.slow)])
def test_equal_to_cpp_under_many_orders_and_wrong_offsets_stay_in_bounds(right: Path, seeds: int) -> None:
    first = random.randrange(10**6)
    done = run(right, seeds, first)
    assert done.returncode == 0, f"first seed {first}: {done.stdout}{done.stderr}"
    assert done.stdout == f"right under {seeds} seeds\n"


@pytest.mark.slow  # a compiler run per bug
@pytest.mark.parametrize(
    ("header", "find", "bug", "codes"),
    [
        pytest.param(
            HEADER,
            "    __syncthreads();\n    if (thread == 0) {\n        GrpoSums<float> tile{};",
            "    if (thread == 0) {\n        GrpoSums<float> tile{};",
            {WRONG},
            id="no barrier before the tile's sum",
        ),
        pytest.param(
            HEADER,
            "    __syncthreads();\n    if (!is_last) {",
            "    if (!is_last) {",
            {WRONG, FAULT},
            id="who is last is read too early",
        ),
        pytest.param(
            HEADER,
            "        __syncthreads();\n        if (thread == 0) {\n            std::int64_t learned",
            "        if (thread == 0) {\n            __syncthreads();\n            std::int64_t learned",
            {FAULT},
            id="divergent barrier",
        ),
        pytest.param(
            HEADER,
            "        __syncthreads();  // before the next episode's counts are written\n",
            "",
            {WRONG},
            id="no barrier before the next episode's counts",
        ),
        pytest.param(
            HEADER, "if (token >= in.tokens) {", "if (token > in.tokens) {", {SANITIZER}, id="a token too far"
        ),
        pytest.param(
            HEADER, "warp_sums[kWarps];", "warp_sums[kWarps - 1];", {SANITIZER}, id="shared memory too small"
        ),
        pytest.param(
            HEADER,
            "return offset < 0 ? 0 : (offset > tokens ? tokens : offset);",
            "return offset + 0 * tokens;",
            {SANITIZER},
            id="offsets believed",
        ),
        pytest.param(
            SHARED,
            "std::int64_t high = in.episodes - 1;",
            "std::int64_t high = in.episodes;",
            {SANITIZER},
            id="an episode too far",
        ),
        pytest.param(
            HEADER,
            "near ? exp_tail(d) * (d * d) : expm1 - d",
            "expm1 - d + 0.0F * static_cast<float>(near)",
            {WRONG},
            id="a KL of differences",
        ),
        pytest.param(
            SHARED,
            "is_finite(policy) & is_finite(old_policy) &",
            "is_finite(policy) &",
            {WRONG},
            id="an infinite ratio clipped away",
        ),
        pytest.param(
            HEADER, "        *workspace.ticket = 0;\n", "", {WRONG}, id="a ticket that does not start at 0"
        ),
    ],
)
def test_planted_bugs_are_caught(tmp_path: Path, header: str, find: str, bug: str, codes: set[int]) -> None:
    done = run(build(DRIVER, tmp_path, kernels=plant(header, find, bug, tmp_path)), 24, 1)
    assert done.returncode in codes, done.stdout + done.stderr
