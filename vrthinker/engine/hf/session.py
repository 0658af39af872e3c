"""What the transformers engine keeps of a session, and of the round that it is writing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vrthinker.engine.base import FinishReason, RoundLimits, Session
from vrthinker.engine.hf.context import Context, LeavingRows
from vrthinker.engine.hf.sampling import FormCursor


@dataclass
class RoundState:
    """The round under way.

    Attributes:
        limits: As requested.
        budget: Tokens it may still write: `limits.max_tokens`, or what the context limit leaves.
        uniforms: Random numbers for its samples, drawn before it starts.
        cursor: Where a guided round stands.
        prompt_tokens: Context that it is written from.
        prefilled_tokens: How much of that the cache did not hold.
        next_position: Position of the next token to be fed.
        ids, logprobs, logits: What was written so far.
        finish: Why it ended, once it has.
    """

    limits: RoundLimits
    budget: int
    uniforms: Iterator[float]
    cursor: FormCursor | None
    prompt_tokens: int
    prefilled_tokens: int
    next_position: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass
class SessionState:
    """A session.

    Attributes:
        session: The handle that the caller has.
        context: Its pieces, up to the last finished round.
        seed: Of its samples.
        row: Its row of the cache, once it has one.
        filled: Tokens of the row that are valid: `context.cached`, and what the round under way added;
            while rows are `leaving`, they count too.
        leaving: Rows of frames that have expired and still have to leave the cache, in order.
        rounds: Rounds begun.
        failed: A round ended in an error, and its row was cleared.
        last_id: The last token of the last finished round.
        writing: The round under way.
    """

    session: Session
    context: Context
    seed: int
    row: int | None = None
    filled: int = 0
    leaving: list[LeavingRows] = field(default_factory=list)
    rounds: int = 0
    failed: bool = False
    last_id: int | None = None
    writing: RoundState | None = None

    @property
    def to_prefill(self) -> int:
        """Context tokens that the cache does not hold."""
        return len(self.context) - self.filled
