"""Stage 2, rejection sampling fine-tuning: the model learns from its own right episodes (method section 5).

What it does: it samples several episodes per pair from the current model, keeps those that are well formed
and right (the two filters of cold start), at most `keep_per_item` of a pair, and trains on the tokens of
their rounds. Pairs without a right episode can be written to a file for the stage that follows, which learns
from them.

How it differs from the paper: the cap per pair, and the random order of the clips, are ours. A dimension
without a label is not checked. Sampling keeps the checkpoint's window and limits, and never guides.

    vrthinker train rejection --model M --pairs pairs.jsonl --out RUN
    vrthinker train rejection --recipe nano-rejection --out RUN
    vrthinker train rejection --resume RUN
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from vrthinker.engine.hf.checkpoint import weights_fingerprint
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.judge import Judge
from vrthinker.judge_configuration import LocalEngine
from vrthinker.progress import Progress, counted
from vrthinker.records.verdicts import VerdictRecord
from vrthinker.train.items import FilePairs, Items, check_items, pairs_of_items, sources_of
from vrthinker.train.loop.ranks import Ranks, current_ranks
from vrthinker.train.phases import TraceLessons
from vrthinker.train.settings import (
    RunSettings,
    SftPhase,
    Stage,
    StageSettings,
    stage_settings,
    stored_settings,
)
from vrthinker.train.sft import (
    base_folder,
    begin_run,
    load_start,
    resume_hint,
    stage_folder,
    train,
)
from vrthinker.train.teacher import TRACES, Collection, collect, select, write_selection
from vrthinker.train.trials import Trial, make_trials, write_pairs_file

REJECTION = Stage("rejection sampling", "rejection")
SAMPLES = "samples"
"""The folder of the sampled episodes in a run's folder."""


# Settings


class Sampling(StageSettings):
    """How episodes are sampled from the current model."""

    samples: int = Field(8, ge=1, le=1024)
    """Number of episodes per pair (ours: 8, the size of a group in GRPO)."""
    temperature: float = Field(1.0, ge=1e-3, le=10.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    keep_per_item: int | None = Field(1, ge=1)
    """The most episodes that are learned per pair (ours), so that easy pairs do not crowd out the others;
    null keeps all that are right."""
    swap: bool = True
    """Draw for each episode whether the clips are judged in the other order, with the labels turned too."""
    batch_size: int = Field(64, ge=1, le=4096)
    """Number of episodes that advance together."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype of sampling: by default bfloat16 on a GPU, float32 on a CPU."""
    engine: LocalEngine = "hf"
    """What samples: transformers, or vLLM, which gives its memory back before training begins."""


class RejectionPhase(SftPhase):
    """How long and how fast the model learns from what was kept."""

    name: str = Field("rejection", pattern=r"^[a-z0-9][a-z0-9-]*$")
    """The name of the phase, for messages and records."""


class RejectionSettings(RunSettings):
    """All settings of rejection sampling fine-tuning."""

    items: Items
    sampling: Sampling = Sampling()
    learn: RejectionPhase = RejectionPhase()
    """How long and how fast it learns from what was kept."""
    for_grpo: Path | None = None
    """A file that pairs without a right episode are written to, as a pairs file."""

    @field_validator("for_grpo")
    @classmethod
    def _from_anywhere_too(cls, path: Path | None) -> Path | None:
        return None if path is None else path.absolute()


def rejection_settings(values: Mapping[str, Any]) -> RejectionSettings:
    """Validates settings. An error names the first wrong key.

    Raises:
        InputError: A key is unknown, missing or out of range.
    """
    return stage_settings(REJECTION, RejectionSettings, values)


def resume_settings(run: Path) -> RejectionSettings:
    """The settings that a run was started with.

    Raises:
        InputError: The folder does not hold a run of this stage.
    """
    return stored_settings(REJECTION, RejectionSettings, run)


# The run


def run_rejection(settings: RejectionSettings, out: Path) -> Path | None:
    """Samples, filters and trains, or resumes a run that was stopped in any of these.

    Args:
        settings: The settings. For a folder that holds a run, they must be the run's.
        out: The run's folder, as of a cold start, with the sampled episodes in `samples/`.

    Returns:
        The trained judge's checkpoint folder, `out/model`; None if a signal ended the run early.

    Raises:
        InputError: Settings, pairs or the folder cannot be used. A folder that this call made is removed.
        VRThinkerError: Sampling or training failed, or nothing was kept. What was recorded stays.
    """
    with stage_folder(out, SAMPLES):
        ranks, items, sampling = current_ranks(), settings.items, settings.sampling
        ranks.together(lambda: check_items(items))
        ranks.together(lambda: _check_for_grpo(settings))
        begin_run(settings, out)
        try:
            pairs, _ = pairs_of_items(items, out / "data", ranks)
            trials = make_trials(pairs, samples=sampling.samples, seed=settings.seed, swap=sampling.swap)
            # All processes of a run share the trials, as they would share a results file.
            base = ranks.first_then_others(functools.partial(base_folder, settings, out))
            _together_or_interrupted(ranks, lambda: _sample(settings, base, trials, out))
            collection = ranks.together(lambda: _selected(settings, trials, out))
        except _Interrupted:
            Progress().say(f"{REJECTION.name}: interrupted while sampling; {resume_hint(REJECTION, out)}")
            return None
        source = {
            "kind": REJECTION.command,
            "path": str(out / SAMPLES / TRACES),
            "unchecked_judgments": collection.unchecked,
        }
        lessons = TraceLessons(settings.learn, collection.selection, source)
        return train(REJECTION, settings, load_start(settings, out), [lessons], out)


class _Interrupted(Exception):
    """Ctrl-C ended the sampling on some process."""


def _together_or_interrupted(ranks: Ranks, act: Callable[[], None]) -> None:
    """Runs `act` on every process. After Ctrl-C on one, all end alike, once the others are done.

    Raises:
        _Interrupted: Ctrl-C came, to whichever process.
        VRThinkerError: `act` raised one.
    """

    def ended() -> str:
        try:
            act()
        except KeyboardInterrupt:
            return "interrupted"
        return "done"

    if "interrupted" in ranks.gather(ranks.together(ended)):
        raise _Interrupted


def _sample(settings: RejectionSettings, base: Path, trials: Sequence[Trial], out: Path) -> None:
    """Samples the episodes from the current model that are not recorded yet."""
    sampling = settings.sampling
    options: dict[str, Any] = {
        "guided": False,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    progress, n_recorded = Progress(), 0

    def started(recorded: int) -> None:
        nonlocal n_recorded
        n_recorded = recorded
        progress.say(f"{REJECTION.name}: {recorded} of {len(trials)} episodes recorded")

    def count(record: VerdictRecord) -> None:
        nonlocal n_recorded
        n_recorded += 1
        line = f"{REJECTION.name}: {n_recorded} of {len(trials)} episodes"
        progress.show("sampling", n_recorded, len(trials), line=line, every=max(1, len(trials) // 20))

    with progress:
        collect(
            Judge.configuration_of(base, engine=sampling.engine, **options),
            lambda: Judge.from_pretrained(
                base,
                engine=sampling.engine,
                batch_size=sampling.batch_size,
                dtype=sampling.dtype,
                **options,
            ),
            trials,
            out / SAMPLES,
            seed=settings.seed,
            run={"weights": weights_fingerprint(base), "swap": sampling.swap},
            on_start=started,
            on_record=count,
        )
    gc.collect()  # the sampling engine's weights and caches, before the policy is loaded


def _selected(settings: RejectionSettings, trials: Sequence[Trial], out: Path) -> Collection:
    """What the filters and the cap keep of the recorded episodes."""
    folder, progress = out / SAMPLES, Progress()
    collection = select(trials, folder, keep_per_pair=settings.sampling.keep_per_item)
    unsolved = [trial.source for trial in collection.without_a_right_episode()]
    if current_ranks().is_first:
        write_selection(collection, folder)
        if settings.for_grpo is not None:
            write_pairs_file(settings.for_grpo, unsolved)
    progress.say(f"{REJECTION.name}: {collection.selection.summary('episodes')}")
    if collection.unchecked:
        progress.say(f"{REJECTION.name}: {collection.unchecked} judgments have no label and were not checked")
    if settings.for_grpo is not None:
        pairs = counted(len(unsolved), "pair")
        progress.say(f"{REJECTION.name}: {pairs} without a right episode in {settings.for_grpo}")
    if not collection.selection.traces:
        raise VRThinkerError(f"{folder}: {collection.selection.summary('episodes')}; nothing to learn from")
    return collection


def _check_for_grpo(settings: RejectionSettings) -> None:
    """Refuses a file for the next stage that would replace this one's pairs, or that has no folder."""
    path = settings.for_grpo
    if path is None:
        return
    sampled = [one.path for one in sources_of(settings.items) if isinstance(one, FilePairs)]
    if path.resolve() in [one.resolve() for one in sampled]:
        raise InputError(f"for_grpo: {path}: holds the pairs that are sampled; choose another file")
    if not path.parent.is_dir():
        raise InputError(f"for_grpo: {path}: its folder is not there; make it, or choose another file")
