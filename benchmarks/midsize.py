"""A mid-size random model, and episodes at the method's proportions: what the memory benchmarks share.

The method's sizes on a 7B model are 4,600 tokens of first input, rounds of 400 and 8 retrieved frames of 492
tokens (method section 2). Here everything is an eighth of that: a first input of about 575 tokens (8 frames
of 64), rounds of 50 and retrievals of 8 frames of 64 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vrthinker.data.pairs import load_pairs
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.tiny import make_tiny
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.trajectory import Trajectory
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace
from vrthinker.visibility import MemoryMode
from vrthinker.world.files import PAIRS_FILE, make_world
from vrthinker.world.nano import nano_templates
from vrthinker.world.world import PRESETS

SIDE = 224
"""Frames are seen at 224 x 224 pixels: 64 tokens."""
FRAMES = 8
ROUND_TOKENS = 50
RESIZE = ResizeSettings(patch_size=14, merge_size=2, min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE)
_TEXT = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
_VISION = {"hidden_size": 128, "intermediate_size": 384, "depth": 4, "num_heads": 4, "out_hidden_size": 384}


def make_midsize(folder: Path, seed: int = 0) -> Path:
    """Writes a random Qwen2.5-VL of about 10 M parameters, heads of 64."""
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    make_tiny(folder, "qwen2.5-vl", seed=seed)
    config: Any = AutoConfig.from_pretrained(folder)
    for name, value in _TEXT.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention"] * _TEXT["num_hidden_layers"]
    config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
    for name, value in _VISION.items():
        setattr(config.vision_config, name, value)
    config.vision_config.fullatt_block_indexes = [1, 3]
    torch.manual_seed(seed)
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    return folder


class Stage:
    """Clips of the synthetic world, and episodes about them."""

    def __init__(self, folder: Path, pairs: int, seed: int) -> None:
        make_world(folder, PRESETS["easy"], pairs=pairs, seed=seed)
        self.pairs = load_pairs(folder / PAIRS_FILE)
        self._reader, self._cache = open_reader(), FrameCache(1 << 30)

    def item(self, pair: int, seed: int, group: Sequence[int] | None = None) -> EpisodeItem:
        """An episode about a pair."""
        given = self.pairs[pair]

        def open_workspace() -> Workspace:
            return Workspace.open(
                given.video_1, given.video_2, reader=self._reader, resize=RESIZE, cache=self._cache
            )

        return EpisodeItem(
            given.id,
            given.prompt,
            open_workspace,
            seed=seed,
            group_seeds=None if group is None else tuple(group),
        )

    def group(
        self, markup: Markup, *, size: int, rounds: int, window: int, memory: MemoryMode, seed: int
    ) -> list[Trajectory]:
        """Episodes of one pair whose rounds differ: each looks at frames of its own."""
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(size):
            script = [_round(rng, markup, last=number == rounds - 1) for number in range(rounds)]
            settings = EpisodeSettings(
                initial_frames=FRAMES, retrieved_frames=FRAMES, window=window, memory=memory, max_rounds=8
            )
            runner = EpisodeRunner(ScriptedEngine([script]), settings, templates=nano_templates())
            trajectory = runner.run_one(self.item(0, 0))
            ids = [
                record.model_copy(update={"token_ids": (*markup.encode(record.text), markup.turn_end)})
                for record in trajectory.rounds
            ]
            found.append(trajectory.model_copy(update={"rounds": tuple(ids)}))
        return found


def _round(rng: np.random.Generator, markup: Markup, *, last: bool) -> str:
    """A well-formed round of about `ROUND_TOKENS` tokens."""
    frames = sorted(rng.choice(np.arange(1, 60), FRAMES, replace=False).tolist())
    call = f'<tool_call>{{"name": "select_frames", "arguments": {{"target_frames": {frames}}}}}</tool_call>'
    end = "<answer>TA=1, VQ=0, MQ=2, OA=1</answer>" if last else call
    words = ""
    while True:
        text = f"<snapshot>{words}</snapshot><think>so</think>{_recommended(last)}{end}"
        if len(markup.encode(text)) >= ROUND_TOKENS:
            return text
        words += f" {rng.integers(100)}"


def _recommended(last: bool) -> str:
    return "" if last else "<recommend answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</recommend answer>"
