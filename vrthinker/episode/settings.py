"""Settings of an episode, and what a checkpoint's folder says about how it wants to be asked.

A checkpoint carries its own wording and sizes: `vrthinker.json` (a `JudgeSettings`) and, beside it, a
folder `vrthinker_prompts/` of jinja2 templates. Either may be missing; then the package's defaults
hold, which are the paper's settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vrthinker.engine.base import MIN_TEMPERATURE
from vrthinker.episode.dimensions import DEFAULT_DATASET, DatasetName
from vrthinker.errors import InputError, first_problem
from vrthinker.video.resize import ResizeSettings
from vrthinker.visibility import MemoryMode

SETTINGS_FILE = "vrthinker.json"
PROMPTS_FOLDER = "vrthinker_prompts"
MAX_SETTINGS_BYTES = 1 << 20
SYNTHETIC_COMMENT = "vrthinker synthetic world"
"""The comment in the metadata of the synthetic world's clips: `JudgeSettings.clips` is checked against it."""


class EpisodeSettings(BaseModel):
    """How one judgment runs (method sections 2, 3 and 6). Defaults are the paper's; *ours* is marked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    initial_frames: int = Field(8, ge=2, le=256)
    """N_in, frames of the first input, half of them from each video."""
    retrieved_frames: int = Field(8, ge=1, le=256)
    """N_ex, the most frames that one tool call may show."""
    window: int | None = Field(1, ge=0)
    """p, how many rounds a retrieved frame stays visible; null keeps it to the end."""
    memory: MemoryMode = "rerender"
    """How expired frames leave the context: `rerender` (the paper's), `evict`, or `renumber` (inference
    only). A policy is used in the mode in which it was trained; docs/memory.md says what differs."""
    max_rounds: int = Field(6, ge=1, le=64)
    """Ours: the last round is told to answer."""
    max_round_tokens: int = Field(512, ge=1, le=32768)
    """Ours: the most tokens that one round may write."""
    temperature: float = Field(0.0, ge=0.0, le=10.0)
    """0 is greedy, as in the paper's evaluation."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus mass; 1 keeps every token."""

    @field_validator("temperature")
    @classmethod
    def _greedy_or_not_too_cold(cls, value: float) -> float:
        if 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"got {value}, allowed: 0 (greedy), or {MIN_TEMPERATURE} and above")
        return value

    guided: bool = False
    """Ours: constrain each round to the grammar (for models that do not hold the form by themselves)."""
    max_fps: float | None = Field(None, gt=0.0)
    """Number at most so many frames a second of each clip; null numbers all of them."""
    tolerate_truncation: bool = False
    """Judge a clip that breaks half-way on the frames before the break."""


class JudgeSettings(BaseModel):
    """What a checkpoint's `vrthinker.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    resize: ResizeSettings = ResizeSettings()
    """Frame sizes; patch and merge size must be the model's."""
    episode: EpisodeSettings = EpisodeSettings()
    """Settings that the checkpoint was trained with."""
    dataset: DatasetName = DEFAULT_DATASET
    """Whose names and explanations of the dimensions the prompt takes when a pair names none."""
    note: str | None = None
    """One line about the checkpoint that every verdict's reader should see."""
    clips: Literal["any", "synthetic"] = "any"
    """What it was trained to judge. `synthetic`: the package's synthetic world; a verdict about other clips
    carries a note that says so."""


def load_judge_settings(folder: Path) -> JudgeSettings | None:
    """Reads a checkpoint folder's `vrthinker.json`; None where there is none.

    Raises:
        InputError: The file is too large, not JSON, or has an unknown or ill-typed key.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_SETTINGS_BYTES:
        raise InputError(f"{path}: got {path.stat().st_size} bytes, allowed: up to {MAX_SETTINGS_BYTES}")
    try:
        return JudgeSettings.model_validate(json.loads(path.read_text("utf-8")))
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}; see docs/checkpoints.md") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({str(error)[:80]})") from None
