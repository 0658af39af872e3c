"""The optimizer of every stage, and its settings: AdamW, or Muon for a judge trained from random weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from vrthinker.errors import InputError
from vrthinker.train.loop.muon import Muon


class OptimizerSettings(BaseModel):
    """The settings of AdamW and Muon. The paper only states the learning rate: all of these are ours."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    kind: Literal["adamw", "muon"] = "adamw"
    """The algorithm. `muon` updates the weights of linear layers by orthogonal steps, and the rest
    (embeddings, the output head, norms, biases, convolutions) by AdamW. It is for training from random
    weights: docs/log.md."""
    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the mean of the gradients, for weights that `muon` updates."""
    matrix_rate: float = Field(1.0, gt=0.0)
    """Learning rate of the weights that `muon` updates, as a multiple of the others' rate."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """AdamW's decay of the mean of the gradients."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """AdamW's decay of the mean of squared gradients. 0.95 averages over about 20 steps. Torch's 0.999 would
    average over 1000, more than the cold start has."""
    eps: float = Field(1e-8, gt=0.0)
    """Number that AdamW adds to the square root of the mean square."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay, of matrices only. Fine-tuning starts from weights that are worth keeping, so
    the default is none."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """The largest norm of a step's gradient over all parameters. Larger gradients are scaled down to it."""


def make_optimizer(model: torch.nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Makes the optimizer of a model's trainable parameters. Tied weights are included once.

    Norms, biases and other parameters with fewer than two dimensions are not decayed. The learning rate is 0
    until it is set on the parameter groups.

    Args:
        model: The model. Its trainable parameters are in fp32, whatever dtype its forward computes in.
        settings: The settings of the optimizer.

    Raises:
        InputError: Nothing is trainable, or a trainable parameter is not fp32 or fp64.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise InputError("model: got no trainable parameter; set requires_grad on what is to be trained")
    for name, parameter in trainable:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{name}: got trainable {str(parameter.dtype).removeprefix('torch.')}, allowed: float32 or "
                "float64 (a step of 1e-6 is lost in the rounding of a half-precision weight); load the "
                "model in float32 and compute its forward under autocast"
            )
    matrices = _hidden_matrices(model) if settings.kind == "muon" else set()
    decayed = [p for _, p in trainable if p.dim() >= 2 and p not in matrices]
    kept = [p for _, p in trainable if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    common: dict[str, Any] = {
        "lr": 0.0,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        # Without `fused`, AdamW on a GPU needs memory for another copy of the weights.
        "fused": True if all(p.is_cuda for _, p in trainable) else None,
    }
    if settings.kind == "adamw":
        return torch.optim.AdamW([group for group in groups if group["params"]], **common)
    groups = [{**group, "orthogonal": False} for group in groups]
    groups.append(
        {
            "params": [p for _, p in trainable if p in matrices],
            "weight_decay": settings.weight_decay,
            "orthogonal": True,
            "momentum": settings.momentum,
            "lr_scale": settings.matrix_rate,
        }
    )
    return Muon([group for group in groups if group["params"]], **common)


def _hidden_matrices(model: torch.nn.Module) -> set[torch.Tensor]:
    """The weights of linear layers, without the embeddings and the output head.

    Those two are tables with a row per token, and most of their rows get no gradient in a step.
    """
    tables: set[torch.Tensor] = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        tables.add(head.weight)
    linear: set[torch.Tensor] = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
    return {weight for weight in linear - tables if weight.requires_grad}
