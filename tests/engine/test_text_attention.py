"""Decoding on a CPU by `decode_attention` writes what transformers' attention writes, and is really used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest
import torch

from vrthinker.engine.base import Message, RoundLimits, RoundRequest, TextSegment
from vrthinker.engine.hf import text_attention
from vrthinker.engine.hf.checkpoint import resolve_checkpoint
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.policy.packed_attention import use_packed_attention

TEXTS = ("One.", "A green circle moves left, and a red square stays where it is. " * 6, "Two or three words.")


def nano() -> VisionLanguageModel:
    return VisionLanguageModel(resolve_checkpoint("nano"), device=torch.device("cpu"), dtype=torch.float32)


def rounds(model: VisionLanguageModel) -> dict[int, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Rounds of different lengths by sessions of different lengths, which wait for each other."""
    engine = HFEngine(model, max_sessions=len(TEXTS))
    sessions = [engine.open([Message("user", (TextSegment(text),))]) for text in TEXTS]
    for length, session in zip((24, 6, 12), sessions, strict=True):
        engine.submit(RoundRequest(session, (), (), RoundLimits(length)))
    written: dict[int, Any] = {}
    while len(written) < len(TEXTS):
        for result in engine.collect():
            assert result.error is None
            written[sessions.index(result.session)] = (result.token_ids, result.logprobs)
    return written


def test_the_op_decodes_what_transformers_attention_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    op = text_attention.decode_attention

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return op(*arguments, **options)

    monkeypatch.setattr(text_attention, "decode_attention", counted)
    model = nano()
    by_op = rounds(model)
    layers = model.model.config.text_config.num_hidden_layers
    assert calls == layers * 23, "each token but the first, at every layer, for all sessions together"
    use_packed_attention(model.model.model.language_model)
    assert rounds(model) == by_op
    assert calls == 2 * layers * 23
    model.model.model.language_model.config._attn_implementation = "sdpa"
    by_sdpa = rounds(model)
    assert calls == 2 * layers * 23
    for place, (ids, logprobs) in by_op.items():
        assert ids == by_sdpa[place][0]
        assert logprobs == pytest.approx(by_sdpa[place][1], abs=1e-5)


def test_a_saved_checkpoint_says_nothing_of_it(tmp_path: Path) -> None:
    model = nano()
    use_packed_attention(model.model.model.language_model)
    model.model.save_pretrained(tmp_path)
    assert "vrthinker" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
