"""Logprobs from hidden states: the distribution that sampling draws from, in chunks, two ways."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vrthinker.engine.hf.sampling import Draw, Vocabulary, sample
from vrthinker.errors import InputError
from vrthinker.policy import logprobs
from vrthinker.policy.logprobs import logprobs_and_entropy, logprobs_from_hidden

WORKER = Path(__file__).with_name("logprobs_worker.py")


def drawn(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return rows, weight, torch.randint(vocab, (tokens,), generator=generator)


@given(
    tokens=st.integers(0, 40),
    vocab=st.integers(2, 30),
    chunk=st.integers(1, 45),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    bans=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_chunks_give_the_log_softmax_and_its_gradients(
    tokens: int, vocab: int, chunk: int, temperature: float, bans: bool, seed: int
) -> None:
    rows, weight, labels = drawn(tokens, 5, vocab, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    banned = torch.rand(vocab, generator=generator) < 0.4
    banned[labels] = False
    banned[0] = False
    logits = rows @ weight.T
    if bans:
        logits = logits.masked_fill(banned, -torch.inf)
    whole = torch.log_softmax(logits / (temperature or 1.0), dim=-1).gather(1, labels[:, None])[:, 0]
    upstream = torch.randn(tokens, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(whole @ upstream, (rows, weight))
    found = logprobs_from_hidden(
        rows, weight, labels, temperature=temperature, banned=banned if bans else None, chunk=chunk
    )
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    slopes = torch.autograd.grad(found @ upstream, (rows, weight))
    torch.testing.assert_close(slopes, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_they_are_the_samplers_own_logprobs(temperature: float) -> None:
    rows, weight, _ = drawn(16, 8, 50, torch.float32)
    banned = torch.arange(50) % 3 == 0
    vocabulary = Vocabulary(end_of_turn=1, banned=banned, opens_tag=torch.zeros(50, dtype=torch.bool))
    draws = [Draw(temperature, 1.0, i / 16, None) for i in range(16)]
    tokens, sampled = sample((rows @ weight.T).detach(), draws, vocabulary)
    found = logprobs_from_hidden(rows, weight, torch.tensor(tokens), temperature=temperature, banned=banned)
    torch.testing.assert_close(found.detach(), torch.tensor(sampled), rtol=1e-6, atol=1e-6)


def test_a_banned_label_is_impossible_and_moves_nothing() -> None:
    rows, weight, labels = drawn(6, 4, 9)
    banned = torch.zeros(9, dtype=torch.bool)
    banned[labels[2]] = True
    found = logprobs_from_hidden(rows, weight, labels, banned=banned, chunk=4)
    hit = banned[labels]
    assert torch.equal(found == -torch.inf, hit)
    slopes = torch.autograd.grad(found, (rows, weight), torch.ones(6, dtype=torch.float64))
    assert all(slope.isfinite().all() for slope in slopes)
    assert slopes[0][hit].abs().max() == 0
    assert slopes[0][~hit].abs().min(dim=1).values.max() > 0
    assert slopes[1][banned].abs().max() == 0


def test_half_precision_gives_fp32() -> None:
    rows, weight, labels = drawn(4, 8, 50, torch.bfloat16)
    found = logprobs_from_hidden(rows, weight, labels)
    assert found.dtype == torch.float32
    logits = (rows @ weight.T).float()
    wanted = torch.log_softmax(logits, dim=-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the largest number of elements that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_the_logits_of_all_tokens_never_exist_at_once() -> None:
    rows, weight, labels = drawn(200, 3, 100)
    with Largest() as largest:
        logprobs_from_hidden(rows, weight, labels, temperature=0.5, chunk=10).sum().backward()
    assert largest.elements == 10 * 100


def test_a_frozen_head_gets_no_gradient() -> None:
    rows, weight, labels = drawn(20, 4, 7)
    logprobs_from_hidden(rows, weight.detach(), labels, chunk=6).sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden": torch.zeros(4, 2, 2)},
            r"hidden: got torch.float32 \[4, 2, 2\], wanted floats \[tokens",
        ),
        ({"hidden": torch.zeros(4, 2).long()}, "hidden: got torch.int64"),
        ({"lm_head_weight": torch.zeros(3, 5)}, r"lm_head_weight: got shape \[3, 5\], wanted \[vocab, 2\]"),
        ({"labels": torch.zeros(3).long()}, r"labels: got torch.int64 \[3\], wanted torch.int64 \[4\]"),
        ({"labels": torch.zeros(4)}, "labels: got torch.float32"),
        ({"labels": torch.tensor([0, 1, -100, 0])}, "labels: got values from -100 to 1, wanted 0 to 2"),
        ({"labels": torch.tensor([0, 1, 3, 0])}, "labels: got values from 0 to 3, wanted 0 to 2"),
        ({"temperature": -1.0}, "temperature: got -1.0, wanted 0, or "),
        ({"temperature": float("nan")}, "temperature: got nan, wanted 0, or "),
        ({"temperature": float("inf")}, "temperature: got inf, wanted 0, or "),
        ({"banned": torch.zeros(3)}, r"banned: got torch.float32 \[3\], wanted torch.bool \[3\]"),
        ({"banned": torch.zeros(2).bool()}, r"banned: got torch.bool \[2\], wanted torch.bool \[3\]"),
        ({"chunk": 0}, "chunk: got 0, wanted 1 or more"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    good = {
        "hidden": torch.zeros(4, 2),
        "lm_head_weight": torch.zeros(3, 2),
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(InputError, match="logprobs_from_hidden: " + message):
        logprobs_from_hidden(**{**good, **changes})


def test_a_named_implementation_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight, labels = drawn(4, 2, 3, torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert torch.equal(
        logprobs_from_hidden(rows, weight, labels),
        logprobs_from_hidden(rows, weight, labels, implementation="torch"),
    )
    with pytest.raises(InputError, match="implementation: got 'liger', but it cannot run: "):
        logprobs_from_hidden(rows, weight, labels, implementation="liger")
    monkeypatch.setattr(logprobs.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(logprobs.importlib.metadata, "version", lambda name: "0.7.0")
    with pytest.raises(InputError, match=r"liger-kernel 0\.7\.0 is installed, 0\.8\.5 or newer is needed"):
        logprobs_from_hidden(rows, weight, labels, implementation="liger")
    monkeypatch.setattr(logprobs.importlib.metadata, "version", lambda name: "0.8.5")
    with pytest.raises(InputError, match=r"it takes float32, bfloat16 and float16, not torch\.float64"):
        logprobs_from_hidden(rows.double(), weight.double(), labels, implementation="liger")


def run_worker(device: str, **environment: str) -> None:
    pytest.importorskip("liger_kernel")
    done = subprocess.run(
        [sys.executable, str(WORKER), device],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n")


@pytest.mark.slow  # imports torch and Triton in a process of its own
@pytest.mark.multi_process
def test_liger_equals_torch_under_the_interpreter() -> None:
    run_worker("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.multi_process
def test_liger_equals_torch_on_a_gpu() -> None:
    run_worker("cuda")


@given(
    tokens=st.integers(0, 20),
    vocab=st.integers(2, 30),
    chunk=st.integers(1, 25),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    bans=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_entropy_comes_with_the_same_logprobs_and_gradients(
    tokens: int, vocab: int, chunk: int, temperature: float, bans: bool, seed: int
) -> None:
    rows, weight, labels = drawn(tokens, 5, vocab, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    banned = torch.rand(vocab, generator=generator) < 0.4 if bans else None
    if banned is not None:
        banned[labels] = False
        banned[0] = False
    options: dict[str, Any] = {"temperature": temperature, "banned": banned, "chunk": chunk}
    alone = logprobs_from_hidden(rows, weight, labels, **options)
    found, entropy = logprobs_and_entropy(rows, weight, labels, **options)
    assert torch.equal(found, alone)
    upstream = torch.randn(tokens, generator=generator, dtype=torch.float64)
    slopes = torch.autograd.grad(found @ upstream, (rows, weight))
    torch.testing.assert_close(slopes, torch.autograd.grad(alone @ upstream, (rows, weight)))
    assert not entropy.requires_grad
    for row in range(tokens):
        logits = (weight @ rows[row]).detach() / (temperature or 1.0)
        kept = logits if banned is None else logits[~banned]
        p = kept.exp() / kept.exp().sum()
        torch.testing.assert_close(entropy[row], -(p * p.log()).sum(), rtol=1e-9, atol=1e-9)
