"""The log-probabilities that a chat-completions server sends with a reply, as pure functions.

What a server sends is untrusted: whatever its form, `token_scores` returns what can be read of it and never
raises. Servers decide themselves whether these numbers are those before or after temperature. vLLM sends the
model's own unless it was started otherwise; others do not say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vrthinker.engine.base import WatchedToken

_NEGLIGIBLE = 0.01
"""A label that a token's list lacks counts as impossible if the least likely text of the list has at most
this share of the listed labels' probability. Otherwise nothing is known about it."""


@dataclass(frozen=True)
class TokenScores:
    """One token of a reply.

    Attributes:
        content: The bytes of the token.
        top: The likeliest texts in its place, with their log-probabilities, as the server lists them.
    """

    content: bytes
    top: tuple[tuple[str, float], ...]


def token_scores(logprobs: object) -> tuple[TokenScores, ...]:
    """The tokens of a choice's `logprobs`; none if the server sent none, or something that cannot be read."""
    listed = logprobs.get("content") if isinstance(logprobs, dict) else None
    tokens = []
    for entry in listed if isinstance(listed, list) else ():
        read = _token(entry)
        if read is None:
            return ()
        tokens.append(read)
    return tuple(tokens)


def _token(entry: object) -> TokenScores | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        return None
    text, raw = entry["token"], entry.get("bytes")
    is_bytes = isinstance(raw, list) and all(type(byte) is int and 0 <= byte < 256 for byte in raw)
    content = bytes(raw) if is_bytes and isinstance(raw, list) else text.encode("utf-8", "replace")
    listed = entry.get("top_logprobs")
    scores: dict[str, float] = {}
    for other in (*(listed if isinstance(listed, list) else ()), entry):
        name, score = (other.get("token"), other.get("logprob")) if isinstance(other, dict) else (None, None)
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if isinstance(name, str) and is_number and isinstance(score, int | float) and math.isfinite(score):
            scores.setdefault(name, float(score))
    return TokenScores(content, tuple(scores.items()))


def watched_tokens(
    tokens: Sequence[TokenScores], text: str, watch: Sequence[str]
) -> tuple[tuple[WatchedToken, ...] | None, str | None]:
    """The tokens of a reply that are watched texts, or the reason why that cannot be told.

    Args:
        tokens: The tokens of the reply.
        text: The text of the round, which the tokens have to spell. It may lack their beginning, or have more
            in front of them (thoughts that the server sends apart).
        watch: The watched texts (`RoundLimits.watch`).
    """
    if not watch:
        return None, None
    if not tokens:
        return None, "the server sent no log-probabilities"
    spelt = b"".join(token.content for token in tokens).decode("utf-8", "replace")
    if not (spelt.endswith(text) or text.endswith(spelt)):
        return None, "the server's log-probabilities are those of another text than its message"
    ahead = len(text) - len(spelt)
    found, before = [], b""
    for token in tokens:
        piece = token.content.decode("utf-8", "replace")
        if piece in watch:
            start = ahead + len(before.decode("utf-8", "replace"))
            if start >= 0:
                found.append(WatchedToken(start, _scores(dict(token.top), watch)))
        before += token.content
    return tuple(found), None


def _scores(top: dict[str, float], watch: Sequence[str]) -> tuple[float | None, ...]:
    known = [top[text] for text in watch if text in top]
    if len(known) == len(watch) or not known:
        return tuple(top.get(text) for text in watch)
    mass = sum(math.exp(min(0.0, score)) for score in known)
    rest = math.exp(min(0.0, min(top.values())))
    missing = -math.inf if rest <= _NEGLIGIBLE * mass else None
    return tuple(top.get(text, missing) for text in watch)
