"""What a judge's verdicts depend on, besides its weights: where its settings and prompts come from.

In this order, each over the one before: the package's defaults; a profile that goes with the checkpoint's hub
id; the checkpoint's own files; a profile that the caller names; single settings that the caller gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import PROMPTS_FOLDER, EpisodeSettings, JudgeSettings, load_judge_settings
from vrthinker.errors import InputError, first_problem
from vrthinker.profiles.profiles import load_profile, profile_for

LocalEngine = Literal["hf", "vllm"]
"""What runs a checkpoint on this machine: transformers, or vLLM (docs/engines.md)."""


@dataclass(frozen=True)
class JudgeConfiguration:
    """What a judge's verdicts depend on, besides its weights.

    Attributes:
        model: The name of the engine.
        settings: The sizes, limits and window.
        templates: The prompts.
    """

    model: str
    settings: JudgeSettings
    templates: PromptTemplates


def checkpoint_configuration(
    model: str | Path,
    *,
    engine: LocalEngine = "hf",
    templates: str | PathLike[str] | None = None,
    max_pixels: int | None = None,
    profile: str | None = None,
    **episode_settings: Any,
) -> JudgeConfiguration:
    """The configuration of a checkpoint. No weights are loaded. `Judge.from_pretrained` has the arguments.

    Raises:
        InputError: The checkpoint, a template or a setting cannot be used.
    """
    from vrthinker.engine.hf.checkpoint import grid, load_config, resolve_checkpoint

    folder = resolve_checkpoint(model)
    stored = load_judge_settings(folder)
    chosen = load_profile(profile) if profile is not None else None
    if chosen is None and stored is None:
        chosen = profile_for(model) or profile_for(folder)
    base = chosen.settings if chosen is not None else stored or JudgeSettings()
    sizes = grid(load_config(folder)) if chosen is not None or stored is None else {}
    settings = _override(base, max_pixels, episode_settings, **sizes)
    if engine == "vllm":
        refuse_without_own_cache(settings.episode, "with vLLM")
    if templates is not None:
        prompts = _load_templates(Path(templates))
    elif chosen is not None and (profile is not None or not (folder / PROMPTS_FOLDER).is_dir()):
        prompts = chosen.prompts()
    else:
        prompts = PromptTemplates.load(folder / PROMPTS_FOLDER)
    return JudgeConfiguration(f"{engine}:{folder.name}", settings, prompts)


def check_grid(folder: Path, settings: JudgeSettings) -> None:
    """Refuses settings whose patch grid is not the model's.

    Raises:
        InputError: A size differs.
    """
    from vrthinker.engine.hf.checkpoint import grid, load_config

    for name, wanted in grid(load_config(folder)).items():
        got = getattr(settings.resize, name)
        if got != wanted:
            raise InputError(f"{folder}: vrthinker.json: resize.{name}: got {got}, the model has {wanted}")


def endpoint_configuration(
    model: str,
    *,
    templates: str | PathLike[str] | None = None,
    max_pixels: int | None = None,
    profile: str | None = None,
    **episode_settings: Any,
) -> tuple[JudgeSettings, PromptTemplates]:
    """The settings and prompts for a model on a server. `Judge.from_endpoint` has the arguments.

    Raises:
        InputError: A template or a setting cannot be used, or asks for what no server can do.
    """
    chosen = load_profile(profile) if profile is not None else profile_for(model)
    settings = _override(chosen.settings if chosen else JudgeSettings(), max_pixels, episode_settings)
    refuse_without_own_cache(settings.episode, "over an endpoint")
    if templates is not None:
        return settings, _load_templates(Path(templates))
    return settings, chosen.prompts() if chosen else PromptTemplates.load()


def refuse_without_own_cache(episode: EpisodeSettings, where: str) -> None:
    """Refuses what only an engine can do that computes the model itself.

    Raises:
        InputError: Frames are to be taken out of a cache, or rounds forced into a form.
    """
    if episode.memory != "rerender":
        raise InputError(
            f"memory: got {episode.memory!r}, allowed {where}: rerender (its cache is out of reach); "
            "use --engine hf"
        )
    if episode.guided:
        raise InputError(
            f"guided: got true, allowed {where}: false (rounds are written without a grammar); use --engine "
            "hf"
        )


def _load_templates(folder: Path) -> PromptTemplates:
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder of prompt templates")
    return PromptTemplates.load(folder)


def _override(
    settings: JudgeSettings, max_pixels: int | None, episode_settings: dict[str, Any], **resize: Any
) -> JudgeSettings:
    """Applies overrides through validation, so that a bad value is one clear line."""
    from pydantic import ValidationError

    frames = episode_settings.get("initial_frames")
    if isinstance(frames, int) and frames % 2:
        raise InputError(f"initial_frames: got {frames}, allowed: an even number, half of it from each video")
    # The caller decides whether a broken clip is judged, never a checkpoint.
    stored = {**settings.episode.model_dump(), "tolerate_truncation": False}
    try:
        episode = EpisodeSettings.model_validate({**stored, **episode_settings})
        sizes = {**settings.resize.model_dump(), **resize}
        if max_pixels is not None:
            sizes["max_pixels"] = max_pixels
            if isinstance(max_pixels, int):
                sizes["min_pixels"] = min(sizes["min_pixels"], max_pixels)
        return settings.model_copy(
            update={"episode": episode, "resize": type(settings.resize).model_validate(sizes)}
        )
    except ValidationError as error:
        raise InputError(first_problem(error, "settings", quote=True)) from None
