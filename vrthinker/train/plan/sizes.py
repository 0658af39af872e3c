"""The sizes of a model, counted on the real transformers class without its weights.

The class is built from a configuration on torch's meta device, where tensors have shapes and no memory. So
the counts are those of the class that is trained, and no formula has to be kept in step with it.

The configurations of Qwen2.5-VL-3B, 7B and 72B come with the package (`models/`), because a plan should not
need a download.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrthinker.bounded_files import read_json
from vrthinker.errors import InputError, one_line

MODELS = Path(__file__).parent / "models"
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Tower:
    """A stack of equal transformer layers.

    Attributes:
        layers: The number of layers.
        hidden: The size of the residual stream.
        query: The size of all queries of a token together.
        key: The size of all keys of a token together (that of the values is the same).
        heads: The number of query heads.
        intermediate: The inner size of the MLP, which is gated.
        parameters: All parameters of the layers.
        linear: The weights of the layers' linear parts, which are multiplied with every token.
    """

    layers: int
    hidden: int
    query: int
    key: int
    heads: int
    intermediate: int
    parameters: int
    linear: int


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a Qwen2.5-VL.

    Attributes:
        name: The model's name.
        parameters: All parameters; tied ones count once.
        text: The language model's layers.
        vision: The vision tower's layers; its tokens are patches.
        vision_parameters: All parameters of the vision tower, with patch embedding and merger.
        patch_embedding: The weights that are multiplied with every patch before the first layer.
        merger: The weights of the merger that are multiplied with every token of a frame.
        vocabulary: The number of rows of the output head.
        tied: Whether the output head is the embedding.
        patch_side: The side of a patch in pixels.
        merge_side: The number of patches per side that make one token.
        window_side: The side in pixels of the windows in which most vision layers attend.
        full_layers: The number of vision layers that attend to the whole frame.
        patch_values: The number of values of a patch.
        linear_shapes: The name of each linear layer of the two towers -> (out, in), for adapters.
    """

    name: str
    parameters: int
    text: Tower
    vision: Tower
    vision_parameters: int
    patch_embedding: int
    merger: int
    vocabulary: int
    tied: bool
    patch_side: int
    merge_side: int
    window_side: int
    full_layers: int
    patch_values: int
    linear_shapes: dict[str, tuple[int, int]]

    @property
    def head_dim(self) -> int:
        """The size of a head of the language model."""
        return self.text.query // self.text.heads

    @property
    def rest(self) -> int:
        """The parameters outside the layers of both towers: embeddings, head, merger, norms."""
        return self.parameters - self.text.parameters - self.vision.parameters


def known_models() -> list[str]:
    """The names of the models whose configuration comes with the package."""
    return sorted(path.stem for path in MODELS.glob("*.json"))


def sizes_of(model: str) -> ModelSizes:
    """Counts a model.

    Args:
        model: A checkpoint's folder, or the name of a known model: `qwen2.5-vl-7b`, or the hub's spelling
            of it, `Qwen/Qwen2.5-VL-7B-Instruct`.

    Raises:
        InputError: The model is not known, or not a Qwen2.5-VL.
    """
    if Path(model).is_dir():
        from vrthinker.engine.hf.checkpoint import load_config

        config = load_config(Path(model))  # its sizes are bounded
        kind = config.model_type
        if kind != "qwen2_5_vl":
            raise InputError(f"{model}: got the model type {kind}, allowed for a plan: qwen2_5_vl")
        return count(_on_meta(config), Path(model).name)
    name = model.rsplit("/", 1)[-1].lower().removesuffix("-instruct")
    if name not in known_models():
        known = ", ".join(known_models())
        raise InputError(f"model: got {one_line(repr(model))}, allowed: a checkpoint's folder, or {known}")
    return count(_on_meta(_known_config(name)), name)


def count(model: Any, name: str = "model") -> ModelSizes:
    """Counts a built model of the class Qwen2_5_VLForConditionalGeneration.

    Args:
        model: The model, on any device.
        name: The name that the result has.
    """
    text, vision = model.config.text_config, model.config.vision_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    named = dict(model.named_parameters())  # tied parameters are there once
    inner, visual = "model.language_model.layers.", "model.visual."

    def total(prefix: str, *, dimensions: int = 0) -> int:
        return sum(p.numel() for key, p in named.items() if key.startswith(prefix) and p.dim() >= dimensions)

    shapes = {
        key.removesuffix(".weight"): (int(p.shape[0]), int(p.shape[1]))
        for key, p in named.items()
        if p.dim() == 2 and key.startswith((inner, visual + "blocks.", visual + "merger."))
    }
    return ModelSizes(
        name=name,
        parameters=sum(p.numel() for p in named.values()),
        text=Tower(
            layers=int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            query=int(text.num_attention_heads) * head_dim,
            key=int(text.num_key_value_heads) * head_dim,
            heads=int(text.num_attention_heads),
            intermediate=int(text.intermediate_size),
            parameters=total(inner),
            linear=total(inner, dimensions=2),
        ),
        vision=Tower(
            layers=int(vision.depth),
            hidden=int(vision.hidden_size),
            query=int(vision.hidden_size),
            key=int(vision.hidden_size),
            heads=int(vision.num_heads),
            intermediate=int(vision.intermediate_size),
            parameters=total(visual + "blocks."),
            linear=total(visual + "blocks.", dimensions=2),
        ),
        vision_parameters=total(visual),
        patch_embedding=total(visual + "patch_embed."),
        merger=total(visual + "merger.", dimensions=2),
        vocabulary=int(model.lm_head.weight.shape[0]),
        tied=bool(model.lm_head.weight is model.model.language_model.embed_tokens.weight),
        patch_side=int(vision.patch_size),
        merge_side=int(vision.spatial_merge_size),
        window_side=int(vision.window_size),
        full_layers=len(vision.fullatt_block_indexes),
        patch_values=int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2),
        linear_shapes=shapes,
    )


def _known_config(name: str) -> Any:
    from transformers import AutoConfig

    values = read_json(MODELS / f"{name}.json", _MAX_CONFIG_BYTES)
    kept = {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
    return AutoConfig.for_model("qwen2_5_vl", **kept)


def _on_meta(config: Any) -> Any:
    """The model of a configuration, without memory for its weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return model
