"""Log-probabilities of given tokens from hidden states, without the logits of all tokens at once.

Invariant: log-probabilities are those of the distribution that the tokens were sampled from, with the
sampling temperature and with banned tokens at -inf before the log-softmax (`engine/hf/sampling.py`). The
logprobs of the policy, of the old policy and of the reference must all come from here, from the same
implementation; otherwise a ratio of two logprobs would measure rounding differences.

There are two implementations, tested against each other. `torch` takes rows in chunks and recomputes logits
in the backward pass; it runs anywhere, in float64 too. `liger` is Liger-Kernel's fused linear cross-entropy
with per-token losses, a Triton kernel that works in place on small chunks of logits and needs fewer passes
over memory. We also looked at cut-cross-entropy 25.1.1, but it supports neither banned tokens nor a bias,
takes no float32 in its backward pass and drops small gradients by default.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from typing import Literal

import torch
from torch.nn import functional

from vrthinker.engine.base import MIN_TEMPERATURE
from vrthinker.errors import InputError
from vrthinker.policy.losses import DEFAULT_CHUNK, NO_LABEL_IS_IGNORED, in_chunks

Implementation = Literal["auto", "torch", "liger"]

_LIGER_NEEDED = (0, 8, 5)
"""The oldest version tested here. 0.8.0 still scaled the head's gradient after the sum over tokens."""

_LIGER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def logprobs_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    banned: torch.Tensor | None = None,
    chunk: int = DEFAULT_CHUNK,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """The log-probability of each label under `softmax(hidden @ lm_head_weight.T / temperature)`.

    A banned label has log-probability -inf, as the distribution says, and gives no gradient. Banned labels
    are not refused, because a check would wait for the GPU, and because a loss of -inf is noticed at once.

    Args:
        hidden: The hidden states, `[tokens, hidden]`, float32, bfloat16 or float16 (float64 with `torch`).
        lm_head_weight: The weight of the language-model head, which has no bias, `[vocab, hidden]`.
        labels: The token that follows each row, int64 `[tokens]`, each in the vocabulary.
        temperature: The sampling temperature. 0 (greedy) counts as 1, as in sampling. `liger` divides the
            hidden states by it in their own dtype, `torch` divides the logits in float32.
        banned: The tokens that sampling never draws, bool `[vocab]`. Not all tokens may be banned.
        chunk: The number of rows whose logits exist at a time in `torch`. `liger` decides this itself.
        implementation: The implementation. `auto` is `liger` on a GPU if it is installed, else `torch`,
            because without a GPU `liger` only runs under Triton's interpreter.

    Returns:
        The log-probabilities, float32 `[tokens]` (float64 for float64), with gradients to `hidden` and
        `lm_head_weight`.

    Raises:
        InputError: An argument is not as described, or `implementation` names one that cannot run.
    """
    _check(hidden, lm_head_weight, labels, temperature, banned, chunk)
    chosen = _choose(hidden, lm_head_weight, implementation)
    divisor = temperature or 1.0
    if chosen == "liger" and labels.numel() > 0:
        logprobs = _by_liger(hidden, lm_head_weight, labels, divisor, banned)
    else:
        part = functools.partial(_chunk, temperature=divisor, banned=banned)
        logprobs = torch.cat(in_chunks(part, hidden, lm_head_weight, labels, chunk))
    return _without_banned(logprobs, labels, banned)


def logprobs_and_entropy(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    banned: torch.Tensor | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logprobs_from_hidden` by `torch`, and each row's entropy from the same logits.

    The arguments are those of `logprobs_from_hidden`. Liger-Kernel has no entropy, and a second pass over the
    head would cost more than it saves.

    Returns:
        The log-probabilities as there, and the entropies in nats, in the same dtype and without gradient,
        `[tokens]`. Banned tokens are not part of the distribution.

    Raises:
        InputError: An argument is not as described.
    """
    _check(hidden, lm_head_weight, labels, temperature, banned, chunk)
    part = functools.partial(_chunk_with_entropy, temperature=temperature or 1.0, banned=banned)
    chunks = in_chunks(part, hidden, lm_head_weight, labels, chunk)
    logprobs, entropies = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return _without_banned(logprobs, labels, banned), entropies


def _without_banned(
    logprobs: torch.Tensor, labels: torch.Tensor, banned: torch.Tensor | None
) -> torch.Tensor:
    return logprobs if banned is None else torch.where(banned[labels], -torch.inf, logprobs)


def liger_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why `liger` cannot run on tensors of this kind; None if it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install 'vrthinker[liger]'"
    version = importlib.metadata.version("liger-kernel")
    if tuple(int(part) for part in version.split(".")[:3] if part.isdecimal()) < _LIGER_NEEDED:
        needed = ".".join(map(str, _LIGER_NEEDED))
        return f"liger-kernel {version} is installed, {needed} or newer is needed (right per-token gradients)"
    if dtype not in _LIGER_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}; without a GPU it needs TRITON_INTERPRET=1 (slow, for tests)"
    return None


def _choose(
    hidden: torch.Tensor, weight: torch.Tensor, implementation: Implementation
) -> Literal["torch", "liger"]:
    if implementation == "torch" or (implementation == "auto" and hidden.device.type != "cuda"):
        return "torch"
    obstacle = liger_obstacle(hidden.device, torch.promote_types(hidden.dtype, weight.dtype))
    if obstacle is None:
        return "liger"
    if implementation == "liger":
        raise InputError(f"logprobs_from_hidden: implementation: got 'liger', but it cannot run: {obstacle}")
    return "torch"


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    banned: torch.Tensor | None,
    chunk: int,
) -> None:
    def refuse(argument: str, got: object, wanted: str) -> None:
        raise InputError(f"logprobs_from_hidden: {argument}: got {got}, wanted {wanted}")

    if hidden.ndim != 2 or not hidden.dtype.is_floating_point:
        refuse("hidden", f"{hidden.dtype} {list(hidden.shape)}", "floats [tokens, hidden]")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        refuse("lm_head_weight", f"shape {list(weight.shape)}", f"[vocab, {hidden.shape[1]}]")
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:1]:
        refuse("labels", f"{labels.dtype} {list(labels.shape)}", f"torch.int64 [{hidden.shape[0]}]")
    if labels.device.type == "cpu" and labels.numel() > 0:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= weight.shape[0]:
            refuse("labels", f"values from {low} to {high}", f"0 to {weight.shape[0] - 1}")
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < float("inf"):
        refuse("temperature", temperature, f"0, or {MIN_TEMPERATURE} or more")
    if banned is not None and (banned.dtype != torch.bool or banned.shape != weight.shape[:1]):
        refuse("banned", f"{banned.dtype} {list(banned.shape)}", f"torch.bool [{weight.shape[0]}]")
    if chunk < 1:
        refuse("chunk", chunk, "1 or more")


def _chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    banned: torch.Tensor | None,
) -> torch.Tensor:
    scores = _scores(hidden, weight, temperature, banned)
    return -functional.cross_entropy(scores, labels, reduction="none", ignore_index=NO_LABEL_IS_IGNORED)


def _chunk_with_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    banned: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(hidden, weight, temperature, banned)
    logprobs = -functional.cross_entropy(scores, labels, reduction="none", ignore_index=NO_LABEL_IS_IGNORED)
    with torch.no_grad():
        every = torch.log_softmax(scores, dim=-1)
        # A banned token has probability 0 and log-probability -inf, whose product is 0 here.
        entropy = torch.special.entr(every.exp()).sum(-1)
    return logprobs, entropy


def _scores(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, banned: torch.Tensor | None
) -> torch.Tensor:
    """The logits that tokens are drawn by."""
    logits = functional.linear(hidden, weight)
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if banned is not None:
        scores = scores.masked_fill(banned, -torch.inf)
    return scores if temperature == 1.0 else scores / temperature


def _by_liger(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    banned: torch.Tensor | None,
) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    scaled = hidden if temperature == 1.0 else hidden / temperature
    bias = None
    if banned is not None:
        # The bias is finite, so that a block of the vocabulary that is banned as a whole gives no inf - inf.
        # It is half of the lowest number, so that adding a logit keeps it finite. Its exponential is still 0.
        bias = weight.new_zeros(weight.shape[0]).masked_fill(banned, torch.finfo(weight.dtype).min / 2)
    losses: torch.Tensor = liger_fused_linear_cross_entropy(
        scaled,
        weight,
        labels,
        bias=bias,
        ignore_index=NO_LABEL_IS_IGNORED,
        reduction="none",
        accum_dtype=torch.float32,
    )
    return -losses
