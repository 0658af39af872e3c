"""The training forward of a batch: hidden states at the tokens that predict a learned one.

Right padding needs no mask under causal attention: no token sees what comes after it. Positions are passed
as the engine computed them. Each distinct frame of the batch is encoded once, with gradient, and its rows are
gathered wherever it is shown.
"""

from __future__ import annotations

import torch

from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.policy.batches import Batch


def learned_hidden(policy: VisionLanguageModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward over a batch.

    Returns:
        Hidden states `[learned, hidden]` of the tokens before each learned one, and the learned tokens
        `[learned]`, row by row.
    """
    device = policy.device
    ids = batch.token_ids.to(device)
    is_image, shown = None, []
    if batch.frames:
        is_image = ids == policy.model.config.image_token_id
        encoded = policy.encode(batch.frames)
        shown = [encoded[place] for place in batch.frame_order]
    hidden = policy.model.model.language_model(
        **policy.embed(ids, is_image, shown),
        position_ids=batch.positions.to(device),
        # None with three rows of positions is plain causal attention (a fourth row would be read as packing).
        attention_mask=None,
        use_cache=False,
    ).last_hidden_state
    learned = batch.loss_mask.to(device)[:, 1:]
    return hidden[:, :-1][learned], ids[:, 1:][learned]
