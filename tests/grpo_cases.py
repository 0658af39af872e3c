"""Random batches for the tests of `grpo_loss`, and what its results must agree with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from vrthinker.kernels.grpo_loss.op import GrpoLoss, grpo_loss
from vrthinker.kernels.grpo_loss.reference import METRICS, grpo_loss_reference

WAYS: list[dict[str, Any]] = [
    {"aggregation": "token_mean"},
    {"aggregation": "episode_mean"},
    {"aggregation": "fixed_length", "fixed_length": 7},
    {"aggregation": "token_mean", "normalizer": 31.0},
    {"aggregation": "episode_mean", "normalizer": 9.5},
    {"aggregation": "fixed_length", "fixed_length": 3, "normalizer": 12.0},
]

# Exponentials within 2 ulp of each other (2.4e-7), carried through products of a few numbers near 1; k3 is a
# difference of such numbers, so its error is absolute. Sums of up to 10^5 terms, added in other orders.
RTOL, ATOL = 2e-5, 2e-6


@dataclass
class Batch:
    """Arguments of `grpo_loss`; what is not learned is NaN or infinite."""

    policy: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor | None
    advantages: torch.Tensor
    mask: torch.Tensor
    offsets: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, device: str = "cpu") -> tuple[torch.Tensor | None, ...]:
        tensors = (self.policy, self.old, self.ref, self.advantages, self.mask, self.offsets)
        return tuple(None if t is None else t.detach().to(device) for t in tensors)


def random_batch(
    seed: int,
    lengths: Sequence[int],
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,) * 3,
    per_episode: bool = True,
    with_ref: bool = True,
    learned: float = 0.8,
    stride: int = 1,
    **options: Any,
) -> Batch:
    """A fresh batch; every second tensor lies in memory with the stride, the others with the stride + 1."""
    generator = torch.Generator().manual_seed(seed)

    def spread(values: torch.Tensor, step: int) -> torch.Tensor:
        memory = torch.full((len(values), step), 1).to(values.dtype)
        memory[:, step - 1] = values
        return memory[:, step - 1]

    tokens = sum(lengths)
    mask = torch.rand(tokens, generator=generator) < learned
    policy = -3 * torch.rand(tokens, generator=generator)
    old = policy + 0.3 * torch.randn(tokens, generator=generator)
    ref = policy + 0.5 * torch.randn(tokens, generator=generator)
    advantages = torch.randn(len(lengths) if per_episode else tokens, generator=generator)
    advantages[torch.rand(len(advantages), generator=generator) < 0.2] = 0
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    trash = torch.tensor([torch.nan, torch.inf, -torch.inf])
    junk = trash[torch.randint(3, (tokens,), generator=generator)]
    columns = [
        spread(torch.where(mask, values, junk).to(dtype), stride + i % 2)
        for i, (values, dtype) in enumerate(zip((policy, old, ref), dtypes, strict=True))
    ]
    if not per_episode:
        advantages = torch.where(mask, advantages, torch.nan)
    return Batch(
        columns[0],
        columns[1],
        columns[2] if with_ref else None,
        spread(advantages, stride + 1),
        spread(mask, stride),
        spread(offsets, stride),
        options,
    )


def reference_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, token losses, metrics, and autograd's gradient of the loss, all by the reference."""
    policy, *others = batch.arguments()
    assert policy is not None
    policy.requires_grad_()
    loss, token_loss, metrics = grpo_loss_reference(policy, *others, **batch.options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, policy)
    return loss.detach(), token_loss, metrics, gradient


def run(batch: Batch, device: str = "cpu", **options: Any) -> tuple[GrpoLoss, torch.Tensor]:
    """The op's result and its gradient, on the CPU."""
    policy, *others = batch.arguments(device)
    assert policy is not None
    policy.requires_grad_()
    result = grpo_loss(policy, *others, **batch.options, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(result.loss, policy)
    return result, gradient.cpu()


GAPS = torch.cat([torch.logspace(-9, 1.5, 4000), torch.linspace(0.3, 0.4, 1000)])
"""Sizes of ref - policy over orders of magnitude, and about where versions change their formula. Below 1e-9
double precision loses digits itself."""


def assert_kl_is_right_near_zero(device: str = "cpu", *, rtol: float = 2e-6) -> None:
    """k3 and its slope against double precision, relative to their own size."""
    gaps = torch.cat([GAPS, -GAPS])
    result, slope = run(_only_kl(gaps), device)
    exact = gaps.double().expm1()
    near = {"rtol": rtol, "atol": 0.0}
    torch.testing.assert_close(result.token_loss.cpu().double(), exact - gaps.double(), **near)
    torch.testing.assert_close(slope.double(), -exact, **near)
    # Two computations of the same policy: what a run begins with.
    noise = 2e-4 * torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    mean = run(_only_kl(noise), device)[0].metrics["kl/ref"].item()
    wanted = (noise.double().expm1() - noise.double()).mean().item()
    assert abs(mean - wanted) <= 1e-5 * wanted


def _only_kl(gaps: torch.Tensor) -> Batch:
    """Tokens whose reference logprobs differ by the gaps, and whose loss is their k3."""
    zeros, learned = torch.zeros_like(gaps), torch.ones_like(gaps, dtype=torch.bool)
    options = {"aggregation": "token_mean", "normalizer": 1.0, "kl_weight": 1.0}
    return Batch(zeros, zeros, gaps, zeros, learned, torch.tensor([0, len(gaps)]), options)


def assert_what_is_not_finite_shows(
    device: str = "cpu",
    *,
    advantages: Sequence[float] = (1.0, -1.0, 0.0),
    kl_weights: Sequence[float] = (0.0, 0.01),
) -> None:
    """Every value that is not finite in every column of a learned token, with any sign of the advantage."""
    columns = ("policy", "old", "ref", "advantages")
    for where, value, advantage, kl_weight in product(
        columns, (torch.nan, torch.inf, -torch.inf), advantages, kl_weights
    ):
        batch = random_batch(1, (4, 3), per_episode=False, learned=1.0, kl_weight=kl_weight)
        batch.advantages[5] = advantage
        getattr(batch, where)[5] = value
        result, gradient = run(batch, device)
        case = f"{where} {value}, advantage {advantage}, KL weight {kl_weight}"
        counts = where != "ref" or kl_weight != 0
        assert bool(result.loss.isnan()) == counts, case
        wanted = [[5]] if counts else []
        assert result.token_loss.cpu().isnan().nonzero().tolist() == wanted, case
        assert gradient.isnan().nonzero().tolist() == wanted, case
        assert counts or not result.metrics["kl/ref"].isfinite(), case
        loss, token_loss, _, slope = reference_of(batch)
        assert bool(loss.isnan()) == counts, case
        assert token_loss.isnan().nonzero().tolist() == wanted, case
        assert slope.isnan().nonzero().tolist() == wanted, case


def assert_equals_reference(batch: Batch, device: str = "cpu", **options: Any) -> None:
    loss, token_loss, metrics, gradient = reference_of(batch)
    result, found = run(batch, device, **options)
    torch.testing.assert_close(result.loss.detach().cpu(), loss, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(result.token_loss.cpu(), token_loss, rtol=RTOL, atol=ATOL)
    assert found.dtype == batch.policy.dtype
    # A gradient in half precision may round to the neighbour.
    half = 0.0 if found.dtype == torch.float32 else 2 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), gradient.float(), rtol=RTOL + half, atol=1e-7)
    names = METRICS if batch.ref is not None else METRICS[:-1]
    assert tuple(result.metrics) == names
    measured = torch.stack(list(result.metrics.values())).cpu()
    torch.testing.assert_close(measured, metrics[: len(names)], rtol=RTOL, atol=ATOL)
