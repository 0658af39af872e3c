"""Preference data of others, brought into a pairs file, with a report of exactly what was read.

Invariants: a file is imported whole, or refused with its first problems (file, row, field, what was got, what
is allowed); rows that give no pair for a known reason are dropped, counted and named in the report. Equal
sources and options give equal results. Nothing is written here: the caller writes `Imported`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vrthinker.data.datasets.draft import Clip, Draft, Format, ImportOptions, Tally
from vrthinker.data.datasets.genai_bench import GENAI_BENCH
from vrthinker.data.datasets.mj_bench_video import MJ_BENCH_VIDEO
from vrthinker.data.datasets.rapidata import RAPIDATA
from vrthinker.data.datasets.rows import DATASET, json_line, read_rows, shown, unit_of
from vrthinker.data.datasets.unifiedreward import UNIFIEDREWARD
from vrthinker.data.datasets.videoalign import VIDEOALIGN, VIDEOGEN_REWARDBENCH
from vrthinker.data.datasets.videodpo import VIDEODPO
from vrthinker.data.datasets.videofeedback import VIDEOFEEDBACK
from vrthinker.data.pairs import written_path
from vrthinker.episode.dimensions import DATASETS, Dimension
from vrthinker.errors import InputError

FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        VIDEOALIGN,
        VIDEOGEN_REWARDBENCH,
        GENAI_BENCH,
        MJ_BENCH_VIDEO,
        RAPIDATA,
        VIDEODPO,
        VIDEOFEEDBACK,
        UNIFIEDREWARD,
    )
}
"""Name on the command line -> layout."""

PAIRS_FILE, REPORT_FILE, FRAMES_FOLDER = "pairs.jsonl", "import.json", "clips"
SHOWN_PROBLEMS = 5
_SHOWN_DROPPED = 1000
_NO_FILE = "a video file is missing (--check-videos)"


@dataclass(frozen=True)
class FrameFolder:
    """A folder of links that makes a clip of picture files which share their folder with other clips.

    Attributes:
        path: The folder.
        links: (name in the folder, picture file) in the order of the frames.
    """

    path: Path
    links: tuple[tuple[str, Path], ...]


@dataclass(frozen=True)
class Imported:
    """What an import gives.

    Attributes:
        lines: The content of the pairs file.
        report: The content of `import.json` (docs/data.md names its fields).
        folders: The folders of links that clips need which are given as frames.
    """

    lines: bytes
    report: dict[str, Any]
    folders: tuple[FrameFolder, ...] = ()


def import_pairs(
    form: Format,
    source: Path,
    out: Path,
    *,
    videos: Path | None = None,
    options: ImportOptions | None = None,
    check_videos: bool = False,
    skip_bad: bool = False,
    swap_seed: int | None = None,
) -> Imported:
    """Reads an annotation file.

    Args:
        form: Its layout.
        source: The file.
        out: The folder that the pairs file is for. Clips below it get relative paths, others absolute ones.
        videos: The folder that relative paths of clips start from; the file's own by default.
        options: The format's options.
        check_videos: Whether rows whose clips do not exist are dropped.
        skip_bad: Whether rows with problems are dropped and counted instead of refusing the file.
        swap_seed: The seed by which the two clips of some pairs change places; None leaves all as they are.

    Raises:
        InputError: The file cannot be read, has problems, or gives no pair.
    """
    options = options or ImportOptions()
    tally = Tally()
    maker = _Maker(form, source, out, videos, check_videos, swap_seed, tally)
    lines = [maker.line(draft) for draft in form.read(read_rows(source, form.columns), options, tally)]
    kept = [line for line in lines if line is not None]
    if tally.problems and not skip_bad:
        raise InputError(f"{source}: {_described(tally, unit_of(source))}")
    for number, name, _, _ in tally.problems:
        tally.drop(number, f"bad field {name} (--skip-bad)")
    if not kept:
        reasons = "; ".join(f"{count} {reason}" for reason, count in _reasons(tally)[:SHOWN_PROBLEMS])
        raise InputError(
            f"{source}: got {tally.rows} rows and no pair{f' ({reasons})' if reasons else ''}, wanted at "
            f"least one pair in the layout {form.name} ({form.about})"
        )
    return Imported("".join(kept).encode(), maker.report(options), tuple(maker.folders.values()))


def _described(tally: Tally, unit: str) -> str:
    said = [
        f"{unit} {number}, {name}: got {got}, allowed: {allowed}"
        for number, name, got, allowed in tally.problems[:SHOWN_PROBLEMS]
    ]
    if len(tally.problems) == 1:
        return f"{said[0]}; mend it, or give --skip-bad"
    more = len(tally.problems) - len(said)
    rest = f"; and {more} more" if more else ""
    return f"{len(tally.problems)} problems: {'; '.join(said)}{rest}; mend them, or give --skip-bad"


def _reasons(tally: Tally) -> list[tuple[str, int]]:
    return Counter(reason for _, reason in tally.dropped).most_common()


@dataclass
class _Maker:
    """Turns drafts into lines, and counts what it sees on the way."""

    form: Format
    source: Path
    out: Path
    videos: Path | None
    check_videos: bool
    swap_seed: int | None
    tally: Tally
    folders: dict[tuple[str, ...], FrameFolder] = field(default_factory=dict)
    labels: dict[str, Counter[int]] = field(default_factory=dict)
    derived: Counter[str] = field(default_factory=Counter)
    ties: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    frames: list[int] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set)
    _rows: dict[tuple[object, ...], int] = field(default_factory=dict)
    _found: dict[str, bool] = field(default_factory=dict)
    _listed: dict[Path, frozenset[str]] = field(default_factory=dict)
    _absolute: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.out = Path(os.path.abspath(self.out))
        self._base = Path(os.path.abspath(self.videos or self.source.parent))

    def line(self, draft: Draft) -> str | None:
        """The line of a pairs file; None if the draft is dropped."""
        if draft.dataset and draft.dataset not in DATASETS:
            self.tally.problems.append(
                (draft.number, DATASET, shown(draft.dataset), f"{', '.join(sorted(DATASETS))}, or nothing")
            )
            return None
        said = (draft.prompt.text, draft.video_1, draft.video_2, tuple(sorted(draft.labels.items())))
        first = self._rows.setdefault((draft.id, *said, draft.tie, draft.dataset), draft.number)
        if first != draft.number:
            self.tally.drop(draft.number, "the same row again")
            return None
        found = [self._clip(draft, number) for number in (1, 2)]
        paths = [path for path, _ in found]
        if self.check_videos and not all(exists for _, exists in found):
            self.tally.drop(draft.number, _NO_FILE)
            return None
        name = self._new_id(draft)
        labels = {code.value: draft.labels[code] for code in Dimension if code in draft.labels}
        if self._swaps(name):
            paths.reverse()
            labels = {code: (0, 2, 1)[label] for code, label in labels.items()}
            self.counts["swapped"] += 1
        self._count(draft, name, labels)
        value: dict[str, Any] = {"id": name, "prompt": draft.prompt.text}
        value |= {
            "video_1": written_path(paths[0], self.out),
            "video_2": written_path(paths[1], self.out),
            "labels": labels,
        }
        dataset = self.form.dataset if draft.dataset is None else draft.dataset
        return json_line(value | ({"dataset": dataset} if dataset else {}))

    def _new_id(self, draft: Draft) -> str:
        if draft.id is None:
            self.counts["ids made from row numbers"] += 1
        name = wanted = draft.id or f"{self.form.name}-{draft.number:06d}"
        again = 1
        while name in self._ids:
            again += 1
            name = f"{wanted}~{again}"
        if again > 1:
            self.counts["ids that were there before, made distinct"] += 1
        self._ids.add(name)
        return name

    def _swaps(self, name: str) -> bool:
        if self.swap_seed is None:
            return False
        return bool(hashlib.sha256(f"{self.swap_seed}:{name}".encode()).digest()[0] & 1)

    def _count(self, draft: Draft, name: str, labels: Mapping[str, int]) -> None:
        for code, label in labels.items():
            self.labels.setdefault(code, Counter())[label] += 1
            rule = self.form.rules.get(code)
            self.derived[code] += code in draft.derived or (rule is not None and rule.derived)
        if draft.tie is not None:
            self.ties.setdefault(draft.tie, []).append(name)
        self.counts["empty captions"] += draft.prompt.missing
        self.counts["captions with blanks or line ends around them, removed"] += draft.prompt.trimmed
        self.counts["pairs of one clip with itself"] += draft.video_1 == draft.video_2
        self.frames += draft.frames

    # Clips

    def _clip(self, draft: Draft, number: int) -> tuple[Path, bool]:
        """The path of a clip, and whether it is there."""
        clip = draft.video_1 if number == 1 else draft.video_2
        if clip.path is not None:
            if os.path.isabs(clip.path):
                self._absolute.add(clip.path)
            path = Path(os.path.abspath(self._base / clip.path))
            return path, self._exists(path)
        files = tuple(Path(os.path.abspath(self._base / frame)) for frame in clip.frames)
        there = all([self._exists(file) for file in files])
        parents = {file.parent for file in files}
        if len(parents) == 1 and self._is_whole_folder(files):
            return files[0].parent, there
        return self._linked(clip, files, draft.number, number, there), there

    def _linked(self, clip: Clip, files: tuple[Path, ...], row: int, number: int, there: bool) -> Path:
        known = self.folders.get(clip.frames)
        if known is not None:
            return known.path
        folder = self.out / FRAMES_FOLDER / f"{row:06d}-{number}"
        if there:  # a folder that lacks frames would be judged as if it were whole
            names = [f"{place:06d}{file.suffix}" for place, file in enumerate(files)]
            made = FrameFolder(folder, tuple(zip(names, files, strict=True)))
            self.folders[clip.frames] = made
        return folder

    def _is_whole_folder(self, files: tuple[Path, ...]) -> bool:
        """Whether a folder holds these pictures and nothing else, so that it is the clip itself."""
        folder = files[0].parent
        if folder not in self._listed:
            try:
                self._listed[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._listed[folder] = frozenset()
        names = [file.name for file in files]
        return names == sorted(names) and set(names) == self._listed[folder]

    def _exists(self, path: Path) -> bool:
        name = str(path)
        if name not in self._found:
            try:
                self._found[name] = path.exists()
            except OSError:  # a name that the system cannot have
                self._found[name] = False
        return self._found[name]

    # The report

    def report(self, options: ImportOptions) -> dict[str, Any]:
        """What was read, as the content of `import.json`."""
        tally, form = self.tally, self.form
        margin = form.margin if options.margin is None else options.margin
        missing = sum(not found for found in self._found.values())
        report: dict[str, Any] = {
            "schema_version": 1,
            "format": form.name,
            "source": str(self.source),
            "videos_from": str(self._base),
            "rows": tally.rows,
            "pairs": len(self._ids),
            "dimensions": {
                code.value: self._dimension(code.value, margin) for code in Dimension if code in self.labels
            },
            "tie_kinds": {kind: len(ids) for kind, ids in self.ties.items()},
            "tie_ids": self.ties,
            "dropped": dict(_reasons(tally)),
            "dropped_rows": [[number, reason] for number, reason in tally.dropped[:_SHOWN_DROPPED]],
            "notes": {note: count for note, count in (self.counts + tally.notes).items() if count},
            "videos": {
                "files": len(self._found),
                "missing": missing,
                "absolute_paths": len(self._absolute),
            },
            "options": {
                "margin": margin,
                "check_videos": self.check_videos,
                "swap_seed": self.swap_seed,
            },
        }
        if self.frames:
            report["frames_of_a_clip"] = {"least": min(self.frames), "most": max(self.frames)}
        return report

    def _dimension(self, code: str, margin: float | None) -> dict[str, Any]:
        counts, rule = self.labels[code], self.form.rules.get(code)
        source = "" if rule is None else rule.source.replace("{margin}", str(margin))
        return {
            "labels": counts.total(),
            "video_1": counts[1],
            "video_2": counts[2],
            "ties": counts[0],
            "derived": self.derived[code],
            "source": source,
        }


def report_json(report: Mapping[str, Any]) -> bytes:
    """The content of `import.json`."""
    return (json.dumps(report, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "backslashreplace")


def dropped_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(reason, number of rows) of a report, the most frequent reason first."""
    yield from sorted(report["dropped"].items(), key=lambda item: -item[1])
