"""What the transformers engine stores about a session, and about the round that it is writing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vrthinker.engine.base import FinishReason, RoundLimits, Session
from vrthinker.engine.hf.context import Context, FreedRows
from vrthinker.engine.hf.sampling import FormCursor


@dataclass
class RoundState:
    """The round that a session is writing.

    Attributes:
        session: The session that the round belongs to.
        limits: The sampling limits that were asked for.
        budget: The most tokens that the round may write: `limits.max_tokens`, or less if the context is
            nearly full.
        uniforms: The random numbers that the round's tokens are sampled with, drawn before it starts.
        cursor: The place in its form that a guided round has reached; None for a free round.
        prompt_tokens: The number of context tokens that the round is written from.
        prefilled_tokens: The number of those that the cache did not hold.
        next_position: The position of the next token to be fed.
        ids: The token ids written so far.
        logprobs: The log-probability of each of those tokens.
        watch: The ids of the texts to watch (`RoundLimits.watch`); empty if there are none.
        watched: The place in `ids` of each token that is one of them, and the logits of all of them there.
        unwatched: The reason why the texts to watch cannot be watched.
        logits: The logits that each of those tokens was drawn from, if the engine keeps logits.
        finish: The reason why the round ended, once it has ended.
    """

    session: Session
    limits: RoundLimits
    budget: int
    uniforms: Iterator[float]
    cursor: FormCursor | None
    prompt_tokens: int
    prefilled_tokens: int
    next_position: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    watch: tuple[int, ...] = ()
    watched: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    unwatched: str | None = None
    logits: list[torch.Tensor] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass
class SessionState:
    """What the engine stores about an open session, besides what its `SessionTable` knows.

    Attributes:
        context: The pieces of its context, up to the last finished round.
        seed: The seed that its tokens are sampled with.
        row: The index of its row in the cache, once it has one.
        filled: The number of valid tokens in that row: `context.cached`, plus what the round under way added.
            Expired tokens count until their rows are freed.
        freed: The rows of expired frames, in order, until the next eviction frees them.
        failed: Whether a round ended in an error, after which the row was cleared.
        last_id: The last token of the last finished round.
        writing: The round that is being written; None between rounds.
    """

    context: Context
    seed: int
    row: int | None = None
    filled: int = 0
    freed: list[FreedRows] = field(default_factory=list)
    failed: bool = False
    last_id: int | None = None
    writing: RoundState | None = None

    @property
    def to_prefill(self) -> int:
        """The number of context tokens that the cache does not hold."""
        return len(self.context) - self.filled
