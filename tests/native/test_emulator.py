"""The fiber emulator: right kernels pass under every order, and each kind of planted bug is caught."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulated import EMULATOR, FAULT, SANITIZER, WRONG, build, plant, run

SAMPLE = EMULATOR / "sample"
DRIVER = EMULATOR / "sample_driver.cpp"
HEADER = "sample/sample_kernel.h"

SUM_BARRIER = """    }
    __syncthreads();
    T total = 0;"""
SHUFFLE = "        sum += __shfl_down_sync(0xffffffffU, sum, distance);"


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DRIVER, tmp_path_factory.mktemp("right"), kernels=SAMPLE)


@pytest.mark.parametrize("kernel", ["sum", "shift"])
def test_right_kernels_pass_under_many_orders(right: Path, kernel: str) -> None:
    done = run(right, kernel, 200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "right under 200 seeds\n"


def test_intrinsics_do_what_cuda_says(tmp_path: Path) -> None:
    done = run(build(EMULATOR / "intrinsics_driver.cpp", tmp_path, kernels=SAMPLE))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow  # a compiler run per bug
@pytest.mark.parametrize(
    ("kernel", "find", "bug", "code", "message"),
    [
        pytest.param(
            "sum",
            SUM_BARRIER,
            SUM_BARRIER.replace("__syncthreads();", ""),
            WRONG,
            "wrong: sum",
            id="missing barrier",
        ),
        pytest.param(
            "shift",
            "        __syncthreads();",
            "",
            WRONG,
            "wrong: shift",
            id="overlap: read after another thread has written",
        ),
        pytest.param(
            "sum",
            "if (lane == 0) {",
            "if (lane == 0 && warp > 0) {",
            WRONG,
            "wrong: sum",
            id="shared memory read before it is written",
        ),
        pytest.param(
            "sum",
            "__shared__ T sums[kThreads / 32];",
            "__shared__ T sums[kThreads / 32 - 1];",
            SANITIZER,
            "global-buffer-overflow",
            id="shared memory out of range",
        ),
        pytest.param(
            "sum",
            "threadIdx.x); i < count;",
            "threadIdx.x); i <= count;",
            SANITIZER,
            "heap-buffer-overflow",
            id="global memory out of range",
        ),
        pytest.param(
            "sum",
            SUM_BARRIER,
            SUM_BARRIER.replace("__syncthreads();", "if (threadIdx.x < 96) { __syncthreads(); }"),
            FAULT,
            "divergent barrier",
            id="barrier that some threads pass by",
        ),
        pytest.param(
            "sum",
            SUM_BARRIER,
            SUM_BARRIER.replace(
                "__syncthreads();", "if (lane < 16) { __syncthreads(); } else { __syncthreads(); }"
            ),
            FAULT,
            "divergent barrier",
            id="barrier in both branches",
        ),
        pytest.param(
            "sum",
            SHUFFLE,
            SHUFFLE.replace("sum +=", "if (threadIdx.x != 37) sum +="),
            FAULT,
            "lanes that never all arrive",
            id="shuffle that one lane passes by",
        ),
        pytest.param(
            "sum",
            SHUFFLE,
            SHUFFLE.replace("0xffffffffU", "0x7fffffffU"),
            FAULT,
            "__shfl_down_sync: a lane that its own mask does not name",
            id="shuffle by a lane outside of the mask",
        ),
        pytest.param(
            "sum",
            SUM_BARRIER,
            SUM_BARRIER.replace(
                "__syncthreads();", "if (warp == 0) { __syncwarp(0x1U << lane); } else { __syncthreads(); }"
            ),
            FAULT,
            "divergent barrier",
            id="__syncwarp in place of a barrier",
        ),
    ],
)
def test_planted_bugs_are_caught(
    tmp_path: Path, kernel: str, find: str, bug: str, code: int, message: str
) -> None:
    done = run(
        build(DRIVER, tmp_path, kernels=plant(HEADER, find, bug, tmp_path, kernels=SAMPLE)), kernel, 50
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stdout + done.stderr


def test_a_stuck_block_says_who_waits_where(tmp_path: Path) -> None:
    bug = SUM_BARRIER.replace("__syncthreads();", "if (warp == 3) { return; } __syncthreads();")
    program = build(DRIVER, tmp_path, kernels=plant(HEADER, SUM_BARRIER, bug, tmp_path, kernels=SAMPLE))
    done = run(program, "sum", 1)
    assert done.returncode == FAULT
    line = (SAMPLE / HEADER).read_text().split("__syncthreads();")[0].count("\n") + 1
    assert "emulator: __syncthreads: divergent barrier: block (" in done.stderr
    assert "96 wait in __syncthreads" in done.stderr
    assert f"sample_kernel.h:{line}, void vrthinker::block_sum_kernel(" in done.stderr
    assert "32 have returned" in done.stderr


@pytest.mark.parametrize(("find", "count"), [("__asyncthreads", 0), ("threadIdx.x", 5)])
def test_a_bug_that_cannot_be_planted_in_one_place_fails_the_test(
    tmp_path: Path, find: str, count: int
) -> None:
    with pytest.raises(AssertionError, match=f"stands there {count} times, wanted exactly once"):
        plant(HEADER, find, "", tmp_path, kernels=SAMPLE)
    assert not list(tmp_path.iterdir())
