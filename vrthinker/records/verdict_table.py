"""Verdicts as a table for other tools: a CSV or Parquet file with a row for each pair.

The results file itself is lines of JSON, because it is written pair by pair and survives a kill. The table is
made of it when it is complete.
Invariant: nothing but an older table of verdicts is ever replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vrthinker.bounded_files import opened
from vrthinker.data.tables import (
    check_table,
    read_csv,
    read_parquet,
    table_bytes,
    table_columns,
    table_format,
)
from vrthinker.episode.dimensions import Dimension
from vrthinker.errors import InputError, first_problem, one_line
from vrthinker.records.files import replace_file
from vrthinker.records.verdicts import VerdictRecord

_NEWER = ("probabilities", "probabilities_reason", "orders", "readers")
"""The fields of a record that version 0.1.0 did not have."""
_OTHERS = tuple(
    name for name in VerdictRecord.model_fields if name not in ("schema_version", "id", "judgment", *_NEWER)
)
_FIRST_COLUMNS = ("id", *(dimension.value for dimension in Dimension), *_OTHERS)
"""The columns of version 0.1.0."""
_PROBABILITIES = tuple(
    (f"{dimension.value}_p_{label}", dimension.value, label)
    for dimension in Dimension
    for label in ("video_1", "tie", "video_2")
)
_LAST = ("probabilities_reason", "consistent", "readers")
COLUMNS = (*_FIRST_COLUMNS, *(column for column, _, _ in _PROBABILITIES), *_LAST)
"""The columns: the id, the judgment (empty if there is none), the other fields of a record, the probabilities
of the labels (empty if they are not known), such as `OA_p_video_1`, whether both orders of the clips gave the
same overall judgment (empty unless both were judged), and the video readers that showed the two clips."""

_TEXTS = ("id", "stop_reason", "reason", "model", "probabilities_reason")


def check_verdict_table(name: str, path: Path, *others: Path) -> None:
    """Refuses a file for a table of verdicts before any work is done.

    Args:
        name: The name of the option, for the message.
        path: The file. An older table of verdicts may be there.
        others: Other files of the same command.

    Raises:
        InputError: The name has another ending, pyarrow is missing, or the file holds something else.
    """
    check_table(name, path)
    if path.resolve() in {other.resolve() for other in others}:
        raise InputError(f"{name}: got {path}, another file of this command; give a file of its own")
    if path.exists() and (not path.is_file() or path.stat().st_size):
        try:
            columns = table_columns(path)
        except InputError:
            columns = []
        if tuple(columns) not in (COLUMNS, _FIRST_COLUMNS):
            raise InputError(f"{name}: {path}: holds something else than verdicts; give another file")


def write_verdict_table(path: Path, records: Sequence[VerdictRecord]) -> None:
    """Writes a table of verdicts atomically.

    Raises:
        VRThinkerError: The file could not be written.
    """
    replace_file(path, table_bytes(path, [_row(record) for record in records], COLUMNS))


def read_verdict_table(path: Path) -> list[VerdictRecord]:
    """Reads a table of verdicts back, also one of version 0.1.0.

    A record has no `orders` then, because a table has only whether they agreed; the lines of JSON have them.

    Raises:
        InputError: The file cannot be read, is no table, or has a row that is not a verdict; the message
            names the row.
    """
    records = []
    for number, row in _rows(path):
        try:
            records.append(VerdictRecord.model_validate(_values(row, is_text=table_format(path) == "csv")))
        except (ValidationError, ValueError, KeyError) as error:
            problem = first_problem(error, "") if isinstance(error, ValidationError) else str(error)
            raise InputError(
                f"{path}: row {number} is no verdict ({one_line(problem)}); give a table that --table wrote"
            ) from None
    return records


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    check_table("verdicts", path)
    if table_format(path) == "parquet":
        yield from read_parquet(path)
        return
    with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as stream:
        yield from read_csv(stream)


def _values(row: dict[str, Any], *, is_text: bool) -> dict[str, Any]:
    """The fields of a record from a row. In CSV an empty cell is null, and numbers and lists are JSON."""
    if tuple(row) not in (COLUMNS, _FIRST_COLUMNS):
        raise ValueError(f"got the columns {', '.join(row)}, allowed: {', '.join(COLUMNS)}")
    values = dict(row)
    if is_text:
        for name, cell in row.items():
            if name not in _TEXTS:
                values[name] = json.loads(cell) if cell else None
            elif name in ("reason", "probabilities_reason"):
                values[name] = cell or None
    judgment = {dimension.value: values.pop(dimension.value) for dimension in Dimension}
    judged = any(value is not None for value in judgment.values())
    known: dict[str, dict[str, Any]] = {}
    for column, code, label in _PROBABILITIES:
        if (share := values.pop(column, None)) is not None:
            known.setdefault(code, {})[label] = share
    values.pop("consistent", None)
    return {
        **values,
        "judgment": judgment if judged else None,
        "probabilities": {dimension.value: known.get(dimension.value) for dimension in Dimension}
        if known
        else None,
        "readers": values.get("readers") or [],
    }


def _row(record: VerdictRecord) -> dict[str, Any]:
    values = record.model_dump(mode="json")
    judgment = values.pop("judgment") or {}
    known = values.pop("probabilities", None) or {}
    values.pop("orders", None)
    return {
        **values,
        **{dimension.value: judgment.get(dimension.value) for dimension in Dimension},
        **{column: (known.get(code) or {}).get(label) for column, code, label in _PROBABILITIES},
        "probabilities_reason": record.probabilities_reason,
        "consistent": record.consistent,
        "readers": record.readers,
    }
