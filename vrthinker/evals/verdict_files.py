"""Anybody's verdicts, read from a CSV or JSONL file, to be scored like those of this package.

A row has an `id` and a verdict: columns `TA`, `VQ`, `MQ`, `OA` (or `overall`, or `verdict`) with words, an
object `judgment` as in this package's own results, or two scores `score_1`, `score_2` (or `TA_1`, `TA_2`,
...) of a scalar scorer. Other columns are passed over.

Invariants:

- A cell is read as a whole. A text that merely mentions "Video 1" is no verdict.
- What cannot be read is a row with a reason, which stays in the denominator as a wrong one. It is never a tie
  and never dropped.
- An id that is there twice is refused: nobody can know which of the two counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vrthinker.bounded_files import opened, parse_json, read_lines
from vrthinker.data.datasets.rows import shown
from vrthinker.data.tables import TableError, read_csv
from vrthinker.episode.dimensions import Dimension
from vrthinker.episode.trajectory import WRITTEN_STOPS
from vrthinker.errors import InputError, one_line
from vrthinker.records.eval_items import ItemStatus

MAX_LINE_BYTES = 16 << 20
_OVERALL = ("OA", "overall", "verdict")
_VERDICTS = (*(code.value for code in Dimension), "overall", "verdict", "judgment")
_SCORES = ("score", *(code.value for code in Dimension))
_WRITTEN = frozenset(reason.value for reason in WRITTEN_STOPS)
_TIE = (
    *("0", "tie", "tied", "same", "equal", "tievote", "bothbad_vote"),
    *("a=b", "a=b=good", "a=b=bad", "both good", "both bad"),
)
_FIRST = (
    *("1", "video 1", "video1", "video_1", "video 1 better", "video 1 is better"),
    *("first", "left", "leftvote", "a", "a>b"),
)
_SECOND = (
    *("2", "video 2", "video2", "video_2", "video 2 better", "video 2 is better"),
    *("second", "right", "rightvote", "b", "b>a"),
)
WORDS: Mapping[str, int] = {
    word: label for label, words in enumerate((_TIE, _FIRST, _SECOND)) for word in words
}
"""A word, in lower case -> what it says: 0 tie, 1 video 1 is better, 2 video 2 is better."""


@dataclass(frozen=True)
class Answer:
    """What a judge says about an item.

    Attributes:
        judgment: Dimension code -> 0, 1 or 2, for the dimensions that can be read.
        scores: Dimension code -> the score of video 1 minus that of video 2.
        status: What became of the item.
        reason: What cannot be read, or why there is no verdict; None if all is well.
        confidence: The stated confidence, 1 to 3, or None.
    """

    judgment: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    status: ItemStatus = ItemStatus.JUDGED
    reason: str | None = None
    confidence: int | None = None


def read_answers(path: Path) -> dict[str, Answer]:
    """Reads a file of verdicts: id -> answer, in the order of the file.

    Raises:
        InputError: The file cannot be read, has no verdict, no id in a row, or an id twice.
    """
    answers: dict[str, Answer] = {}
    lines: dict[str, int] = {}
    columns: set[str] = set()
    for number, row in _rows(path):
        columns |= row.keys()
        name = _identity(path, number, row)
        if name in lines:
            raise InputError(
                f"{path}: line {number}: got the id {shown(name)} again (first on line {lines[name]}), "
                "allowed: each id once; remove the row that does not count"
            )
        lines[name] = number
        answers[name] = _answer(row)
    if not answers:
        raise InputError(f"{path}: got no row, allowed: at least one verdict")
    if not columns & {*_VERDICTS, *(f"{name}_1" for name in _SCORES)}:
        raise InputError(
            f"{path}: got the columns {', '.join(sorted(map(one_line, columns)))[:200]}, wanted one of "
            f"{', '.join(_VERDICTS)}, or score_1 and score_2"
        )
    return answers


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix.lower() == ".csv":
        try:
            with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as stream:
                yield from read_csv(stream)
        except TableError as error:
            place = "" if error.number is None else f"line {error.number}: "
            raise InputError(f"{path}: {place}{error}") from None
        return
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        raise InputError(f"{path}: got {shown(path.suffix)}, allowed: a file that ends in .csv or .jsonl")
    for number, line in read_lines(path, MAX_LINE_BYTES):
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if content.strip():
            row = parse_json(content, f"{path}: line {number}", allow_nan=True)
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number}: got {shown(row)}, allowed: a JSON object a line")
            yield number, row


def _identity(path: Path, number: int, row: Mapping[str, Any]) -> str:
    value = row.get("id")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{path}: line {number}: id: got {shown(value)}, allowed: the id of a pair")
    return value.strip()


def _answer(row: Mapping[str, Any]) -> Answer:
    cells: dict[str, Any] = {code.value: row[code.value] for code in Dimension if code.value in row}
    for name in _OVERALL[1:]:
        if name in row:
            cells.setdefault("OA", row[name])
    inner = row.get("judgment")
    problems = []
    if isinstance(inner, Mapping):
        cells |= {code.value: inner[code.value] for code in Dimension if code.value in inner}
    elif inner is not None:
        problems.append(f"judgment: got {shown(inner)}, which is no object of verdicts")
    judgment: dict[str, int] = {}
    for code, cell in cells.items():
        label = _label(cell)
        if label is not None:
            judgment[code] = label
        elif not _is_empty(cell):
            problems.append(f"{code}: got {shown(cell)}, which is no verdict")
    scores = {}
    for name in _SCORES:
        if f"{name}_1" in row or f"{name}_2" in row:
            difference = _difference(row.get(f"{name}_1"), row.get(f"{name}_2"))
            if difference is None:
                pair = f"{shown(row.get(f'{name}_1'))} and {shown(row.get(f'{name}_2'))}"
                problems.append(f"{name}_1, {name}_2: got {pair}, which are no scores")
            else:
                scores["OA" if name == "score" else name] = difference
    confidence = row.get("confidence")
    reason = "; ".join(problems) or None
    if judgment or scores:
        level = _number(confidence)
        stated = int(level) if level in (1, 2, 3) else None
        return Answer(judgment, scores, ItemStatus.JUDGED, reason, stated)
    given = row.get("reason")
    said = str(given).strip() if given is not None else ""
    stop = row.get("stop_reason")
    by_error = isinstance(stop, str) and stop.strip() != "" and stop not in _WRITTEN
    status = ItemStatus.FAILED if by_error else ItemStatus.UNPARSED
    why = (
        "; ".join(filter(None, (str(stop) if stop else "", said, reason or ""))) or "the row says no verdict"
    )
    return Answer(status=status, reason=why)


def _label(cell: object) -> int | None:
    """The verdict that a cell says; None if it says none."""
    if isinstance(cell, bool):
        return None
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, int):
        return cell if cell in (0, 1, 2) else None
    if not isinstance(cell, str):
        return None
    word = " ".join(cell.split()).lower().removesuffix(".")
    return WORDS.get(word[0] if re.fullmatch(r"[0-9]\.0+", word) else word)


def _is_empty(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _difference(first: object, second: object) -> float | None:
    numbers = [_number(first), _number(second)]
    if numbers[0] is None or numbers[1] is None:
        return None
    difference = numbers[0] - numbers[1]
    return difference if math.isfinite(difference) else None


def _number(cell: object) -> float | None:
    if isinstance(cell, str):
        try:
            cell = float(cell)
        except ValueError:
            return None
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return None
    try:
        number = float(cell)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
