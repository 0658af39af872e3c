"""The vision tower attends in batches: equal to transformers' own loop, gradients too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vrthinker.engine.hf import vision_attention
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.engine.hf.tiny import make_tiny

pytestmark = pytest.mark.versions


def load(folder: Path) -> VisionLanguageModel:
    model = VisionLanguageModel(folder, device=torch.device("cpu"), dtype=torch.float32)
    model.model.requires_grad_(True)
    return model


def outputs(
    model: VisionLanguageModel, frames: list[np.ndarray[Any, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything the tower gives, and the gradient of its square."""
    encoded = model.encode(frames)
    flat = torch.cat([t.flatten() for f in encoded for t in (f.embeds, *f.deepstack)])
    flat.square().sum().backward()
    tower = model.model.model.visual
    gradient = torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None])
    model.model.zero_grad()
    return flat.detach(), gradient


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("grids", [[(2, 2)] * 5, [(2, 2), (4, 6), (2, 2), (5, 3)], [(9, 7)]])
def test_batched_attention_equals_the_loop(
    tmp_path: Path, family: Any, grids: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny(tmp_path / "model", family)
    model = load(folder)
    side = model.patch_size * model.merge_size
    rng = np.random.default_rng(len(grids))
    frames = [rng.integers(0, 256, (h * side, w * side, 3), dtype=np.uint8) for h, w in grids]
    calls = []
    real = vision_attention._attend
    monkeypatch.setattr(vision_attention, "_attend", lambda *args: calls.append(1) or real(*args))
    batched = outputs(model, frames)
    assert calls, "the tower did not attend through it"
    model.model.model.visual.config._attn_implementation = "sdpa"
    count = len(calls)
    looped = outputs(model, frames)
    assert len(calls) == count
    for got, wanted in zip(batched, looped, strict=True):
        assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_a_saved_checkpoint_says_nothing_of_it(tmp_path: Path) -> None:
    model = load(make_tiny(tmp_path / "model", "qwen2.5-vl"))
    model.model.save_pretrained(tmp_path / "saved")
    assert "vrthinker_flash" not in json.dumps(json.loads((tmp_path / "saved" / "config.json").read_text()))
