"""The rows of an annotation file that somebody else wrote, and their fields, read strictly.

A file is a CSV or Parquet table, a JSON list of objects, or JSON lines; the ending of its name tells which.
Invariants: a field is either what its column should hold or a `BadField` that says what was got and what is
allowed; nothing is guessed. Numbers may be spelled as tools spell them (an id 7 or `7.0`, a label `1.0`,
counts of frames such as `126.0`), and `NaN`, which tools write for a missing text, is a missing text.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrthinker.bounded_files import opened, parse_json, read_file, read_lines
from vrthinker.data.tables import TableError, read_csv, read_parquet, table_format
from vrthinker.episode.prompts import MAX_CAPTION_CHARS
from vrthinker.errors import InputError, one_line
from vrthinker.limits import MAX_ANNOTATION_BYTES

MAX_LINE_BYTES = 1 << 20
"""The most bytes of a line of JSON."""
MAX_ID_CHARS = 512
_FETCH = "the path of a file: fetch the clips and name their folder (--videos)"
MAX_PATH_CHARS = 4096
DATASET = "vrthinker_dataset"
"""The field in which an export of this package keeps the dataset of a pair."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{1,20}:/{1,2}[^/]")
_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{0,15})?([eE][+-]?[0-9]{1,2})?")
_MISSING = frozenset({"", "nan", "none", "null", "<na>"})
"""What tools write in the place of a missing number or label, in lower case."""

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxdict, _repr.maxstring, _repr.maxother = 2, 2, 2, 60, 60


class BadField(Exception):
    """A field that is not what its column should hold.

    Attributes:
        field: The name of the column.
        got: What was got, in words.
        allowed: What is allowed.
    """

    def __init__(self, field: str, got: str, allowed: str) -> None:
        super().__init__(f"{field}: got {got}, allowed: {allowed}")
        self.field, self.got, self.allowed = field, got, allowed


class RowDropped(Exception):
    """A row that is readable and still gives no pair. Its message is the reason, equal for equal reasons."""


def shown(value: object) -> str:
    """The beginning of a value in words, as one printable line."""
    return one_line(_repr.repr(value))


@dataclass(frozen=True)
class Caption:
    """The text that both clips were made from.

    Attributes:
        text: The caption without blanks and line ends around it; empty if there is none.
        trimmed: Whether there were blanks or line ends around it.
        missing: Whether there is none, because the cell is empty, null or NaN.
    """

    text: str
    trimmed: bool = False
    missing: bool = False


@dataclass(frozen=True)
class Row:
    """One row of an annotation file.

    Attributes:
        number: The 1-based number: of the line in CSV and JSON lines, of the row in Parquet, of the item in a
            JSON list.
        values: The fields by name.
    """

    number: int
    values: Mapping[str, Any]

    def any_of(self, *names: str) -> str:
        """The first of these names that the row has.

        Raises:
            BadField: It has none of them.
        """
        found = next((name for name in names if name in self.values), None)
        if found is None:
            raise BadField(names[0], "nothing", f"a field {' or '.join(names)}")
        return found

    def caption(self, name: str) -> Caption:
        """The caption in a field.

        Raises:
            BadField: The field is missing from the row, is no text, or is too long.
        """
        if name not in self.values:
            raise BadField(name, "nothing", "a caption")
        value = self.values[name]
        if _is_nothing(value) or (isinstance(value, str) and is_missing_caption(value)):
            return Caption("", missing=True)
        text = _unicode(name, value, "a caption, valid Unicode text")
        stripped = text.strip()
        if len(stripped) > MAX_CAPTION_CHARS:
            raise BadField(name, f"{len(stripped)} characters", f"up to {MAX_CAPTION_CHARS}")
        return Caption(stripped, trimmed=stripped != text, missing=not stripped)

    def identity(self, name: str = "id") -> str | None:
        """The id in a field; None if the row has none. Whole numbers become texts.

        Raises:
            BadField: The field is neither a text nor a whole number, or is too long.
        """
        value = self.values.get(name)
        if _is_nothing(value):
            return None
        allowed = f"a text of up to {MAX_ID_CHARS} characters or a whole number"
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int:
            return str(value)
        text = _unicode(name, value, allowed).strip()
        if len(text) > MAX_ID_CHARS:
            raise BadField(name, f"{len(text)} characters", allowed)
        return text or None

    def dataset(self) -> str | None:
        """What an export of this package says about the pair's dataset.

        Returns:
            The name; empty if the pair has none; None if the row does not say it.
        """
        return None if DATASET not in self.values else self.identity(DATASET) or ""

    def path(self, name: str) -> str:
        """The path of a clip in a field, without `./` and blanks around it.

        Raises:
            BadField: The field is missing, no path, or a URL.
        """
        return checked_path(name, self.values.get(name))

    def paths(self, name: str) -> tuple[str, ...]:
        """The list of paths in a field; a table may spell it as JSON.

        Raises:
            BadField: The field is no list of paths, or one of them is a URL.
        """
        value = self.values.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = parse_json(value, name)
            except InputError:
                raise BadField(name, shown(value), "a list of paths") from None
        if not isinstance(value, list):
            raise BadField(name, shown(value), "a list of paths")
        return tuple(checked_path(f"{name}[{index}]", item) for index, item in enumerate(value))

    def number_of(self, name: str) -> float | None:
        """The finite number in a field, also if it is spelled as a text; None if the field is empty.

        Raises:
            BadField: The field is missing from the row, or no finite number.
        """
        if name not in self.values:
            raise BadField(name, "nothing", "a number")
        value = self.values[name]
        if _is_missing(value):
            return None
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadField(name, shown(value), "a finite number, or nothing")
        return float(value)

    def whole(self, name: str) -> int:
        """The whole number from 0 on in a field.

        Raises:
            BadField: The field holds something else.
        """
        number = self.number_of(name)
        if number is None or not number.is_integer() or not 0 <= number < 1 << 53:
            raise BadField(name, shown(self.values[name]), "a whole number from 0 on")
        return int(number)

    def choice(self, name: str, choices: Mapping[str, int | None], allowed: str) -> int | None:
        """The label that a field's word stands for. Case and blanks around it do not matter.

        Args:
            name: The name of the field.
            choices: Word in lower case -> label; None as a label means that there is none.
            allowed: The words that are allowed, for the message.

        Raises:
            BadField: The field is missing from the row, or holds another word.
        """
        if name not in self.values:
            raise BadField(name, "nothing", allowed)
        value = self.values[name]
        if _is_missing(value):
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int:
            value = str(value)
        word = " ".join(value.split()).lower() if isinstance(value, str) else None
        if word is not None and re.fullmatch(r"[0-9]\.0*", word):
            word = word[0]
        if word is None or word not in choices:
            raise BadField(name, shown(self.values[name]), allowed)
        return choices[word]


def is_missing_caption(text: str) -> bool:
    """Whether a text is what tools write in the place of a missing caption."""
    return text.strip().lower() == "nan"


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_missing(value: object) -> bool:
    """Whether a number or a label is missing."""
    return _is_nothing(value) or (isinstance(value, str) and value.strip().lower() in _MISSING)


def _unicode(name: str, value: object, allowed: str) -> str:
    if not isinstance(value, str):
        raise BadField(name, shown(value), allowed)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadField(name, shown(value), allowed) from None
    return value


def checked_path(name: str, value: object) -> str:
    """A path as a set spells it, without `./` and blanks around it.

    Raises:
        BadField: It is no path, or a URL.
    """
    allowed = f"the path of a file, up to {MAX_PATH_CHARS} characters"
    text = _unicode(name, value, allowed).strip()
    if _URL.match(text):
        raise BadField(name, f"the URL {shown(text)}", _FETCH)
    if not text or "\0" in text or len(text) > MAX_PATH_CHARS:
        raise BadField(name, shown(value), allowed)
    return str(Path(text))


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of an annotation file, in order.

    Args:
        path: The file: .csv, .parquet, .jsonl, or anything else for a JSON list of objects.
        columns: The columns to read of a Parquet file; those that it lacks are left out. None reads all.

    Raises:
        InputError: The file cannot be read; the message names the file and, if it is known, the line.
    """
    kind = table_format(path)
    try:
        if kind == "csv":
            with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as stream:
                yield from (Row(number, values) for number, values in read_csv(stream))
        elif kind == "parquet":
            yield from (Row(number, values) for number, values in read_parquet(path, columns))
        elif path.suffix.lower() == ".jsonl":
            yield from _json_lines(path)
        else:
            yield from _json_list(path)
    except TableError as error:
        place = "" if error.number is None else f"{'line' if kind == 'csv' else 'row'} {error.number}: "
        raise InputError(f"{path}: {place}{error}") from None


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in read_lines(path, MAX_LINE_BYTES):
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if content.strip():
            yield _object(number, parse_json(content, f"{path}: line {number}", allow_nan=True), path, "line")


def _json_list(path: Path) -> Iterator[Row]:
    content = read_file(path, MAX_ANNOTATION_BYTES).removeprefix(b"\xef\xbb\xbf")
    try:
        items = parse_json(content, str(path), allow_nan=True)
    except InputError as error:
        raise InputError(f"{error}; a file of JSON lines has to be named .jsonl") from None
    if not isinstance(items, list):
        raise InputError(
            f"{path}: got {shown(items)}, allowed: a JSON list of objects (or .jsonl, .csv, .parquet)"
        )
    for number, item in enumerate(items, start=1):
        yield _object(number, item, path, "item")


def _object(number: int, value: object, path: Path, unit: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{path}: {unit} {number}: got {shown(value)}, allowed: a JSON object")
    return Row(number, value)


def unit_of(path: Path) -> str:
    """What a row's number counts in this file."""
    kind = table_format(path)
    if kind == "parquet":
        return "row"
    return "line" if kind == "csv" or path.suffix.lower() == ".jsonl" else "item"


def json_line(value: object) -> str:
    """A value as one line of JSON, with its newline."""
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": ")) + "\n"
