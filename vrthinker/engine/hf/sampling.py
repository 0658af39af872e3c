"""Sampling with bans, temperature, nucleus and guided forms. Equal seeds give equal tokens in any batch.

Random numbers come from a counter-based generator keyed by (seed, round). Each session's are drawn before its
round starts, so that no generator state is shared and a session samples the same tokens alone or in a batch
(up to floating-point differences between batch shapes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vrthinker.engine.base import Choice, Form, Free


def round_uniforms(seed: int, round_number: int, count: int) -> list[float]:
    """Draws `count` uniform numbers in [0, 1) for one round of one session."""
    key = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, round_number])
    drawn: list[float] = np.random.Generator(np.random.Philox(key)).random(count).tolist()
    return drawn


@dataclass
class FormCursor:
    """The place in its form that a guided round has reached.

    Args:
        form: The parts of the round.
        encode: A function from text to token ids, without special tokens.
        end_of_part: The token that ends a free part early. It is not kept.
    """

    form: Form
    encode: Callable[[str], Sequence[int]]
    end_of_part: int

    def __post_init__(self) -> None:
        self._left: list[Free | Choice] = list(reversed(self.form))
        self._options: list[tuple[int, Sequence[int]]] = []
        self._depth = 0
        self._free = 0
        self._choice: Choice | None = None
        self._next_part()

    @property
    def done(self) -> bool:
        """Whether the whole form is written."""
        return self._choice is None and self._free == 0

    @property
    def in_free_part(self) -> bool:
        """Whether the model may write any token (except those that open tags)."""
        return self._free > 0

    def allowed(self) -> list[int]:
        """The tokens that continue an option of the current choice."""
        return sorted({ids[self._depth] for _, ids in self._options})

    def advance(self, token: int) -> bool:
        """Takes the sampled token and returns whether it belongs to the text."""
        if self._free:
            if token == self.end_of_part:
                self._free = 0
                self._next_part()
                return False
            self._free -= 1
            if not self._free:
                self._next_part()
            return True
        self._depth += 1
        self._options = [o for o in self._options if o[1][self._depth - 1] == token]
        complete = [index for index, ids in self._options if len(ids) == self._depth]
        if complete:  # options are prefix-free, so a complete one is the only one left
            assert self._choice is not None
            if self._choice.then:
                self._left.extend(reversed(self._choice.then[complete[0]]))
            self._next_part()
        return True

    def _next_part(self) -> None:
        self._choice, self._depth, self._free = None, 0, 0
        while self._left:
            part = self._left.pop()
            if isinstance(part, Choice):
                self._choice = part
                self._options = [(i, self.encode(option)) for i, option in enumerate(part.options)]
                return
            if part.max_tokens > 0:
                self._free = part.max_tokens
                return


@dataclass(frozen=True)
class Vocabulary:
    """What sampling has to know about the model's tokens.

    Attributes:
        end_of_turn: The only token that ends a round.
        banned: The tokens that are never sampled and count in no logprob (vision, pad and turn markers, ids
            without a token), bool `[vocabulary]`.
        opens_tag: The tokens whose text contains a `<`, which a guided round's free parts may not use,
            bool `[vocabulary]`.
    """

    end_of_turn: int
    banned: torch.Tensor
    opens_tag: torch.Tensor


@dataclass(frozen=True)
class Draw:
    """The settings and the random number that one row's next token is drawn with."""

    temperature: float
    top_p: float
    uniform: float
    cursor: FormCursor | None


def sample(
    logits: torch.Tensor, draws: Sequence[Draw], vocabulary: Vocabulary
) -> tuple[list[int], list[float]]:
    """Draws one token per row.

    Args:
        logits: The logits of any float dtype, `[batch, vocabulary]`. They are not modified.
        draws: How to draw each row's token.
        vocabulary: The bans and markers.

    Returns:
        The token ids, and their log-probabilities after bans, form and temperature (greedy rows:
        temperature 1), before the nucleus cut.
    """
    scores = logits.float().masked_fill(vocabulary.banned, -torch.inf)
    scores = _apply_forms(scores, draws, vocabulary)
    device = scores.device
    temperatures = torch.tensor([d.temperature for d in draws], device=device)
    greedy = temperatures == 0
    logprobs = torch.log_softmax(scores / torch.where(greedy, 1.0, temperatures)[:, None], dim=-1)
    tokens = logprobs.argmax(-1)
    if not all(d.temperature == 0 for d in draws):
        probabilities = _nucleus(logprobs.exp(), [d.top_p for d in draws])
        cumulative = probabilities.cumsum(-1)
        uniforms = torch.tensor([d.uniform for d in draws], dtype=torch.float32, device=device)
        # The threshold is strictly below the total, so that the search ends on a token with mass.
        threshold = (uniforms * cumulative[:, -1])[:, None]
        drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
        drawn = drawn.clamp_max(scores.shape[-1] - 1)
        drawn = torch.where(probabilities.gather(-1, drawn[:, None])[:, 0] > 0, drawn, tokens)
        tokens = torch.where(greedy, tokens, drawn)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    return tokens.tolist(), chosen.tolist()


def _apply_forms(scores: torch.Tensor, draws: Sequence[Draw], vocabulary: Vocabulary) -> torch.Tensor:
    guided = [(row, d.cursor) for row, d in enumerate(draws) if d.cursor is not None]
    for row, cursor in guided:
        if cursor.in_free_part:
            scores[row].masked_fill_(vocabulary.opens_tag, -torch.inf)
        else:
            allowed = torch.tensor(cursor.allowed(), device=scores.device)
            kept = scores[row, allowed]
            scores[row] = -torch.inf
            scores[row, allowed] = kept
    return scores


def _nucleus(probabilities: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """Zeroes tokens outside each row's nucleus, which is the fewest tokens whose mass reaches top_p."""
    if all(p == 1.0 for p in top_p):
        return probabilities
    ranked, order = probabilities.sort(dim=-1, descending=True)
    limit = torch.tensor(top_p, device=probabilities.device)[:, None]
    outside = ranked.cumsum(-1) - ranked >= limit
    outside[:, 0] = False
    return probabilities.masked_fill(outside.scatter(-1, order, outside), 0.0)
