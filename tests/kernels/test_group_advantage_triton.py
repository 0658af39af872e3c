"""`group_advantage` in Triton: equal to the reference under the interpreter.

It needs a process of its own: Triton reads TRITON_INTERPRET when it is first imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import math, torch
from vrthinker.errors import InputError
from vrthinker.kernels.group_advantage.op import group_advantage
from vrthinker.kernels.group_advantage.reference import METHODS, group_advantage_reference
from vrthinker.kernels.group_advantage import triton as version

def offsets(sizes, first=0):
    return torch.tensor([first, *sizes]).cumsum(0)

def compare(result, wanted, dtype):
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(
        result[0], wanted[0], rtol=64 * tolerance if dtype == torch.float64 else tolerance,
        atol=1e-14, equal_nan=True,
        msg=lambda text: f"seed {seed}: {text}")
    assert torch.equal(result[1], wanted[1]), seed
    assert torch.equal(result[2], wanted[2]), seed

seed = {seed}
generator = torch.Generator().manual_seed(seed)
for dtype in (torch.float32, torch.float64):
    for method in METHODS:
        for sizes in ([8, 0, 1, 3], [300, 2], []):
            n = sum(sizes)
            rewards = torch.randint(0, 5, (2 * n,), generator=generator).to(dtype)[::2] / 3
            valid = torch.rand(2 * n, generator=generator)[::2] < 0.8
            tokens = offsets(torch.randint(0, 6, (n,), generator=generator).tolist(), first=2)
            if n > 1:
                tokens[2:] += 700  # one episode is longer than a block
            length = int(tokens[-1]) + 300
            choices = [dict(), dict(valid=valid, ddof=0, eps=0.5)]
            if n < 50:  # the interpreter is slow
                choices.append(dict(valid=valid, token_offsets=tokens, n_tokens=length))
            for arguments in choices:
                call = dict(rewards=rewards, group_offsets=offsets(sizes), method=method, **arguments)
                compare(group_advantage(**call), group_advantage_reference(**call), dtype)

# What a GPU would see: bad values, which the op refuses on a CPU.
def direct(rewards, group_offsets, token_offsets=None, n_tokens=0, method="grpo"):
    out = torch.full((len(rewards) if token_offsets is None else n_tokens,), -777.0)
    marks = torch.ones(len(group_offsets) - 1, dtype=torch.bool)
    status = torch.full((1,), -1, dtype=torch.int32)
    version.group_advantage_triton(
        rewards, group_offsets, None, token_offsets, out, marks, status, method, 1, 1e-6)
    return out, marks, status

rewards = torch.tensor([1, 2, 3, 4, math.nan, 6, 7, 9])
for method in METHODS:
    wanted = group_advantage_reference(rewards, offsets([3, 3, 2]), method=method)
    assert wanted[2].item() == 1
    compare(direct(rewards, offsets([3, 3, 2]), method=method), wanted, torch.float32)
rewards[4] = 5
huge = 2**62
for _ in range(20):
    def anywhere(count, limit):
        places = torch.tensor([-huge, -1, 0, limit // 3, limit // 2, limit, limit + 1, huge])
        return places[torch.randint(0, 8, (count,), generator=generator)]
    call = dict(group_offsets=anywhere(4, 8), token_offsets=anywhere(9, 50), n_tokens=50)
    out, marks, status = direct(rewards, **call)
    assert (out != -777).all()
    assert torch.equal(status, group_advantage_reference(rewards, **call)[2])
try:
    group_advantage(torch.tensor([math.inf]), torch.tensor([0, 1]))
except InputError as error:
    assert "rewards[0]: got inf" in str(error)
else:
    raise AssertionError("inf was taken")
print("done")
"""


def run(script: str, **environment: str) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VRTHINKER_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "done\n"


def test_interpreted_kernel_agrees_with_the_reference() -> None:
    script = INTERPRETED.replace("{seed}", str(time.time_ns() % 2**31))
    run(script, TRITON_INTERPRET="1", VRTHINKER_KERNELS="triton")
