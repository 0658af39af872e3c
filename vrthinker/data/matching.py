"""The clips of two generators, matched to prompts.

Both folders hold one clip for each prompt. There are three ways to say which clip belongs to which prompt:

- `order`: the clips of a folder in the order of their names, numbers by value (`2.mp4` before `10.mp4`),
  belong to the prompts in the order of the file. Both folders need as many clips as there are prompts.
- `number`: the last number in a clip's name is the number of its prompt, from 1, or from 0 if both folders
  have a clip 0. If only one has, and the other has no last clip from which one sees that it counts from 1,
  nothing is matched.
- A table of prompts with a column `video` (the name in both folders), or `video_1` and `video_2`, names them.

Invariant: no clip is guessed. Clips that are missing are listed, and nothing else takes their place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vrthinker.bounded_files import opened, read_lines
from vrthinker.data.tables import read_csv, read_parquet, table_format
from vrthinker.errors import InputError, one_line

Match = Literal["order", "number"]
MAX_PROMPTS = 100_000
_MAX_LINE_BYTES = 1 << 20
_MOVIES = frozenset(
    [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".ogv"]
)
_VIDEOS = _MOVIES | {".flv", ".wmv", ".gif", ".webp", ".apng"}
_PICTURES = frozenset([".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"])
_COLUMNS = ("id", "prompt", "video", "video_1", "video_2")
_SHOWN = 5


@dataclass(frozen=True)
class Sample:
    """A prompt, and what both generators made of it.

    Attributes:
        id: The id: a table's, or the prompt's number with zeros in front.
        prompt: The prompt.
        clips: The clip of the first and of the second generator.
    """

    id: str
    prompt: str
    clips: tuple[Path, Path]


@dataclass(frozen=True)
class Matched:
    """What was matched.

    Attributes:
        samples: The prompts that have both clips, in the order of the file.
        missing: The prompts that lack one, each as a line that names what is missing.
    """

    samples: tuple[Sample, ...]
    missing: tuple[str, ...]


def match_clips(folders: tuple[Path, Path], prompts: Path, *, match: Match = "order") -> Matched:
    """Matches the clips of two folders to prompts.

    Args:
        folders: The folder of each generator.
        prompts: A text file with a prompt on each line, or a table (.csv, .parquet, .jsonl) with a column
            `prompt`, and perhaps `id`, `video`, `video_1`, `video_2`.
        match: How clips are matched where the prompts do not name them.

    Raises:
        InputError: A folder or the file cannot be read, has nothing in it, or does not fit.
    """
    rows = _read_prompts(prompts)
    names = [_names(row) for row in rows]
    if any(names) and not all(names):
        raise InputError(
            f"{prompts}: got rows with and without a video, allowed: a name in every row or none"
        )
    if all(names):
        chosen = [
            [folder / name[side] for name in names if name is not None] for side, folder in enumerate(folders)
        ]
        paths: list[Sequence[Path | None]] = [
            [path if path.exists() else None for path in side] for side in chosen
        ]
        wanted = [[str(path) for path in side] for side in chosen]
    elif match == "order":
        paths = _by_order(folders, prompts, len(rows))
        wanted = [[""] * len(rows)] * 2
    else:
        clips = [_numbered(folder) for folder in folders]
        starts = _starts(folders, clips, len(rows))
        paths, wanted = [], []
        for folder, side, start in zip(folders, clips, starts, strict=True):
            paths.append(_by_number(folder, side, start, len(rows)))
            wanted.append(
                [f"a clip with the number {start + place} in {folder}" for place in range(len(rows))]
            )
    samples, missing = [], []
    for place, row in enumerate(rows):
        first, second = paths[0][place], paths[1][place]
        if first is None or second is None:
            lacks = [wanted[side][place] for side in (0, 1) if paths[side][place] is None]
            missing.append(f"prompt {row['id']}: {' and '.join(lacks)}")
        else:
            samples.append(Sample(row["id"], row["prompt"], (first, second)))
    return Matched(tuple(samples), tuple(missing))


def listed(lines: Sequence[str]) -> str:
    """The first lines of a list, and how many there are besides."""
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def clips_in(folder: Path) -> list[Path]:
    """The clips of a folder, by name, numbers by value: video files, and folders that hold pictures.

    Raises:
        InputError: The folder cannot be read.
    """
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; give a folder of clips") from None
    found = [entry for entry in entries if entry.suffix.lower() in _VIDEOS or _holds_pictures(entry)]
    return sorted(found, key=lambda path: _natural(path.name))


def _holds_pictures(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in _PICTURES for path in folder.iterdir())


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    pieces = re.findall(r"([0-9]+)|([^0-9]+)", name)
    return tuple((0, int(digits), "") if digits else (1, 0, text) for digits, text in pieces)


def _by_order(folders: tuple[Path, Path], prompts: Path, n_prompts: int) -> list[Sequence[Path | None]]:
    clips = [clips_in(folder) for folder in folders]
    if any(len(side) != n_prompts for side in clips):
        raise InputError(
            f"{folders[0]} has {len(clips[0])} clips, {folders[1]} has {len(clips[1])}, and {prompts} has "
            f"{n_prompts} prompts; allowed: equally many, or --match number with the prompt's number in each "
            "name, or a table of prompts that names the clips"
        )
    return [list(side) for side in clips]


def _numbered(folder: Path) -> dict[int, Path]:
    numbered: dict[int, Path] = {}
    for path in clips_in(folder):
        digits = re.findall(r"[0-9]+", path.stem)
        if not digits:
            raise InputError(f"{path}: got a name without a number, allowed: the number of its prompt")
        number = int(digits[-1][:18])
        if number in numbered:
            raise InputError(
                f"{folder}: got {numbered[number].name} and {path.name}, both with the number {number}; "
                "allowed: each number once"
            )
        numbered[number] = path
    return numbered


def _starts(folders: tuple[Path, Path], clips: Sequence[Mapping[int, Path]], n_prompts: int) -> list[int]:
    """The number of the first prompt in each folder, 0 or 1.

    Raises:
        InputError: One folder has a clip 0, and the other may count from 0 or from 1.
    """
    starts = [0 if 0 in side else 1 for side in clips]
    if starts[0] != starts[1]:
        other = starts.index(1)
        if n_prompts not in clips[other]:
            raise InputError(
                f"{folders[1 - other]} has a clip 0 and {folders[other]} has none, and no clip {n_prompts} "
                "either, so that it may count from 0 or from 1; rename the clips so that both folders count "
                "from the same number, or give a table of prompts that names the clips"
            )
    return starts


def _by_number(folder: Path, numbered: Mapping[int, Path], start: int, n_prompts: int) -> list[Path | None]:
    beyond = [path.name for number, path in numbered.items() if number >= start + n_prompts]
    if beyond:
        raise InputError(f"{folder}: got {beyond[0]}, allowed: numbers of the {n_prompts} prompts")
    return [numbered.get(start + place) for place in range(n_prompts)]


def _names(row: Mapping[str, str]) -> tuple[str, str] | None:
    one = row.get("video", "")
    first, second = row.get("video_1", "") or one, row.get("video_2", "") or one
    return (first, second) if first and second else None


def _read_prompts(file: Path) -> list[dict[str, str]]:
    """The rows of a file of prompts, each with an id."""
    rows = list(_rows(file))
    if not rows:
        raise InputError(f"{file}: got no prompt, allowed: at least one")
    if len(rows) > MAX_PROMPTS:
        raise InputError(f"{file}: got {len(rows)} prompts, allowed: up to {MAX_PROMPTS}")
    width = max(3, len(str(len(rows))))
    for number, row in enumerate(rows, start=1):
        if not row.get("prompt", "").strip():
            raise InputError(f"{file}: got an empty prompt {number}, allowed: a text")
        row["id"] = row.get("id", "").strip() or f"{number:0{width}d}"
    ids = [row["id"] for row in rows]
    if (
        twice := next((name for name in ids if ids.count(name) > 1), None)
        if len(set(ids)) < len(ids)
        else None
    ):
        raise InputError(f"{file}: got the id {one_line(twice)} twice, allowed: each id once")
    return rows


def _rows(file: Path) -> Iterator[dict[str, str]]:
    kind = table_format(file)
    if kind == "csv":
        with opened(file) as descriptor, open(descriptor, "rb", closefd=False) as stream:
            for number, row in read_csv(stream):
                yield _texts(file, number, row)
    elif kind == "parquet":
        for number, row in read_parquet(file):
            yield _texts(file, number, row)
    else:
        lines = [(number, line) for number, line in read_lines(file, _MAX_LINE_BYTES)]
        while lines and not lines[-1][1].strip():
            lines.pop()
        for number, line in lines:
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
                if file.suffix.lower() in (".jsonl", ".json"):
                    yield _texts(file, number, json.loads(text))
                else:
                    yield {"prompt": text}
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
                raise InputError(f"{file}: line {number} is no UTF-8 text or no JSON object") from None


def _texts(file: Path, number: int, row: Any) -> dict[str, str]:
    if not isinstance(row, Mapping) or not set(row) <= set(_COLUMNS):
        got = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise InputError(f"{file}: row {number}: got {one_line(got)}, allowed: {', '.join(_COLUMNS)}")
    return {name: str(value) for name, value in row.items() if value is not None}
