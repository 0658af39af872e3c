"""Every Triton kernel that ships compiles to machine code for A100, H100 and B200, without a GPU.

The kernels are found by looking: each `kernels/<op>/triton.py` lists what it ships in `AOT` (the form is in
CONTRIBUTING.md). The default run compiles the first and the last entry of each kernel for H100; all entries
for all targets are slow.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vrthinker import kernels

# A source tree lists its ops twice: vrthinker/kernels is a link to kernels/.
OPS = sorted({file.parent.name for folder in kernels.__path__ for file in Path(folder).glob("*/triton.py")})

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton (pip install triton)"
    ),
    pytest.mark.skipif(
        bool(os.environ.get("TRITON_INTERPRET")), reason="under TRITON_INTERPRET nothing is compiled"
    ),
    # A release of Triton that is about to change its default of fusing a product and a sum.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

Entry = tuple[Any, dict[str, str], dict[str, Any]]

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


@pytest.fixture(autouse=True)
def nothing_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def compile_ahead(entries: Iterable[Entry], *capabilities: int) -> list[tuple[str, int, int]]:
    """The kernel's name, the target and the bytes of machine code, of each entry for each target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled = []
    for kernel, signature, constants in entries:
        name = kernel.__name__
        if list(signature) != list(kernel.arg_names):
            raise ValueError(f"{name}: the signature names {list(signature)}, wanted {kernel.arg_names}")
        wanted = sorted(argument for argument, kind in signature.items() if kind == "constexpr")
        if wanted != sorted(constants):
            raise ValueError(f"{name}: got values for {sorted(constants)}, wanted {wanted}")
        for capability in capabilities:
            source = ASTSource(fn=kernel, signature=dict(signature), constexprs=dict(constants))
            code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
            assert f".target sm_{capability}" in code["ptx"]
            compiled.append((name, capability, len(code["cubin"])))
    return compiled


def entries_of(op: str) -> list[Entry]:
    entries: list[Entry] = importlib.import_module(f"vrthinker.kernels.{op}.triton").AOT
    assert entries, "an empty list would compile nothing"
    return entries


def ends(entries: list[Entry]) -> list[Entry]:
    """The first and the last entry of each kernel: in the lists these differ most."""
    first, last = {}, {}
    for entry in entries:
        first.setdefault(entry[0].__name__, entry)
        last[entry[0].__name__] = entry
    return [*first.values(), *(entry for name, entry in last.items() if entry is not first[name])]


def sample(folder: Path, text: str) -> ModuleType:
    """Triton reads a kernel's source from its file."""
    file = folder / "sample_kernels.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_kernels_are_found() -> None:
    assert {"evict", "group_advantage", "grpo_loss"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_the_ends_of_the_list_compile(op: str) -> None:
    entries = ends(entries_of(op))
    assert {kernel.__name__ for kernel, _, _ in entries} == {k.__name__ for k, _, _ in entries_of(op)}
    assert len(compile_ahead(entries, 90)) == len(entries)


@pytest.mark.slow  # a second per entry
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile(op: str, capability: int) -> None:
    entries = entries_of(op)
    assert len(compile_ahead(entries, capability)) == len(entries)


def test_a_list_is_compiled_entry_by_entry_for_every_target(tmp_path: Path) -> None:
    compiled = compile_ahead(sample(tmp_path, SAMPLE).AOT, 80, 90, 100)
    assert [(name, target) for name, target, _ in compiled] == [("add_kernel", c) for c in (80, 90, 100)] * 2
    assert all(size > 1000 for _, _, size in compiled)


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
    entries = sample(tmp_path, SAMPLE.replace(find, replace)).AOT
    with pytest.raises(Exception, match=r"add_kernel|at \d") as caught:
        compile_ahead(entries, 90)
    assert message in "".join(traceback.format_exception(caught.value))
