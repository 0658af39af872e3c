"""The op `grpo_loss`. It checks its arguments, picks a version, and is registered with `torch.library`.

Invariant: one pass over the logprobs gives the loss, every token's loss, the gradient and the metrics. The
backward pass multiplies the stored gradient by one number. On a GPU nothing waits for the device: the CUDA
version has two launches (counts per episode, then the pass), the Triton version three. `reference.py` is the
specification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch

from vrthinker.errors import InputError
from vrthinker.kernels import choose_version, native_obstacles, triton_obstacle
from vrthinker.kernels.arguments import require_number, require_tensors, require_whole
from vrthinker.kernels.grpo_loss.reference import (
    METRICS,
    Aggregation,
    grpo_gradient_reference,
    grpo_loss_reference,
    weights_and_scale,
)

LOGPROB_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GrpoLoss:
    """The result of `grpo_loss`.

    Attributes:
        loss: The loss, a float32 scalar with a gradient to the policy's logprobs.
        token_loss: The unweighted loss of each token, float32 `[tokens]`, without gradient; 0 for tokens that
            are not learned.
        metrics: Metrics over the learned tokens, float32 scalars without gradient. `ratio/mean` and
            `ratio/max` are the mean and maximum of exp(policy - old). `clip/low`, `clip/high` and
            `clip/total` are the shares of tokens that get no gradient because of clipping (the ratio is below
            the range and the advantage negative, or above it and the advantage positive). `kl/ref` is the
            mean of k3, only with `ref_logprobs`. Without learned tokens, ratios are 1 and the others 0.
    """

    loss: torch.Tensor
    token_loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def grpo_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    episode_offsets: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.01,
    aggregation: Aggregation = "episode_mean",
    fixed_length: int | None = None,
    normalizer: float | None = None,
    num_threads: int | None = None,
) -> GrpoLoss:
    """The clipped policy loss of packed episodes, with a KL term to a reference policy.

    All tensors are on one device (CPU or CUDA), with any strides. Everything is computed in float32. Tokens
    outside `loss_mask` may hold anything. If a logprob or the advantage of a learned token is not finite, the
    loss and the token's gradient are NaN, and nothing is raised.

    Args:
        policy_logprobs: The policy's logprobs, `[tokens]`, float32, bfloat16 or float16. Only this argument
            gets a gradient.
        old_logprobs: The logprobs of the policy that the ratio is taken against, in the same form.
        ref_logprobs: The logprobs of the reference policy, in the same form; None for no KL term.
        advantages: The advantages, float32 `[tokens]`, or `[episodes]` (one for all tokens of an episode). If
            there are as many episodes as tokens, they are read per token.
        loss_mask: True for the learned tokens, bool `[tokens]`.
        episode_offsets: The first token of each episode, int64 `[episodes + 1]`, ascending from 0 to
            `tokens`: episode e has tokens offsets[e] to offsets[e + 1]. They are checked on a CPU only,
            because a check would wait for a GPU. There, wrong offsets give wrong numbers, but no access out
            of bounds.
        clip_low: The lower clip width: the ratio is clipped below 1 - clip_low; 0 to 1.
        clip_high: The upper clip width: the ratio is clipped above 1 + clip_high; 0 or more.
        kl_weight: The weight of k3 in a token's loss, 0 or more. At 0 the KL is measured, but not in the
            loss: a reference logprob that is not finite then shows in `kl/ref` only.
        aggregation: The aggregation. `token_mean` is the mean over learned tokens. `episode_mean` is the mean
            over episodes of their means (without episodes that have no learned token). `fixed_length` is the
            sum divided by episodes * fixed_length.
        fixed_length: The number of tokens for the aggregation `fixed_length`, and only for it; 1 or more.
        normalizer: A number that replaces the number of learned tokens (`token_mean`), of episodes with a
            learned token (`episode_mean`) or of episodes (`fixed_length`) that the sum is divided by. With
            the number of the whole batch, the losses of its parts (micro-batches, ranks) add up to the
            batch's loss. If gradients are averaged over ranks instead of added, pass it divided by the number
            of ranks.
        num_threads: The number of threads of the C++ version; `torch.get_num_threads()` if None. It does not
            change any bit of the result.

    Returns:
        The loss, the tokens' losses and the metrics.

    Raises:
        InputError: An argument is not as described, or `VRTHINKER_KERNELS` names a version that cannot run.

    Source: the paper's GRPO stage, section 3 (clip 0.2, KL weight 0.01, mean over an episode's sampled
    tokens). Equations and aggregations are in `reference.py`.
    """
    _check_tensors(policy_logprobs, old_logprobs, ref_logprobs, advantages, loss_mask, episode_offsets)
    _check_numbers(clip_low, clip_high, kl_weight, aggregation, fixed_length, normalizer, num_threads)
    loss, token_loss, _, _, metrics = torch.ops.vrthinker.grpo_loss(
        policy_logprobs,
        old_logprobs,
        ref_logprobs,
        advantages,
        loss_mask,
        episode_offsets,
        float(clip_low),
        float(clip_high),
        float(kl_weight),
        aggregation,
        fixed_length or 0,
        float(normalizer or 0),
        num_threads or 0,
    )
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    if ref_logprobs is None:
        del named["kl/ref"]
    return GrpoLoss(loss, token_loss, named)


def _check_tensors(
    policy: torch.Tensor,
    old: torch.Tensor,
    ref: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    require_tensors(
        "grpo_loss",
        policy_logprobs=policy,
        old_logprobs=old,
        ref_logprobs=policy if ref is None else ref,
        advantages=advantages,
        loss_mask=mask,
        episode_offsets=offsets,
    )
    if policy.device.type not in ("cpu", "cuda"):
        raise InputError(f"grpo_loss: policy_logprobs: got a tensor on {policy.device}, wanted cpu or cuda")
    logprobs = {"policy_logprobs": policy, "old_logprobs": old}
    if ref is not None:
        logprobs["ref_logprobs"] = ref
    for name, value in logprobs.items():
        if value.dtype not in LOGPROB_DTYPES:
            raise InputError(
                f"grpo_loss: {name}: got dtype {value.dtype}, wanted float32, bfloat16 or float16"
            )
    others = {"advantages": advantages, "loss_mask": mask, "episode_offsets": offsets}
    wanted = {"advantages": torch.float32, "loss_mask": torch.bool, "episode_offsets": torch.int64}
    for name, value in others.items():
        if value.dtype != wanted[name]:
            raise InputError(f"grpo_loss: {name}: got dtype {value.dtype}, wanted {wanted[name]}")
    for name, value in {**logprobs, **others}.items():
        if value.device != policy.device:
            raise InputError(
                f"grpo_loss: {name}: got a tensor on {value.device}, wanted one on {policy.device}, as "
                "policy_logprobs"
            )
        if value.ndim != 1:
            raise InputError(f"grpo_loss: {name}: got shape {list(value.shape)}, wanted one dimension")
    tokens = policy.shape[0]
    for name, value in {**logprobs, "loss_mask": mask}.items():
        if value.shape[0] != tokens:
            raise InputError(
                f"grpo_loss: {name}: got shape {list(value.shape)}, wanted [{tokens}], as policy_logprobs"
            )
    episodes = offsets.shape[0] - 1
    if episodes < 0 or (episodes == 0 and tokens > 0):
        raise InputError(
            f"grpo_loss: episode_offsets: got {episodes + 1} offsets for {tokens} tokens, wanted one "
            "more than there are episodes"
        )
    if advantages.shape[0] != tokens and advantages.shape[0] != episodes:
        raise InputError(
            f"grpo_loss: advantages: got shape {list(advantages.shape)}, wanted [{tokens}] (tokens) or "
            f"[{episodes}] (episodes)"
        )


def _check_numbers(
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    aggregation: Aggregation,
    fixed_length: int | None,
    normalizer: float | None,
    num_threads: int | None,
) -> None:
    require_number("grpo_loss", "clip_low", clip_low, "0 to 1")
    require_number("grpo_loss", "clip_high", clip_high, "a finite number of 0 or more")
    require_number("grpo_loss", "kl_weight", kl_weight, "a finite number of 0 or more")
    if fixed_length is not None:
        require_whole("grpo_loss", "fixed_length", fixed_length, "a whole number of tokens, or None")
    if normalizer is not None:
        require_number("grpo_loss", "normalizer", normalizer, "a finite number above 0, or None")
    if num_threads is not None:
        require_whole("grpo_loss", "num_threads", num_threads, "1 to 1024")
    if not 0 <= clip_low <= 1:
        raise InputError(f"grpo_loss: clip_low: got {clip_low}, wanted 0 to 1")
    for name, value in (("clip_high", clip_high), ("kl_weight", kl_weight)):
        if not 0 <= value < math.inf:
            raise InputError(f"grpo_loss: {name}: got {value}, wanted a finite number of 0 or more")
    if aggregation not in get_args(Aggregation):
        raise InputError(
            f"grpo_loss: aggregation: got {aggregation!r}, wanted one of " + ", ".join(get_args(Aggregation))
        )
    if aggregation == "fixed_length":
        if fixed_length is None or fixed_length < 1:
            raise InputError(f"grpo_loss: fixed_length: got {fixed_length}, wanted 1 or more tokens")
    elif fixed_length is not None:
        raise InputError(
            f"grpo_loss: fixed_length: got {fixed_length}, wanted None with aggregation {aggregation!r}"
        )
    if normalizer is not None and not 0 < normalizer < math.inf:
        raise InputError(f"grpo_loss: normalizer: got {normalizer}, wanted a finite number above 0, or None")
    if num_threads is not None and not 1 <= num_threads <= 1024:
        raise InputError(f"grpo_loss: num_threads: got {num_threads}, wanted 1 to 1024")


def _check_offsets(offsets: torch.Tensor, tokens: int) -> None:
    """Checks offsets on a CPU only, because on a GPU it would wait for the device."""
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != tokens:
        raise InputError(
            f"grpo_loss: episode_offsets: got offsets from {first} to {last}, wanted 0 to {tokens}, the "
            "number of tokens"
        )
    falls = offsets[1:] < offsets[:-1]
    if bool(falls.any()):
        at = int(falls.nonzero()[0, 0])
        raise InputError(
            f"grpo_loss: episode_offsets: got {int(offsets[at + 1])} after {int(offsets[at])}, wanted "
            "ascending offsets"
        )


@torch.library.custom_op("vrthinker::grpo_loss", mutates_args=())
def _grpo_loss_op(
    policy: torch.Tensor,
    old: torch.Tensor,
    ref: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    offsets: torch.Tensor,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    aggregation: str,
    fixed_length: int,
    normalizer: float,
    num_threads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the loss, token losses, the gradient without its scale, the scale and the metrics."""
    device = policy.device
    version = choose_version("grpo_loss", {**native_obstacles(device), "triton": triton_obstacle(device)})
    # DLPack does not accept tensors that require a gradient.
    policy, old, advantages = policy.detach(), old.detach(), advantages.detach()
    ref = None if ref is None else ref.detach()
    inputs: tuple[Any, ...] = (policy, old, ref, advantages, mask, offsets)
    if device.type == "cpu":
        _check_offsets(offsets, policy.shape[0])
    if version == "reference":
        clip: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "kl_weight": kl_weight}
        how = cast(Aggregation, aggregation), fixed_length or None, normalizer or None
        loss, token_loss, metrics = grpo_loss_reference(
            *inputs, **clip, aggregation=how[0], fixed_length=how[1], normalizer=how[2]
        )
        weight, scale = weights_and_scale(mask, offsets, *how)
        return loss, token_loss, grpo_gradient_reference(*inputs, **clip) * weight, scale, metrics
    outputs = _outputs(policy)
    numbers = (1 - clip_low, 1 + clip_high, kl_weight, aggregation, fixed_length, normalizer)
    arguments: tuple[Any, ...] = (*inputs, *outputs, *numbers)
    if version == "triton":
        from vrthinker.kernels.grpo_loss.triton import grpo_loss_triton

        grpo_loss_triton(*arguments)
        return outputs
    import vrthinker._core as _core

    if version == "cuda":
        size = _core.grpo_loss_workspace_bytes(policy.shape[0], offsets.shape[0] - 1)
        workspace = policy.new_empty(size, dtype=torch.uint8)
        stream = torch.cuda.current_stream(device).cuda_stream
        arguments += (workspace, stream)
        _core.grpo_loss_cuda(*arguments)
    else:
        arguments += (num_threads or torch.get_num_threads(),)
        _core.grpo_loss_cpu(*arguments)
    return outputs


def _outputs(
    policy: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def new(*shape: int) -> torch.Tensor:
        return policy.new_empty(shape, dtype=torch.float32)

    tokens = policy.shape[0]
    return new(), new(tokens), new(tokens), new(), new(len(METRICS))


@_grpo_loss_op.register_fake
def _grpo_loss_fake(
    policy: torch.Tensor, *_others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(policy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    loss, token_loss, gradient, scale, metrics = output
    del loss
    ctx.policy_dtype = inputs[0].dtype
    ctx.save_for_backward(gradient, scale)
    ctx.mark_non_differentiable(token_loss, gradient, scale, metrics)


def _backward(ctx: Any, grad_loss: torch.Tensor, *_grads: object) -> tuple[torch.Tensor | None, ...]:
    gradient, scale = ctx.saved_tensors
    # The op's 12 other inputs get no gradient.
    return ((gradient * (grad_loss * scale)).to(ctx.policy_dtype), *(None,) * 12)


_grpo_loss_op.register_autograd(_backward, setup_context=_setup_context)
