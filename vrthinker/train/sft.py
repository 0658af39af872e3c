"""The supervised stage that cold start and rejection sampling share: a policy learns traces (eq. 1).

A stage says which traces each of its phases learns from. This module does the rest: the run's folder,
training sequences, the order of batches, the loss, and the exported judge. The loss falls on the tokens of
the rounds; tool outcomes, prompts and frames carry none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from vrthinker.bounded_files import read_json
from vrthinker.engine.hf.checkpoint import resolve_checkpoint
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import PROMPTS_FOLDER, SETTINGS_FILE, JudgeSettings, load_judge_settings
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.policy.batches import Batch, BatchSource, FrameLoader
from vrthinker.policy.forward import learned_hidden
from vrthinker.policy.losses import sft_loss_from_hidden
from vrthinker.policy.sequences import TrainingSequence, training_sequences
from vrthinker.records.files import replace_file
from vrthinker.records.metrics_file import METRICS_FILE
from vrthinker.records.provenance import provenance
from vrthinker.records.run_folder import adopt_run
from vrthinker.records.run_lock import lock_run
from vrthinker.records.trackers import open_tracker
from vrthinker.train.held_out import HeldOut, load_held_out
from vrthinker.train.loop.checkpoint import latest_checkpoint
from vrthinker.train.loop.loop import LoopSettings, MicroLoss, run_loop
from vrthinker.train.settings import CONFIG_FILE, NANO, SftPhase, SftSettings, Stage
from vrthinker.train.traces import Selection
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.world.nano import write_judge_settings, write_nano

PROVENANCE_FILE, TRACES_FILE = "provenance.json", "traces.json"
_MAX_TRACES_FILE_BYTES = 1 << 30
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf")
"""Suffixes of files that are not copied from the base model to the trained judge."""


# The run


@contextlib.contextmanager
def stage_folder(out: Path, *kept: str) -> Iterator[None]:
    """Holds a run's folder. If the run is refused before it has trained, a folder that is new is removed.

    Args:
        out: The folder.
        kept: The names of files in it that are never removed with it.

    Raises:
        InputError: The folder cannot be used.
        VRThinkerError: Another process holds it.
    """
    is_new = not os.path.lexists(out)
    try:
        with lock_run(out):
            yield
    except InputError:
        # Nothing was trained: the same folder may be named again, with what was wrong mended.
        if is_new and not any((out / name).exists() for name in (METRICS_FILE, *kept)):
            shutil.rmtree(out, ignore_errors=True)
        raise


def begin_run(settings: SftSettings, out: Path) -> None:
    """From here on the folder belongs to these settings.

    Raises:
        InputError: The base model is missing, or the folder belongs to a run with other settings.
    """
    if settings.model != NANO:
        resolve_checkpoint(settings.model)
    if not _belongs_to(settings, out / CONFIG_FILE):
        adopt_run(out / CONFIG_FILE, settings.model_dump(mode="json"), (), out)
    if not (out / PROVENANCE_FILE).exists():
        replace_file(out / PROVENANCE_FILE, (json.dumps(provenance(), indent=2) + "\n").encode())


def _belongs_to(settings: SftSettings, path: Path) -> bool:
    """Whether stored settings resolve to these; an older version's may lack one that has a default."""
    try:
        return type(settings).model_validate(read_json(path)) == settings
    except (InputError, ValidationError):
        return False


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from: the base's folder, its prompts and settings, and the policy that is trained."""

    folder: Path
    templates: PromptTemplates
    judge_settings: JudgeSettings
    policy: VisionLanguageModel


def load_start(settings: SftSettings, out: Path) -> Start:
    """Loads the base model, or draws the nano judge's initial weights.

    Raises:
        InputError: The checkpoint cannot be used.
    """
    folder = base_folder(settings, out)
    templates = PromptTemplates.load(folder / PROMPTS_FOLDER)
    policy = _load_policy(folder, train_vision=settings.train_vision)
    return Start(folder, templates, _judge_settings(folder, policy), policy)


@dataclasses.dataclass(frozen=True)
class Lessons:
    """What one phase learns from.

    Attributes:
        phase: How long and how fast.
        selection: The traces.
        source: Where they come from, for the record in `traces.json`.
    """

    phase: SftPhase
    selection: Selection
    source: Mapping[str, Any]


def train(
    stage: Stage, settings: SftSettings, start: Start, lessons: Sequence[Lessons], out: Path
) -> Path | None:
    """Trains the policy on each phase's traces, one phase after the other, and exports the judge.

    Args:
        stage: The stage's names.
        settings: The settings.
        start: The base model.
        lessons: The phases with their traces.
        out: The run's folder, which the caller holds.

    Returns:
        The trained judge's checkpoint folder, `out/model`; None if a signal ended the run early.

    Raises:
        InputError: Nothing is left to learn from, a trace is not what it says, or a resumed run would learn
            from other traces than it began with.
        VRThinkerError: Training failed; the last checkpoint is kept.
    """
    markup = Markup(start.policy.tokenizer, start.policy.vocabulary_size)
    loader = FrameLoader(open_reader(), FrameCache(settings.frame_cache_bytes))
    phases = []
    for number, lesson in enumerate(lessons):
        traces = lesson.selection.traces
        sequences = _sequences(lesson.phase, traces, markup, start.policy, start.judge_settings.resize)
        phases.append(_PhaseRun(lesson.phase, sequences, loader, seed=settings.seed * 1000 + number))
    curriculum = _Curriculum(phases)
    held_out = _held_out(settings, start, lessons, curriculum.steps, out)
    _record_what_was_kept(out / TRACES_FILE, phases, lessons)
    begun = latest_checkpoint(out)
    tracker = open_tracker(
        settings.tracker,
        run=out,
        title=stage.name,
        config=settings.model_dump(mode="json"),
        first_step=0 if begun is None else begun.step,
    )
    try:
        result = run_loop(
            start.policy.model,
            settings=LoopSettings(
                steps=curriculum.steps,
                checkpoint_every=settings.checkpoint_every,
                seed=settings.seed,
                optimizer=settings.optimizer,
            ),
            learning_rate=curriculum.learning_rate,
            micro_losses=lambda step: curriculum.micro_losses(start.policy, step),
            run=out,
            name=stage.name,
            on_step=tracker.log,
            measure=None if held_out is None else held_out.measure,
            resume_hint=resume_hint(stage, out),
        )
    finally:
        tracker.close()
        curriculum.close()
        loader.close()
    if result.outcome != "finished":
        return None
    return export(start.policy, start.folder, out / "model", start.judge_settings, start.templates, settings)


def _held_out(
    settings: SftSettings, start: Start, lessons: Sequence[Lessons], steps: int, out: Path
) -> HeldOut | None:
    """The held-out pairs of a run, if it has some."""
    if settings.evaluation is None:
        return None
    traces = (trace for lesson in lessons for trace in lesson.selection.traces)
    return HeldOut(
        start.policy,
        load_held_out(settings.evaluation, traces, seed=settings.seed),
        settings.evaluation,
        steps=steps,
        run=out,
        judge_settings=start.judge_settings,
        templates=start.templates,
        export=lambda folder: export(
            start.policy, start.folder, folder, start.judge_settings, start.templates, settings
        ),
    )


def resume_hint(stage: Stage, out: Path) -> str:
    """The command that resumes a run, as a part of a line."""
    return f"vrthinker train {stage.command} --resume {shlex.quote(str(out))} goes on"


# Data


def _record_what_was_kept(path: Path, runs: Sequence[_PhaseRun], lessons: Sequence[Lessons]) -> None:
    """Writes which traces were dropped and why. For a resumed run, checks that the same ones are kept.

    Raises:
        InputError: A resumed run would learn from other traces than it began with.
    """
    described = [
        {
            "phase": run.phase.name,
            "steps": run.steps,
            "traces": dict(lesson.source),
            "checked": lesson.selection.checked,
            "read": lesson.selection.n_read,
            "kept": len(lesson.selection.traces),
            "kept_sha256": lesson.selection.digest(),
            "dropped": lesson.selection.reasons,
            "dropped_traces": [dataclasses.asdict(dropped) for dropped in lesson.selection.dropped],
        }
        for run, lesson in zip(runs, lessons, strict=True)
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
    phase: SftPhase,
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
        self, phase: SftPhase, sequences: list[TrainingSequence], loader: FrameLoader, *, seed: int
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


def base_folder(settings: SftSettings, out: Path) -> Path:
    """The folder of the base model. That of `nano-from-nothing` is written with random weights, once."""
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
    settings: SftSettings,
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
