"""The Triton version of `grpo_loss`, in a process of its own: `equal` under the interpreter, or `compile`.

Triton decides when it is imported whether it interprets, for the whole process; so this is no test module.
"""

from __future__ import annotations

import os
import sys

import torch


def equal() -> None:
    from grpo_cases import WAYS, assert_equals_reference, random_batch, run

    os.environ["VRTHINKER_KERNELS"] = "triton"
    seed = torch.seed() % 2**31
    sys.stdout.write(f"seed {seed}\n")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    lengths = ((), (0, 0), (1,), (0, 5, 700, 0, 0, 1, 1300, 30, 0))
    for i, way in enumerate(WAYS):
        for j, shape in enumerate(lengths):
            batch = random_batch(
                seed + i,
                shape,
                dtypes=(dtypes[(i + j) % 3], dtypes[i % 3], dtypes[j % 3]),
                per_episode=(i + j) % 2 == 0,
                with_ref=j % 3 != 0,
                learned=(0.8, 1.0, 0.0)[i % 3],
                stride=1 + i % 3,
                kl_weight=(0.3, 0.0)[j % 2],
                clip_high=(0.2, 0.0)[i % 2],
                **way,
            )
            assert_equals_reference(batch)
    batch = random_batch(seed, (30, 2000), per_episode=False, learned=1.0)
    batch.policy[3] = torch.nan
    result, gradient = run(batch)
    assert result.loss.isnan()
    assert result.metrics["ratio/max"].isnan()
    assert gradient.isnan().nonzero().tolist() == [[3]]


def compile_for_gpus() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vrthinker.kernels.grpo_loss import triton as kernels

    pointers = {
        "policy": "*bf16",
        "old": "*fp32",
        "ref": "*fp16",
        "mask": "*u8",
        "offsets": "*i64",
        "learned": "*i32",
    }
    integers = {"tokens", "episodes", "tiles", "search_steps"}
    numbers = {"lowest_ratio", "highest_ratio", "kl_weight", "fixed_length", "normalizer"}
    constants = {"TILE": 1024, "SUMS": 8}
    choices = [
        {"AGGREGATION": way, "PER_EPISODE": per_episode, "HAS_REF": has_ref}
        for way, per_episode, has_ref in ((0, False, False), (1, True, True), (2, True, False))
    ]
    for kernel in (kernels.count_kernel, kernels.loss_kernel, kernels.finish_kernel):
        for choice in choices:
            signature, constexprs = {}, {}
            for name in kernel.arg_names:
                if name in {**constants, **choice}:
                    signature[name] = "constexpr"
                    constexprs[name] = {**constants, **choice}[name]
                elif name.endswith("_stride") or name in integers:
                    signature[name] = "i32"
                elif name in numbers:
                    signature[name] = "fp32"
                else:
                    signature[name] = pointers.get(name, "*fp32")
            for architecture in (80, 90, 100):
                source = ASTSource(kernel, signature, constexprs)
                binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
                assert len(binary.asm["cubin"]) > 0


if __name__ == "__main__":
    {"equal": equal, "compile": compile_for_gpus}[sys.argv[1]]()
    sys.stdout.write("done\n")
