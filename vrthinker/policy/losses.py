"""The SFT loss: cross-entropy on the rounds' tokens only.

Tool outcomes, prompts and frames carry no loss: callers remove their rows before they call these functions.
Losses are sums in fp32 instead of means, so that the losses of a step's micro-batches, each divided by the
step's number of tokens, add up to the step's loss.

Source: eq. 1 of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

DEFAULT_CHUNK = 1024
"""The number of rows whose logits exist at a time: 0.6 GB in fp32 at a vocabulary of 150k."""

NO_LABEL_IS_IGNORED = torch.iinfo(torch.int64).min
"""A value for `ignore_index` that no label has."""

Result = TypeVar("Result")


def sft_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy.

    Args:
        logits: The logits of any float dtype, `[tokens, vocab]`. Row i predicts `labels[i]`.
        labels: The tokens to predict, int64 `[tokens]`, each in the vocabulary. No label means "ignore".

    Returns:
        The loss, an fp32 scalar (fp64 for fp64 logits); 0 for no tokens.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, labels, reduction="sum", ignore_index=NO_LABEL_IS_IGNORED)


def count_correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The number of tokens that the most likely prediction gets right: int64 scalar, without gradient."""
    return (logits.detach().argmax(dim=-1) == labels).sum()


def token_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of tokens that the most likely prediction gets right: fp32 scalar, NaN for no tokens."""
    return count_correct(logits, labels) / labels.numel()


def sft_loss_from_hidden(
    hidden: torch.Tensor, lm_head_weight: torch.Tensor, labels: torch.Tensor, *, chunk: int = DEFAULT_CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sft_loss` and `count_correct` of `hidden @ lm_head_weight.T`, whose rows never all exist at once.

    The logits of a chunk are computed, used and dropped, and computed again in the backward pass. This costs
    one more product with the head per learned token, and saves storing logits of `[tokens, vocab]` in fp32.

    Args:
        hidden: The hidden states, `[tokens, hidden]`.
        lm_head_weight: The weight of the language-model head, which has no bias, `[vocab, hidden]`.
        labels: The tokens to predict, int64 `[tokens]`.
        chunk: The number of rows at a time, at least 1.

    Returns:
        The summed loss (fp32 scalar, with gradients to both) and the number of right tokens (int64 scalar).

    Raises:
        ValueError: `chunk` is below 1, or the number of labels differs from the number of rows.
    """
    chunks = in_chunks(_chunk, hidden, lm_head_weight, labels, chunk)
    losses, correct = zip(*chunks, strict=True)
    return torch.stack(losses).sum(), torch.stack(correct).sum()


def in_chunks(
    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Result],
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    chunk: int,
) -> list[Result]:
    """Calls `function(rows, lm_head_weight, labels of the rows)` for every chunk and recomputes activations.

    Tensors that `function` makes inside (logits) are dropped after the forward pass and computed again in the
    backward pass. There is at least one chunk, so that even no tokens give a result with a gradient (of
    zeros).

    Args:
        function: A function that returns tensors much smaller than a chunk's logits.
        hidden: The hidden states, `[tokens, hidden]`.
        lm_head_weight: The weight of the language-model head, `[vocab, hidden]`.
        labels: The tokens to predict, `[tokens]`.
        chunk: The number of rows at a time, at least 1.

    Raises:
        ValueError: `chunk` is below 1, or the number of labels differs from the number of rows.
    """
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, allowed: 1 or more")
    if hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"labels: got {labels.shape[0]}, wanted one per row of hidden: {hidden.shape[0]}")
    results: list[Result] = []
    for start in range(0, max(1, len(labels)), chunk):
        rows, wanted = hidden[start : start + chunk], labels[start : start + chunk]
        results.append(
            checkpoint(function, rows, lm_head_weight, wanted, use_reentrant=False, preserve_rng_state=False)
        )
    return results


def _chunk(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = functional.linear(hidden, weight)
    return sft_loss(logits, labels), count_correct(logits, labels)
