"""The settings that every stage has, the recipes that hold them, and how a run's own are read again.

Settings are frozen pydantic models. A recipe is their YAML form.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from vrthinker.bounded_files import parse_json, read_json, read_yaml
from vrthinker.errors import InputError, first_problem, one_line
from vrthinker.records.trackers import TrackerName
from vrthinker.train.loop.optimizer import AdamWSettings, OptimizerSettings
from vrthinker.train.loop.schedule import LearningRate
from vrthinker.train.model import PolicySettings

RECIPES = Path(__file__).parent / "recipes"
CONFIG_FILE = "config.json"
NANO = "nano-from-nothing"
"""The value of `model` that starts from the nano judge's random weights."""
MAX_SEED, MAX_STEPS = 1 << 40, 1 << 40
"""Above these, numbers that are computed from them would not fit into 64 bits."""


class StageSettings(BaseModel):
    """A group of settings: it is frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SftPhase(StageSettings):
    """How long and how fast one phase learns. Defaults are the paper's."""

    name: str = Field("cold-start", pattern=r"^[a-z0-9][a-z0-9-]*$")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    """Number of optimizer steps; one pass over the traces by default."""
    batch_size: int = Field(32, ge=1)
    """Number of traces per step. The paper uses 32 (accumulated one by one)."""
    micro_batch_size: int = Field(1, ge=1)
    """Number of traces per forward. Gradients are accumulated over `batch_size` traces."""
    packed: bool = True
    """Compute what the rounds of a trace share once (docs/memory.md). Without it, each context of a trace is
    a row of a padded batch, and `batch_size` and `micro_batch_size` count rows."""
    max_pack_tokens: int | None = Field(None, ge=1)
    """The most tokens of a packed forward. What does not fit is computed in another. No limit by default."""
    learning_rate: LearningRate = LearningRate(peak=1.5e-6)
    freeze_vision: bool = False
    """Leave the vision tower as it is in this phase."""


def _from_home(path: Path) -> Path:
    """The absolute path; that of an unknown user's home is left for reading to refuse."""
    return Path(os.path.expanduser(path)).absolute()


class HeldOutSettings(StageSettings):
    """On what a policy is judged while it is trained, and how often (`held_out.HeldOut`)."""

    pairs: Annotated[Path, AfterValidator(_from_home)]
    """A file of labelled pairs that training does not see."""
    every: int = Field(100, ge=1)
    """Number of steps between evaluations. There is always one before the first step and after the last."""
    limit: int | None = Field(None, ge=1)
    """Number of pairs, drawn by the run's seed; all by default."""
    batch_size: int = Field(8, ge=1)
    """Number of episodes that advance together."""
    temperature: float = Field(0.0, ge=0.0, le=10.0)
    """0 decodes greedily, as in the paper's evaluations. Above it, one episode per pair is sampled, always
    with the same seeds: what GRPO improves first is how often a sampled episode is right."""


class RunSettings(PolicySettings, StageSettings):
    """The settings of every stage. Every run writes its resolved settings to `config.json`."""

    model: str
    """A checkpoint folder, a hub id, or `nano-from-nothing`."""

    @field_validator("model")
    @classmethod
    def _from_anywhere(cls, model: str) -> str:
        """Makes a path absolute, because a run may be resumed from another folder."""
        try:
            folder = Path(model).expanduser()
            return str(folder.absolute()) if model != NANO and folder.exists() else model
        except (OSError, RuntimeError):
            # A name that no file can have, or the home of an unknown user: loading the model says so.
            return model

    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of generated traces, of the order of batches, and of random initial weights."""
    optimizer: OptimizerSettings = AdamWSettings()
    frame_cache_bytes: int = Field(4 << 30, ge=0)
    """The most bytes of decoded frames that are kept: in memory, or on the GPU that decodes them."""
    checkpoint_every: int = Field(100, ge=1)
    note: str | None = None
    """A line that is added to every verdict of the trained judge."""
    clips: Literal["any", "synthetic"] | None = None
    """The clips that the trained judge is meant for (`JudgeSettings.clips`); by default the base's."""
    evaluation: HeldOutSettings | None = None
    """Held-out pairs that the policy is judged on during the run; none by default."""
    tracker: TrackerName | None = None
    """Where metrics go besides `metrics.jsonl`: trackio, wandb, tensorboard or none. By default trackio, if
    it is installed."""


AnySettings = TypeVar("AnySettings", bound=RunSettings)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage's names: in messages (`cold start`), and of its command (`cold-start`)."""

    name: str
    command: str


def load_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, which is a YAML file or the name of a recipe that ships with the package.

    Raises:
        InputError: There is no such recipe, or it is not a YAML mapping.
    """
    path = Path(name)
    if not name.endswith((".yaml", ".yml")):
        known = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        if name not in known:
            got = one_line(repr(name))
            raise InputError(f"recipe {got}: not known; there is {', '.join(known)}, or give a .yaml file")
        path = RECIPES / f"{name}.yaml"
    loaded = read_yaml(path)
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: got {type(loaded).__name__}, wanted a mapping of settings")
    return loaded


def with_overrides(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Settings with single values replaced, as `--set phases.0.steps=10` gives them.

    A value is read as JSON; what is no JSON is text. Whether a key exists is for the settings to say. A group
    that is null gets the key that is named in it.

    Raises:
        InputError: An assignment is not `key=value`, or its key leads into something that has no keys.
    """
    changed: dict[str, Any] = json.loads(json.dumps(values, default=str))  # aliases of a recipe become copies
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            got = one_line(repr(assignment))
            raise InputError(f"--set: got {got}, allowed: key=value, like phases.0.steps=100")
        try:
            value = parse_json(text, "--set")
        except InputError:
            value = text
        *parents, last = key.split(".")
        holder: Any = changed
        for name in parents:
            if isinstance(holder, dict):
                if holder.get(name) is None:
                    holder[name] = {}
                holder = holder[name]
            else:
                holder = _entry(holder, name, key)
        if isinstance(holder, dict):
            holder[last] = value
        else:
            _entry(holder, last, key)
            holder[int(last)] = value
    return changed


def _entry(holder: object, name: str, key: str) -> Any:
    """An entry of a list by its number."""
    if not isinstance(holder, list):
        raise InputError(f"--set: {one_line(key)}: {one_line(name)} stands below a value that has no keys")
    if not (name.isdecimal() and name.isascii() and len(name) < 9 and int(name) < len(holder)):
        raise InputError(
            f"--set: {one_line(key)}: got {one_line(name)}, allowed: 0 to {len(holder) - 1}, one entry of "
            "the list"
        )
    return holder[int(name)]


def stage_settings(stage: Stage, kind: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Validates a stage's settings. An error names the first wrong key.

    Raises:
        InputError: A key is unknown, missing or out of range.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{stage.name}: {first_problem(error, '(settings)')}") from None


def stored_settings(stage: Stage, kind: type[AnySettings], run: Path) -> AnySettings:
    """The settings that a run was started with.

    Raises:
        InputError: The folder does not hold a run of this stage.
    """
    try:
        return stage_settings(stage, kind, read_json(run / CONFIG_FILE))
    except InputError as error:
        raise InputError(f"{run}: no run to resume ({error})") from None
