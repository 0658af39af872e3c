"""The options of a judge that commands with many pairs share, and the judge that they name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from vrthinker.commands.judges import JudgeSource, endpoint_extra
from vrthinker.commands.options import Flag, check_device, option
from vrthinker.errors import InputError, first_problem
from vrthinker.visibility import MemoryMode


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Which judge, and with which settings. Commands inherit it."""

    model: Annotated[str | None, option("M")] = None
    """A checkpoint folder, a hub id, or nano (for synthetic clips); with --endpoint, a name on the server."""
    window: Annotated[int | Literal["all"] | None, option("ROUNDS")] = None
    """How many rounds a retrieved frame stays visible, or "all". The checkpoint's own by default."""
    rounds: Annotated[int | None, option("N")] = None
    """The most rounds of an episode. The checkpoint's own by default."""
    frames: Annotated[int | None, option("N")] = None
    """The frames of the first input, half of them from each clip. The checkpoint's own by default."""
    memory: Annotated[MemoryMode | None, option("rerender|evict|renumber")] = None
    """How expired frames are removed. By default as in training; another mode is another policy."""
    temperature: Annotated[float | None, option("T")] = None
    """The sampling temperature; 0 is greedy. The checkpoint's own by default."""
    seed: int = 0
    """The seed of sampling, and of what the command draws."""
    max_fps: Annotated[float | None, option("FPS")] = None
    """The most frames per second that are numbered. All frames by default."""
    max_pixels: Annotated[int | None, option("N")] = None
    """The most pixels of a frame. The checkpoint's own by default."""
    dataset: Annotated[str | None, option("NAME")] = None
    """The dataset whose names of the dimensions the prompt uses. The checkpoint's by default."""
    tolerate_truncation: Flag = False
    """If a clip breaks half-way, judge the frames before the break. The verdict says so."""
    templates: Annotated[Path | None, option("FOLDER")] = None
    """A folder of prompt templates to use instead of the checkpoint's."""
    device: Annotated[str | None, option("DEVICE")] = None
    """cpu, cuda, cuda:1. By default a GPU if there is one."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, option("TYPE")] = None
    """float32, bfloat16 or float16. bfloat16 on a GPU and float32 on a CPU by default."""
    batch_size: int = 8
    """The number of episodes that advance together."""
    endpoint: Annotated[str | None, option("URL")] = None
    """Judge through the OpenAI-compatible server at this address, with the API key in OPENAI_API_KEY."""
    endpoint_extra: Annotated[str | None, option("JSON")] = None
    """Fields to add to each request, as a JSON object; null leaves a field out that the server refuses."""

    def source(self) -> JudgeSource:
        """The judge that the options name. What can be refused without a clip or a model is refused here.

        Raises:
            InputError: An option is missing or cannot be used.
        """
        from pydantic import ValidationError

        from vrthinker.episode.dimensions import dimension_texts
        from vrthinker.episode.settings import EpisodeSettings

        if self.model is None:
            raise InputError(
                "--model: missing; give a checkpoint folder or hub id (nano: for the synthetic world only)"
            )
        check_device(self.device)
        dimension_texts(self.dataset)
        if self.batch_size < 1:
            raise InputError(f"--batch-size: got {self.batch_size}, allowed: at least 1")
        if self.seed < 0:
            raise InputError(f"--seed: got {self.seed}, allowed: 0 and above")
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
            endpoint=self.endpoint,
            endpoint_options=endpoint_extra(self.endpoint_extra, self.endpoint),
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            overrides={"templates": self.templates, "max_pixels": self.max_pixels, **settings},
        )

    def _episode_settings(self) -> dict[str, Any]:
        given = {field: getattr(self, name) for field, name in _OPTIONS.items()}
        settings = {field: value for field, value in given.items() if value is not None}
        if self.tolerate_truncation:
            settings["tolerate_truncation"] = True
        if self.window == "all":
            settings["window"] = None
        return settings


_OPTIONS = {
    "window": "window",
    "max_rounds": "rounds",
    "initial_frames": "frames",
    "memory": "memory",
    "temperature": "temperature",
    "max_fps": "max_fps",
}
"""Field of `EpisodeSettings` -> the option that overrides it."""
