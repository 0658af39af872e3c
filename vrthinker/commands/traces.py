"""`vrthinker data export-traces` and `import-traces`: thinking traces to and from other trainers."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vrthinker.commands.options import Flag, announce, option
from vrthinker.errors import InputError, unwritable
from vrthinker.progress import counted

if TYPE_CHECKING:
    from vrthinker.episode.trajectory import Trajectory
    from vrthinker.video.resize import ResizeSettings

_SHOWN = 5


@dataclass(frozen=True)
class DataExportTracesCommand:
    """Write recorded episodes as training data of another trainer, with their frames as PNG files.

    vrthinker data export-traces sharegpt traces.jsonl --pairs pairs.jsonl --out DIR

    FORMAT: sharegpt (LLaMA-Factory), ms-swift, trl, verl. Only the model's rounds are learned.
    """

    format: Annotated[tyro.conf.Positional[str], option("FORMAT")]
    """The format to write."""
    trajectories: Annotated[tyro.conf.Positional[Path], option("TRAJECTORIES")]
    """The trajectories (`vrthinker judge --trajectories` writes them)."""
    out: Annotated[Path, option("DIR")]
    """The folder to write."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """The pairs file with the labels: only traces with four right judgments are exported."""
    unfiltered: Flag = False
    """Export every trace with a verdict, also those that are not well formed."""
    samples: Literal["auto", "round", "episode"] = "auto"
    """One sample per round with the frames that the round saw, or one per episode with all frames. auto: per
    round if any frame expired."""
    json: Flag = False
    """Print the report as JSON."""

    def run(self) -> int:
        """Exports; says what was dropped and what the trainer must be told."""
        from vrthinker.exchange.formats import TRACE_FORMATS

        if self.format not in TRACE_FORMATS:
            raise InputError(f"data export-traces: got {self.format!r}, allowed: {', '.join(TRACE_FORMATS)}")
        if self.pairs is not None and self.unfiltered:
            raise InputError("--unfiltered: goes without --pairs")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out: {self.out}: got a file, allowed: a folder")
        from vrthinker.exchange.exporting import chosen_traces, export_traces

        traces, dropped = chosen_traces(self.trajectories, self.pairs, unfiltered=self.unfiltered)
        announce(f"writing the frames of {counted(len(traces), 'trace')}")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(f"--out: {self.out}", error, "give another folder") from None
        report = export_traces(self.format, traces, self.out, samples=self.samples, dropped=dropped)
        if self.json:
            import json

            sys.stdout.write(json.dumps(report, ensure_ascii=False, indent=2) + "\n")
        else:
            _print_export(report, self.out)
        return 0


@dataclass(frozen=True)
class DataImportTracesCommand:
    """Read thinking traces of another trainer back into a trajectories file, checked against their clips.

    vrthinker data import-traces sharegpt traces.jsonl --pairs pairs.jsonl --out traces-back.jsonl
    """

    format: Annotated[tyro.conf.Positional[str], option("FORMAT")]
    """The format to read: sharegpt."""
    source: Annotated[tyro.conf.Positional[Path], option("SRC")]
    """The file: .jsonl, or a JSON list."""
    pairs: Annotated[Path, option("FILE")]
    """The pairs file with the clips that the traces are about."""
    out: Annotated[Path, option("FILE")]
    """The trajectories file to write. It must not exist."""
    window: Annotated[str, option("P|all")] = "all"
    """For how many rounds frames stayed visible, for traces that do not say it. All rounds by default."""
    model: Annotated[Path | None, option("M")] = None
    """The checkpoint folder whose frame sizes the trajectories get. Those of Qwen2.5-VL by default."""
    skip_bad: Flag = False
    """Leave out traces that cannot be trajectories instead of refusing the file."""

    def run(self) -> int:
        """Imports; a trace that cannot be a trajectory is refused with the reason."""
        if self.format != "sharegpt":
            raise InputError(f"data import-traces: got {self.format!r}, allowed: sharegpt")
        if self.window != "all" and not (
            self.window.isascii() and self.window.isdigit() and len(self.window) < 4
        ):
            raise InputError(f"--window: got {self.window!r}, allowed: 0, 1, 2, ... or all")
        if self.out.exists():
            raise InputError(f"--out: {self.out}: is there already; give a new file")
        from vrthinker.data.pairs import load_pairs
        from vrthinker.data.tables import refuse_table_ending
        from vrthinker.episode.trajectory import dump_line
        from vrthinker.exchange.importing import import_traces
        from vrthinker.records.files import replace_file

        refuse_table_ending("--out", self.out)
        resize = self._resize()
        pairs = load_pairs(self.pairs)
        window = None if self.window == "all" else int(self.window)
        told = import_traces(self.source, pairs, window=window, resize=resize)
        traces, refused = _told_apart(told)
        if refused and (not self.skip_bad or not traces):
            shown = "; ".join(map(str, refused[:_SHOWN]))
            more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
            advice = "; mend them, or give --skip-bad" if traces else ""
            raise InputError(
                f"{counted(len(refused), 'trace')} cannot be trajectories: {shown}{more}{advice}"
            )
        if not traces:
            raise InputError(f"{self.source}: got no traces, wanted at least one")
        for error in refused[:_SHOWN]:
            announce(f"left out: {error}")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(f"--out: {self.out}", error, "give another file") from None
        replace_file(self.out, "".join(map(dump_line, traces)).encode())
        left = f", {len(refused)} left out" if refused else ""
        sys.stdout.write(f"{_plain(self.out)}: {counted(len(traces), 'trace')}{left}\n")
        return 0

    def _resize(self) -> ResizeSettings | None:
        if self.model is None:
            return None
        from vrthinker.episode.settings import SETTINGS_FILE, load_judge_settings

        settings = load_judge_settings(self.model)
        if settings is None:
            raise InputError(
                f"--model: {self.model}: has no {SETTINGS_FILE}; give a judge's checkpoint folder"
            )
        return settings.resize


def _told_apart(told: Iterable[Trajectory | InputError]) -> tuple[list[Trajectory], list[InputError]]:
    traces: list[Trajectory] = []
    refused: list[InputError] = []
    for one in told:
        if isinstance(one, InputError):
            refused.append(one)
        else:
            traces.append(one)
    return traces, refused


def _plain(value: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(value))


def _print_export(report: dict[str, Any], out: Path) -> None:
    kind = "one per round" if report["kind"] == "round" else "one per episode"
    sys.stdout.write(
        f"{_plain(out / report['file'])}: {counted(report['samples'], 'sample')} ({kind}) of "
        f"{counted(report['traces'], 'trace')}, {counted(report['pictures'], 'picture')}\n"
    )
    for reason, count in report["dropped"].items():
        sys.stdout.write(f"dropped: {count} {reason}\n")
    for note in report["notes"]:
        sys.stdout.write(f"{_plain(note)}\n")
