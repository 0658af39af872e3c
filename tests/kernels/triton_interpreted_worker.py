"""Compares Triton versions with their references:  triton_interpreted_worker.py [--all] OP...

A process of its own, because TRITON_INTERPRET counts when Triton is first imported; one process for all ops,
because loading torch and Triton takes longer than the comparisons. Prints a line of JSON per op: how many
results were equal, or the traceback of the first that was not. With --all an op's whole product of parameters
runs.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from evictions import DTYPES, bits, random_tensor
from grpo_cases import (
    WAYS,
    assert_equals_reference,
    assert_kl_is_right_near_zero,
    assert_what_is_not_finite_shows,
    random_batch,
    run,
)

from vrthinker.errors import InputError
from vrthinker.kernels.evict.op import evict_cache, evict_sequence
from vrthinker.kernels.evict.plan import EvictionPlan, plan_eviction
from vrthinker.kernels.evict.reference import evict_reference, rotation_table
from vrthinker.kernels.group_advantage.op import group_advantage
from vrthinker.kernels.group_advantage.reference import METHODS, group_advantage_reference
from vrthinker.kernels.group_advantage.triton import group_advantage_triton


def refusal(call: Callable[[], object]) -> str:
    """What a call is refused with."""
    try:
        call()
    except InputError as error:
        return str(error)
    raise AssertionError("it was not refused")


# Evictions

HALF = 4
INV_FREQ = 1e4 ** (-torch.arange(HALF) / HALF)


def random_plan(seed: int, longest: int) -> EvictionPlan:
    rng = random.Random(seed)
    lengths = [rng.randrange(longest // 4, longest) for _ in range(rng.randrange(1, 3))]
    spans = []
    for length in lengths:
        cuts = sorted(rng.randrange(length + 1) for _ in range(4))
        spans.append([(cuts[0], cuts[1]), (cuts[2], cuts[3])])
    return plan_eviction(spans, lengths)


def assert_bits(found: torch.Tensor, wanted: torch.Tensor, *, turned: bool) -> None:
    if turned and wanted.dtype is torch.bfloat16:
        # The interpreter cuts bfloat16 off where hardware rounds: one unit in the last place.
        assert torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=1e-6)
    else:
        assert torch.equal(bits(found), bits(wanted))


def check_cache(plan: EvictionPlan, seed: int, layout: Any, dtype: torch.dtype, renumber: bool) -> None:
    tokens = max(plan.lengths) + 2
    shape = (plan.batch, 3, tokens, 2 * HALF) if layout == "bhtd" else (plan.batch, tokens, 3, 2 * HALF)
    keys = [random_tensor(shape, dtype, seed + layer) for layer in range(2)]
    values = [random_tensor(shape, dtype, seed + 7).transpose(-1, -2).contiguous().transpose(-1, -2)]
    inv_freq = INV_FREQ if renumber else None
    found = evict_cache(keys, values, plan, layout=layout, in_place=False, inv_freq=inv_freq)
    runs = plan.table(in_place=False, renumber=renumber)
    rotations = rotation_table(plan.shifts, INV_FREQ) if renumber else None
    dims = {"batch_dim": 0, "token_dim": 2 if layout == "bhtd" else 1, "out_tokens": plan.out_tokens}
    tables = [rotations, rotations, None]
    for tensor, got, table in zip([*keys, *values], [*found[0], *found[1]], tables, strict=True):
        wanted = evict_reference(tensor, runs, rotations=table, **dims)
        assert_bits(got, wanted, turned=table is not None)


def check_sequence(plan: EvictionPlan, seed: int) -> None:
    tokens = max(plan.lengths)
    ids = torch.arange(plan.batch * tokens).reshape(plan.batch, tokens)
    wide = random_tensor((plan.batch, tokens, 7), torch.float64, seed)
    tensors, batch_dims = [ids, ids % 2 == 0, ids.expand(3, -1, -1), wide], [0, 0, 1, 0]
    found = evict_sequence(tensors, plan, batch_dims=batch_dims, token_dims=[1, 1, 2, 1])
    runs = plan.table(in_place=False, renumber=False)
    for tensor, got, dim in zip(tensors, found, batch_dims, strict=True):
        wanted = evict_reference(tensor, runs, batch_dim=dim, token_dim=dim + 1, out_tokens=plan.out_tokens)
        assert_bits(got, wanted, turned=False)


def evict(seed: int, *, whole: bool) -> int:
    """Every layout, dtype and turn; a plan longer than a tile for one of them, or for all."""
    count = 0
    for i, (layout, dtype, renumber) in enumerate(itertools.product(("bhtd", "bthd"), DTYPES, (False, True))):
        for own_seed in range(seed, seed + 3) if whole else (seed + i,):
            check_cache(random_plan(own_seed, 90 if whole or i == 3 else 16), i, layout, dtype, renumber)
            count += 1
    # One token stays, the first or the last, or none; in all sequences or in one of them.
    few = ([(0, 5)], [(1, 5)], [(0, 4)])
    for i, spans in enumerate([[few[0]], [few[1]], [few[2]], [few[0], few[2]], [few[1], [(2, 3)]]]):
        plan = plan_eviction(spans, [5] * len(spans))
        for layout in ("bhtd", "bthd") if whole else ("bhtd",):
            check_cache(plan, seed, layout, DTYPES[i % len(DTYPES)], i % 2 == 0)
            count += 1
        if whole or i in (0, 4):
            check_sequence(plan, seed)
    for own_seed in range(seed, seed + (12 if whole else 2)):
        check_sequence(random_plan(own_seed, 90), own_seed)
        count += 1
    key = torch.ones(1, 1, 3, 2 * HALF)
    refused = refusal(lambda: evict_cache([key], [key.clone()], plan_eviction([[(0, 1)]], [3])))
    assert "it has no in-place version" in refused
    return count


# Advantages


def offsets(sizes: list[int], first: int = 0) -> torch.Tensor:
    return torch.tensor([first, *sizes]).cumsum(0)


def assert_advantages(result: Any, wanted: Any, dtype: torch.dtype) -> None:
    tolerance = torch.finfo(dtype).eps * (64 if dtype == torch.float64 else 1)
    torch.testing.assert_close(result[0], wanted[0], rtol=tolerance, atol=1e-14, equal_nan=True)
    assert torch.equal(result[1], wanted[1])
    assert torch.equal(result[2], wanted[2])


def check_advantages(
    sizes: list[int], method: str, dtype: torch.dtype, generator: torch.Generator, way: str
) -> None:
    n = sum(sizes)
    rewards = torch.randint(0, 5, (2 * n,), generator=generator).to(dtype)[::2] / 3
    call: dict[str, Any] = {"rewards": rewards, "group_offsets": offsets(sizes), "method": method}
    if way != "plain":
        call["valid"] = torch.rand(2 * n, generator=generator)[::2] < 0.8
    if way == "options":
        call |= {"ddof": 0, "eps": 0.5}
    if way == "tokens":
        tokens = offsets(torch.randint(0, 6, (n,), generator=generator).tolist(), first=2)
        if n > 1:
            tokens[2:] += 300  # one episode is longer than a block
        call |= {"token_offsets": tokens, "n_tokens": int(tokens[-1]) + 300}
    assert_advantages(group_advantage(**call), group_advantage_reference(**call), dtype)


def direct(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    token_offsets: torch.Tensor | None = None,
    n_tokens: int = 0,
    method: str = "grpo",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Past the op, which refuses bad values on a CPU: what a GPU would see."""
    out = torch.full((len(rewards) if token_offsets is None else n_tokens,), -777.0)
    marks = torch.ones(len(group_offsets) - 1, dtype=torch.bool)
    status = torch.full((1,), -1, dtype=torch.int32)
    group_advantage_triton(rewards, group_offsets, None, token_offsets, out, marks, status, method, 1, 1e-6)
    return out, marks, status


def group_advantages(seed: int, *, whole: bool) -> int:
    """Small groups of every method with tokens, and the rest of the product in part, or all of it."""
    generator = torch.Generator().manual_seed(seed)
    small, large, dtypes = [4, 0, 1], [300, 2], (torch.float32, torch.float64)
    if whole:
        cases = list(itertools.product((small, large, []), METHODS, dtypes, ("plain", "options", "tokens")))
        # The interpreter is slow: tokens of hundreds of episodes would take minutes.
        cases = [case for case in cases if case[0] != large or case[3] != "tokens"]
    else:
        cases = [(small, method, dtypes[i % 2], "tokens") for i, method in enumerate(METHODS)]
        cases += [(large, "grpo", dtypes[1], "plain"), (large, "batch_std", dtypes[0], "options")]
        cases += [([], METHODS[i], dtypes[0], way) for i, way in enumerate(("plain", "options", "tokens"))]
    for sizes, method, dtype, way in cases:
        check_advantages(sizes, method, dtype, generator, way)

    rewards = torch.tensor([1, 2, 3, 4, math.nan, 6, 7, 9])
    for method in METHODS:
        wanted = group_advantage_reference(rewards, offsets([3, 3, 2]), method=method)
        assert wanted[2].item() == 1
        assert_advantages(direct(rewards, offsets([3, 3, 2]), method=method), wanted, torch.float32)
    rewards[4] = 5

    def anywhere(count: int, limit: int) -> torch.Tensor:
        places = torch.tensor([-(2**62), -1, 0, limit // 3, limit // 2, limit, limit + 1, 2**62])
        return places[torch.randint(0, 8, (count,), generator=generator)]

    for _ in range(20 if whole else 2):
        call: Any = {"group_offsets": anywhere(4, 8), "token_offsets": anywhere(9, 50), "n_tokens": 50}
        out, _marks, status = direct(rewards, **call)
        assert (out != -777).all()
        assert torch.equal(status, group_advantage_reference(rewards, **call)[2])
    refused = refusal(lambda: group_advantage(torch.tensor([math.inf]), torch.tensor([0, 1])))
    assert "rewards[0]: got inf" in refused
    return len(cases)


# The loss


def grpo_losses(seed: int, *, whole: bool) -> int:
    """Every way of adding up with long and with short episodes, or with every shape."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    shapes = ((), (0, 0), (1,), (0, 5, 700, 0, 0, 1, 1300, 30, 0))
    count = 0
    for i, way in enumerate(WAYS):
        for j, shape in enumerate(shapes):
            if not whole and j not in (3, i % 3):
                continue
            batch = random_batch(
                seed + i,
                shape,
                dtypes=(dtypes[(i + j) % 3], dtypes[i % 3], dtypes[j % 3]),
                per_episode=(i + j) % 2 == 0,
                with_ref=(i // 3 + j) % 3 != 0,
                learned=(0.8, 1.0, 0.0)[i % 3],
                stride=1 + i % 3,
                kl_weight=(0.3, 0.0)[j % 2],
                clip_high=(0.2, 0.0)[i % 2],
                **way,
            )
            assert_equals_reference(batch)
            count += 1
    batch = random_batch(seed, (30, 2000), per_episode=False, learned=1.0)
    batch.policy[3] = torch.nan
    result, gradient = run(batch)
    assert result.loss.isnan()
    assert result.metrics["ratio/max"].isnan()
    assert gradient.isnan().nonzero().tolist() == [[3]]
    assert_kl_is_right_near_zero(rtol=1e-5)  # as for a GPU, whose exponential is off by a few units
    assert_what_is_not_finite_shows(**{} if whole else {"advantages": (1.0,), "kl_weights": (0.01,)})
    return count


CHECKS = {"evict": evict, "group_advantage": group_advantages, "grpo_loss": grpo_losses}


def main(arguments: list[str]) -> None:
    whole = "--all" in arguments
    for op in arguments:
        if op == "--all":
            continue
        seed = torch.seed() % 2**31
        told: dict[str, Any] = {"op": op, "seed": seed, "equal": None, "traceback": None}
        try:
            told["equal"] = CHECKS[op](seed, whole=whole)
        except Exception:
            told["traceback"] = traceback.format_exc()
        sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
