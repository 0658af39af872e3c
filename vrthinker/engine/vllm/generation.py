"""What is asked of vLLM for one round, and what comes back, whichever way the two travel.

Token ids, placeholders and patches are ours: vLLM gets the ids of the whole live context with every
placeholder in it, and the rows that its vision tower takes. It has no text to encode, no picture to resize,
and nothing to count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vrthinker.errors import EngineError

if TYPE_CHECKING:
    import torch

MIN_TEMPERATURE = 1e-2
"""vLLM raises lower temperatures to this one, silently."""
MAX_BANNED = 1024
"""The most tokens that vLLM's sampler on a GPU takes a bias for."""
_BAN = -1e9
"""What is added to a banned token's logit: its probability is exactly 0 in float32, and JSON can spell it."""


class EngineGone(EngineError):
    """What runs vLLM has ended: nothing works any more."""


@dataclass(frozen=True)
class Picture:
    """One frame of a context, as the vision tower takes it.

    Attributes:
        uuid: What names the picture in vLLM's caches: equal for equal pixels, and else different.
        offset: The index of its first placeholder in the context.
        length: The number of its placeholders.
        grid: Its (1, height, width) in patches.
        patches: Its patches, float32 or bfloat16 `[height * width, values of a patch]`.
    """

    uuid: str
    offset: int
    length: int
    grid: tuple[int, int, int]
    patches: torch.Tensor


@dataclass(frozen=True)
class Generation:
    """One round to be sampled.

    Attributes:
        id: What names the request. It is never used twice.
        token_ids: The ids of the whole context, with every placeholder.
        pictures: The frames of the context, in order.
        max_tokens: The most tokens to sample.
        temperature: The temperature; 0 is greedy.
        top_p: The nucleus mass in (0, 1].
        seed: The seed of the round.
    """

    id: str
    token_ids: list[int]
    pictures: tuple[Picture, ...]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Generated:
    """What became of a request.

    Attributes:
        id: The request's id.
        token_ids: The sampled ids, with the end-of-turn token if it was sampled.
        logprobs: The log-probability of each of them under the distribution that it was drawn from.
        stopped: Whether the end-of-turn token ended it, and not its length.
        cached_tokens: The number of context tokens that were not computed for it; None if that is not known.
        error: Why it failed; None if it did not.
    """

    id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    stopped: bool = False
    cached_tokens: int | None = None
    error: str | None = None


class Transport(Protocol):
    """The way to vLLM. Every method but `close` raises `EngineGone` once vLLM is gone."""

    @property
    def max_context_tokens(self) -> int:
        """The most tokens of context and text of one request."""

    def submit(self, generation: Generation) -> None:
        """Queues a request. It is under way until `poll` returns it or `cancel` ends it.

        Raises:
            EngineError: This request is refused.
        """

    def poll(self, timeout_seconds: float | None) -> list[Generated]:
        """Waits until a request is finished or the time is over; returns all finished ones.

        Raises:
            EngineError: vLLM has failed; whatever is under way is lost.
        """

    def cancel(self, generation_id: str) -> None:
        """Ends a request that is under way; it is not returned any more."""

    def update_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Replaces all weights, and forgets everything that was computed from the old ones."""

    def free_caches(self) -> None:
        """Gives memory back between two uses, as far as vLLM can."""

    def close(self) -> None:
        """Ends vLLM, if it is ours, and frees what is held here. Closing twice is harmless."""


def sampling_fields(generation: Generation, bans: Mapping[int, float], end_of_turn: int) -> dict[str, Any]:
    """The fields of vLLM's `SamplingParams`. All that a generation config could set is set.

    Log-probabilities are those of the sampled token alone; the engine or server has to run with
    `logprobs_mode="processed_logprobs"`, so that bans and temperature are in them.
    """
    return {
        "n": 1,
        "max_tokens": generation.max_tokens,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": generation.seed,
        "logit_bias": dict(bans),
        "stop_token_ids": [end_of_turn],
        "ignore_eos": True,  # the only token that ends a round is the end of the turn
        "logprobs": 0,
        "detokenize": False,
        "skip_special_tokens": False,
    }


def bans_of(banned: Sequence[int]) -> dict[int, float]:
    """The biases that keep tokens from being sampled and from counting in log-probabilities."""
    return dict.fromkeys(banned, _BAN)


def round_seed(seed: int, round_number: int) -> int:
    """The seed of one round of one session, so that a round samples the same in any batch; below 2**63."""
    digest = hashlib.sha256(f"{seed & 0xFFFF_FFFF_FFFF_FFFF}:{round_number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
