"""The training forward of a batch: hidden states at the tokens that predict a learned one.

Right padding needs no mask under causal attention: no token sees what comes after it. Positions are passed
as the engine computed them. Each distinct frame of the batch is encoded once, with gradient, and its rows are
gathered wherever it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vrthinker.engine.hf.model import FrameFeatures, VisionLanguageModel
from vrthinker.kernels.patchify.op import patchify
from vrthinker.policy.batches import Batch


def encode_frames(policy: VisionLanguageModel, frames: Sequence[np.ndarray]) -> list[FrameFeatures]:
    """Runs the vision tower over distinct frames, with gradient.

    Args:
        policy: The model.
        frames: uint8 `[height, width, 3]` each, on the patch grid; sizes may differ.
    """
    patches, grids = [], []
    by_size: dict[tuple[int, ...], list[int]] = {}
    for place, frame in enumerate(frames):
        by_size.setdefault(frame.shape[:2], []).append(place)
    order = [place for places in by_size.values() for place in places]
    for (height, width), places in by_size.items():
        stacked = torch.from_numpy(np.stack([frames[place] for place in places])).to(policy.device)
        patches.append(
            patchify(
                stacked,
                patch_size=policy.patch_size,
                merge_size=policy.merge_size,
                temporal_patch_size=policy.temporal_patch_size,
                mean=policy.mean,
                std=policy.std,
            )
        )
        grids += [[1, height // policy.patch_size, width // policy.patch_size]] * len(places)
    grid = torch.tensor(grids, device=policy.device)
    output = policy.model.model.visual(torch.cat(patches).to(policy.dtype), grid_thw=grid)
    counts = [h * w // policy.merge_size**2 for _, h, w in grids]
    embeds = output.pooler_output.split(counts)
    maps = [layer.split(counts) for layer in getattr(output, "deepstack_features", None) or ()]
    found = {
        place: FrameFeatures(embeds[i], tuple(layer[i] for layer in maps)) for i, place in enumerate(order)
    }
    return [found[place] for place in range(len(frames))]


def learned_hidden(policy: VisionLanguageModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward over a batch.

    Returns:
        Hidden states `[learned, hidden]` of the tokens before each learned one, and the learned tokens
        `[learned]`, row by row.
    """
    device = policy.device
    ids = batch.token_ids.to(device)
    language = policy.model.model.language_model
    embeds = language.embed_tokens(ids)
    extra: dict[str, Any] = {}
    if batch.frames:
        images = ids == policy.model.config.image_token_id
        encoded = encode_frames(policy, batch.frames)
        shown = [encoded[place] for place in batch.frame_order]
        rows = torch.cat([features.embeds for features in shown]).to(embeds.dtype)
        embeds = embeds.masked_scatter(images[..., None], rows)
        if shown[0].deepstack:
            extra["visual_pos_masks"] = images
            layers = zip(*(features.deepstack for features in shown), strict=True)
            extra["deepstack_visual_embeds"] = [torch.cat(layer) for layer in layers]
    hidden = language(
        inputs_embeds=embeds,
        position_ids=batch.positions.to(device),
        # None with three rows of positions is plain causal attention (a fourth row would be read as packing).
        attention_mask=None,
        use_cache=False,
        **extra,
    ).last_hidden_state
    learned = batch.loss_mask.to(device)[:, 1:]
    return hidden[:, :-1][learned], ids[:, 1:][learned]
