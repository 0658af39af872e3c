"""Text to token ids and back: ChatML turns, frame placeholders, bans.

A context is a concatenation of token ids that are never encoded again. Turn markers and vision markers are
placed by id. All other text is encoded without reading special tokens in it, so a caption that says
`<|im_end|>` becomes seven harmless tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vrthinker.engine.hf.sampling import Vocabulary
from vrthinker.errors import InputError

_REMEMBERED_CHARACTERS = 8_000_000
"""The most characters of text whose ids are kept. Labels, roles, options and prompts are encoded often."""
_ROUND = "<think>frame 12, 0.5 s</think>\n<answer>TA=1, VQ=0, MQ=2, OA=1</answer>"
"""A text that every tokenizer must encode and decode without loss."""
_MARKERS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""Tokens that no round may contain: they would begin a turn, or stand for a picture."""
_NEEDED = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


class Markup:
    """The tokenizer's side of an engine.

    Args:
        tokenizer: A transformers fast tokenizer with Qwen's special tokens.
        vocabulary_size: The number of rows of the model's output layer. Ids that the tokenizer lacks are
            banned.

    Raises:
        InputError: The tokenizer lacks one of the markers, or has ids that the model does not know.
    """

    def __init__(self, tokenizer: Any, vocabulary_size: int) -> None:
        self._tokenizer = tokenizer
        known = tokenizer.get_vocab()
        highest = max(known.values(), default=0)
        if highest >= vocabulary_size:
            raise InputError(
                f"tokenizer: has ids up to {highest}, the model has {vocabulary_size} embeddings"
            )
        missing = [marker for marker in _NEEDED if marker not in known]
        if missing:
            raise InputError(
                f"tokenizer: lacks {', '.join(missing)}; wanted a Qwen2.5-VL or Qwen3-VL checkpoint"
            )
        self.turn_start, self.turn_end = known["<|im_start|>"], known["<|im_end|>"]
        self.vocabulary_size = vocabulary_size
        self._known = known
        self.vision_start, self.vision_end = known["<|vision_start|>"], known["<|vision_end|>"]
        self.image_pad = known["<|image_pad|>"]
        self._ids = frozenset(known.values())
        markers = {known.get(marker) for marker in _MARKERS}
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._markers = frozenset(number for number in markers if number is not None)
        self._remembered: dict[str, tuple[int, ...]] = {}
        self._remembered_characters = 0
        for text in ("\n", "assistant\n", _ROUND):
            got = self.decode(self.encode(text))
            if got != text:
                raise InputError(f"tokenizer: {text!r} comes back as {got[:80]!r}; it cannot write a round")
        self.newline = self.encode("\n")
        self.generation_prompt = [self.turn_start, *self.encode("assistant\n")]

    def encode(self, text: str) -> list[int]:
        """Encodes plain text. Special tokens in it are read as ordinary characters."""
        return list(self.encode_option(text))

    def encode_option(self, text: str) -> tuple[int, ...]:
        """Does what `encode` does, but returns a tuple that is shared between calls."""
        ids = self._remembered.get(text)
        if ids is None:
            encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            ids = tuple(encoded["input_ids"])
            # Each text counts 50 characters more than it has, because many short texts take memory too.
            self._remembered_characters += len(text) + 50
            if self._remembered_characters > _REMEMBERED_CHARACTERS:
                self._remembered.clear()
                self._remembered_characters = len(text) + 50
            self._remembered[text] = ids
        return ids

    def single_tokens(self, texts: Sequence[str]) -> tuple[tuple[int, ...], str | None]:
        """The id of each of these texts, and None; or no ids, and why one of them is no single token."""
        ids: list[int] = []
        for text in texts:
            encoded = self.encode_option(text)
            if len(encoded) != 1 or not text.isascii() or encoded[0] in ids:
                return (), f"{text!r} is no single token of its own in this model's vocabulary"
            ids.append(encoded[0])
        return tuple(ids), None

    def decode(self, ids: list[int]) -> str:
        """Decodes sampled ids to text, without the end-of-turn token."""
        if ids and ids[-1] == self.turn_end:
            ids = ids[:-1]
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def unusable_id(self, ids: Sequence[int]) -> int | None:
        """The first id that no round can have: it stands for no token, or for a marker of turns or frames."""
        return next((number for number in ids if number not in self._ids or number in self._markers), None)

    def without_special(self, ids: Sequence[int]) -> list[int]:
        """The ids without those of special tokens."""
        return [number for number in ids if number not in self._special]

    def turn_opening(self, role: str) -> list[int]:
        """The ids of `<|im_start|>role` and a newline."""
        return [self.turn_start, *self.encode(f"{role}\n")]

    @property
    def turn_closing(self) -> list[int]:
        """The ids of `<|im_end|>` and a newline."""
        return [self.turn_end, *self.newline]

    def vocabulary(self, device: torch.device) -> Vocabulary:
        """The bans: special tokens (except end-of-turn), the pad token, and ids without a token."""
        tokenizer = self._tokenizer
        added = tokenizer.added_tokens_decoder
        banned = torch.zeros(self.vocabulary_size, dtype=torch.bool)
        opens_tag = torch.zeros(self.vocabulary_size, dtype=torch.bool)
        in_use = set(self._known.values())
        special = {token_id for token_id, token in added.items() if token.special}
        special |= {self.vision_start, self.vision_end, self.image_pad, self.turn_start}
        if tokenizer.pad_token_id is not None:
            special.add(tokenizer.pad_token_id)
        for token_id in range(self.vocabulary_size):
            banned[token_id] = token_id not in in_use or (token_id in special and token_id != self.turn_end)
        for token, token_id in self._known.items():
            if "<" in token and token_id != self.turn_end and token_id < self.vocabulary_size:
                opens_tag[token_id] = True
        return Vocabulary(self.turn_end, banned.to(device), opens_tag.to(device))
