"""Compiles a module's Triton kernels ahead of time:  triton_aot_worker.py MODULE CAPABILITY...

A process of its own: Triton decides when it is first imported whether kernels are interpreted. Prints a line
per kernel and target; any failure ends it.
"""

from __future__ import annotations

import importlib
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def main(module_name: str, capabilities: list[int]) -> None:
    module = importlib.import_module(module_name)
    for kernel, signature, constants in module.AOT:
        if list(signature) != list(kernel.arg_names):
            raise SystemExit(
                f"{kernel.__name__}: the signature names {list(signature)}, wanted the kernel's arguments "
                f"{list(kernel.arg_names)}"
            )
        constant_names = {name for name, kind in signature.items() if kind == "constexpr"}
        if constant_names != set(constants):
            raise SystemExit(
                f"{kernel.__name__}: got values for {sorted(constants)}, wanted {sorted(constant_names)}"
            )
        for capability in capabilities:
            source = ASTSource(fn=kernel, signature=dict(signature), constexprs=dict(constants))
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert f".target sm_{capability}" in compiled.asm["ptx"]
            print(f"{kernel.__name__} sm_{capability}: {len(compiled.asm['cubin'])} bytes")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], [int(argument) for argument in sys.argv[2:]])
