"""Trajectories as training data of other trainers: one call writes a folder.

Invariant: traces are chosen as cold start chooses them (`train/traces.py`), unless everything with a verdict
is asked for. Equal traces write equal files.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from vrthinker.bounded_files import read_json
from vrthinker.data.tables import check_table, parquet_bytes
from vrthinker.episode.trajectory import Trajectory, load_trajectories
from vrthinker.errors import InputError
from vrthinker.exchange.formats import DATASET, TRACE_FORMATS, dataset_info
from vrthinker.exchange.frames import FOLDER, FrameFiles
from vrthinker.exchange.samples import SampleKind, expires, samples_of
from vrthinker.records.files import replace_file
from vrthinker.train.trace_sources import FileTraces
from vrthinker.train.traces import read_traces

REPORT_FILE, INFO_FILE = "export.json", "dataset_info.json"


def chosen_traces(
    path: Path, pairs: Path | None, *, unfiltered: bool
) -> tuple[list[Trajectory], dict[str, int]]:
    """The traces of a file that are exported, and how many were dropped for which reason.

    Args:
        path: The trajectories file.
        pairs: The pairs file with the right labels; None to check the form only.
        unfiltered: Whether all traces with a verdict are taken, whatever their form.

    Raises:
        InputError: A file cannot be used, or no trace is left.
    """
    if not unfiltered:
        selection = read_traces(FileTraces(path=path, pairs=pairs))
        return selection.traces, selection.reasons
    kept, dropped = [], Counter[str]()
    for trajectory in load_trajectories(path):
        if trajectory.outcome.judgments is not None and trajectory.rounds:
            kept.append(trajectory)
        else:
            dropped["without a verdict"] += 1
    if not kept:
        raise InputError(
            f"{path}: got {dropped.total()} trajectories, none with a verdict; nothing to export"
        )
    return kept, dict(dropped)


def export_traces(
    name: str,
    traces: Sequence[Trajectory],
    out: Path,
    *,
    samples: SampleKind | Literal["auto"] = "auto",
    dropped: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Writes traces in the format of a trainer, with their frames as PNG files beside them.

    Args:
        name: The format, a key of `TRACE_FORMATS`.
        traces: The traces.
        out: The folder to write.
        samples: The kind of the samples. `auto` makes one sample per round if a frame of some trace expired,
            or if the format can mask nothing else; otherwise one per trajectory.
        dropped: What the report says about dropped traces.

    Returns:
        The content of `export.json`.

    Raises:
        InputError: The format is unknown, a clip changed or is gone, or the folder cannot be written.
    """
    if name not in TRACE_FORMATS:
        raise InputError(f"data export-traces: got {name!r}, allowed: {', '.join(TRACE_FORMATS)}")
    form = TRACE_FORMATS[name]
    if form.file.endswith(".parquet"):
        check_table(name, Path(form.file))
    expired = sum(map(expires, traces))
    kind: SampleKind = samples if samples != "auto" else "round" if expired or name == "trl" else "episode"
    files = FrameFiles(out / FOLDER)
    folder = os.path.join(os.path.abspath(out), FOLDER) if form.absolute else FOLDER
    rows: list[dict[str, Any]] = []
    for trajectory in traces:
        made = list(samples_of(trajectory, kind))
        names = files.write(trajectory, [frame for sample in made for frame in sample.frames])
        for sample in made:
            pictures = [names[frame.frame_number, frame.view] for frame in sample.frames]
            rows.append(form.row(sample, [f"{folder}/{picture}" for picture in pictures]))
    out.mkdir(parents=True, exist_ok=True)
    if form.file.endswith(".parquet"):
        replace_file(out / form.file, parquet_bytes(rows))
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_file(out / form.file, lines.encode())
    if name == "sharegpt":
        replace_file(out / INFO_FILE, _indented(_known_sets(out / INFO_FILE) | {DATASET: dataset_info()}))
    report = {
        "schema_version": 1,
        "format": name,
        "file": form.file,
        "traces": len(traces),
        "samples": len(rows),
        "kind": kind,
        "pictures": files.count,
        "dropped": dropped or {},
        "traces_with_expired_frames": expired,
        "notes": _notes(name, traces, kind, expired),
    }
    replace_file(out / REPORT_FILE, _indented(report))
    return report


def _notes(name: str, traces: Sequence[Trajectory], kind: SampleKind, expired: int) -> list[str]:
    notes = [TRACE_FORMATS[name].advice[kind]]
    if kind == "episode" and expired:
        notes.append(
            f"frames expired in {expired} of {len(traces)} traces and stay in the samples, so that later "
            "rounds see more than they saw when they were written; --samples round shows what they saw"
        )
    other = sorted({trace.settings.memory for trace in traces} - {"rerender"})
    if other and expired:
        notes.append(
            f"traces were written under memory {' and '.join(other)}, where later texts had read frames "
            "before they expired; no other trainer computes that, and the samples are those of rerender"
        )
    return notes


def _known_sets(path: Path) -> dict[str, Any]:
    """The sets that a dataset_info.json names already."""
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(
            f"{path}: got no JSON object, allowed: LLaMA-Factory's list of sets; give another folder"
        )
    return value


def _indented(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
