"""The CUDA kernels of `evict`, run on the CPU under random thread orders; planted bugs are caught."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulated import EMULATOR, FAULT, SANITIZER, WRONG, build, plant, run

DRIVER = EMULATOR / "evict_driver.cpp"
HEADER = "evict/evict_kernel.h"
BARRIER = "        __syncthreads();\n"


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DRIVER, tmp_path_factory.mktemp("right"))


@pytest.mark.parametrize("seeds", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kernels_equal_the_cpp_version_under_many_orders(right: Path, seeds: int) -> None:
    done = run(right, seeds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"right under {seeds} seeds\n"


@pytest.mark.slow  # a compiler run per bug
@pytest.mark.parametrize(
    ("find", "bug", "code", "message"),
    [
        pytest.param(BARRIER, "", WRONG, "wrong: seed ", id="missing barrier"),
        pytest.param(
            BARRIER,
            BARRIER.replace("__syncthreads();", "if (!share.idle) { __syncthreads(); }"),
            FAULT,
            "divergent barrier",
            id="divergent barrier",
        ),
        pytest.param(
            ": header.out_tokens;",
            ": header.out_tokens + 1;",
            SANITIZER,
            "heap-buffer-overflow",
            id="one row too many",
        ),
        pytest.param(
            "const std::int64_t begin = all * part / parts;",
            "const std::int64_t begin = part > 0 ? all * part / parts - 1 : 0;",
            WRONG,
            "wrong: seed ",
            id="overlap: two blocks own a column",
        ),
        pytest.param(
            "    load(now, 0);\n",
            "    load(now, 0);\n    __syncthreads();\n    for (auto& piece : now) { piece.target = -1; }\n",
            WRONG,
            "wrong: seed ",
            id="a tile that is not stored",
        ),
    ],
)
def test_planted_bugs_are_caught(tmp_path: Path, find: str, bug: str, code: int, message: str) -> None:
    done = run(build(DRIVER, tmp_path, kernels=plant(HEADER, find, bug, tmp_path)), 100)
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stdout + done.stderr
