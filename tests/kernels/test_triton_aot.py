"""Every Triton kernel that ships compiles to machine code for A100, H100 and B200, without a GPU.

The kernels are found by looking: each `kernels/<op>/triton.py` lists what it ships in `AOT` (the form is in
CONTRIBUTING.md).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vrthinker import kernels

WORKER = Path(__file__).with_name("triton_aot_worker.py")
OPS = sorted(file.parent.name for folder in kernels.__path__ for file in Path(folder).glob("*/triton.py"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (pip install triton)"
)

SAMPLE = """
import triton
import triton.language as tl


@triton.jit
def add_kernel(x, out, count, value, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < count) + value, mask=at < count)


def entry(x, count, block):
    signature = {"x": x, "out": "*fp32", "count": count, "value": "fp32", "BLOCK": "constexpr"}
    return add_kernel, signature, {"BLOCK": block}


AOT = [entry("*bf16", "i32", 128), entry("*fp32", "i64", 256)]
"""


def compile_ahead(module: str, folder: Path, *capabilities: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, str(WORKER), module, *map(str, capabilities)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize(
    "capability",
    [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile(op: str, capability: int, tmp_path: Path) -> None:
    done = compile_ahead(f"vrthinker.kernels.{op}.triton", tmp_path, capability)
    assert done.returncode == 0, done.stderr
    assert f" sm_{capability}: " in done.stdout  # an empty list would compile nothing


def test_a_list_is_compiled_entry_by_entry_for_every_target(tmp_path: Path) -> None:
    (tmp_path / "sample_kernels.py").write_text(SAMPLE)
    done = compile_ahead("sample_kernels", tmp_path, 80, 90, 100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"add_kernel sm_{c}" for c in (80, 90, 100)] * 2
    assert all(int(line.split()[2]) > 1000 for line in lines)


@pytest.mark.parametrize(
    ("find", "replace", "message"),
    [
        ("+ value, mask", "+ missing, mask", "missing is not defined"),
        ('"count": count, ', "", "add_kernel: the signature names ['x', 'out', 'value', 'BLOCK']"),
        ('{"BLOCK": block}', "{}", "add_kernel: got values for [], wanted ['BLOCK']"),
        ('"i64", 256', '"i64", 100', "power of 2"),
    ],
)
def test_a_kernel_that_does_not_compile_fails(find: str, replace: str, message: str, tmp_path: Path) -> None:
    assert SAMPLE.count(find) == 1
    (tmp_path / "sample_kernels.py").write_text(SAMPLE.replace(find, replace))
    done = compile_ahead("sample_kernels", tmp_path, 90)
    assert done.returncode != 0
    assert message in done.stderr
