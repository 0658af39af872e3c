"""The op `group_advantage`. It checks its arguments, picks a version, and is registered with `torch.library`.

The op is registered as `vrthinker::group_advantage` through a plain `torch.library.Library`. A call through
`torch.library.custom_op` would cost 10 us more, which is as much as the op itself takes for 512 episodes. The
op has no gradient, because advantages are constants of the loss.

Invariant: on a GPU, the host never waits for the device. For that reason values are checked on the tensors'
device: on a CPU before anything is written, with an error; on a GPU by the kernel, which counts bad values in
`status`.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any, NamedTuple

import torch

from vrthinker.errors import InputError
from vrthinker.kernels import Version, choose_version, native_obstacles, triton_obstacle
from vrthinker.kernels.arguments import require_number, require_tensors, require_whole
from vrthinker.kernels.group_advantage.reference import (
    MAX_REWARD,
    METHODS,
    default_eps,
    group_advantage_reference,
)

MIN_EPS = 1e-30
"""The smallest eps: below it, a group of almost equal rewards could overflow."""


class GroupAdvantages(NamedTuple):
    """The result of `group_advantage`.

    Attributes:
        advantages: The advantages in the rewards' dtype, `[episodes]`, or `[n_tokens]` if token offsets were
            given.
        zero_variance: True for groups without a signal, whose advantages are exactly 0, bool `[groups]`.
        status: The number of bad values, int32 `[1]`. Always 0 on a CPU, where a bad value raises.
    """

    advantages: torch.Tensor
    zero_variance: torch.Tensor
    status: torch.Tensor


def group_advantage(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    method: str = "grpo",
    ddof: int = 1,
    eps: float | None = None,
    token_offsets: torch.Tensor | None = None,
    n_tokens: int | None = None,
    check: bool = False,
) -> GroupAdvantages:
    """Turns the rewards of grouped episodes into advantages, in one launch. `reference.py` specifies it.

    With s_i the rewards of a group's valid episodes:

    - `grpo`: (s_i - mean) / (std + eps)
    - `dr_grpo`: s_i - mean
    - `rloo`: s_i - mean of the other valid episodes
    - `batch_std`: (s_i - mean) / (std over all valid rewards of the batch + eps)
    - `reinforce_plus_plus`: (s_i - mean) / sqrt(variance of all (s_j - mean of j's group) of the batch + eps)

    Groups with fewer than two valid episodes, or whose rewards are all equal, get exactly 0. The C++ and the
    CUDA version give the same bits. Those of the other versions may differ in the last bit.

    Args:
        rewards: The rewards, float32 or float64 `[episodes]`, any stride, on a CPU or a CUDA device, within
            -1e38 to 1e38.
        group_offsets: The first episode of each group, int64 `[groups + 1]`, ascending from 0 to `episodes`:
            group g has the episodes `[group_offsets[g], group_offsets[g + 1])`.
        valid: False for an episode whose reward is null (and may be NaN), bool `[episodes]`. Such an episode
            is not part of its group's statistics and gets 0. None means that all are valid.
        method: The method, one of the five above.
        ddof: The kind of standard deviation: 1 for the sample's, 0 for the population's.
        eps: The number that is added to the standard deviation, or under `reinforce_plus_plus` to the
            variance, at least 1e-30. None means 1e-6, or under `reinforce_plus_plus` verl's 1e-8.
        token_offsets: The first token of each episode, int64 `[episodes + 1]`, ascending within 0 to
            `n_tokens`. Every token of an episode gets the episode's advantage, all other tokens 0.
        n_tokens: The length of the result, required with `token_offsets` and only then. (Reading it from the
            device would wait for it.)
        check: Whether to wait for the result on a GPU and to raise if a value was bad. Not allowed inside a
            compiled graph.

    Returns:
        The advantages, the groups without a signal, and the status. On a GPU a bad reward makes its group's
        advantages NaN (where the std is the batch's, those of every group with a signal), a bad offset at
        least those of its ranges, and `status` counts them. Nothing is read or written out of bounds.

    Raises:
        InputError: An argument is not as described, a value is bad (on a CPU, or with `check`), or
            `VRTHINKER_KERNELS` names a version that cannot run.

    Source:
        Method, section 5, stage 3: A_i = (s_i - mean) / (std + 1e-6), with ddof 1 as TRL and verl.
        `reference.py` names the sources of the other methods.
    """
    eps = default_eps(method) if eps is None else eps
    _check(rewards, group_offsets, valid, method, ddof, eps, token_offsets, n_tokens)
    if rewards.requires_grad:
        rewards = rewards.detach()
    result = GroupAdvantages(
        *torch.ops.vrthinker.group_advantage.default(
            rewards, group_offsets, valid, method, ddof, eps, token_offsets, n_tokens or 0
        )
    )
    if check and rewards.is_cuda and (bad := int(result.status)) > 0:
        raise InputError(
            f"group_advantage: got {bad} bad values, wanted rewards within -1e38 to 1e38 in every valid "
            f"episode, group_offsets that ascend from 0 to {rewards.shape[0]}, and token_offsets that ascend "
            "within n_tokens"
        )
    return result


def _check(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    valid: torch.Tensor | None,
    method: str,
    ddof: int,
    eps: float,
    token_offsets: torch.Tensor | None,
    n_tokens: int | None,
) -> None:
    """Checks everything that can be checked without reading a tensor's values."""
    if method not in METHODS:
        raise _refusal("method", repr(method), ", ".join(METHODS))
    require_number("group_advantage", "eps", eps, "a finite number of at least 1e-30")
    require_tensors("group_advantage", rewards=rewards, group_offsets=group_offsets)
    if valid is not None:
        require_tensors("group_advantage", valid=valid)
    if token_offsets is not None:
        require_tensors("group_advantage", token_offsets=token_offsets)
    if n_tokens is not None:
        require_whole("group_advantage", "n_tokens", n_tokens)
    if ddof not in (0, 1):
        raise _refusal("ddof", ddof, "0 or 1")
    if not (MIN_EPS <= eps < math.inf):
        raise _refusal("eps", eps, f"a finite number of at least {MIN_EPS:g}")
    if rewards.dtype not in (torch.float32, torch.float64):
        raise _refusal("rewards", f"dtype {rewards.dtype}", "torch.float32 or torch.float64")
    device = rewards.device
    if device.type not in ("cpu", "cuda"):
        raise _refusal("rewards", f"a tensor on {device}", "cpu or cuda")
    if rewards.ndim != 1:
        raise _refusal("rewards", f"shape {list(rewards.shape)}", "[episodes]")
    episodes = rewards.shape[0]
    _check_tensor("group_offsets", group_offsets, torch.int64, device)
    if group_offsets.ndim != 1 or group_offsets.shape[0] < (2 if episodes > 0 else 1):
        wanted = f"[groups + 1], with at least one group for {episodes} episodes"
        raise _refusal("group_offsets", f"shape {list(group_offsets.shape)}", wanted)
    if valid is not None:
        _check_tensor("valid", valid, torch.bool, device)
        if valid.ndim != 1 or valid.shape[0] != episodes:
            raise _refusal("valid", f"shape {list(valid.shape)}", f"[episodes] = [{episodes}]")
    if (token_offsets is None) != (n_tokens is None):
        raise _refusal("n_tokens", n_tokens, "a number if token_offsets are given, None if not")
    if token_offsets is not None and n_tokens is not None:
        _check_tensor("token_offsets", token_offsets, torch.int64, device)
        if token_offsets.ndim != 1 or token_offsets.shape[0] != episodes + 1:
            shape = list(token_offsets.shape)
            raise _refusal("token_offsets", f"shape {shape}", f"[episodes + 1] = [{episodes + 1}]")
        if n_tokens < 0:
            raise _refusal("n_tokens", n_tokens, "0 or more")


def _check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise _refusal(name, f"dtype {tensor.dtype}", str(dtype))
    if tensor.device != device:
        raise _refusal(name, f"a tensor on {tensor.device}", f"the rewards' device, {device}")


def _refusal(argument: str, got: object, wanted: str) -> InputError:
    return InputError(f"group_advantage: {argument}: got {got}, wanted {wanted}")


def _refuse_bad_values(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    valid: torch.Tensor | None,
    token_offsets: torch.Tensor | None,
    n_tokens: int,
) -> None:
    """Checks values on a CPU, for versions that do not check them (the C++ version does, in these words)."""
    episodes = rewards.shape[0]
    _refuse_bad_offsets("group_offsets", group_offsets, f"from 0 to {episodes}, the episodes", episodes, True)
    if token_offsets is not None:
        wanted = f"within 0 to {n_tokens}, n_tokens"
        _refuse_bad_offsets("token_offsets", token_offsets, wanted, n_tokens, False)
    bad = ~(rewards.abs() <= MAX_REWARD)
    if valid is not None:
        bad &= valid
    if bad.any():
        i = int(bad.nonzero()[0])
        wanted = "a number within -1e38 to 1e38 in every valid episode (mark the others in `valid`)"
        raise _refusal(f"rewards[{i}]", float(rewards[i]), wanted)


def _refuse_bad_offsets(name: str, offsets: torch.Tensor, wanted: str, limit: int, covers: bool) -> None:
    values = offsets.tolist()
    for k, value in enumerate(values):
        misplaced = not (values[k - 1] if k > 0 else 0) <= value <= limit or value < 0
        misses_an_end = covers and ((k == 0 and value != 0) or (k == len(values) - 1 and value != limit))
        if misplaced or misses_an_end:
            raise _refusal(f"{name}[{k}]", value, f"offsets that ascend {wanted}")


_library: Any = torch.library.Library("vrthinker", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "group_advantage(Tensor rewards, Tensor group_offsets, Tensor? valid, str method, int ddof, float eps, "
    "Tensor? token_offsets, SymInt n_tokens) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _empty_result(
    rewards: torch.Tensor, group_offsets: torch.Tensor, token_offsets: torch.Tensor | None, n_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    length = rewards.shape[0] if token_offsets is None else n_tokens
    advantages = torch.empty(length, dtype=rewards.dtype, device=rewards.device)
    zero_variance = torch.empty(group_offsets.shape[0] - 1, dtype=torch.bool, device=rewards.device)
    return advantages, zero_variance


@functools.cache
def _obstacles(device: torch.device, _interpreted: str | None) -> dict[Version, str | None]:
    """The obstacles, cached: checking whether Triton is installed takes longer than the op."""
    return {**native_obstacles(device), "triton": triton_obstacle(device)}


def _group_advantage(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    valid: torch.Tensor | None,
    method: str,
    ddof: int,
    eps: float,
    token_offsets: torch.Tensor | None,
    n_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rewards = rewards.detach() if rewards.requires_grad else rewards  # as DLPack requires
    device = rewards.device
    version = choose_version("group_advantage", _obstacles(device, os.environ.get("TRITON_INTERPRET")))
    if device.type == "cpu" and version != "cpu":
        _refuse_bad_values(rewards, group_offsets, valid, token_offsets, n_tokens)
    if version == "reference":
        return group_advantage_reference(
            rewards,
            group_offsets,
            valid=valid,
            method=method,
            ddof=ddof,
            eps=eps,
            token_offsets=token_offsets,
            n_tokens=n_tokens,
        )
    advantages, zero_variance = _empty_result(rewards, group_offsets, token_offsets, n_tokens)
    tensors = (rewards, group_offsets, valid, token_offsets, advantages, zero_variance)
    if version == "cpu":
        import vrthinker._core as _core

        try:
            _core.group_advantage_cpu(*tensors, method, ddof, eps, torch.get_num_threads())
        except ValueError as error:
            raise InputError(str(error)) from None
        return advantages, zero_variance, torch.zeros(1, dtype=torch.int32, device="cpu")
    status = torch.empty(1, dtype=torch.int32, device=device)
    if version == "cuda":
        import vrthinker._core as _core

        stream = torch.cuda.current_stream(device).cuda_stream
        _core.group_advantage_cuda(*tensors, status, method, ddof, eps, stream)
    else:
        from vrthinker.kernels.group_advantage.triton import group_advantage_triton

        group_advantage_triton(*tensors, status, method, ddof, eps)
    return advantages, zero_variance, status


@torch.library.register_fake("vrthinker::group_advantage", lib=_library)  # type: ignore[untyped-decorator]
def _fake(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    valid: torch.Tensor | None,
    method: str,
    ddof: int,
    eps: float,
    token_offsets: torch.Tensor | None,
    n_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    advantages, zero_variance = _empty_result(rewards, group_offsets, token_offsets, n_tokens)
    return advantages, zero_variance, torch.empty(1, dtype=torch.int32, device=rewards.device)


_library.impl("group_advantage", _group_advantage, "CPU")
_library.impl("group_advantage", _group_advantage, "CUDA")
