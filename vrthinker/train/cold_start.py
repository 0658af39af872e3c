"""Stage 1, cold start: supervised fine-tuning on a teacher's traces (method section 5, eq. 1).

What it does: it reads or makes traces, keeps those that are well formed and right in all four judgments, and
trains on the rounds' tokens. Tool outcomes, prompts and frames carry no loss.

How it differs from the paper: training may have several phases (a curriculum) instead of one, and a judge can
be trained from random weights on the synthetic world (`--recipe nano`).

    vrthinker train cold-start --model M --traces traces.jsonl --pairs pairs.jsonl --out RUN
    vrthinker train cold-start --recipe nano --out RUN
    vrthinker train cold-start --resume RUN
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vrthinker.bounded_files import read_json, read_yaml
from vrthinker.engine.hf.checkpoint import resolve_checkpoint
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import PROMPTS_FOLDER, SETTINGS_FILE, JudgeSettings, load_judge_settings
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError, first_problem, one_line
from vrthinker.policy.batches import Batch, BatchSource, FrameLoader
from vrthinker.policy.forward import learned_hidden
from vrthinker.policy.losses import sft_loss_from_hidden
from vrthinker.policy.sequences import TrainingSequence, training_sequences
from vrthinker.progress import Progress
from vrthinker.records.files import replace_file
from vrthinker.records.metrics_file import METRICS_FILE
from vrthinker.records.provenance import provenance
from vrthinker.records.run_folder import adopt_run
from vrthinker.records.run_lock import lock_run
from vrthinker.train.loop.loop import LoopSettings, MicroLoss, run_loop
from vrthinker.train.loop.optimizer import AdamWSettings, OptimizerSettings
from vrthinker.train.loop.schedule import LearningRate
from vrthinker.train.traces import (
    FileTraces,
    Selection,
    TraceSource,
    WorldTraces,
    make_traces,
    read_traces,
)
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.world.nano import write_judge_settings, write_nano

RECIPES = Path(__file__).parent / "recipes"
CONFIG_FILE, PROVENANCE_FILE, TRACES_FILE = "config.json", "provenance.json", "traces.json"
_MAX_TRACES_FILE_BYTES = 1 << 30
NANO = "nano-from-nothing"
"""The value of `model` that starts from the nano judge's random weights."""
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf")
"""Suffixes of files that are not copied from the base model to the trained judge."""
_MAX_SEED, _MAX_STEPS = 1 << 40, 1 << 40
"""Above these, numbers that are computed from them would not fit into 64 bits."""


# Settings


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Phase(_Settings):
    """One phase of the curriculum: the traces to train on, and for how long. Defaults are the paper's."""

    name: str = Field("cold-start", pattern=r"^[a-z0-9][a-z0-9-]*$")
    traces: Annotated[TraceSource, Field(discriminator="kind")]
    steps: int | None = Field(None, ge=1, le=_MAX_STEPS)
    """Number of optimizer steps; one pass over the traces by default."""
    batch_size: int = Field(32, ge=1)
    """Number of sequences per step. The paper uses 32 (accumulated one by one)."""
    micro_batch_size: int = Field(1, ge=1)
    """Number of sequences per forward. Gradients are accumulated over `batch_size` sequences."""
    learning_rate: LearningRate = LearningRate(peak=1.5e-6)
    only_snapshots: bool = False
    """Learn only the snapshots, as in reading lessons: what each frame shows, without any conclusions."""


class ColdStartSettings(_Settings):
    """All settings of a cold start. Every run writes its resolved settings to `config.json`."""

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

    phases: tuple[Phase, ...] = Field(min_length=1)
    seed: int = Field(0, ge=0, le=_MAX_SEED)
    """Seed of generated traces, of the order of batches, and of random initial weights."""
    optimizer: OptimizerSettings = AdamWSettings()
    train_vision: bool = True
    """Train the vision tower too."""
    frame_cache_bytes: int = Field(4 << 30, ge=0)
    """The most bytes of decoded frames that are kept in memory."""
    checkpoint_every: int = Field(100, ge=1)
    note: str | None = None
    """A line that is added to every verdict of the trained judge."""
    clips: Literal["any", "synthetic"] | None = None
    """The clips that the trained judge is meant for (`JudgeSettings.clips`); by default the base's."""


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


def cold_start_settings(values: Mapping[str, Any]) -> ColdStartSettings:
    """Validates settings. An error names the first wrong key.

    Raises:
        InputError: A key is unknown, missing or out of range.
    """
    try:
        return ColdStartSettings.model_validate(values)
    except ValidationError as error:
        raise InputError(f"cold start: {first_problem(error, '(settings)')}") from None


# The run


def run_cold_start(settings: ColdStartSettings, out: Path) -> Path | None:
    """Trains a judge, or resumes a run that was stopped.

    Args:
        settings: The settings. For a folder that holds a run, they must be the run's.
        out: The run's folder, for `config.json`, `traces.json`, `data/`, `checkpoints/`, `metrics.jsonl` and
            `model/`.

    Returns:
        The trained judge's checkpoint folder, `out/model`; None if a signal ended the run early.

    Raises:
        InputError: Settings, traces or the folder cannot be used. A folder that this call made is removed.
        VRThinkerError: Training failed; the last checkpoint is kept.
    """
    is_new = not os.path.lexists(out)
    try:
        with lock_run(out):
            return _run(settings, out)
    except InputError:
        # Nothing was trained: the same folder may be named again, with what was wrong mended.
        if is_new and not (out / METRICS_FILE).exists():
            shutil.rmtree(out, ignore_errors=True)
        raise


def _run(settings: ColdStartSettings, out: Path) -> Path | None:
    # Traces are read first, because they may be missing. After that, the folder belongs to these settings.
    read = [read_traces(p.traces) if isinstance(p.traces, FileTraces) else None for p in settings.phases]
    if settings.model != NANO:
        resolve_checkpoint(settings.model)
    adopt_run(out / CONFIG_FILE, settings.model_dump(mode="json"), (), out)
    for phase, selection in zip(settings.phases, read, strict=True):
        if selection is not None:
            _say_what_was_kept(phase, selection)
    if not (out / PROVENANCE_FILE).exists():
        replace_file(out / PROVENANCE_FILE, (json.dumps(provenance(), indent=2) + "\n").encode())
    base = _base_model(settings, out)
    templates = PromptTemplates.load(base / PROMPTS_FOLDER)
    policy = _load_policy(base, train_vision=settings.train_vision)
    judge_settings = _judge_settings(base, policy)
    markup = Markup(policy.tokenizer, policy.vocabulary_size)
    loader = FrameLoader(open_reader(), FrameCache(settings.frame_cache_bytes))
    phases, selections = [], []
    for number, (phase, selection) in enumerate(zip(settings.phases, read, strict=True)):
        if selection is None:
            selection = _made_traces(phase, out / "data", judge_settings, templates, settings.seed)
            _say_what_was_kept(phase, selection)
        sequences = _sequences(phase, selection.traces, markup, policy, judge_settings.resize)
        phases.append(_PhaseRun(phase, sequences, loader, seed=settings.seed * 1000 + number))
        selections.append(selection)
    _record_what_was_kept(out / TRACES_FILE, phases, selections)
    curriculum = _Curriculum(phases)
    try:
        result = run_loop(
            policy.model,
            settings=LoopSettings(
                steps=curriculum.steps,
                checkpoint_every=settings.checkpoint_every,
                seed=settings.seed,
                optimizer=settings.optimizer,
            ),
            learning_rate=curriculum.learning_rate,
            micro_losses=lambda step: curriculum.micro_losses(policy, step),
            run=out,
            name="cold start",
            resume_hint=f"vrthinker train cold-start --resume {shlex.quote(str(out))} goes on",
        )
    finally:
        curriculum.close()
        loader.close()
    if result.outcome != "finished":
        return None
    return export(policy, base, out / "model", judge_settings, templates, settings)


def resume_settings(run: Path) -> ColdStartSettings:
    """The settings that a run was started with.

    Raises:
        InputError: The folder does not hold a run of this stage.
    """
    try:
        return cold_start_settings(read_json(run / CONFIG_FILE))
    except InputError as error:
        raise InputError(f"{run}: no run to resume ({error})") from None


# Data


def _made_traces(
    phase: Phase, folder: Path, settings: JudgeSettings, templates: PromptTemplates, seed: int
) -> Selection:
    assert isinstance(phase.traces, WorldTraces)
    folder.mkdir(parents=True, exist_ok=True)
    return make_traces(phase.traces, folder, settings, templates, seed=seed)


def _say_what_was_kept(phase: Phase, selection: Selection) -> None:
    """Says on stderr how many traces a phase learns from, and what was not checked."""
    progress, place = Progress(), f"cold start: phase {phase.name}"
    progress.say(f"{place}: {selection.summary()}")
    if isinstance(phase.traces, FileTraces) and phase.traces.pairs is None:
        progress.say(f"{place}: without pairs, nobody checks whether these traces are right")
    if count := selection.without_content:
        progress.say(
            f"{place}: {count} of them do not say what was in their clips, because version 0.1.0 recorded "
            "them; a replaced clip is not noticed"
        )


def _record_what_was_kept(path: Path, runs: Sequence[_PhaseRun], selections: Sequence[Selection]) -> None:
    """Writes which traces were dropped and why. For a resumed run, checks that the same ones are kept.

    Raises:
        InputError: A resumed run would learn from other traces than it began with.
    """
    described = [
        {
            "phase": run.phase.name,
            "steps": run.steps,
            "traces": run.phase.traces.model_dump(mode="json", include={"kind", "path", "pairs"}),
            "checked": selection.checked,
            "read": selection.n_read,
            "kept": len(selection.traces),
            "kept_sha256": selection.digest(),
            "dropped": selection.reasons,
            "dropped_traces": [dataclasses.asdict(dropped) for dropped in selection.dropped],
        }
        for run, selection in zip(runs, selections, strict=True)
    ]
    if os.path.lexists(path):
        before = read_json(path, _MAX_TRACES_FILE_BYTES)
        kept = [phase.get("kept_sha256") if isinstance(phase, dict) else None for phase in _phases_in(before)]
        for number, now in enumerate(described):
            if number >= len(kept) or kept[number] != now["kept_sha256"]:
                raise InputError(
                    f"phase {now['phase']}: its traces are not those that this run began with ({path}); put "
                    "them back, or train into another folder"
                )
        return
    content = json.dumps({"schema_version": 1, "phases": described}, indent=2)
    replace_file(path, content.encode() + b"\n")


def _phases_in(record: object) -> list[object]:
    phases = record.get("phases") if isinstance(record, dict) else None
    return phases if isinstance(phases, list) else []


def _sequences(
    phase: Phase,
    traces: list[Trajectory],
    markup: Markup,
    policy: VisionLanguageModel,
    resize: ResizeSettings,
) -> list[TrainingSequence]:
    factor = policy.patch_size * policy.merge_size
    sequences = [
        sequence
        for trace in traces
        for sequence in training_sequences(
            trace, markup, (factor, factor), only_snapshots=phase.only_snapshots, resize=resize
        )
    ]
    longest = max(map(len, sequences), default=0)
    if longest > policy.max_positions:
        raise InputError(
            f"phase {phase.name}: a trace has {longest} tokens, the model allows {policy.max_positions}"
        )
    if not sequences:
        raise InputError(f"phase {phase.name}: no trace passes the filters; nothing to learn from")
    return sequences


class _PhaseRun:
    """A phase together with its batches."""

    def __init__(
        self, phase: Phase, sequences: list[TrainingSequence], loader: FrameLoader, *, seed: int
    ) -> None:
        self.phase = phase
        self.steps = phase.steps or max(1, len(sequences) // phase.batch_size)
        self.source = BatchSource(
            sequences,
            loader,
            batch_size=phase.batch_size,
            micro_batch_size=phase.micro_batch_size,
            seed=seed,
        )


class _Curriculum:
    """The phases in order. A step's phase, rate and batches follow from its number."""

    def __init__(self, phases: list[_PhaseRun]) -> None:
        self._phases = phases
        self.steps = sum(phase.steps for phase in phases)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a 0-based step."""
        run, local = self._locate(step)
        return run.phase.learning_rate.at(local, run.steps)

    def micro_losses(self, policy: VisionLanguageModel, step: int) -> Iterator[MicroLoss]:
        """The losses of a step's micro-batches, each divided by the learned tokens of the whole step."""
        run, local = self._locate(step)
        batches = run.source.batches(local)
        total = sum(batch.n_learned for batch in batches)
        for batch in batches:
            yield _micro_loss(policy, batch, total)

    def close(self) -> None:
        """Stops reading ahead."""
        for phase in self._phases:
            phase.source.close()

    def _locate(self, step: int) -> tuple[_PhaseRun, int]:
        for phase in self._phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise ValueError(f"step {step} lies behind the last phase")


# Loss


def _micro_loss(policy: VisionLanguageModel, batch: Batch, learned_in_step: int) -> MicroLoss:
    hidden, labels = learned_hidden(policy, batch)
    summed, correct = sft_loss_from_hidden(hidden, policy.model.lm_head.weight, labels)
    loss = summed / learned_in_step
    sums: dict[str, float | torch.Tensor] = {
        "sft/token_accuracy": correct / learned_in_step,
        "sft/tokens": float(batch.n_learned),
    }
    return MicroLoss(loss, batch.n_tokens, sums)


# Model


def _base_model(settings: ColdStartSettings, out: Path) -> Path:
    if settings.model != NANO:
        return resolve_checkpoint(settings.model)
    folder = out / "initial"
    if not folder.is_dir():
        spare = out / ".initial.new"
        shutil.rmtree(spare, ignore_errors=True)
        write_nano(spare, seed=settings.seed).rename(folder)
    return folder


def _judge_settings(base: Path, policy: VisionLanguageModel) -> JudgeSettings:
    """The base's settings. If it has none, the defaults with its patch grid, as in `Judge`."""
    grid = {"patch_size": policy.patch_size, "merge_size": policy.merge_size}
    stored = load_judge_settings(base)
    if stored is None:
        return JudgeSettings(resize=ResizeSettings(**grid))
    for name, wanted in grid.items():
        if (got := getattr(stored.resize, name)) != wanted:
            raise InputError(f"{base}: {SETTINGS_FILE}: resize.{name}: got {got}, the model has {wanted}")
    return stored


def _load_policy(folder: Path, *, train_vision: bool) -> VisionLanguageModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = VisionLanguageModel(folder, device=device, dtype=torch.float32)
    policy.model.requires_grad_(True).train()
    if not train_vision:
        policy.model.model.visual.requires_grad_(False)
    return policy


def export(
    policy: VisionLanguageModel,
    base: Path,
    target: Path,
    judge_settings: JudgeSettings,
    templates: PromptTemplates,
    settings: ColdStartSettings,
) -> Path:
    """Writes the trained judge as a checkpoint folder, atomically. An older one is replaced."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for left in target.parent.glob(f".{target.name}.*"):  # remains of an export that was killed
        shutil.rmtree(left)
    spare = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        policy.model.eval().save_pretrained(spare)
        for file in base.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS) and not (spare / file.name).exists():
                shutil.copyfile(file, spare / file.name)
        for weights in spare.glob("*.safetensors"):
            weights.chmod(0o644)
        changes = {k: v for k, v in (("note", settings.note), ("clips", settings.clips)) if v is not None}
        write_judge_settings(spare, judge_settings.model_copy(update=changes), templates)
        if target.exists():
            old = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            target.rename(old)
            spare.rename(target)
            shutil.rmtree(old)
        else:
            spare.rename(target)
    except BaseException:
        shutil.rmtree(spare, ignore_errors=True)
        raise
    return target
