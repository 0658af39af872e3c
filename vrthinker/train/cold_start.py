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
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vrthinker.errors import one_line
from vrthinker.progress import Progress
from vrthinker.train.frame_phase import FramePhase, make_frame_lessons
from vrthinker.train.loop.ranks import current_ranks
from vrthinker.train.phases import Lessons, TraceLessons
from vrthinker.train.settings import RunSettings, SftPhase, Stage, stage_settings, stored_settings
from vrthinker.train.sft import Start, begin_run, load_start, stage_folder, train
from vrthinker.train.trace_sources import FileTraces, MixedTraces, TraceSource, WorldTraces, sources_of
from vrthinker.train.traces import Selection, read_traces
from vrthinker.train.world_traces import make_traces

COLD_START = Stage("cold start", "cold-start")


class Phase(SftPhase):
    """One phase of the curriculum: the traces to train on, and for how long."""

    kind: Literal["traces"] = "traces"
    traces: Annotated[TraceSource, Field(discriminator="kind")]


def _phase(values: Any) -> Any:
    """A phase of the kind that it names, `traces` if it names none."""
    if isinstance(values, Phase | FramePhase):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"got {one_line(repr(values))}, allowed: a mapping of settings")
    kind = values.get("kind", "traces")
    if kind not in ("traces", "frames"):
        raise ValueError(f"kind: got {one_line(repr(kind))}, allowed: traces or frames")
    return (FramePhase if kind == "frames" else Phase).model_validate(values)


# A validator and not a tagged union, because errors should name the keys as they are written.
AnyPhase = Annotated[Phase | FramePhase, BeforeValidator(_phase)]
"""A phase of either kind."""


class ColdStartSettings(RunSettings):
    """All settings of a cold start."""

    phases: tuple[AnyPhase, ...] = Field(min_length=1)


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
            lambda: [_read_files(phase) if isinstance(phase, Phase) else {} for phase in settings.phases]
        )
        begin_run(settings, out)
        start = load_start(settings, out)
        data, seed = out / "data", settings.seed
        lessons: list[Lessons] = []
        for phase, files in zip(settings.phases, read, strict=True):
            if isinstance(phase, FramePhase):
                make = functools.partial(make_frame_lessons, phase, data, seed=seed)
                lessons.append(ranks.first_then_others(make))
                continue
            selections = []
            for number, source in enumerate(sources_of(phase.traces)):
                selection = files.get(number)
                if isinstance(source, WorldTraces):
                    make_some = functools.partial(_made_traces, source, data, start, seed)
                    selection = ranks.first_then_others(make_some)
                assert selection is not None
                selections.append(selection)
            selection = Selection.joined(selections)
            _say_what_was_kept(phase, selection)
            lessons.append(TraceLessons(phase, selection, _described(phase.traces)))
        return train(COLD_START, settings, start, lessons, out)


def _read_files(phase: Phase) -> dict[int, Selection]:
    """The traces of a phase's sources that are files, by the sources' numbers."""
    sources = enumerate(sources_of(phase.traces))
    return {number: read_traces(s) for number, s in sources if isinstance(s, FileTraces)}


def _made_traces(source: WorldTraces, folder: Path, start: Start, seed: int) -> Selection:
    folder.mkdir(parents=True, exist_ok=True)
    return make_traces(source, folder, start.judge_settings, start.templates, seed=seed)


def _described(source: TraceSource) -> dict[str, Any]:
    """A source for the record in `traces.json`."""
    if isinstance(source, MixedTraces):
        return {"kind": source.kind, "of": [_described(one) for one in source.of]}
    return source.model_dump(mode="json", include={"kind", "path", "pairs"})


def _say_what_was_kept(phase: Phase, selection: Selection) -> None:
    """Says on stderr how many traces a phase learns from, and what was not checked."""
    progress, place = Progress(), f"cold start: phase {phase.name}"
    progress.say(f"{place}: {selection.summary()}")
    if any(isinstance(s, FileTraces) and s.pairs is None for s in sources_of(phase.traces)):
        progress.say(f"{place}: without pairs, nobody checks whether these traces are right")
    if count := selection.without_content:
        progress.say(
            f"{place}: {count} of them do not say what was in their clips, because version 0.1.0 recorded "
            "them; a replaced clip is not noticed"
        )
