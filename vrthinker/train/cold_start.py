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

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vrthinker.progress import Progress
from vrthinker.train.loop.ranks import current_ranks
from vrthinker.train.settings import SftPhase, SftSettings, Stage, stage_settings, stored_settings
from vrthinker.train.sft import Lessons, Start, begin_run, load_start, stage_folder, train
from vrthinker.train.traces import (
    FileTraces,
    Selection,
    TraceSource,
    WorldTraces,
    make_traces,
    read_traces,
)

COLD_START = Stage("cold start", "cold-start")


class Phase(SftPhase):
    """One phase of the curriculum: the traces to train on, and for how long."""

    traces: Annotated[TraceSource, Field(discriminator="kind")]


class ColdStartSettings(SftSettings):
    """All settings of a cold start."""

    phases: tuple[Phase, ...] = Field(min_length=1)


def cold_start_settings(values: Mapping[str, Any]) -> ColdStartSettings:
    """Validates settings. An error names the first wrong key.

    Raises:
        InputError: A key is unknown, missing or out of range.
    """
    return stage_settings(COLD_START, ColdStartSettings, values)


def resume_settings(run: Path) -> ColdStartSettings:
    """The settings that a run was started with.

    Raises:
        InputError: The folder does not hold a run of this stage.
    """
    return stored_settings(COLD_START, ColdStartSettings, run)


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
    with stage_folder(out):
        # Files are read first, because they may be missing.
        ranks = current_ranks()
        read = ranks.together(
            lambda: [
                read_traces(p.traces) if isinstance(p.traces, FileTraces) else None for p in settings.phases
            ]
        )
        begin_run(settings, out)
        for phase, selection in zip(settings.phases, read, strict=True):
            if selection is not None:
                _say_what_was_kept(phase, selection)
        start = load_start(settings, out)
        lessons = []
        for phase, selection in zip(settings.phases, read, strict=True):
            if selection is None:
                selection = ranks.first_then_others(
                    functools.partial(_made_traces, phase, out / "data", start, settings.seed)
                )
                _say_what_was_kept(phase, selection)
            source = phase.traces.model_dump(mode="json", include={"kind", "path", "pairs"})
            lessons.append(Lessons(phase, selection, source))
        return train(COLD_START, settings, start, lessons, out)


def _made_traces(phase: Phase, folder: Path, start: Start, seed: int) -> Selection:
    assert isinstance(phase.traces, WorldTraces)
    folder.mkdir(parents=True, exist_ok=True)
    return make_traces(phase.traces, folder, start.judge_settings, start.templates, seed=seed)


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
