"""The SFT loss: cross-entropy on the rounds' tokens only.

Source: eq. 1 of the paper. Tool outcomes, prompts and frames carry no loss: their rows are left out before
these functions see them. Losses are sums in fp32, not means, so that a step's micro-batches add up to the
step's loss once each is divided by the step's number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

DEFAULT_CHUNK = 1024
"""Rows whose logits exist at a time: 0.6 GB in fp32 at a vocabulary of 150k."""

NO_LABEL_IS_IGNORED = torch.iinfo(torch.int64).min
"""For `ignore_index`: a value that no label has."""

Result = TypeVar("Result")


def sft_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy.

    Args:
        logits: `[tokens, vocab]`, any float type; row i predicts `labels[i]`.
        labels: int64 `[tokens]`, each in the vocabulary; there is no label that means "ignore".

    Returns:
        fp32 scalar (fp64 for fp64 logits); 0 for no tokens.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, labels, reduction="sum", ignore_index=NO_LABEL_IS_IGNORED)


def count_correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many tokens the most likely prediction gets right: int64 scalar, without gradient."""
    return (logits.detach().argmax(dim=-1) == labels).sum()


def token_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of tokens that the most likely prediction gets right: fp32 scalar, NaN for no tokens."""
    return count_correct(logits, labels) / labels.numel()


def sft_loss_from_hidden(
    hidden: torch.Tensor, lm_head_weight: torch.Tensor, labels: torch.Tensor, *, chunk: int = DEFAULT_CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sft_loss` and `count_correct` of `hidden @ lm_head_weight.T`, whose rows never exist all at once.

    A chunk's logits are made, used and dropped, and made again in the backward pass: one more product
    with the head per learned token, against `[tokens, vocab]` in fp32 kept from the forward pass on.

    Args:
        hidden: `[tokens, hidden]`.
        lm_head_weight: `[vocab, hidden]`, of a head without bias.
        labels: int64 `[tokens]`.
        chunk: Rows at a time, at least 1.

    Returns:
        The summed loss (fp32 scalar, with gradient to both) and the number of right tokens (int64 scalar).

    Raises:
        ValueError: `chunk` is below 1, or there are more or fewer labels than rows.
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
    """`function(rows, lm_head_weight, labels of the rows)` of every chunk; its activations are recomputed.

    What `function` makes inside (logits) is dropped after the forward pass and made again in the backward
    pass. There is at least one chunk, so that no tokens still give a result with a gradient (of zeros).

    Args:
        function: Returns tensors that are small against a chunk's logits.
        hidden: `[tokens, hidden]`.
        lm_head_weight: `[vocab, hidden]`.
        labels: `[tokens]`.
        chunk: Rows at a time, at least 1.

    Raises:
        ValueError: `chunk` is below 1, or there are more or fewer labels than rows.
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
