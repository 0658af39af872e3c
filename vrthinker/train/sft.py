"""The supervised stage that cold start and rejection sampling share: a policy learns traces (eq. 1).

A stage says which traces each of its phases learns from. This module does the rest: the run's folder,
the order of steps, what was learned, and the exported judge. The loss falls on the tokens of
the rounds; tool outcomes, prompts and frames carry none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from vrthinker.bounded_files import read_json
from vrthinker.engine.hf.checkpoint import resolve_checkpoint
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import PROMPTS_FOLDER, SETTINGS_FILE, JudgeSettings, load_judge_settings
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.policy.batches import FrameLoader
from vrthinker.progress import Progress
from vrthinker.records.files import replace_file
from vrthinker.records.metrics_file import METRICS_FILE
from vrthinker.records.provenance import provenance
from vrthinker.records.run_folder import adopt_run
from vrthinker.records.trackers import open_tracker
from vrthinker.train.held_out import HeldOut, load_held_out
from vrthinker.train.loop.checkpoint import latest_checkpoint
from vrthinker.train.loop.loop import LoopSettings, hold_run, run_loop
from vrthinker.train.loop.ranks import current_ranks, joined_ranks
from vrthinker.train.model import TrainedPolicy, export, load_policy
from vrthinker.train.phases import Curriculum, Lessons, PhaseRun
from vrthinker.train.settings import CONFIG_FILE, NANO, RunSettings, Stage
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.world.nano import write_nano

PROVENANCE_FILE, TRACES_FILE = "provenance.json", "traces.json"
_MAX_TRACES_FILE_BYTES = 1 << 30


# The run


@contextlib.contextmanager
def stage_folder(out: Path, *kept: str) -> Iterator[None]:
    """Holds a run's folder, and joins the other processes of the run if torchrun started several.

    If the run is refused before it has trained, a folder that is new is removed.

    Args:
        out: The folder.
        kept: The names of files in it that are never removed with it.

    Raises:
        InputError: The folder cannot be used.
        VRThinkerError: Another process holds it.
    """
    with joined_ranks() as ranks, contextlib.ExitStack() as stack:
        is_new = ranks.is_first and not os.path.lexists(out)
        try:
            hold_run(out, ranks, stack)
            yield
        except InputError:
            # Nothing was trained: the same folder may be named again, with what was wrong mended.
            if is_new and not any((out / name).exists() for name in (METRICS_FILE, *kept)):
                shutil.rmtree(out, ignore_errors=True)
            raise


def begin_run(settings: RunSettings, out: Path) -> None:
    """From here on the folder belongs to these settings.

    Raises:
        InputError: The base model is missing, or the folder belongs to a run with other settings.
    """
    current_ranks().first_then_others(lambda: _begin_run(settings, out))


def _begin_run(settings: RunSettings, out: Path) -> None:
    if settings.model != NANO:
        resolve_checkpoint(settings.model)
    if not _belongs_to(settings, out / CONFIG_FILE):
        adopt_run(out / CONFIG_FILE, settings.model_dump(mode="json"), (), out)
    if not (out / PROVENANCE_FILE).exists():
        replace_file(out / PROVENANCE_FILE, (json.dumps(provenance(), indent=2) + "\n").encode())


def _belongs_to(settings: RunSettings, path: Path) -> bool:
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
    trained: TrainedPolicy

    @property
    def policy(self) -> VisionLanguageModel:
        """The model that is trained."""
        return self.trained.policy


def load_start(settings: RunSettings, out: Path) -> Start:
    """Loads the base model, or draws the nano judge's initial weights.

    Raises:
        InputError: The checkpoint cannot be used.
    """
    ranks = current_ranks()
    folder = ranks.first_then_others(lambda: base_folder(settings, out))
    templates = ranks.together(lambda: PromptTemplates.load(folder / PROMPTS_FOLDER))
    trained = ranks.together(lambda: load_policy(folder, settings, ranks, seed=settings.seed))
    judge_settings = ranks.together(lambda: _judge_settings(folder, trained.policy))
    return Start(folder, templates, judge_settings, trained)


def train(
    stage: Stage, settings: RunSettings, start: Start, lessons: Sequence[Lessons], out: Path
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
    ranks = current_ranks()
    learned = [trace for lesson in lessons for trace in lesson.traces]
    start = ranks.together(lambda: in_their_memory(start, learned))
    loader = FrameLoader(open_reader(), FrameCache(settings.frame_cache_bytes))
    phases = [
        lesson.begin(start.trained, loader, start.judge_settings.resize, seed=settings.seed * 1000 + number)
        for number, lesson in enumerate(lessons)
    ]
    curriculum = Curriculum(phases)
    held_out = held_out_of(settings, start, learned, curriculum.steps, out)
    ranks.first(lambda: _record_what_was_kept(out / TRACES_FILE, phases))
    begun = latest_checkpoint(out, ranks)
    tracker = open_tracker(
        settings.tracker if ranks.is_first else "none",
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
            micro_losses=lambda step: curriculum.micro_losses(start.trained, step),
            run=out,
            name=stage.name,
            on_step=tracker.log,
            measure=None if held_out is None else held_out.measure,
            resume_hint=resume_hint(stage, out),
            ranks=ranks,
        )
    finally:
        tracker.close()
        curriculum.close()
        loader.close()
    if result.outcome != "finished":
        return None
    return export_judge(start, settings, out / "model")


def in_their_memory(start: Start, traces: Sequence[Trajectory]) -> Start:
    """The start, with the memory mode of the traces: a judge keeps to the mode whose contexts it learned.

    Raises:
        InputError: The traces are of several modes, which are several policies.
    """
    modes = Counter(trace.settings.memory for trace in traces)
    if len(modes) > 1:
        got = " and ".join(f"{count} under {mode}" for mode, count in modes.most_common())
        raise InputError(f"traces: memory: got {got}, allowed: all under one memory mode; make some anew")
    settings = start.judge_settings
    mode = next(iter(modes), settings.episode.memory)
    if mode in (settings.episode.memory, "renumber"):  # what was renumbered is refused when it is read
        return start
    if current_ranks().is_first:
        Progress().say(f"the traces were made under memory {mode}, so the trained judge judges under it too")
    episode = settings.episode.model_copy(update={"memory": mode})
    return dataclasses.replace(start, judge_settings=settings.model_copy(update={"episode": episode}))


def export_judge(start: Start, settings: RunSettings, target: Path) -> Path:
    """Writes the trained judge."""
    changes = {k: v for k, v in (("note", settings.note), ("clips", settings.clips)) if v is not None}
    judge_settings = start.judge_settings.model_copy(update=changes)
    base_name = settings.model if settings.model != NANO else None
    return export(start.trained, start.folder, target, judge_settings, start.templates, base_name=base_name)


def held_out_of(
    settings: RunSettings, start: Start, traces: Sequence[Trajectory], steps: int, out: Path
) -> HeldOut | None:
    """The held-out pairs of a run, if it has some; `traces` are what it learns from, as far as known."""
    if settings.evaluation is None:
        return None
    evaluation = settings.evaluation
    return HeldOut(
        start.trained,
        current_ranks().together(lambda: load_held_out(evaluation, traces, seed=settings.seed)),
        evaluation,
        steps=steps,
        run=out,
        judge_settings=start.judge_settings,
        templates=start.templates,
        export=lambda folder: export_judge(start, settings, folder),
    )


def resume_hint(stage: Stage, out: Path) -> str:
    """The command that resumes a run, as a part of a line."""
    several = current_ranks().size > 1
    program = "the same torchrun command with" if several else f"vrthinker train {stage.command}"
    return f"{program} --resume {shlex.quote(str(out))} goes on"


# Data


def _record_what_was_kept(path: Path, phases: Sequence[PhaseRun]) -> None:
    """Writes what each phase learns. For a resumed run, checks that it is the same.

    Raises:
        InputError: A resumed run would learn from other traces than it began with.
    """
    described = [phase.record() for phase in phases]
    if os.path.lexists(path):
        before = _phases_in(read_json(path, _MAX_TRACES_FILE_BYTES))
        for number, now in enumerate(described):
            then = before[number] if number < len(before) else None
            if not isinstance(then, dict) or then.get("kept_sha256") != now["kept_sha256"]:
                raise InputError(
                    f"phase {now['phase']}: its traces are not those that this run began with ({path}); put "
                    "them back, or train into another folder"
                )
            # Before there were packs, a phase counted contexts.
            if now.get("unit", "contexts") != (unit := then.get("unit", "contexts")):
                raise InputError(
                    f"phase {now['phase']}: counts {now['unit']}, and this run began by counting {unit}; "
                    f'write "packed": {"false" if unit == "contexts" else "true"} into this phase of '
                    f"{path.with_name(CONFIG_FILE)}, then resume"
                )
        return
    content = json.dumps({"schema_version": 1, "phases": described}, indent=2)
    replace_file(path, content.encode() + b"\n")


def _phases_in(record: object) -> list[object]:
    phases = record.get("phases") if isinstance(record, dict) else None
    return phases if isinstance(phases, list) else []


# Model


def base_folder(settings: RunSettings, out: Path) -> Path:
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
