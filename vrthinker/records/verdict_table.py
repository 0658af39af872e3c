"""Verdicts as a table for other tools: a CSV or Parquet file with a row for each pair.

The results file itself is lines of JSON, because it is written pair by pair and survives a kill. The table is
made of it when it is complete.
Invariant: nothing but an older table of verdicts is ever replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vrthinker.data.tables import check_table, table_bytes, table_columns
from vrthinker.episode.dimensions import Dimension
from vrthinker.errors import InputError
from vrthinker.records.files import replace_file
from vrthinker.records.verdicts import VerdictRecord

_OTHERS = tuple(
    name
    for name in VerdictRecord.model_fields
    if name not in ("schema_version", "id", "judgment", "probabilities", "probabilities_reason", "orders")
)
_FIRST_COLUMNS = ("id", *(dimension.value for dimension in Dimension), *_OTHERS)
"""The columns of version 0.1.0."""
_PROBABILITIES = tuple(
    (f"{dimension.value}_p_{label}", dimension.value, label)
    for dimension in Dimension
    for label in ("video_1", "tie", "video_2")
)
_LAST = ("probabilities_reason", "consistent")
COLUMNS = (*_FIRST_COLUMNS, *(column for column, _, _ in _PROBABILITIES), *_LAST)
"""The columns: the id, the judgment (empty if there is none), the other fields of a record, the probabilities
of the labels (empty if they are not known), such as `OA_p_video_1`, and whether both orders of the clips gave
the same overall judgment (empty unless both were judged)."""


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
    }
