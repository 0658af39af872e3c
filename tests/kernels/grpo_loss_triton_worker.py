"""The Triton version of `grpo_loss`, in a process of its own under the interpreter.

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


if __name__ == "__main__":
    equal()
    sys.stdout.write("done\n")
