"""The pairs file: the pairs to judge, one JSON object a line, or a table.

A line is `{"id", "prompt", "video_1", "video_2", "labels": {"TA", "VQ", "MQ", "OA"}?, "dataset"?}` in UTF-8.
A table (a file that ends in .csv or .parquet, `tables.py`) has a row for each pair and the same names as
columns, with a column for each label: `id, prompt, video_1, video_2, TA?, VQ?, MQ?, OA?, dataset?`. In it,
an empty cell is no label, and numbers may be spelled as tools spell them (an id 7, a label 1.0).
The videos' paths are relative to the file's folder.

Invariant: a file is read as a whole or refused as a whole. All problems in it are counted and the first few
are named (line, field, what was got, what is allowed), so that a user can mend the file after one run.
Whether the videos exist is not checked here: a clip that cannot be read is a failed item when it is judged.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from vrthinker.data.tables import (
    TableError,
    check_table,
    read_csv,
    read_parquet,
    table_bytes,
    table_format,
)
from vrthinker.episode.dimensions import DATASETS, Dimension, Preference
from vrthinker.errors import InputError, one_line

MAX_LINE_BYTES = 1 << 20
"""The most bytes of a line. A longer line is refused without being read to its end."""

SHOWN_PROBLEMS = 5
"""The number of problems of a file that are described. The others are only counted."""

_MAX_DIGITS = 40
_ALLOWED = {
    "id": "a non-empty string of valid Unicode",
    "prompt": "a string of valid Unicode",
    "video_1": "a path, a non-empty string",
    "video_2": "a path, a non-empty string",
    "labels": "an object with keys among TA, VQ, MQ, OA, or null",
    "dataset": f"{', '.join(sorted(DATASETS))} or null",
}
_COLUMNS = ("id", "prompt", "video_1", "video_2", *Dimension, "dataset")
_CODES = frozenset(code.value for code in Dimension)
_ALLOWED_CODES = ", ".join(Dimension)
_ALLOWED_LABEL = "0 (tie), 1 (video 1 is better), 2 (video 2 is better) or null"

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxdict, _repr.maxstring, _repr.maxother = 2, 2, 2, 60, 60


def _is_code(value: str) -> str:
    if value not in _CODES:
        raise ValueError(f"got {value!r}, allowed: {_ALLOWED_CODES}")
    return value


def _is_unicode(value: str) -> str:
    """Refuses lone surrogates, which JSON can spell, but which files and terminals cannot hold."""
    value.encode("utf-8")  # UnicodeEncodeError is a ValueError
    return value


DimensionLabels = dict[Annotated[str, AfterValidator(_is_code)], Annotated[int, Field(ge=0, le=2)]]
"""Dimension code -> 0 (tie), 1 (video 1 is better) or 2 (video 2 is better)."""

Text = Annotated[str, AfterValidator(_is_unicode)]


def _without_nulls(value: object) -> object:
    """Removes null labels, which count as absent."""
    if isinstance(value, Mapping):
        return {key: label for key, label in value.items() if label is not None} or None
    return value


class Pair(BaseModel):
    """One item: a caption, two videos made from it, and the preferences of people, if they are known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Text
    """The id of the pair, unique in its file."""
    prompt: Text
    """The caption that both videos were made from."""
    video_1: Path
    video_2: Path
    labels: Annotated[DimensionLabels | None, BeforeValidator(_without_nulls)] = None
    """What people preferred, for the dimensions that are known."""
    dataset: str | None = None
    """The dataset that the pair comes from, which decides how the prompt names the dimensions."""

    def swapped(self) -> Pair:
        """The pair with its clips in the other order, and the labels turned with them."""
        labels = self.labels and {c: int(Preference(v).swapped()) for c, v in self.labels.items()}
        return self.model_copy(update={"video_1": self.video_2, "video_2": self.video_1, "labels": labels})

    @field_validator("id")
    @classmethod
    def _id_is_not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("blank")
        return value

    @field_validator("dataset")
    @classmethod
    def _dataset_is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in DATASETS:
            raise ValueError("unknown")
        return value

    @field_validator("video_1", "video_2", mode="before")
    @classmethod
    def _resolve(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str):
            if not _is_unicode(value).strip() or "\0" in value:
                raise ValueError("no path")
            return Path((info.context or {}).get("folder", ""), value)
        return value


def load_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Reads a pairs file, in the order of its lines.

    Blank lines, a byte order mark and CRLF line ends are tolerated.

    Args:
        path: The file. Relative video paths in it start from its folder; the result has absolute paths.

    Raises:
        InputError: The file cannot be read, has no pair, or has lines that are not pairs. The message is one
            line with the first problems and the number of all.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"pairs: got {type(path).__name__}, allowed: the path of a file")
    file = Path(path)
    folder = file.absolute().parent
    problems = _Problems("row" if table_format(file) == "parquet" else "line")
    pairs: list[Pair] = []
    first_numbers: dict[str, int] = {}
    for number, value in _objects(file, problems):
        pair = _validated(value, folder, number, problems)
        if pair is None:
            continue
        first = first_numbers.setdefault(pair.id, number)
        if first != number:
            where = f"(first on {problems.unit} {first})"
            problems.add(number, "id", f"{_repr.repr(pair.id)} again {where}", "each id once")
            continue
        pairs.append(pair)
    if problems.count:
        raise InputError(f"{file}: {problems.text()}")
    if not pairs:
        one = "one line, a JSON object" if table_format(file) is None else "one row below the header"
        raise InputError(f"{file}: got no pairs, allowed: at least {one}")
    return pairs


def written_path(clip: Path, folder: Path) -> str:
    """The path of a clip in a file of this folder: relative if the clip lies below it, otherwise absolute.

    Raises:
        InputError: The path has bytes that are no UTF-8, which a file of text cannot hold.
    """
    path, base = Path(os.path.abspath(clip)), Path(os.path.abspath(folder))
    written = str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
    try:
        return _is_unicode(written)
    except UnicodeEncodeError:
        raise InputError(
            f"{one_line(written)}: got a path with bytes that are no UTF-8, allowed: names in UTF-8; rename "
            "the file or its folder, or write to the folder that holds it"
        ) from None


def dump_pair(pair: Pair, folder: Path) -> str:
    """A pair as a line of a pairs file in a folder, with its newline. Reading it gives the same pair."""
    value: dict[str, Any] = {"id": pair.id, "prompt": pair.prompt}
    value |= {name: written_path(getattr(pair, name), folder) for name in ("video_1", "video_2")}
    value |= {} if pair.labels is None else {"labels": pair.labels}
    value |= {} if pair.dataset is None else {"dataset": pair.dataset}
    return json.dumps(value, ensure_ascii=False) + "\n"


def save_pairs(path: str | os.PathLike[str], pairs: Sequence[Pair]) -> None:
    """Writes a pairs file, which `load_pairs` reads back: a table if the name ends in .csv or .parquet.

    The file is either complete, or unchanged. Clips below its folder get relative paths, others absolute
    ones.

    Raises:
        InputError: Parquet cannot be written here, or a clip's path is no UTF-8.
        OSError: The file cannot be written.
    """
    file = Path(path)
    folder = Path(os.path.abspath(file.parent))
    kind = table_format(file)
    if kind is None:
        content = "".join(dump_pair(pair, folder) for pair in pairs).encode()
    else:
        check_table("pairs", file)
        rows = [
            {
                "id": pair.id,
                "prompt": pair.prompt,
                "video_1": written_path(pair.video_1, folder),
                "video_2": written_path(pair.video_2, folder),
                **{code.value: (pair.labels or {}).get(code.value) for code in Dimension},
                "dataset": pair.dataset,
            }
            for pair in pairs
        ]
        content = table_bytes(file, rows, [str(column) for column in _COLUMNS])
    spare = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        spare.write_bytes(content)
        spare.replace(file)
    finally:
        spare.unlink(missing_ok=True)


def missing_clips(pairs: Sequence[Pair]) -> list[Path]:
    """The clips of pairs that are not there, each once, in the order of the pairs."""
    clips = dict.fromkeys(clip for pair in pairs for clip in (pair.video_1, pair.video_2))
    return [clip for clip in clips if not os.path.exists(clip)]


@dataclass
class _Problems:
    """Counts the problems of a file and keeps the first few descriptions."""

    unit: str
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, number: int | None, where: str | None, got: str, allowed: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN_PROBLEMS:
            line = None if number is None else f"{self.unit} {number}"
            place = ", ".join(filter(None, (line, where)))
            self.first.append(f"{place}{': ' if place else ''}got {got}, allowed: {allowed}")

    def text(self) -> str:
        if self.count == 1:
            return self.first[0]
        more = f"; and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return f"{self.count} problems: " + "; ".join(self.first) + more


def _objects(file: Path, problems: _Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (1-based line or row number, the fields of a pair) for every line or row that has some."""
    kind = table_format(file)
    if kind is None:
        with _opened(file) as stream:
            for number, line in _lines(stream, problems):
                value = _parse(line, number, problems)
                if value is not None:
                    yield number, value
        return
    try:
        if kind == "parquet":
            yield from _from_rows(read_parquet(file))
        else:
            with _opened(file) as stream:
                yield from _from_rows(read_csv(stream))
    except TableError as error:
        problems.add(error.number, None, error.got, error.allowed)


def _from_rows(rows: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    checked = False
    for number, row in rows:
        if not checked:
            for name in row:
                if name not in _COLUMNS:
                    raise TableError(None, f"the unknown column {_repr.repr(name)}", ", ".join(_COLUMNS))
            checked = True
        yield number, _from_row(row)


def _from_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a pair from a row of a table."""
    value: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    for name, cell in row.items():
        if name in tuple(Dimension):
            if cell not in (None, ""):
                labels[name] = _label(cell)
        elif name == "dataset":
            value[name] = cell or None
        else:
            value[name] = str(cell) if name == "id" and type(cell) is int else cell
    return {**value, "labels": labels}


def _label(cell: object) -> object:
    """A label as a number, if it is spelled as one; otherwise as it is, to be refused."""
    if isinstance(cell, str) and re.fullmatch(r"[0-9](\.0*)?", cell.strip()):
        return int(cell.strip()[0])
    return int(cell) if isinstance(cell, float) and cell.is_integer() else cell


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The file, opened for reading.

    Raises:
        InputError: The file cannot be opened or read, or is a folder, a device or a socket.
    """
    wanted = "a file of JSON lines, or a .csv or .parquet table"
    try:
        # A device may never end, but a pipe (`--pairs /dev/stdin`) does.
        mode = file.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or socket"
            raise InputError(f"{file}: got {kind}, allowed: {wanted}")
        # Without waiting: a pipe with a name may never have a writer, and then it is empty.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(descriptor, True)
        with open(descriptor, "rb") as stream:
            yield stream
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise InputError(f"{file}: cannot be read ({reason}); give {wanted}") from None


def _lines(stream: IO[bytes], problems: _Problems) -> Iterator[tuple[int, bytes]]:
    """Yields (1-based line number, line without its end) for every line that is not blank."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            allowed = f"at most {MAX_LINE_BYTES} bytes (the rest of the file was not read)"
            problems.add(number, None, f"more than {MAX_LINE_BYTES} bytes", allowed)
            return
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line.rstrip(b"\r\n")


class _NotJson(ValueError):
    """JSON that Python's reader accepts, but a pairs file does not."""


def _refuse_constant(name: str) -> object:
    raise _NotJson(f"{name}, which is not JSON")


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _NotJson(f"a number of {len(digits)} digits")
    return int(digits)


def _printable(key: str) -> None:
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        raise _NotJson(f"the key {_repr.repr(key)}, which is not Unicode text") from None


def _distinct_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in items:
        _printable(key)
        if key in values:
            raise _NotJson(f"the key {_repr.repr(key)} twice in one object")
        values[key] = value
    return values


def _parse(line: bytes, number: int, problems: _Problems) -> dict[str, Any] | None:
    """Reads one line of JSON, or adds its problem to `problems`."""
    allowed = "one JSON object"
    try:
        text = line.decode("utf-8")
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            object_pairs_hook=_distinct_keys,
        )
        if isinstance(value, dict):
            return value
        problems.add(number, None, _repr.repr(value), allowed)
    except UnicodeDecodeError as error:
        got = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        problems.add(number, None, got, "UTF-8 text")
    except json.JSONDecodeError as error:
        problems.add(number, None, f"no JSON ({error.msg} at column {error.colno})", allowed)
    except RecursionError:
        problems.add(number, None, "JSON nested too deeply", allowed)
    except _NotJson as error:
        problems.add(number, None, str(error), allowed)
    return None


def _validated(value: dict[str, Any], folder: Path, number: int, problems: _Problems) -> Pair | None:
    """Makes a pair of its fields, or adds their problems to `problems`."""
    try:
        return Pair.model_validate(value, context={"folder": folder})
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False):
            _explain(detail["type"], detail["loc"], detail["input"], number, problems)
    return None


def _explain(kind: str, loc: tuple[int | str, ...], got: object, number: int, problems: _Problems) -> None:
    """Describes one of pydantic's errors in the terms of a pairs file."""
    name = str(loc[0])
    if kind == "extra_forbidden":
        problems.add(number, None, f"the unknown key {_repr.repr(name)}", ", ".join(_ALLOWED))
    elif loc[-1] == "[key]":
        problems.add(number, name, f"the unknown key {_repr.repr(loc[1])}", _ALLOWED_CODES)
    elif len(loc) > 1:
        if loc[1] in tuple(Dimension):  # an unknown key is reported separately
            problems.add(number, f"{name}.{loc[1]}", _repr.repr(got), _ALLOWED_LABEL)
    else:
        problems.add(number, name, "nothing" if kind == "missing" else _repr.repr(got), _ALLOWED[name])
