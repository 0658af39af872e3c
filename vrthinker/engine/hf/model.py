"""A Qwen2.5-VL or Qwen3-VL checkpoint as the two functions that an engine needs: encode frames, run tokens.

The model classes are those of transformers, loaded without torchvision. `generate()` is never used: we
compute positions, masks and the cache. Weights come from safetensors only, and code from a checkpoint is
never run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vrthinker.engine.hf.adapters import merge_adapter, read_adapter
from vrthinker.engine.hf.cache import KVCache
from vrthinker.engine.hf.checkpoint import FAMILIES, base_of_adapter, check_size, load_config, unloadable
from vrthinker.engine.hf.frontend import load_frontend
from vrthinker.engine.hf.patch_embed import use_patch_product
from vrthinker.engine.hf.text_attention import use_text_attention
from vrthinker.engine.hf.vision_attention import use_batched_attention
from vrthinker.errors import EngineError, InputError


@dataclass(frozen=True)
class FrameFeatures:
    """One encoded frame.

    Attributes:
        embeds: The embeddings at the frame's placeholders, `[tokens, hidden]`.
        deepstack: Qwen3-VL's feature maps, one `[tokens, hidden]` per early layer; empty for Qwen2.5-VL.
    """

    embeds: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]

    @property
    def size_bytes(self) -> int:
        """The number of bytes that the features take."""
        return sum(t.numel() * t.element_size() for t in (self.embeds, *self.deepstack))

    def copied(self) -> FrameFeatures:
        """A copy of the features: a view would keep all features of its forward in memory."""
        return FrameFeatures(self.embeds.clone(), tuple(layer.clone() for layer in self.deepstack))


class VisionLanguageModel:
    """A loaded checkpoint.

    Args:
        folder: The checkpoint folder (see `resolve_checkpoint`). Its files are checked first
            (`checkpoint.py`). An adapter in it is merged into its base's weights (`adapters.py`).
        device: The device that the model runs on.
        dtype: The dtype of weights and activations: bfloat16, float16 or float32.

    Raises:
        InputError: The folder is not a checkpoint of a supported family.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self.folder, self.device, self.dtype = folder, device, dtype
        try:
            config = load_config(folder)
            adapter, base = read_adapter(folder), base_of_adapter(folder)
            if base is not None:
                load_config(base)  # its files come from somewhere else, and are checked too
            check_size(config, base or folder)
            self.frontend = load_frontend(folder, config)
            self.tokenizer = self.frontend.tokenizer
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                base or folder,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            model, loading = loaded
            self._check_complete(loading)
            if adapter is not None:
                merge_adapter(model, adapter)
            self.model: Any = model.to(device).eval().requires_grad_(False)
            use_batched_attention(self.model.model.visual)
            use_patch_product(self.model.model.visual)
            use_text_attention(self.model.model.language_model)
            text, vision = self.model.config.text_config, self.model.config.vision_config
            self.hidden_size = int(text.hidden_size)
            self.vocabulary_size = int(self.model.lm_head.weight.shape[0])
            self.max_positions = int(text.max_position_embeddings)
            self.patch_size, self.merge_size = int(vision.patch_size), int(vision.spatial_merge_size)
        except BaseException as error:  # a tokenizer's panic is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise unloadable(folder, error) from None

    @staticmethod
    def _check_complete(loading: Any) -> None:
        # transformers would silently fill missing weights with random numbers.
        absent = sorted(str(name) for name in (*loading["missing_keys"], *loading["mismatched_keys"]))
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            raise InputError(f"weights missing or of another shape: {', '.join(absent[:3])}{more}")

    @property
    def family(self) -> str:
        """The model family: `qwen2.5-vl` or `qwen3-vl`."""
        return FAMILIES[self.model.config.model_type]

    @cached_property
    def inv_freq(self) -> torch.Tensor:
        """Inverse frequencies of the text model's rotary embedding, `[head_dim / 2]`, on the CPU.

        Evictions are planned on the CPU, and planning should not wait for a GPU.
        """
        frequencies: torch.Tensor = self.model.model.language_model.rotary_emb.inv_freq
        return frequencies.detach().cpu()

    @property
    def renumber_obstacle(self) -> str | None:
        """The reason why keys cannot be rotated to other positions; None if they can."""
        kind = getattr(self.model.model.language_model.rotary_emb, "rope_type", "default")
        # Scaled rotary embeddings may change their frequencies with the length.
        return None if kind == "default" else f"its rotary embedding is of the kind {kind!r}"

    def new_cache(self) -> KVCache:
        """An empty cache of this model's shape."""
        text = self.model.config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return KVCache(
            text.num_hidden_layers,
            text.num_key_value_heads,
            head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def encode(self, frames: Sequence[np.ndarray | torch.Tensor]) -> list[FrameFeatures]:
        """Runs the vision tower over frames, with all frames of one size in one batch.

        Gradients flow if the caller allows them and the tower is trained. The features are views of one
        output, which stays in memory as long as any of them does; `FrameFeatures.copied` avoids that.

        Args:
            frames: The pixels of each frame, uint8 `[height, width, 3]`, on the patch grid; sizes may differ.
                Tensors on a GPU that decoded them are not copied to the host.

        Returns:
            The features of each frame, in the order of `frames`.
        """
        by_size: dict[tuple[int, ...], list[int]] = {}
        for place, frame in enumerate(frames):
            by_size.setdefault(frame.shape[:2], []).append(place)
        order = [place for places in by_size.values() for place in places]
        patches, grids = [], []
        for (height, width), places in by_size.items():
            stacked = _stacked([frames[place] for place in places], self.device)
            patches.append(self.frontend.patches(stacked))
            grids += [list(self.frontend.grid((height, width)))] * len(places)
        grid = torch.tensor(grids, device=self.device)
        output = self.model.model.visual(torch.cat(patches).to(self.dtype), grid_thw=grid)
        counts = [h * w // self.merge_size**2 for _, h, w in grids]
        embeds = output.pooler_output.split(counts)
        maps = [layer.split(counts) for layer in getattr(output, "deepstack_features", None) or ()]
        encoded = {
            place: FrameFeatures(embeds[i], tuple(layer[i] for layer in maps))
            for i, place in enumerate(order)
        }
        return [encoded[place] for place in range(len(frames))]

    def embed(
        self, token_ids: torch.Tensor, is_image: torch.Tensor | None, features: Sequence[FrameFeatures]
    ) -> dict[str, Any]:
        """Puts encoded frames at their placeholders and returns the language model's arguments.

        Args:
            token_ids: The token ids, int64 `[batch, tokens]`.
            is_image: Whether each token is an image placeholder, bool `[batch, tokens]`; None if no token is.
            features: The features of each showing, in the order of the True entries of `is_image`.

        Returns:
            `inputs_embeds`, `[batch, tokens, hidden]`. Qwen3-VL's early layers add feature maps of the frames
            (deepstack); for it also `visual_pos_masks` and `deepstack_visual_embeds`.
        """
        embeds = self.model.model.language_model.embed_tokens(token_ids)
        if not features or is_image is None:
            return {"inputs_embeds": embeds}
        rows = torch.cat([frame.embeds for frame in features]).to(embeds.dtype)
        inputs: dict[str, Any] = {"inputs_embeds": embeds.masked_scatter(is_image[..., None], rows)}
        if features[0].deepstack:
            inputs["visual_pos_masks"] = is_image
            layers = zip(*(frame.deepstack for frame in features), strict=True)
            inputs["deepstack_visual_embeds"] = [torch.cat(layer) for layer in layers]
        return inputs

    @torch.inference_mode()
    def run(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: KVCache,
        image_mask: torch.Tensor | None = None,
        features: Sequence[FrameFeatures] = (),
        row_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs one forward of the language model and writes the cache. Call `cache.plan` first.

        Args:
            token_ids: The ids of the new tokens, int64 `[batch, new]`.
            positions: The M-RoPE positions of the new tokens, int64 `[3, batch, new]`.
            mask: True where a query sees a key, bool `[batch, 1, new, read_length]`.
            cache: The cache that keys and values are written to and read from.
            image_mask: True at image placeholders, bool `[batch, new]`.
            features: The encoded frames, in the order of the True entries of `image_mask`.
            row_lengths: With one new token per row, how many keys it sees, int64 `[batch]` (see
                `text_attention`).

        Returns:
            Hidden states `[batch, new, hidden]` after the final norm.
        """
        output = self.model.model.language_model(
            **self.embed(token_ids, image_mask, features),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            row_lengths=row_lengths,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of hidden states, `[..., vocabulary]`."""
        scores: torch.Tensor = self.model.lm_head(hidden)
        return scores

    def load_tensors(self, named_tensors: Any) -> None:
        """Copies weights in place by their `state_dict` names: all of them, so that no two policies mix.

        Args:
            named_tensors: A mapping or pairs of names and tensors. Of weights that are tied, one is enough.

        Raises:
            EngineError: A name is unknown or missing, or a shape differs; nothing is changed then.
        """
        weights = dict(self.model.state_dict())
        pairs = list(named_tensors.items() if hasattr(named_tensors, "items") else named_tensors)
        for name, tensor in pairs:
            if name not in weights:
                raise EngineError(f"update_weights: unknown tensor {name!r}")
            if tuple(tensor.shape) != tuple(weights[name].shape):
                got, wanted = tuple(tensor.shape), tuple(weights[name].shape)
                raise EngineError(f"update_weights: {name}: got shape {got}, wanted {wanted}")
        given_storages = {weights[name].data_ptr() for name, _ in pairs}
        if missing := sorted(
            name for name, tensor in weights.items() if tensor.data_ptr() not in given_storages
        ):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise EngineError(
                f"update_weights: got {len(pairs)} tensors, missing {', '.join(missing[:3])}{more}; "
                "give every weight of the model"
            )
        with torch.no_grad():
            for name, tensor in pairs:
                weights[name].copy_(tensor)


def _stacked(frames: Sequence[np.ndarray | torch.Tensor], device: torch.device) -> torch.Tensor:
    """Frames of one size in one tensor on a device."""
    if all(isinstance(frame, np.ndarray) for frame in frames):
        return torch.from_numpy(np.stack(frames)).to(device)
    return torch.stack([torch.as_tensor(frame).to(device) for frame in frames])
