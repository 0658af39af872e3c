"""The policy that is trained: what of it learns, in which precision, on how many processes; and its export.

Master weights are always float32. With `precision: bfloat16` the forward and backward passes compute in
bfloat16 (autocast), and a loss and its sums stay float32. If `torchrun` started several processes, FSDP2
shards weights, gradients and optimizer state over them, one group per transformer layer, and gathers a
layer's weights while it computes.

Invariant: the sum of the gradients over the processes is the gradient of the sum of their losses; nothing is
averaged. So N processes do the step of one process with all their micro-batches (`train/loop/loop.py`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.distributed.tensor import DTensor

from vrthinker.engine.hf.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_names
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import JudgeSettings
from vrthinker.errors import InputError, as_reason
from vrthinker.records.files import replace_file
from vrthinker.train.loop.ranks import ALONE, Ranks
from vrthinker.world.nano import write_judge_settings

Result = TypeVar("Result")

_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ADAPTER_CONFIG)
"""Endings of files that are not copied from the base model to the trained judge."""
_TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraSettings(BaseModel):
    """Training of small adapters instead of the weights. The paper trains all weights: this is ours."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    rank: int = Field(16, ge=1, le=1024)
    """The inner dimension of an adapter: an update of a weight is a product of two matrices of this rank."""
    alpha: float = Field(32.0, gt=0.0)
    """An adapter's product is multiplied by `alpha / rank`."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """The share of an adapter's inputs that is zeroed in training."""
    targets: tuple[str, ...] = Field(_TEXT_TARGETS, min_length=1)
    """The last names of the text tower's linear layers that get an adapter. With `train_vision`, all linear
    layers of the vision tower get one too."""
    export: Literal["merged", "adapter"] = "merged"
    """What the trained judge's folder holds: the weights with the adapters merged into them, or the adapters
    alone, which need the base model when they are loaded."""


class PolicySettings(BaseModel):
    """The settings of a policy in training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    train_vision: bool = True
    """Train the vision tower too."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """The dtype of a step's computation, and of the trained judge's stored weights. Master weights and the
    optimizer's state are always float32."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of each layer for the backward pass and compute the rest again: far less memory,
    about a third more time."""
    lora: LoraSettings | None = None
    """Train LoRA adapters instead of the weights."""


class TrainedPolicy:
    """A policy with its trainable part, on this process's device.

    Args:
        policy: The loaded model, whose trainable parameters are float32. It is changed in place.
        settings: The settings.
        ranks: The processes that train it together.
        seed: The seed of the adapters' initial weights.

    Attributes:
        policy: The model. While there are several processes, its weights are only whole inside `forward`.
    """

    def __init__(
        self, policy: VisionLanguageModel, settings: PolicySettings, ranks: Ranks = ALONE, *, seed: int = 0
    ) -> None:
        self.policy, self.settings, self.ranks = policy, settings, ranks
        model = policy.model
        model.requires_grad_(settings.lora is None).train()
        if not settings.train_vision:
            model.model.visual.requires_grad_(False)
        if settings.lora is not None:
            _add_adapters(model, settings.lora, train_vision=settings.train_vision, seed=seed)
        if settings.gradient_checkpointing:
            _recompute_layers(model)
        if ranks.size > 1:
            _shard(model, settings, ranks)
            policy.device = ranks.device

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.policy.model

    def forward(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Calls `function(*arguments)`, which runs the model, with whole weights and in the precision.

        All processes call this equally often. The function runs the same layers on each, once per call.

        Args:
            function: A function that returns tensors, in tuples or dictionaries if there are several.
            arguments: Its arguments.
        """
        with torch.autocast(
            self.policy.device.type,
            dtype=torch.bfloat16,
            enabled=self.settings.precision == "bfloat16",
            cache_enabled=False,  # a weight is used once in a forward; its copy would only take memory
        ):
            if self.ranks.size == 1:
                return function(*arguments)
            result: Result = self.model.with_whole_weights(function, *arguments)
            return result

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Gathers all weights on every process, for work between two steps that not all processes do.

        All processes enter and leave together. Inside, the model computes in the precision without autocast.
        """
        if self.ranks.size == 1:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        self.model.with_whole_weights(tuple)  # before its first forward, the model does not know its groups
        groups = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        before = self.policy.dtype
        try:
            for group in groups:
                group.set_reshard_after_forward(False, recurse=False)
                group.unshard()
            if self.settings.precision == "bfloat16":
                self.policy.dtype = torch.bfloat16
            yield
        finally:
            self.policy.dtype = before
            for group in groups:
                group.set_reshard_after_forward(group is not self.model, recurse=False)
                group.reshard()


def load_policy(
    folder: Path, settings: PolicySettings, ranks: Ranks = ALONE, *, seed: int = 0
) -> TrainedPolicy:
    """Loads a checkpoint to be trained.

    Args:
        folder: The checkpoint's folder.
        settings: The settings.
        ranks: The processes that train it together. Each loads all weights into its memory, and keeps its
            shard of them.
        seed: The seed of the adapters' initial weights.

    Raises:
        InputError: The checkpoint cannot be used, no layer is a target of the adapters, or peft is missing.
    """
    # Layer after layer moves to the GPU when it is sharded, so that the whole model need not fit there.
    device = ranks.device if ranks.size == 1 else torch.device("cpu")
    policy = VisionLanguageModel(folder, device=device, dtype=torch.float32)
    return TrainedPolicy(policy, settings, ranks, seed=seed)


def export(
    trained: TrainedPolicy,
    base: Path,
    target: Path,
    judge_settings: JudgeSettings,
    templates: PromptTemplates,
    *,
    base_name: str | None = None,
) -> Path:
    """Writes the trained judge as a checkpoint folder, atomically. An older one is replaced.

    All processes call this; the first writes.

    Args:
        trained: The policy.
        base: The folder of the model that the training began with, for its tokenizer and the like.
        target: The folder to write.
        judge_settings: The judge's settings.
        templates: Its prompts.
        base_name: The folder or hub id that an adapter names as its base; by default the path of `base`.

    Raises:
        VRThinkerError: The folder cannot be written.
    """
    lora = trained.settings.lora
    only_adapters = lora is not None and lora.export == "adapter"
    weights = _adapters(trained) if only_adapters else _whole_weights(trained)

    def write() -> None:
        for left in target.parent.glob(f".{target.name}.*"):  # remains of an export that was killed
            shutil.rmtree(left)
        spare = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            if only_adapters:
                _write_adapter(trained, spare, weights, base_name or str(base.absolute()))
            else:
                _write_model(trained, spare, weights)
            for file in base.iterdir():
                if file.is_file() and not file.name.endswith(_WEIGHTS) and not (spare / file.name).exists():
                    shutil.copyfile(file, spare / file.name)
            for path in spare.glob("*.safetensors"):
                path.chmod(0o644)
            write_judge_settings(spare, judge_settings, templates)
            if target.exists():
                old = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
                target.rename(old)
                spare.rename(target)
                shutil.rmtree(old)
            else:
                spare.rename(target)
        except BaseException as error:
            shutil.rmtree(spare, ignore_errors=True)
            if isinstance(error, Exception) and trained.ranks.size > 1:
                raise as_reason(error) from error  # the other processes wait for the reason
            raise

    trained.ranks.first(write)
    return target


def _recompute_layers(model: Any) -> None:
    """Turns gradient checkpointing on, which transformers renamed after the oldest version supported here."""
    chosen = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=chosen)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=chosen)


# Adapters


def _add_adapters(model: Any, lora: LoraSettings, *, train_vision: bool, seed: int) -> None:
    """Puts trainable adapters into the model's linear layers. All other weights are frozen."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("lora: needs peft, which is not installed: pip install 'vrthinker[train]'") from None
    text, vision = "model.language_model.", "model.visual."
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linear if name.startswith(text) and name.split(".")[-1] in lora.targets]
    if not targets:
        known = sorted({name.split(".")[-1] for name in linear if name.startswith(text)})
        raise InputError(f"lora.targets: got {', '.join(lora.targets)}, allowed: some of {', '.join(known)}")
    targets += [name for name in linear if train_vision and name.startswith(vision)]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def _adapters(trained: TrainedPolicy) -> dict[str, torch.Tensor]:
    """The adapters' tensors under peft's names, whole, on the CPU; on the first process only."""
    found = {}
    for name, parameter in trained.model.named_parameters():
        for part, place in ((".lora_A.default.weight", 0), (".lora_B.default.weight", 1)):
            if name.endswith(part):
                whole = _whole(parameter)
                if trained.ranks.is_first:
                    found[adapter_names(name.removesuffix(part))[place]] = whole.detach().cpu().contiguous()
    return found


def _write_adapter(
    trained: TrainedPolicy, folder: Path, weights: dict[str, torch.Tensor], base_name: str
) -> None:
    from safetensors.torch import save_file

    lora = trained.settings.lora
    assert lora is not None
    folder.mkdir()
    targets = sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in weights})
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    replace_file(folder / ADAPTER_CONFIG, json.dumps(described, indent=2).encode() + b"\n")
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    trained.model.config.save_pretrained(folder)
    _spell_both_ways(folder / "config.json", None)


# Several processes


def _shard(model: Any, settings: PolicySettings, ranks: Ranks) -> None:
    """Shards a model with FSDP2: a group per transformer layer, and one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    half = torch.bfloat16 if settings.precision == "bfloat16" else None
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    towers = [list(model.model.language_model.layers), list(model.model.visual.blocks)]
    for layer in (layer for tower in towers for layer in tower):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    # Embeddings and head are in one group, because they may be tied. A stage calls parts of the model and not
    # its forward, so that a method of the whole gathers this group.
    model.with_whole_weights = types.MethodType(_call, model)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(model, "with_whole_weights")
    # While a layer's backward pass runs, the layer before it is gathered. FSDP would find out by itself which
    # one that is, from the forward passes that it saw, but the first process alone runs some (`whole`).
    model.set_modules_to_backward_prefetch([towers[0][-1]])
    for tower in towers:
        for place, layer in enumerate(tower):
            layer.set_modules_to_backward_prefetch([tower[max(place - 1, 0)]])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor


def _call(self: Any, function: Callable[..., Result], *arguments: Any) -> Result:
    return function(*arguments)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or the whole of which this process has a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# Export


def live_weights(trained: TrainedPolicy) -> dict[str, torch.Tensor]:
    """All weights of now for an engine's `update_weights`, on every process. All processes call this.

    They are on the CPU in float32, under the base's names, with adapters merged.
    """
    return _whole_weights(trained, torch.float32, everywhere=True)


@contextlib.contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Computes with the base's weights alone, as before any adapter was trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _whole_weights(
    trained: TrainedPolicy, dtype: torch.dtype | None = None, *, everywhere: bool = False
) -> dict[str, torch.Tensor]:
    """All weights under the base's names, with adapters merged; on the first process only, or `everywhere`.

    Tied weights are the same tensor. Without `dtype` they have that of the precision.
    """
    model, lora = trained.model, trained.settings.lora
    if dtype is None:
        dtype = torch.bfloat16 if trained.settings.precision == "bfloat16" else torch.float32
    wanted = everywhere or trained.ranks.is_first
    stored = model.state_dict(keep_vars=True)
    done: dict[int, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if ".lora_" in name:
            continue
        if id(tensor) not in done:
            whole = _whole(tensor.detach())
            layer = name.removesuffix(".base_layer.weight")
            if lora is not None and layer != name:
                first, second = (
                    _whole(stored[f"{layer}.lora_{part}.default.weight"].detach()) for part in "AB"
                )
                whole = whole + (second @ first) * (lora.alpha / lora.rank)
            cast = whole.to(dtype) if whole.is_floating_point() else whole
            done[id(tensor)] = cast.cpu() if wanted else torch.empty(0)
        weights[name.replace(".base_layer.", ".")] = done[id(tensor)]
    return weights if wanted else {}


def _write_model(trained: TrainedPolicy, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    trained.model.save_pretrained(folder, state_dict=weights)
    _spell_both_ways(folder / "config.json", trained.settings.precision)


def _spell_both_ways(path: Path, dtype: str | None) -> None:
    """Writes the rotary embedding's settings as transformers 5 and as transformers 4 read them.

    Version 5 has them in `rope_parameters`. Version 4 reads the base from `rope_theta` and the sections of
    the three kinds of positions from `rope_scaling`; without those it would use its defaults in silence.

    Args:
        path: The configuration, as transformers 5 wrote it.
        dtype: The dtype of the weights beside it; None leaves it as it is.
    """
    config = json.loads(path.read_bytes())
    if dtype is not None:
        config["dtype"] = dtype
    text = config.get("text_config", {})
    if isinstance(rope := text.get("rope_parameters"), dict) and "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        text["rope_scaling"] = scaling | {"type": rope.get("rope_type", "default")}
    replace_file(path, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
