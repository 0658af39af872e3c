"""The CUDA kernel of `group_advantage` on a CPU: the C++ version's bits under every order, bugs caught."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulated import EMULATOR, FAULT, SANITIZER, WRONG, build, plant, run

DRIVER = EMULATOR / "group_advantage_driver.cpp"
HEADER = "group_advantage/group_advantage_kernel.h"


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DRIVER, tmp_path_factory.mktemp("right"))


# A seed in five is each method's.
@pytest.mark.parametrize("seeds", [5, pytest.param(32, marks=pytest.mark.slow)])
def test_same_bits_as_cpp_and_bad_values_stay_in_bounds(right: Path, seeds: int) -> None:
    done = run(right, seeds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"right under {seeds} seeds\n"


@pytest.mark.slow  # a compiler run per bug
@pytest.mark.parametrize(
    ("find", "bug", "codes"),
    [
        pytest.param(
            "    }\n    __syncthreads();\n    mine = shared",
            "    }\n    mine = shared",
            {WRONG, FAULT},  # threads that saw another sum also take another branch
            id="no barrier",
        ),
        pytest.param(
            "    __syncthreads();  // before the next fold writes\n", "", {WRONG}, id="overlap of two folds"
        ),
        pytest.param(
            "if (lane == 0) {", "if (lane == 0 && warp > 0) {", {WRONG, FAULT}, id="a warp's sum is missing"
        ),
        pytest.param(
            "group < task.groups; group += kLanes",
            "group <= task.groups; group += kLanes",
            {SANITIZER},
            id="a group too far",
        ),
        pytest.param("if (blockIdx.x == 0) {", "if (threadIdx.x == 0) {", {FAULT}, id="divergent barrier"),
        pytest.param("tallies[kWarps];", "tallies[kWarps - 1];", {SANITIZER}, id="shared memory too small"),
        pytest.param(
            "if (last + lane < range.end)", "if (last + lane <= range.end)", {WRONG}, id="a token too far"
        ),
        pytest.param("(kWidth - place % kWidth) % kWidth", "0", {SANITIZER}, id="unaligned vector store"),
        pytest.param(
            "clamped_range(task.group_offsets, part, task.episodes)",
            "Range{task.group_offsets[part], task.group_offsets[part + 1]}",
            {SANITIZER},
            id="offsets believed",
        ),
    ],
)
def test_planted_bugs_are_caught(tmp_path: Path, find: str, bug: str, codes: set[int]) -> None:
    done = run(build(DRIVER, tmp_path, kernels=plant(HEADER, find, bug, tmp_path)), 24)
    assert done.returncode in codes, done.stdout + done.stderr
