"""The options of a judge that commands share, and the judge that they name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from vrthinker.commands.judges import EngineName, JudgeSource, endpoint_extra
from vrthinker.commands.options import Flag, check_device, option
from vrthinker.errors import InputError, first_problem
from vrthinker.visibility import MemoryMode


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which judge, and with which settings. Commands inherit it."""

    model: Annotated[str | None, option("M")] = None
    """A checkpoint folder, a hub id, or nano (for synthetic clips); with --endpoint, a name on the server."""
    window: Annotated[int | Literal["all"] | None, option("ROUNDS")] = None
    """How many rounds a retrieved frame stays visible, or "all". The checkpoint's own by default."""
    rounds: Annotated[int | None, option("N")] = None
    """The most rounds of an episode. The checkpoint's own by default."""
    frames: Annotated[int | None, option("N")] = None
    """The frames of the first input, half of them from each clip. The checkpoint's own by default."""
    max_round_tokens: Annotated[int | None, option("N")] = None
    """The most tokens that one round may write. The checkpoint's own by default."""
    memory: Annotated[MemoryMode | None, option("rerender|evict|renumber")] = None
    """How expired frames are removed (docs/memory.md). The checkpoint's own by default; another mode is
    another policy."""
    temperature: Annotated[float | None, option("T")] = None
    """The sampling temperature; 0 is greedy. The checkpoint's own by default."""
    seed: int = 0
    """The seed of sampling, and of whatever else is drawn."""
    max_fps: Annotated[float | None, option("FPS")] = None
    """The most frames per second that are numbered. The checkpoint's own by default, or else all frames."""
    max_pixels: Annotated[int | None, option("N")] = None
    """The most pixels of a frame. The checkpoint's own by default."""
    reader: Annotated[Literal["auto", "pyav", "dali"], option("auto|pyav|dali")] = "auto"
    """What decodes clips: pyav on the CPU, or NVIDIA DALI. vrthinker doctor says what auto takes."""
    tolerate_truncation: Flag = False
    """If a clip breaks half-way, judge the frames before the break. The verdict says so."""
    guided: Annotated[bool | None, option("True|False")] = None
    """Force rounds into the grammar, for models that do not keep to it. The checkpoint's own by default."""
    profile: Annotated[str | None, option("NAME")] = None
    """Settings and prompts of a released checkpoint: vr-thinker-48, vr-thinker-128. By default its own."""
    templates: Annotated[Path | None, option("FOLDER")] = None
    """A folder of prompt templates to use instead of the checkpoint's."""
    engine: Annotated[EngineName | None, option("hf|vllm|endpoint")] = None
    """What runs the model: transformers, vLLM, or a server. hf by default, with --endpoint the server."""
    device: Annotated[str | None, option("DEVICE")] = None
    """cpu, cuda, cuda:1. By default a GPU if there is one."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, option("TYPE")] = None
    """float32, bfloat16 or float16. bfloat16 on a GPU and float32 on a CPU by default."""
    batch_size: int = 8
    """The number of episodes that advance together."""
    endpoint: Annotated[str | None, option("URL")] = None
    """Judge through the OpenAI-compatible server at this address, with the API key in OPENAI_API_KEY. With
    --engine vllm, it is a vllm serve that has --model loaded."""
    endpoint_extra: Annotated[str | None, option("JSON")] = None
    """Fields to add to each request, as a JSON object; null leaves a field out that the server refuses."""

    def source(self) -> JudgeSource:
        """The judge that the options name. What can be refused without a clip or a model is refused here.

        Raises:
            InputError: An option is missing or cannot be used.
        """
        if self.model is None:
            raise InputError(
                "--model: missing; give a checkpoint folder or hub id (nano: for the synthetic world only)"
            )
        from pydantic import ValidationError

        from vrthinker.episode.settings import EpisodeSettings

        check_device(self.device)
        if self.reader == "dali":
            from vrthinker.video.open import open_reader

            open_reader(self.reader)
        for name, value, least in (("batch-size", self.batch_size, 1), ("seed", self.seed, 0)):
            if value < least:
                raise InputError(f"--{name}: got {value}, allowed: {least} and above")
        if self.frames is not None and self.frames % 2:
            raise InputError(
                f"--frames: got {self.frames}, allowed: an even number, half of it from each clip"
            )
        settings = self._episode_settings()
        try:
            EpisodeSettings.model_validate(settings)
        except ValidationError as error:
            field, _, problem = first_problem(error, quote=True).partition(": ")
            name = _OPTIONS.get(field, field).replace("_", "-")
            raise InputError(f"--{name}: {problem}") from None
        return JudgeSource(
            self.model,
            engine=self.engine,
            endpoint=self.endpoint,
            endpoint_options=endpoint_extra(self.endpoint_extra, self.endpoint),
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            reader=self.reader,
            overrides={
                "templates": self.templates,
                "max_pixels": self.max_pixels,
                "profile": self.profile,
                **settings,
            },
        )

    def _episode_settings(self) -> dict[str, Any]:
        """The settings of the episode that options override."""
        given = {field: getattr(self, name) for field, name in _OPTIONS.items()}
        settings = {field: value for field, value in given.items() if value is not None}
        if self.tolerate_truncation:
            settings["tolerate_truncation"] = True
        if self.window == "all":
            settings["window"] = None
        return settings


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(ModelOptions):
    """The options of a judge of pairs that no file names."""

    dataset: Annotated[str | None, option("NAME")] = None
    """The dataset whose names of the dimensions the prompt uses. The checkpoint's by default; a pairs file
    names its own."""

    def source(self) -> JudgeSource:
        """The judge that the options name (`ModelOptions.source`)."""
        source = super().source()
        from vrthinker.episode.dimensions import dimension_texts

        dimension_texts(self.dataset)
        return source


_OPTIONS = {
    "window": "window",
    "max_rounds": "rounds",
    "initial_frames": "frames",
    "max_round_tokens": "max_round_tokens",
    "memory": "memory",
    "temperature": "temperature",
    "max_fps": "max_fps",
    "guided": "guided",
}
"""Field of `EpisodeSettings` -> the option that overrides it."""
