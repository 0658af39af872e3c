"""What a training run's folder holds, read for its page.

Invariant: every file but the metrics may be missing, and none is trusted. A file that cannot be read becomes
a line under `problems`, and the page shows the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from vrthinker.bounded_files import read_json
from vrthinker.episode.trajectory import Trajectory, load_trajectories
from vrthinker.errors import InputError, one_line
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics

EVALUATIONS_FOLDER, TRAJECTORIES_FILE, EVAL_FILE = "evaluations", "trajectories.jsonl", "eval.json"
_MAX_BYTES = 1 << 28
_MOST_TRAJECTORIES = 4096
_MOST_FACTS = 400


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on held-out pairs.

    Attributes:
        step: The number of finished steps.
        measures: Measure -> (value, low, high), each None if there is none.
        folder: The folder with its episodes.
    """

    step: int
    measures: Mapping[str, tuple[float | None, float | None, float | None]]
    folder: Path


@dataclass(frozen=True)
class DroppedTraces:
    """What a phase learned from: how many traces were read and kept, and why the others were not."""

    phase: str
    read: int
    kept: int
    reasons: tuple[tuple[str, int], ...]


@dataclass
class Run:
    """A run's folder.

    Attributes:
        folder: The folder.
        metrics: The lines of its metrics file.
        settings: Dotted key -> value, as text.
        provenance: Dotted key -> value, as text.
        phases: The ends of the phases: (name, steps), in order.
        traces: What each phase learned from; phases that learn frames have no traces.
        evaluations: Its evaluations, by step.
        problems: What could not be read, one line each.
    """

    folder: Path
    metrics: list[dict[str, Any]]
    settings: list[tuple[str, str]] = field(default_factory=list)
    provenance: list[tuple[str, str]] = field(default_factory=list)
    phases: list[tuple[str, int]] = field(default_factory=list)
    traces: list[DroppedTraces] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        InputError: The folder holds no metrics, or the metrics file cannot be read.
    """
    path = folder / METRICS_FILE
    lines = read_metrics(path) if path.is_file() else []
    if not lines:
        raise InputError(f"{folder}: no run that has finished a step; name the folder that --out named")
    run = Run(folder, lines)
    run.settings = _flat(_object(run, folder / "config.json"))
    run.provenance = _flat(_object(run, folder / "provenance.json"))
    phases = _object(run, folder / "traces.json").get("phases")
    for phase in phases if isinstance(phases, list) else []:
        if isinstance(phase, dict):
            run.phases.append((str(phase.get("phase")), _count(phase.get("steps"))))
            source = phase.get("traces")
            if not (isinstance(source, dict) and source.get("kind") == "frames"):
                run.traces.append(_dropped(phase))
    for place in sorted((folder / EVALUATIONS_FOLDER).glob("step-*")):
        if (found := _evaluation(run, place)) is not None:
            run.evaluations.append(found)
    run.evaluations.sort(key=lambda evaluation: evaluation.step)
    return run


def episodes_of(run: Run, most: int) -> Iterator[tuple[str, Trajectory]]:
    """Sampled episodes with what they are: of the same pairs before and after training, if there are some.

    Otherwise they are traces that the run learned from.
    """
    chosen: list[tuple[str, Path, int]] = []
    files = [(e.step, e.folder / TRAJECTORIES_FILE) for e in run.evaluations]
    files = [(step, path) for step, path in files if path.is_file()]
    if files:
        ends = files[-1:] if len(files) == 1 or most == 1 else [files[0], files[-1]]
        chosen = [(f"after step {step}", path, most // len(ends)) for step, path in ends]
    else:
        sources = [value for key, value in run.settings if key.endswith("traces.path")]
        paths = [Path(source) for source in sources] + sorted((run.folder / "data").glob("**/*.jsonl"))
        chosen = [("learned from", path, most) for path in paths if path.is_file()]
    left = most
    for what, path, share in chosen:
        for trajectory in islice(_readable(path), min(share, left)):
            left -= 1
            yield what, trajectory
        if not left:
            return


def _readable(path: Path) -> Iterator[Trajectory]:
    """The episodes of a file up to the first line that is none."""
    try:
        yield from islice(load_trajectories(path), _MOST_TRAJECTORIES)
    except InputError:
        return


def _object(run: Run, path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if it is missing or something else, which is noted."""
    if not path.exists():
        return {}
    try:
        content = read_json(path, _MAX_BYTES)
    except InputError as error:
        run.problems.append(str(error))
        return {}
    if not isinstance(content, dict):
        run.problems.append(f"{path}: got {type(content).__name__}, wanted a JSON object")
        return {}
    return content


def _flat(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as dotted keys with their values as text."""
    found: list[tuple[str, str]] = []

    def add(inner: object, key: str) -> None:
        if len(found) >= _MOST_FACTS:
            return
        if isinstance(inner, dict) and inner:
            for name, below in inner.items():
                add(below, f"{key}.{name}" if key else str(name))
        elif isinstance(inner, list) and any(isinstance(item, dict) for item in inner):
            for number, below in enumerate(inner):
                add(below, f"{key}.{number}")
        elif inner is not None and inner != {}:
            text = ", ".join(map(str, inner)) if isinstance(inner, list) else str(inner)
            found.append((one_line(key), one_line(text)))

    add(value, prefix)
    return found


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value < 1 << 50 else 0


def _dropped(phase: Mapping[str, Any]) -> DroppedTraces:
    reasons = phase.get("dropped")
    counts = reasons.items() if isinstance(reasons, dict) else ()
    return DroppedTraces(
        phase=str(phase.get("phase")),
        read=_count(phase.get("read")),
        kept=_count(phase.get("kept")),
        reasons=tuple((str(reason), _count(count)) for reason, count in counts),
    )


def _evaluation(run: Run, folder: Path) -> Evaluation | None:
    content = _object(run, folder / EVAL_FILE)
    judged = content.get("judged")
    measures = judged.get("all") if isinstance(judged, dict) else None
    if type(content.get("step")) is not int or not isinstance(measures, dict):
        return None
    found = {}
    for name, spelled in measures.items():
        if isinstance(spelled, dict):
            found[str(name)] = (_number(spelled, "value"), _number(spelled, "low"), _number(spelled, "high"))
    return Evaluation(content["step"], found, folder)


def _number(spelled: Mapping[str, Any], name: str) -> float | None:
    value = spelled.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None
