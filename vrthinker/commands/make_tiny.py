"""`vrthinker make-tiny` writes a tiny checkpoint with random weights, for tests and for trying the package.

Its verdicts are random, and everything that prints them says so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vrthinker.commands.options import option
from vrthinker.errors import InputError, unwritable

Family = Literal["qwen2.5-vl", "qwen3-vl"]

RANDOM_NOTE = "random weights: the verdict is random"
_PATCH_SIZES = {"qwen2.5-vl": 14, "qwen3-vl": 16}


@dataclass(frozen=True)
class MakeTinyCommand:
    """Write a tiny checkpoint with random weights, for tests and for trying the package."""

    out: Annotated[tyro.conf.Positional[Path], option("FOLDER")]
    """The folder to write; it must not exist yet, or be empty."""
    family: Family = "qwen2.5-vl"
    """The model class."""
    seed: int = 0
    """The seed of the weights."""
    layers: Annotated[int, option("N")] = 3
    """The number of layers of the text tower. 3 by default."""

    def run(self) -> int:
        """Writes the checkpoint."""
        folder = make_tiny_judge(self.out, self.family, self.seed, layers=self.layers)
        sys.stdout.write(f"{folder}\n")
        return 0


def make_tiny_judge(out: Path, family: Family, seed: int = 0, *, layers: int = 3) -> Path:
    """Writes a tiny random checkpoint with tokenizer, processor, judge settings and prompt templates.

    Its rounds are guided (`EpisodeSettings.guided`), because a model with random weights does not keep to the
    grammar by itself.

    Args:
        out: The folder to write. It must not exist yet, or be empty.
        family: The family of the transformers class.
        seed: The seed of the weights. Equal seeds give equal files.
        layers: The number of layers of the text tower, 1 to 64.

    Raises:
        InputError: The folder is not empty or cannot be written, or the number of layers is not allowed.
        MachineError: The disk is full.
    """
    from vrthinker.engine.hf.tiny import make_tiny
    from vrthinker.episode.prompts import PromptTemplates
    from vrthinker.episode.settings import PROMPTS_FOLDER, SETTINGS_FILE, EpisodeSettings, JudgeSettings
    from vrthinker.video.resize import ResizeSettings

    if not 1 <= layers <= 64:
        raise InputError(f"--layers: got {layers}, allowed: 1 to 64")
    folder = make_tiny(out, family, seed, layers=layers)
    patch = _PATCH_SIZES[family]
    settings = JudgeSettings(
        resize=ResizeSettings(
            patch_size=patch, merge_size=2, min_pixels=(2 * patch) ** 2, max_pixels=16 * (2 * patch) ** 2
        ),
        episode=EpisodeSettings(guided=True, max_rounds=3, max_round_tokens=256),
        note=RANDOM_NOTE,
    )
    try:
        PromptTemplates.load().save(folder / PROMPTS_FOLDER)
        (folder / SETTINGS_FILE).write_text(settings.model_dump_json(indent=2) + "\n", "utf-8")
    except OSError as error:
        raise unwritable(folder, error, "name another") from None
    return folder
