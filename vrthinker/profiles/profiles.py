"""Profiles: how released checkpoints want to be asked that have no `vrthinker.json` of their own.

A profile is a YAML file in this folder: settings, names of the dimensions and, if a checkpoint was trained
with another wording than the package's, its templates. It is chosen by name, or by a hub id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vrthinker.bounded_files import read_yaml
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import JudgeSettings
from vrthinker.errors import InputError, first_problem

_FOLDER = Path(__file__).parent
_HUB_FOLDER = "models--"
"""What the name of a checkpoint's folder in the hub's cache begins with."""


class Profile(BaseModel):
    """One profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hub_ids: tuple[str, ...]
    """The checkpoints that it is chosen for by itself."""
    settings: JudgeSettings
    """The settings. Patch size and merge size are always the model's."""
    templates: dict[Literal["system", "first_input", "outcome"], str] = {}
    """Templates that differ from the package's."""

    def prompts(self) -> PromptTemplates:
        """The package's templates with those of the profile in their places."""
        sources = dict(PromptTemplates.load().sources)
        sources.update({name: text for name, text in self.templates.items()})
        return PromptTemplates(sources)


def profile_names() -> tuple[str, ...]:
    """The names of all profiles."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def load_profile(name: str) -> Profile:
    """The profile of this name.

    Raises:
        InputError: There is none.
    """
    if name not in profile_names():
        raise InputError(f"profile: got {name!r}, allowed: {', '.join(profile_names())}")
    path = _FOLDER / f"{name}.yaml"
    try:
        return Profile.model_validate(read_yaml(path))
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from None


def profile_for(model: str | Path) -> Profile | None:
    """The profile of a checkpoint, by its hub id or by its folder in the hub's cache; None if it has none."""
    parts = Path(model).parts
    names = {str(model), *(p.removeprefix(_HUB_FOLDER).replace("--", "/") for p in parts if _HUB_FOLDER in p)}
    for name in profile_names():
        profile = load_profile(name)
        if names & set(profile.hub_ids):
            return profile
    return None
