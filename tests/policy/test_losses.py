"""The SFT loss against its definition, and the chunked one against the whole one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vrthinker.policy.losses import count_correct, sft_loss, sft_loss_from_hidden, token_accuracy


def drawn(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens * 1000 + vocab)
    rows = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return rows, weight, torch.randint(vocab, (tokens,), generator=generator)


def test_loss_is_the_summed_negative_log_probability() -> None:
    rows, weight, labels = drawn(9, 4, 13)
    logits = (rows @ weight.T).detach()
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    by_hand = -sum(probabilities[i, labels[i]].log() for i in range(9))
    assert sft_loss(logits, labels).item() == pytest.approx(float(by_hand), rel=1e-12)


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.zeros(4096, 8, dtype=torch.bfloat16)
    loss = sft_loss(logits, torch.zeros(4096, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4096 * 2.0794415, rel=1e-6)


def test_no_label_is_passed_over() -> None:
    with pytest.raises(IndexError):
        sft_loss(torch.zeros(2, 3), torch.tensor([0, -100]))


def test_accuracy_counts_the_most_likely_token() -> None:
    logits = torch.tensor([[0.0, 1.0], [3.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
    labels = torch.tensor([1, 0, 0, 0])
    assert count_correct(logits, labels).item() == 3
    assert token_accuracy(logits, labels).item() == 0.75


@given(tokens=st.integers(0, 40), vocab=st.integers(2, 30), chunk=st.integers(1, 45))
def test_chunks_give_the_whole_loss_and_its_gradients(tokens: int, vocab: int, chunk: int) -> None:
    rows, weight, labels = drawn(tokens, 5, vocab)
    whole = sft_loss(rows @ weight.T, labels)
    wanted = torch.autograd.grad(whole * 0.37, (rows, weight))
    loss, correct = sft_loss_from_hidden(rows, weight, labels, chunk=chunk)
    found = torch.autograd.grad(loss * 0.37, (rows, weight))
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    assert correct == count_correct(rows @ weight.T, labels)


def test_chunks_under_autocast_give_what_the_whole_does() -> None:
    rows, weight, labels = drawn(64, 16, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        whole = sft_loss(torch.nn.functional.linear(rows, weight), labels)
        loss, _ = sft_loss_from_hidden(rows, weight, labels, chunk=16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(whole, (rows, weight))
    found = torch.autograd.grad(loss, (rows, weight))
    # Rows are computed alike; the weight's gradients of the chunks are added up in bfloat16.
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], wanted[1], rtol=0.03, atol=0.03)


class Largest(TorchDispatchMode):
    """Remembers the largest number of elements that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("chunked", [True, False])
def test_the_logits_of_all_tokens_never_exist_at_once(chunked: bool) -> None:
    rows, weight, labels = drawn(200, 3, 100)
    with Largest() as largest:
        if chunked:
            sft_loss_from_hidden(rows, weight, labels, chunk=10)[0].backward()
        else:
            sft_loss(rows @ weight.T, labels).backward()
    assert largest.elements == (10 * 100 if chunked else 200 * 100)


def test_a_frozen_head_gets_no_gradient() -> None:
    rows, weight, labels = drawn(20, 4, 7)
    sft_loss_from_hidden(rows, weight.detach(), labels, chunk=6)[0].backward()
    assert rows.grad is not None
    assert rows.grad.abs().sum() > 0


def test_wrong_arguments_are_named() -> None:
    rows, weight, labels = drawn(4, 2, 3)
    with pytest.raises(ValueError, match="chunk: got 0"):
        sft_loss_from_hidden(rows, weight, labels, chunk=0)
    with pytest.raises(ValueError, match="labels: got 3, wanted one per row of hidden: 4"):
        sft_loss_from_hidden(rows, weight, labels[:3])
