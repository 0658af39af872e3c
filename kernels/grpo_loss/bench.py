"""Microbenchmark of `grpo_loss`: forward and backward of a batch of episodes, versions side by side.

The competitors do what one optimiser step needs: the loss with its metrics, and the gradient of the policy's
logprobs. `reference` is unfused torch with autograd. `torch.compile` is the same code compiled, with k3 in
float32 as a trainer would write it, where the specification has double. Liger's fused loss is no competitor,
because it starts from logits and does not accept logprobs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from vrthinker.kernels import ENVIRONMENT_VARIABLE, Version, native_obstacles, triton_obstacle
from vrthinker.kernels.grpo_loss.op import grpo_loss
from vrthinker.kernels.grpo_loss.reference import METRICS, grpo_loss_reference
from vrthinker.kernels.measure import Comparison, why_not_compiled

Result = tuple[torch.Tensor, ...]
"""The loss, the gradient of the policy's logprobs, then the metrics."""

Compute = Callable[..., tuple[torch.Tensor, Sequence[torch.Tensor]]]
"""A function from the op's arguments to the loss and the metrics."""

RTOL, ATOL = 2e-5, 1e-8
"""Tolerances: exponentials differ by a few ulps, and sums have other orders. Gradients are about 1e-6."""


def comparisons(device: str, seed: int) -> Iterator[Callable[[], Comparison]]:
    """The cases: the method's 64 groups of 8 episodes, with and without the KL term.

    Args:
        device: The device, `cpu` or `cuda`.
        seed: The seed of the random data.

    Yields:
        One function per case, which makes its data.
    """
    for with_kl in (True, False):
        yield partial(comparison, device, seed, episodes=512, mean_length=400, with_kl=with_kl)


def comparison(
    device: str, seed: int, *, episodes: int, mean_length: int, with_kl: bool, compiled: bool = True
) -> Comparison:
    """One case, ready to be timed.

    Args:
        device: The device, `cpu` or `cuda`.
        seed: The seed of the random data.
        episodes: The number of episodes.
        mean_length: The mean number of tokens of an episode. Lengths range from 1 to twice the mean.
        with_kl: Whether there are reference logprobs.
        compiled: Whether `torch.compile` of the reference takes part (it takes seconds to compile).
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 2 * mean_length, (episodes,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = int(offsets[-1])
    policy = -3 * torch.rand(tokens, generator=generator)
    old = policy + 0.2 * torch.randn(tokens, generator=generator)
    ref = policy + 0.2 * torch.randn(tokens, generator=generator) if with_kl else None
    advantages = torch.randn(episodes, generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.95
    inputs = tuple(None if t is None else t.to(device) for t in (policy, old, ref, advantages, mask, offsets))

    def run(compute: Compute) -> Result:
        leaf = inputs[0].detach().requires_grad_()  # type: ignore[union-attr]
        loss, metrics = compute(leaf, *inputs[1:])
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient, *metrics

    def reference(
        *arguments: Any, kl_dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        loss, _, metrics = grpo_loss_reference(*arguments, kl_dtype=kl_dtype)
        return loss, metrics.unbind()[: len(METRICS) if with_kl else -1]

    competitors: dict[str, Callable[[], Result]] = {"reference": lambda: run(reference)}
    if compiled and why_not_compiled(device) is None:
        graph: Compute = torch.compile(partial(reference, kl_dtype=torch.float32), fullgraph=True)
        competitors["torch.compile"] = lambda: run(graph)
    for version in _versions(device):
        competitors[version] = partial(_run_version, version, run)

    def check() -> None:
        wanted = competitors["reference"]()
        for name, compete in competitors.items():
            for found, value in zip(compete(), wanted, strict=True):
                if not torch.allclose(found, value, rtol=RTOL, atol=ATOL):
                    raise RuntimeError(
                        f"grpo_loss: {name} differs from the reference by "
                        f"{float((found - value).abs().max()):.3g}, seed {seed}"
                    )

    # Logprobs, mask, offsets and advantages are read; token losses and gradients are written.
    read = sum(t.nbytes for t in inputs if t is not None)
    kl = "with KL" if with_kl else "without KL"
    return Comparison(
        op="grpo_loss",
        case=f"{episodes} episodes of {mean_length} tokens on average, float32, {kl}, forward and backward",
        bytes_moved=read + 2 * 4 * tokens,
        competitors=competitors,
        check=check,
        facts={
            "episodes": episodes,
            "tokens": tokens,
            "with_kl": with_kl,
            "dtype": "float32",
            "without_torch_compile": why_not_compiled(device),
        },
    )


def _versions(device: str) -> list[Version]:
    """The fast versions that run here, without Triton's interpreter."""
    place = torch.device(device)
    obstacles: dict[Version, str | None] = {**native_obstacles(place), "triton": triton_obstacle(place)}
    if device == "cpu":
        del obstacles["triton"]
    return [name for name, obstacle in obstacles.items() if name != "reference" and obstacle is None]


def _op(*arguments: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    result = grpo_loss(*arguments)
    return result.loss, list(result.metrics.values())


def _run_version(version: Version, run: Callable[[Compute], Result]) -> Result:
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = version
    try:
        return run(_op)
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before
