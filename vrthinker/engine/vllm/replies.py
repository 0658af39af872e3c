"""What a server answers to a generation, checked: token ids and their log-probabilities."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from vrthinker.engine.base import FinishReason
from vrthinker.engine.endpoint.wire import BadReply, Reply, clean_line, error_message


@dataclass(frozen=True)
class TokenReply(Reply):
    """The answer of a server that takes and gives token ids.

    Attributes:
        token_ids: The sampled ids.
        logprobs: The log-probability of each.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


def read_tokens(body: bytes, *, secret: str = "") -> TokenReply:
    """Reads the body of a generation.

    Raises:
        BadReply: The body is not one with token ids and their log-probabilities.
    """
    try:
        said = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        head = clean_line(body[:400].decode("utf-8", "replace"), 80, secret=secret)
        raise BadReply(f"the reply is not JSON: {head}") from None
    choices = said.get("choices") if isinstance(said, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadReply(f"the reply has not one choice: {error_message(body, secret=secret)}")
    ids, reason = choices[0].get("token_ids"), choices[0].get("finish_reason")
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in ids):
        raise BadReply("the reply has no token_ids")
    told = choices[0].get("logprobs")
    content = told.get("content") if isinstance(told, dict) else None
    entries = content if isinstance(content, list) else []
    found: list[Any] = [entry.get("logprob") for entry in entries if isinstance(entry, dict)]
    if len(found) != len(ids) or not all(
        type(value) in (int, float) and math.isfinite(value) for value in found
    ):
        raise BadReply("the reply does not have a logprob for each token")
    if reason not in ("stop", "length"):
        raise BadReply(f"the reply ended for another reason: {clean_line(str(reason), 40, secret=secret)}")
    usage = said.get("usage") if isinstance(said.get("usage"), dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    prompt = usage.get("prompt_tokens")
    return TokenReply(
        "",
        FinishReason.STOP if reason == "stop" else FinishReason.LENGTH,
        None,
        prompt if type(prompt) is int else None,
        len(ids),
        cached if type(cached) is int else None,
        token_ids=tuple(ids),
        logprobs=tuple(float(value) for value in found),
    )
