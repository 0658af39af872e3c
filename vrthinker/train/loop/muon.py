"""The Muon optimizer: momentum steps made orthogonal for matrices, and AdamW for everything else.

A matrix's step is the polar factor of its momentum, found by five Newton-Schulz iterations, so that every
direction in which the gradient points moves equally far. With the scale of Liu et al., a step is about as
large as AdamW's, so the same learning rates can be used.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with its
coefficients; J. Liu et al., "Muon is scalable for LLM training" (2025), the scale 0.2 * sqrt(longer side).

`torch.optim.Muon` implements the same rule, and tests compare with it. It iterates in bfloat16, which a CPU
without bfloat16 instructions computes several times slower than float32, and it only accepts matrices. The
iteration here is in float32, and matrices of one shape are processed together.

Of a sharded model, every process collects the whole matrices, computes all steps, and applies its own rows.
Muon is meant for small models, for which that is cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7
_RMS_OF_ADAMW = 0.2


class Muon(torch.optim.AdamW):
    """AdamW, except in parameter groups with `orthogonal=True`, whose parameters must all be matrices.

    Groups of matrices have `momentum`, `weight_decay` and `lr_scale` (a factor on the learning rate). Their
    state is `exp_avg`, the mean of the gradients.

    Args:
        groups: The parameter groups, each with the key `orthogonal`.
        lr: The initial learning rate of all parameter groups, as in AdamW.
        betas: AdamW's decay rates, for groups that are not orthogonal.
        eps: AdamW's epsilon, for groups that are not orthogonal.
        fused: AdamW's choice of a fused implementation, for groups that are not orthogonal.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool | None = None,
    ) -> None:
        for group in groups:
            wrong = [tuple(p.shape) for p in group["params"] if group["orthogonal"] and p.dim() != 2]
            if wrong:
                raise ValueError(f"orthogonal: got a parameter of shape {wrong[0]}, allowed: matrices")
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Does one step. The gradients of matrices are consumed: they are None afterwards."""
        if closure is not None:
            raise ValueError("closure: got one, allowed: None; call backward before the step")
        for group in self.param_groups:
            if group["orthogonal"]:
                self._step_matrices(group)
                for parameter in group["params"]:
                    parameter.grad = None  # so that AdamW skips this parameter
        return super().step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        rate = group["lr"] * group["lr_scale"]
        by_shape: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            mean = state["exp_avg"].lerp_(parameter.grad, 1 - group["momentum"])
            # Nesterov momentum: the mean as if the same gradient came once more.
            ahead = parameter.grad.lerp(mean, group["momentum"])
            whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
            by_shape.setdefault((*parameter.shape,), []).append((parameter, whole))
        for shape, members in by_shape.items():
            steps = orthogonalize(torch.stack([ahead for _, ahead in members]))
            scale = _RMS_OF_ADAMW * max(shape) ** 0.5
            for (parameter, _), whole in zip(members, steps, strict=True):
                step = whole
                if isinstance(parameter, DTensor):  # with None, nothing is sent: each process has all of it
                    mesh, placements = parameter.device_mesh, parameter.placements
                    step = distribute_tensor(whole, mesh, placements, src_data_rank=None)
                parameter.mul_(1 - rate * group["weight_decay"]).add_(step, alpha=-rate * scale)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Makes matrices approximately orthogonal: singular values become 0.7 to 1.2, but zeros stay zeros.

    Args:
        matrices: The matrices, float32 or float64 `[batch, rows, columns]`.

    Returns:
        Matrices of the same shape and dtype, with the same singular vectors.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    result: torch.Tensor = matrices.mT if tall else matrices
    result = result / (result.norm(dim=(-2, -1), keepdim=True) + _EPS)
    first, second, third = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = result @ result.mT
        result = first * result + (second * gram + third * gram @ gram) @ result
    return result.mT if tall else result
