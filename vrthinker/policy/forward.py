"""The training forward of a batch: hidden states of the tokens from which a learned token is predicted.

Right padding needs no mask under causal attention, because no token sees later ones. Positions are passed as
the engine computed them. Each distinct frame of the batch is encoded once, with gradient, and its features
are copied to wherever the frame is shown. A frame that is not shown (`batches.py`) takes part in the
computation, and its gradient is 0.
"""

from __future__ import annotations

import torch

from vrthinker.engine.hf.model import FrameFeatures, VisionLanguageModel
from vrthinker.policy.batches import Batch


def learned_hidden(
    policy: VisionLanguageModel, batch: Batch, *, freeze_vision: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs one forward over a batch.

    Args:
        policy: The model.
        batch: The batch.
        freeze_vision: Whether no gradient reaches the vision tower.

    Returns:
        The hidden states of the token before each learned token, `[learned, hidden]`, and the learned tokens,
        `[learned]`, row by row.
    """
    device = policy.device
    ids = batch.token_ids.to(device)
    is_image, encoded, shown = None, list[FrameFeatures](), list[FrameFeatures]()
    if batch.frames:
        is_image = ids == policy.model.config.image_token_id if batch.frame_order else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_vision):
            encoded = policy.encode(batch.frames)
        shown = [encoded[place] for place in batch.frame_order]
    inputs = policy.embed(ids, is_image, shown)
    if encoded and not shown:
        unseen = [features.sum() for frame in encoded for features in (frame.embeds, *frame.deepstack)]
        inputs["inputs_embeds"] = inputs["inputs_embeds"] + 0.0 * torch.stack(unseen).sum()
    hidden = policy.model.model.language_model(
        **inputs,
        position_ids=batch.positions.to(device),
        # With three rows of positions, None means causal attention. (A fourth row would be read as packing.)
        attention_mask=None,
        use_cache=False,
    ).last_hidden_state
    learned = batch.loss_mask.to(device)[:, 1:]
    return hidden[:, :-1][learned], ids[:, 1:][learned]
