"""Compares the Triton version of `evict` with its reference; run with TRITON_INTERPRET=1 by its test."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from evictions import DTYPES, bits, random_tensor

from vrthinker.errors import InputError
from vrthinker.kernels.evict.op import evict_cache, evict_sequence
from vrthinker.kernels.evict.plan import plan_eviction
from vrthinker.kernels.evict.reference import evict_reference, rotation_table

HALF = 4
INV_FREQ = 1e4 ** (-torch.arange(HALF) / HALF)


def random_plan(seed: int) -> Any:
    rng = random.Random(seed)
    lengths = [rng.randrange(1, 90) for _ in range(rng.randrange(1, 4))]
    spans = []
    for length in lengths:
        cuts = sorted(rng.randrange(length + 1) for _ in range(4))
        spans.append([(cuts[0], cuts[1]), (cuts[2], cuts[3])])
    return plan_eviction(spans, lengths)


def check(found: torch.Tensor, wanted: torch.Tensor, *, turned: bool) -> None:
    if turned and wanted.dtype is torch.bfloat16:
        # The interpreter cuts bfloat16 off where hardware rounds: one unit in the last place.
        assert torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=1e-6)
    else:
        assert torch.equal(bits(found), bits(wanted))


def main() -> None:
    count = 0
    for seed, layout, dtype, renumber in itertools.product(range(3), ("bhtd", "bthd"), DTYPES, (False, True)):
        plan = random_plan(seed)
        tokens = max(plan.lengths) + 2
        shape = (plan.batch, 3, tokens, 2 * HALF) if layout == "bhtd" else (plan.batch, tokens, 3, 2 * HALF)
        token_dim = 2 if layout == "bhtd" else 1
        keys = [random_tensor(shape, dtype, seed + layer) for layer in range(2)]
        values = [random_tensor(shape, dtype, seed + 7).transpose(-1, -2).contiguous().transpose(-1, -2)]
        found = evict_cache(
            keys, values, plan, layout=layout, in_place=False, inv_freq=INV_FREQ if renumber else None
        )
        runs = plan.table(in_place=False, renumber=renumber)
        rotations = rotation_table(plan.shifts, INV_FREQ) if renumber else None
        for tensor, got, table in zip(
            [*keys, *values], [*found[0], *found[1]], [rotations, rotations, None], strict=True
        ):
            wanted = evict_reference(
                tensor, runs, batch_dim=0, token_dim=token_dim, out_tokens=plan.out_tokens, rotations=table
            )
            check(got, wanted, turned=table is not None)
        count += 1
    for seed in range(12):
        plan = random_plan(seed + 100)
        tokens = max(plan.lengths)
        ids = torch.arange(plan.batch * tokens).reshape(plan.batch, tokens)
        tensors = [
            ids,
            ids % 2 == 0,
            ids.expand(3, -1, -1),
            random_tensor((plan.batch, tokens, 7), torch.float64, seed),
        ]
        found_all = evict_sequence(tensors, plan, batch_dims=[0, 0, 1, 0], token_dims=[1, 1, 2, 1])
        for tensor, got, batch_dim in zip(tensors, found_all, (0, 0, 1, 0), strict=True):
            wanted = evict_reference(
                tensor,
                plan.table(in_place=False, renumber=False),
                batch_dim=batch_dim,
                token_dim=batch_dim + 1,
                out_tokens=plan.out_tokens,
            )
            check(got, wanted, turned=False)
        count += 1
    try:
        evict_cache(keys, keys, plan)
    except InputError:
        pass
    else:
        raise AssertionError("Triton ran in place")
    print(f"{count} evictions are equal")  # noqa: T201 - the test reads it


if __name__ == "__main__":
    main()
