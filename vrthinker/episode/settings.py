"""Settings of an episode, and the settings that a checkpoint's folder contains.

A checkpoint has its own prompts and sizes: `vrthinker.json` (a `JudgeSettings`) and, beside it, a folder
`vrthinker_prompts/` of jinja2 templates. If either is missing, the package's defaults are used, which are the
paper's settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from vrthinker.bounded_files import read_json
from vrthinker.engine.base import MIN_TEMPERATURE
from vrthinker.episode.dimensions import DEFAULT_DATASET, DatasetName, Dimension, DimensionText
from vrthinker.errors import InputError, first_problem
from vrthinker.video.resize import ResizeSettings
from vrthinker.visibility import MemoryMode

SETTINGS_FILE = "vrthinker.json"
PROMPTS_FOLDER = "vrthinker_prompts"
MAX_SETTINGS_BYTES = 1 << 20
SYNTHETIC_COMMENT = "vrthinker synthetic world"
"""The comment in the metadata of the synthetic world's clips: `JudgeSettings.clips` is checked against it."""


class EpisodeSettings(BaseModel):
    """The settings of one judgment (method sections 2, 3 and 6). Defaults are the paper's, or "ours"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    initial_frames: int = Field(8, ge=2, le=256)
    """N_in, the number of frames of the first input, half of them from each video."""
    retrieved_frames: int = Field(8, ge=1, le=256)
    """N_ex, the most frames that the tool calls of one round may show."""
    window: int | None = Field(1, ge=0)
    """p, the number of rounds for which a retrieved frame stays visible; null keeps it to the end."""
    memory: MemoryMode = "rerender"
    """How expired frames are removed from the context: `rerender` (the paper's), `evict`, or `renumber`
    (inference only). A policy is used in the mode in which it was trained; docs/memory.md says how the modes
    differ."""
    max_rounds: int = Field(6, ge=1, le=64)
    """Ours: the most rounds. The last round is told to answer."""
    max_round_tokens: int = Field(512, ge=1, le=32768)
    """Ours: the most tokens that one round may write."""
    temperature: float = Field(0.0, ge=0.0, le=10.0)
    """The sampling temperature; 0 is greedy, as in the paper's evaluation."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """The nucleus mass; 1 keeps every token."""

    @field_validator("temperature")
    @classmethod
    def _greedy_or_not_too_cold(cls, value: float) -> float:
        if 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"got {value}, allowed: 0 (greedy), or {MIN_TEMPERATURE} and above")
        return value

    guided: bool = False
    """Ours: force each round into the grammar, for models that do not keep to it by themselves."""
    max_fps: float | None = Field(None, gt=0.0)
    """The most frames per second of each clip that are numbered; null numbers all of them."""
    frames_per_video: int | None = Field(None, ge=1, le=4096)
    """F, the number of frames of each clip that are numbered, whatever its length: evenly spaced from its
    first to its last, and repeated if it has fewer. Video 1 holds 1..F, video 2 F+1..2F. Null numbers all."""
    tolerate_truncation: bool = False
    """If a clip breaks half-way, judge the frames before the break."""

    @property
    def numbers_all_frames(self) -> bool:
        """Whether every frame of the clips has a number, so that numbers are places in the files."""
        return self.max_fps is None and self.frames_per_video is None

    @model_serializer(mode="wrap")
    def _without_null_picks(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_nulls(handler(self), "frames_per_video")


class JudgeSettings(BaseModel):
    """The content of a checkpoint's `vrthinker.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    resize: ResizeSettings = ResizeSettings()
    """The frame sizes. Patch size and merge size must be the model's."""
    episode: EpisodeSettings = EpisodeSettings()
    """The settings that the checkpoint was trained with."""
    dataset: DatasetName = DEFAULT_DATASET
    """The dataset whose names and explanations of the dimensions the prompt uses if a pair has no dataset."""
    dimensions: tuple[DimensionText, ...] | None = None
    """The checkpoint's own names and explanations of the dimensions, in its own order, instead of those of
    `dataset`. A dataset that a pair or a caller names still comes first."""
    note: str | None = Field(None, max_length=1000)
    """A line about the checkpoint that is added to every verdict."""
    clips: Literal["any", "synthetic"] = "any"
    """The clips that it was trained to judge. With `synthetic` (the package's synthetic world), a verdict
    about other clips has a note that says so."""

    @field_validator("dimensions")
    @classmethod
    def _are_the_four(cls, value: tuple[DimensionText, ...] | None) -> tuple[DimensionText, ...] | None:
        if value is not None and sorted(text.code for text in value) != sorted(Dimension):
            codes = ", ".join(text.code for text in value)
            raise ValueError(f"got {codes or 'none'}, allowed: each of {', '.join(Dimension)} once")
        return value

    @model_serializer(mode="wrap")
    def _without_null_dimensions(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_nulls(handler(self), "dimensions")


def without_nulls(written: dict[str, Any], *names: str) -> dict[str, Any]:
    """Values that are about to be written, without newer fields that are null, so that older readers work."""
    return {name: value for name, value in written.items() if value is not None or name not in names}


def load_judge_settings(folder: Path) -> JudgeSettings | None:
    """Reads a checkpoint folder's `vrthinker.json`; None if there is none.

    Raises:
        InputError: The file is too large, not JSON, or has an unknown or ill-typed key.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    content = read_json(path, MAX_SETTINGS_BYTES)
    try:
        return JudgeSettings.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}; see docs/checkpoints.md") from None
