"""`vrthinker data` brings preference data in and out, splits it, and takes thinking traces to other trainers.

None of these commands loads torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vrthinker.commands.options import Flag, announce, option
from vrthinker.commands.traces import DataExportTracesCommand, DataImportTracesCommand
from vrthinker.errors import InputError, one_line, unwritable
from vrthinker.progress import counted

if TYPE_CHECKING:
    from vrthinker.data.importing import FrameFolder

_SPLIT_FILE = "split.json"


@dataclass(frozen=True)
class DataImportCommand:
    """Read a public preference set, or your own in its layout, into pairs.jsonl, and say what was read.

    vrthinker data import genai-bench annotations.json --out DATA --videos CLIPS

    FORMAT: videoalign, videogen-rewardbench, genai-bench, mj-bench-video, rapidata, videodpo, videofeedback,
    unifiedreward (docs/data.md describes them).
    """

    format: Annotated[tyro.conf.Positional[str], option("FORMAT")]
    """The layout of the file."""
    source: Annotated[tyro.conf.Positional[Path], option("SRC")]
    """The annotation file: .json, .jsonl, .csv or .parquet."""
    out: Annotated[Path, option("DIR")]
    """The folder for pairs.jsonl and import.json."""
    videos: Annotated[Path | None, option("FOLDER")] = None
    """The folder that relative paths of clips start from. The folder of SRC by default."""
    check_videos: Flag = False
    """Drop rows whose clips are not there. By default they are counted only."""
    margin: Annotated[float | None, option("X")] = None
    """How far two scores or shares of votes must differ to be no tie (rapidata: 0.1, videofeedback: 0)."""
    pairs_per_prompt: Annotated[int, option("N")] = 10
    """The most pairs that are made of the single clips of one prompt (videofeedback). 10 by default."""
    ignore_assets: Flag = False
    """Keep pairs that were made from a picture beside the caption (rapidata), without a label for TA."""
    swap_seed: Annotated[int | None, option("N")] = None
    """Let the clips of about half of the pairs change places, chosen by this seed and the pair's id."""
    skip_bad: Flag = False
    """Drop and count rows that are not what the layout says, instead of refusing the file."""
    json: Flag = False
    """Print the report as JSON instead of tables."""

    def run(self) -> int:
        """Imports and prints the report."""
        import math

        from vrthinker.data.datasets.draft import ImportOptions
        from vrthinker.data.importing import FORMATS, PAIRS_FILE, REPORT_FILE, import_pairs, report_json
        from vrthinker.records.files import replace_file

        form = FORMATS.get(self.format)
        if form is None:
            raise InputError(f"data import: got {self.format!r}, allowed: {', '.join(FORMATS)}")
        if self.margin is not None and form.margin is None:
            raise InputError(f"--margin: goes with formats that have scores, not with {form.name}")
        if self.margin is not None and not (0 <= self.margin < math.inf):
            raise InputError(f"--margin: got {self.margin}, allowed: 0 and above")
        if self.pairs_per_prompt < 1:
            raise InputError(f"--pairs-per-prompt: got {self.pairs_per_prompt}, allowed: at least 1")
        if self.ignore_assets and form.name != "rapidata":
            raise InputError(f"--ignore-assets: goes with rapidata, not with {form.name}")
        if self.videos is not None and not self.videos.is_dir():
            raise InputError(f"--videos: {self.videos}: no folder; give the folder of the clips")
        _check_folder("--out", self.out)
        for name in (PAIRS_FILE, REPORT_FILE):
            _check_other("--out", self.out / name, self.source)
        imported = import_pairs(
            form,
            self.source,
            self.out,
            videos=self.videos,
            options=ImportOptions(self.margin, self.pairs_per_prompt, self.ignore_assets),
            check_videos=self.check_videos,
            skip_bad=self.skip_bad,
            swap_seed=self.swap_seed,
        )
        _make_folder("--out", self.out)
        for folder in imported.folders:
            _link_frames(folder)
        replace_file(self.out / REPORT_FILE, report_json(imported.report))
        replace_file(self.out / PAIRS_FILE, imported.lines)
        if self.json:
            sys.stdout.write(report_json(imported.report).decode())
        else:
            _print_import(imported.report, self.out / PAIRS_FILE)
        return 0


@dataclass(frozen=True)
class DataExportCommand:
    """Write a pairs file in the layout of a public set.

    vrthinker data export videoalign pairs.jsonl --out pairs.csv

    FORMAT: videoalign (CSV), genai-bench (JSON, overall labels only), unifiedreward (JSON, overall only).
    """

    format: Annotated[tyro.conf.Positional[str], option("FORMAT")]
    """The layout to write."""
    pairs: Annotated[tyro.conf.Positional[Path], option("PAIRS")]
    """The pairs file."""
    out: Annotated[Path, option("FILE")]
    """The file to write."""

    def run(self) -> int:
        """Exports; says what the layout cannot hold."""
        from vrthinker.data.exporting import check_export, export_pairs
        from vrthinker.data.pairs import load_pairs
        from vrthinker.records.files import replace_file

        check_export(self.format, self.out)
        _check_other("--out", self.out, self.pairs)
        exported = export_pairs(self.format, load_pairs(self.pairs), self.out)
        _make_folder("--out", self.out.parent)
        replace_file(self.out, exported.content)
        for what, count in exported.lost.items():
            announce(f"left out: {count} {what}")
        sys.stdout.write(f"{_plain(self.out)}: {counted(exported.pairs, 'pair')}\n")
        return 0


@dataclass(frozen=True)
class DataSplitCommand:
    """Split a pairs file into parts that share no caption and no clip.

    vrthinker data split pairs.jsonl --out SPLIT --parts train=0.9,test=0.1 --seed 0
    """

    pairs: Annotated[tyro.conf.Positional[Path], option("PAIRS")]
    """The pairs file."""
    out: Annotated[Path, option("DIR")]
    """The folder for one pairs file a part, and split.json."""
    parts: Annotated[str, option("NAME=SHARE,...")] = "train=0.9,test=0.1"
    """The parts and their shares, which add up to 1."""
    seed: int = 0
    """The seed of the split."""
    json: Flag = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Splits and prints sizes and label balance."""
        from vrthinker.data.pairs import dump_pair, load_pairs
        from vrthinker.data.splits import label_balance, parse_parts, split_pairs
        from vrthinker.records.files import replace_file

        parts = parse_parts(self.parts)
        _check_folder("--out", self.out)
        for name in (*(f"{part}.jsonl" for part in parts), _SPLIT_FILE):
            _check_other("--out", self.out / name, self.pairs)
        _check_older_parts(self.out, parts)
        pairs = load_pairs(self.pairs)
        announce(f"reading the clips of {counted(len(pairs), 'pair')}")
        split = split_pairs(pairs, parts, self.seed)
        _make_folder("--out", self.out)
        report: dict[str, Any] = {
            "schema_version": 1,
            "pairs": str(self.pairs),
            "seed": self.seed,
            "groups": split.components,
            "largest_group": split.largest,
            "clips_known_by_path_only": split.by_path,
            "parts": {
                name: {
                    "share": parts[name],
                    "pairs": len(members),
                    "labels": label_balance(members),
                }
                for name, members in split.parts.items()
            },
            "warnings": list(split.warnings),
        }
        for name, members in split.parts.items():
            content = "".join(dump_pair(pair, self.out) for pair in members)
            replace_file(self.out / f"{name}.jsonl", content.encode())
        replace_file(self.out / _SPLIT_FILE, _json(report).encode("utf-8", "backslashreplace"))
        if split.by_path:
            announce(
                f"{counted(split.by_path, 'clip')} cannot be read and known by path only: copies of one clip "
                "under other names are not noticed"
            )
        for warning in split.warnings:
            announce(warning)
        if self.json:
            sys.stdout.write(_json(report).encode("utf-8", "backslashreplace").decode())
        else:
            _print_split(report)
        return 0


# Files


def _check_folder(name: str, path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"{name}: {path}: got a file, allowed: a folder")


def _check_other(name: str, out: Path, source: Path) -> None:
    """Refuses to overwrite what is being read."""
    if os.path.realpath(out) == os.path.realpath(source):
        raise InputError(f"{name}: {out} is the file that is read; give another place")
    if out.exists() and not out.is_file():
        raise InputError(f"{name}: {out}: not a file; give another place")


def _check_older_parts(out: Path, parts: Mapping[str, float]) -> None:
    """Refuses a folder in which a part of an older split would stay beside the new ones: it would leak."""
    from vrthinker.bounded_files import read_json

    path = out / _SPLIT_FILE
    if not path.exists():
        return
    try:
        older = read_json(path)["parts"]
        left = [name for name in older if name not in parts and (out / f"{name}.jsonl").exists()]
    except (InputError, TypeError, KeyError, OSError, ValueError):
        return  # something else has that name, and is replaced
    if left:
        raise InputError(
            f"--out: {out}: holds another split with the part {one_line(left[0])}, which would share clips "
            "with the new parts; give another folder, or remove it"
        )


def _make_folder(name: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(f"{name}: {path}", error, "give another folder") from None


def _link_frames(folder: FrameFolder) -> None:
    """Makes a folder of links to pictures, which is a clip. One that is there must be the same."""
    _make_folder("--out", folder.path)
    try:
        strange = set(os.listdir(folder.path)) - {name for name, _ in folder.links}
        if strange:
            raise InputError(
                f"{folder.path}: holds other pictures ({sorted(strange)[0]!r}); give an empty folder as --out"
            )
        for name, picture in folder.links:
            link = folder.path / name
            if link.is_symlink() and os.readlink(link) == str(picture):
                continue
            link.unlink(missing_ok=True)
            link.symlink_to(picture)
    except OSError as error:
        raise unwritable(folder.path, error, "give another folder") from None


# Printing


def _plain(value: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(value))


def _json(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _print_import(report: Mapping[str, Any], path: Path) -> None:
    rows = counted(report["rows"], "row")
    sys.stdout.write(f"{_plain(path)}: {counted(report['pairs'], 'pair')} of {rows}\n")
    _print_table(
        ("label", "pairs", "video 1", "video 2", "ties", "derived"),
        [
            (code, got["labels"], got["video_1"], got["video_2"], got["ties"], got["derived"] or "-")
            for code, got in report["dimensions"].items()
        ],
    )
    for code, got in report["dimensions"].items():
        if got["derived"]:
            sys.stdout.write(f"{code} is derived, nobody gave it: {got['source']}\n")
    if len(report["tie_kinds"]) > 1:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report["tie_kinds"].items())
        sys.stdout.write(f"ties: {kinds}\n")
    if report["dropped"]:
        _print_table(("rows dropped", "why"), [(count, why) for why, count in report["dropped"].items()])
    for note, count in report["notes"].items():
        sys.stdout.write(f"{count} {note}\n")
    videos = report["videos"]
    missing = f"{videos['missing']} of {videos['files']} files are not there" if videos["missing"] else ""
    if missing:
        sys.stdout.write(f"{missing}, looked for below {_plain(report['videos_from'])}\n")


def _print_split(report: Mapping[str, Any]) -> None:
    rows = []
    for name, part in report["parts"].items():
        balance = "; ".join(
            f"{code} {counts['video_1']}/{counts['video_2']}/{counts['ties']}"
            for code, counts in part["labels"].items()
        )
        rows.append((name, part["pairs"], f"{part['share']:.0%}", balance or "no labels"))
    _print_table(("part", "pairs", "asked for", "labels: video 1 / video 2 / ties"), rows)
    sys.stdout.write(
        f"{counted(report['groups'], 'group')} of pairs that share a caption or a clip, the largest of "
        f"{counted(report['largest_group'], 'pair')}\n"
    )


def _print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a small table in plain columns; the last column is not cut."""
    cells = [list(map(_plain, row)) for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


DataCommand = (
    Annotated[DataImportCommand, tyro.conf.subcommand("import", prefix_name=False)]
    | Annotated[DataExportCommand, tyro.conf.subcommand("export", prefix_name=False)]
    | Annotated[DataSplitCommand, tyro.conf.subcommand("split", prefix_name=False)]
    | Annotated[DataExportTracesCommand, tyro.conf.subcommand("export-traces", prefix_name=False)]
    | Annotated[DataImportTracesCommand, tyro.conf.subcommand("import-traces", prefix_name=False)]
)
