"""The forward over a pack: hidden states and log-probabilities of all tokens that were sampled in it.

Each distinct frame is encoded once, with gradient if the vision tower is trained, and its features are copied
to every showing. Only hidden states from which a token is predicted are multiplied with the language-model
head. The log-probabilities of the policy, of the old policy and of the reference all come from
`packed_logprobs`.

Source: method section 5 (ratios, KL).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.model import FrameFeatures, VisionLanguageModel
from vrthinker.policy import logprobs
from vrthinker.policy.losses import DEFAULT_CHUNK
from vrthinker.policy.packed_attention import Implementation, PackedAttention, use_packed_attention
from vrthinker.policy.packing import Pack

LoadFrames = Callable[[Sequence[FrameKey]], list[np.ndarray]]


def packed_hidden(
    policy: VisionLanguageModel,
    pack: Pack,
    load: LoadFrames,
    *,
    attention: Implementation = "auto",
    features: Sequence[FrameFeatures] | None = None,
) -> torch.Tensor:
    """The hidden states of the tokens from which sampled tokens are predicted.

    Args:
        policy: The model.
        pack: The pack that the model is run over.
        load: A function that loads the pixels of frames by key (`FrameLoader.load`).
        attention: The implementation of attention.
        features: The features of `pack.frames`, if they are encoded already (a tower that is not trained).

    Returns:
        The hidden states after the final norm, with gradient, `[predictions, hidden]`, in the order of
        `pack.sources`.

    Raises:
        VideoError: A frame does not decode.
    """
    device = policy.device
    language = policy.model.model.language_model
    use_packed_attention(language)
    is_image, shown = None, []
    if pack.frames:
        encoded = policy.encode(load(pack.frames)) if features is None else features
        shown = [encoded[place] for place in pack.frame_order]
        is_image = torch.from_numpy(pack.is_image).to(device)[None]
    token_ids = torch.from_numpy(pack.token_ids).to(device)[None]
    hidden: torch.Tensor = language(
        **policy.embed(token_ids, is_image, shown),
        position_ids=torch.from_numpy(pack.positions).to(device)[:, None],
        attention_mask=None,
        use_cache=False,
        packed=PackedAttention(pack, device, attention),
    ).last_hidden_state
    return hidden[0, torch.from_numpy(pack.sources).to(device)]


def packed_logprobs(
    policy: VisionLanguageModel,
    pack: Pack,
    load: LoadFrames,
    *,
    temperature: float,
    banned: torch.Tensor | None,
    attention: Implementation = "auto",
    features: Sequence[FrameFeatures] | None = None,
    chunk: int = DEFAULT_CHUNK,
    implementation: logprobs.Implementation = "auto",
) -> list[torch.Tensor]:
    """The log-probabilities of the sampled tokens under a policy, with the sampling temperature and bans.

    Args:
        policy: The model.
        pack: The pack of the sampled tokens in their contexts.
        load: A function that loads the pixels of frames by key.
        temperature: The sampling temperature; 0 (greedy) counts as 1.
        banned: The tokens that sampling never draws, bool `[vocab]` (`Markup.vocabulary`).
        attention: The implementation of attention.
        features: The features of `pack.frames`, if they are encoded already.
        chunk: The number of rows whose logits exist at a time (`logprobs_from_hidden`).
        implementation: The implementation of the logprobs (`logprobs_from_hidden`).

    Returns:
        For each trajectory of the pack (`pack.trajectories`) float32 `[sampled]`, with gradient.
    """
    hidden = packed_hidden(policy, pack, load, attention=attention, features=features)
    by_prediction = logprobs.logprobs_from_hidden(
        hidden,
        policy.model.lm_head.weight,
        torch.from_numpy(pack.labels).to(policy.device),
        temperature=temperature,
        banned=banned,
        chunk=chunk,
        implementation=implementation,
    )
    return _by_trajectory(by_prediction, pack)


def packed_logprobs_and_entropy(
    policy: VisionLanguageModel,
    pack: Pack,
    load: LoadFrames,
    *,
    temperature: float,
    banned: torch.Tensor | None,
    attention: Implementation = "auto",
    features: Sequence[FrameFeatures] | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`packed_logprobs`, and the entropy of the distribution that each token was drawn from.

    The arguments are those of `packed_logprobs`.

    Returns:
        For each trajectory of the pack the log-probabilities, with gradient, and the entropies in nats,
        without, both float32 `[sampled]`.
    """
    hidden = packed_hidden(policy, pack, load, attention=attention, features=features)
    found, entropies = logprobs.logprobs_and_entropy(
        hidden,
        policy.model.lm_head.weight,
        torch.from_numpy(pack.labels).to(policy.device),
        temperature=temperature,
        banned=banned,
        chunk=chunk,
    )
    return _by_trajectory(found, pack), _by_trajectory(entropies, pack)


def _by_trajectory(by_prediction: torch.Tensor, pack: Pack) -> list[torch.Tensor]:
    return [
        by_prediction[torch.from_numpy(predictions).to(by_prediction.device)] for predictions in pack.sampled
    ]
