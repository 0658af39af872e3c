"""Tables of rows in CSV and Parquet files, which the ending of the file's name tells apart.

CSV is UTF-8 with a header; its cells are texts, and lists are written as JSON. Parquet keeps types and needs
pyarrow (the train extra).
Invariant: a table of bounded size is read whatever it holds, or refused with a line.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from vrthinker.bounded_files import opened
from vrthinker.errors import InputError, one_line

TableFormat = Literal["csv", "parquet"]
MAX_LINE_BYTES = 1 << 20
"""The most bytes of a line of a CSV file."""
MAX_PARQUET_BYTES = 1 << 30
"""The most bytes of a Parquet file, and of what it says to hold when unpacked."""
_BATCH_ROWS = 1024


class TableError(InputError):
    """A table cannot be read on.

    Attributes:
        number: The 1-based line of a CSV file; None for a file as a whole.
        got: What was got.
        allowed: What is allowed.
    """

    def __init__(self, number: int | None, got: str, allowed: str) -> None:
        super().__init__(f"got {got}, allowed: {allowed}")
        self.number, self.got, self.allowed = number, got, allowed


def table_format(path: str | os.PathLike[str]) -> TableFormat | None:
    """The format that a name's ending tells; None for other files."""
    endings: dict[str, TableFormat] = {".csv": "csv", ".parquet": "parquet"}
    return endings.get(Path(path).suffix.lower())


def check_table(name: str, path: Path) -> None:
    """Refuses a file for a table that has another ending, or whose format cannot be written here.

    Args:
        name: The name of the option, for the message.
        path: The file.

    Raises:
        InputError: The ending is another one, or pyarrow is not installed.
    """
    kind = table_format(path)
    if kind is None:
        raise InputError(f"{name}: got {path.name}, allowed: a file that ends in .csv or .parquet")
    if kind == "parquet":
        _need_pyarrow(f"{name}: {path.name}")


def refuse_table_ending(name: str, path: Path) -> None:
    """Refuses the name of a table for a file of JSON lines.

    Args:
        name: The name of the option, for the message.
        path: The file.

    Raises:
        InputError: The name ends like a table's.
    """
    if path.suffix.lower() in (".csv", ".tsv", ".xlsx", ".parquet"):
        raise InputError(
            f"{name}: got {path.name}, allowed: a file of JSON lines, like {path.stem or 'rows'}.jsonl"
        )


def read_csv(stream: IO[bytes]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file, each with the number of its first line. Blank lines are skipped.

    Raises:
        TableError: A line is too long, is not UTF-8, or is no CSV; a column's name is there twice; or a row
            has another number of cells than the header.
    """
    reader = csv.reader(_decoded(stream), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise TableError(number, f"no CSV ({error})", "comma-separated cells") from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if twice := next((cell for cell in header if header.count(cell) > 1), None):
                raise TableError(number, f"the column {twice[:60]!r} twice", "each column once")
            continue
        if len(cells) != len(header):
            raise TableError(number, f"{len(cells)} cells", f"{len(header)}, as in the header")
        yield number, dict(zip(header, cells, strict=True))


def _decoded(stream: IO[bytes]) -> Iterator[str]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise TableError(number, f"more than {MAX_LINE_BYTES} bytes", "shorter lines")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            got = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
            raise TableError(number, got, "UTF-8 text") from None


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file, each with its 1-based number.

    Args:
        path: The file.
        columns: The columns to read, as far as the file has them; None reads all.

    Raises:
        TableError: The file is no Parquet, or is too large.
        InputError: pyarrow is not installed, or the file cannot be read.
    """
    _need_pyarrow(path.name)
    number = 0
    with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as stream, _parquet_errors():
        _check_size(os.fstat(descriptor).st_size)
        file = _parquet().ParquetFile(stream)
        groups = range(file.metadata.num_row_groups)
        _check_size(sum(file.metadata.row_group(group).total_byte_size for group in groups))
        # A text that many rows share is stored once, and would be read once for each of them.
        texts = [field.name for field in file.schema_arrow if str(field.type) in _TEXTS]
        file = _parquet().ParquetFile(stream, read_dictionary=texts)
        total = 0
        present = file.schema_arrow.names
        chosen = None if columns is None else [name for name in columns if name in present]
        for batch in file.iter_batches(_BATCH_ROWS, columns=chosen):
            for place in range(len(batch)):
                (row,) = batch.slice(place, 1).to_pylist()
                number += 1
                size = sum(len(value) for value in row.values() if isinstance(value, str | bytes))
                if size > MAX_LINE_BYTES:
                    raise TableError(number, f"{size} characters", f"up to {MAX_LINE_BYTES}")
                total += size
                _check_size(total)
                yield number, row


@contextlib.contextmanager
def _parquet_errors() -> Iterator[None]:
    """Turns what pyarrow raises into a `TableError`."""
    try:
        yield
    except (_pyarrow().ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise TableError(None, f"no Parquet ({_first_line(error)})", "a Parquet table") from None


_TEXTS = ("string", "large_string", "binary", "large_binary")


def _check_size(size: int) -> None:
    if not 0 <= size <= MAX_PARQUET_BYTES:
        raise TableError(None, f"{size} bytes", f"up to {MAX_PARQUET_BYTES}, packed and unpacked")


def table_columns(path: Path) -> list[str]:
    """The names of the columns of a table.

    Raises:
        InputError: The file cannot be read, or is no table.
    """
    if table_format(path) == "parquet":
        _need_pyarrow(path.name)
        with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as stream, _parquet_errors():
            return list(_parquet().ParquetFile(stream).schema_arrow.names)
    with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as stream:
        try:
            return next(csv.reader(_decoded(stream), strict=True), [])
        except csv.Error as error:
            raise TableError(1, f"no CSV ({error})", "comma-separated cells") from None


def table_bytes(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """A table as the content of a file.

    Args:
        path: The file that it is for: its ending says the format (`check_table`).
        rows: The rows. A cell is text, a number, a truth value, None or a list of text or numbers.
        columns: The names of the columns, in order.
    """
    if table_format(path) == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row[column]) for column in columns] for row in rows)
        return text.getvalue().encode("utf-8", "backslashreplace")
    table = _pyarrow().table({column: [row[column] for row in rows] for column in columns})
    buffer = io.BytesIO()
    _parquet().write_table(table, buffer)
    return buffer.getvalue()


def parquet_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows with nested lists and objects as the content of a Parquet file. All rows have the same fields.

    Raises:
        InputError: pyarrow is not installed.
    """
    _need_pyarrow("Parquet")
    buffer = io.BytesIO()
    _parquet().write_table(_pyarrow().Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple) else value


def _pyarrow() -> Any:
    return importlib.import_module("pyarrow")


def _parquet() -> Any:
    return importlib.import_module("pyarrow.parquet")


def _need_pyarrow(what: str) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            f"{what}: Parquet needs pyarrow, which is not installed: pip install 'vrthinker[train]'"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[0])
