"""The optimizer of every stage, and its settings: AdamW, or Muon for a judge trained from random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from vrthinker.errors import InputError
from vrthinker.train.loop.muon import Muon


class AdamWSettings(BaseModel):
    """The settings of AdamW. The paper only states the learning rate: all of these are ours."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    kind: Literal["adamw"] = "adamw"
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

    @model_validator(mode="before")
    @classmethod
    def _is_asked_of_its_own(cls, values: Any) -> Any:
        """Says which kind a setting belongs to that this kind would have to ignore."""
        if isinstance(values, Mapping):
            for name in sorted(MuonSettings.model_fields.keys() - cls.model_fields.keys()):
                if name in values:
                    raise ValueError(f"got {name} with kind adamw, allowed with kind muon only")
        return values


class MuonSettings(AdamWSettings):
    """The settings of Muon, and of AdamW for what Muon does not move. It is for training from random weights.

    Muon updates the weights of linear layers by orthogonal steps. The rest (embeddings, output head, norms,
    biases, convolutions) is updated by AdamW (docs/log.md).
    """

    kind: Literal["muon"] = "muon"  # type: ignore[assignment]
    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the mean of the gradients, for weights that Muon updates."""
    matrix_rate: float = Field(1.0, gt=0.0)
    """Learning rate of the weights that Muon updates, as a multiple of the others' rate."""


def _kind(values: Any) -> str | None:
    """The kind that settings name, `adamw` if they name none."""
    kind = values.get("kind", "adamw") if isinstance(values, Mapping) else getattr(values, "kind", None)
    return kind if isinstance(kind, str) and kind in ("adamw", "muon") else None


OptimizerSettings = Annotated[
    Annotated[AdamWSettings, Tag("adamw")] | Annotated[MuonSettings, Tag("muon")],
    Discriminator(
        _kind,
        custom_error_type="optimizer_kind",
        custom_error_message="kind: allowed: adamw or muon, in a mapping of settings",
    ),
]
"""The settings of either optimizer. `kind` chooses, and a setting that the chosen one lacks is refused."""


def make_optimizer(model: torch.nn.Module, settings: AdamWSettings | MuonSettings) -> torch.optim.AdamW:
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
    muon = settings if isinstance(settings, MuonSettings) else None
    matrices = set() if muon is None else _hidden_matrices(model)
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
    if muon is None:
        return torch.optim.AdamW([group for group in groups if group["params"]], **common)
    groups = [{**group, "orthogonal": False} for group in groups]
    groups.append(
        {
            "params": [p for _, p in trainable if p in matrices],
            "weight_decay": settings.weight_decay,
            "orthogonal": True,
            "momentum": muon.momentum,
            "lr_scale": muon.matrix_rate,
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
