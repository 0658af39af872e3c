"""LoRA adapters: a folder with small weights that are added to those of another checkpoint.

An adapter folder is a checkpoint folder in which `adapter_config.json` and `adapter_model.safetensors` (the
format of peft) stand in place of the weights. Its configuration names the checkpoint that it belongs to. The
adapter is merged into that checkpoint's weights when it is loaded: W + scale * B @ A, so that judging costs
nothing more, and peft is not needed.

An adapter comes from anywhere, like every other checkpoint. Only plain LoRA of linear layers is loaded, and
everything is checked before the first weight is changed: names, shapes, the rank, and that all is finite. An
adapter of a head that is tied to the embedding is refused, because merging it would change the embedding too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrthinker.bounded_files import read_json
from vrthinker.errors import InputError, one_line

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_MAX_CONFIG_BYTES = 4 << 20
_MAX_RANK = 4096
_PLAIN: dict[str, tuple[object, ...]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "use_rslora": (None, False),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
"""What the configuration must say about each variant of LoRA, so that the weights mean B @ A and no more. The
other ways to draw initial weights (PiSSA, OLoRA, CorDA, LoftQ) also change the base's weights; peft says True
for an adapter that it saved as a difference from the unchanged base."""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose configuration was checked.

    Attributes:
        folder: The folder.
        base: The checkpoint that it belongs to: a folder, or a hub id.
        scale: The factor on B @ A.
        rank: The inner dimension of B @ A.
    """

    folder: Path
    base: str
    scale: float
    rank: int


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter in a folder; None if the folder has no `adapter_config.json`.

    Raises:
        InputError: The configuration is not that of plain LoRA, or names no base.
    """
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return None
    config = read_json(path, _MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise InputError(f"{ADAPTER_CONFIG}: got no JSON object")
    if (kind := config.get("peft_type")) != "LORA":
        raise InputError(f"{ADAPTER_CONFIG}: peft_type: got {_quoted(kind)}, allowed: LORA")
    for key, allowed in _PLAIN.items():
        if (value := config.get(key)) not in allowed or (value == 0 and value is not False):
            raise InputError(
                f"{ADAPTER_CONFIG}: {key}: got {_quoted(value)}, allowed: none; merge it with peft instead"
            )
    base, rank, alpha = (config.get(key) for key in ("base_model_name_or_path", "r", "lora_alpha"))
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{ADAPTER_CONFIG}: base_model_name_or_path: got {_quoted(base)}, wanted the folder or hub id of "
            "the checkpoint that the adapter belongs to"
        )
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= _MAX_RANK:
        raise InputError(
            f"{ADAPTER_CONFIG}: r: got {_quoted(rank)}, allowed: a whole number from 1 to {_MAX_RANK}"
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e6:
        raise InputError(f"{ADAPTER_CONFIG}: lora_alpha: got {_quoted(alpha)}, allowed: a number")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"no {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG}; other formats are not loaded")
    return Adapter(folder, base, float(alpha) / rank, rank)


def merge_adapter(model: torch.nn.Module, adapter: Adapter) -> None:
    """Adds an adapter to the weights of its base, in place. Nothing is changed unless everything fits.

    Args:
        model: The base model. Products are computed in float32 and then added in the model's dtype.
        adapter: The adapter.

    Raises:
        InputError: A tensor is none of an adapter, belongs to no linear layer or to one whose weight is tied,
            has another shape, or is not finite.
    """
    import torch
    from safetensors import safe_open

    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, framework="pt") as weights:
        names = set(weights.keys())
        targets = sorted({_target(name) for name in names})
        if not targets:
            raise InputError(f"{ADAPTER_WEIGHTS}: has no tensors")
        for target in targets:
            _check_target(target, layers, weights, names, adapter.rank)
            if owners[id(layers[target].weight)] > 1:
                raise InputError(
                    f"{ADAPTER_WEIGHTS}: {one_line(target)}: the base ties this weight to another layer's, "
                    "which merging would change too; merge it with peft instead"
                )
            for name in adapter_names(target):
                if not weights.get_tensor(name).isfinite().all():
                    raise InputError(f"{ADAPTER_WEIGHTS}: {one_line(name)}: has numbers that are not finite")
        with torch.no_grad():
            for target in targets:
                first = weights.get_tensor(f"{_PREFIX}{target}{_A}").float()
                second = weights.get_tensor(f"{_PREFIX}{target}{_B}").float()
                weight = layers[target].weight
                added = (second.to(weight.device) @ first.to(weight.device)) * adapter.scale
                weight.copy_(weight.float() + added)


def adapter_names(merged_name: str) -> tuple[str, str]:
    """The names of A and B in an adapter's file for a linear layer of the model."""
    return f"{_PREFIX}{merged_name}{_A}", f"{_PREFIX}{merged_name}{_B}"


def _target(name: str) -> str:
    """The linear layer that a tensor belongs to."""
    for ending in (_A, _B):
        if name.startswith(_PREFIX) and name.endswith(ending):
            return name.removeprefix(_PREFIX).removesuffix(ending)
    raise InputError(
        f"{ADAPTER_WEIGHTS}: got {one_line(name)}, allowed: {_PREFIX}LAYER{_A} and {_PREFIX}LAYER{_B}"
    )


def _check_target(
    target: str, layers: Mapping[str, torch.nn.Linear], weights: Any, names: set[str], rank: int
) -> None:
    layer = layers.get(target)
    if layer is None:
        raise InputError(f"{ADAPTER_WEIGHTS}: {one_line(target)}: the base has no such linear layer")
    wanted = {_A: [rank, layer.in_features], _B: [layer.out_features, rank]}
    for ending, shape in wanted.items():
        name = f"{_PREFIX}{target}{ending}"
        if name not in names:
            raise InputError(f"{ADAPTER_WEIGHTS}: {one_line(name)}: missing")
        found = weights.get_slice(name)
        if list(found.get_shape()) != shape or found.get_dtype() not in ("F32", "BF16", "F16"):
            raise InputError(
                f"{ADAPTER_WEIGHTS}: {one_line(name)}: got {found.get_dtype()} {list(found.get_shape())}, "
                f"wanted floats {shape}"
            )


def _quoted(value: object) -> str:
    return one_line(repr(value))[:80]
