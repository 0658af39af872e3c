"""A line of `verdicts.jsonl`: the versioned record of one judged pair.

Invariant: a record has either a judgment or the reason why it has none. A line that is not a record is an
error that names it; it is never skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vrthinker.bounded_files import read_lines
from vrthinker.data.pairs import DimensionLabels, Text
from vrthinker.episode.dimensions import Dimension
from vrthinker.episode.probabilities import Probabilities
from vrthinker.errors import InputError, first_problem

MAX_LINE_BYTES = 16 << 20
"""The most bytes of a line. A longer line is refused without being read to its end."""

_READ_BYTES = 1 << 20


def _writable(value: object) -> object:
    """Replaces lone surrogates by escapes, because a reason may quote a file name that is not Unicode."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


Remark = Annotated[str, BeforeValidator(_writable)]
Count = Annotated[int, Field(ge=0)]


class OrderRecord(BaseModel):
    """What one order of the clips gave, turned back to the pair's own order."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    judgment: DimensionLabels | None
    probabilities: Probabilities | None = None


class VerdictRecord(BaseModel):
    """One judged pair. If `judgment` is null, `reason` says why, and only then."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1
    id: Text
    judgment: DimensionLabels | None
    """The judgment of all four dimensions: 0 tie, 1 video 1 is better, 2 video 2 is better."""
    confidence: Annotated[int, Field(ge=1, le=3)] | None
    """The confidence: 1 high, 2 middle, 3 low; null if the model did not state it."""
    rounds: Count
    tool_calls: Count
    frames_seen: list[Annotated[int, Field(ge=1)]]
    """The frame numbers that the model saw."""
    stop_reason: Remark
    reason: Remark | None
    notes: list[Remark] = []
    """Notes for the reader, for instance that a clip is truncated."""
    well_formed: bool | None
    """Whether every round had the right form; null if there was no round."""
    repairs: Count = 0
    """The number of repairs in all rounds (docs/rounds.md)."""
    latency_seconds: Annotated[float, Field(ge=0)] | None
    prompt_tokens: Count | None
    sampled_tokens: Count | None
    seed: int
    model: Remark
    probabilities: Probabilities | None = None
    """How likely the model finds each label of its final answer; null if that is not known."""
    probabilities_reason: Remark | None = None
    """The reason why some or all probabilities are not known."""
    orders: list[OrderRecord] | None = None
    """What the pair's order and the other one gave, if both were judged. `judgment` is that of both."""
    readers: list[Remark] = []
    """The names of the readers that showed the frames of video 1 and video 2; `memory` where none is
    known (frames in an array), and nothing if neither is."""

    @property
    def consistent(self) -> bool | None:
        """Whether both orders gave the same overall judgment; None unless both gave one."""
        given = [order.judgment["OA"] for order in self.orders or () if order.judgment is not None]
        return given[0] == given[1] if len(given) == 2 else None

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Records of judgments without any are what they were before there were these.
        written: dict[str, Any] = handler(self)
        for name in ("probabilities", "probabilities_reason", "orders"):
            if written.get(name) is None:
                written.pop(name, None)
        return written

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not self.id.strip():
            raise ValueError("id: got a blank one, allowed: a non-empty string")
        if self.judgment is None and not (self.reason or "").strip():
            raise ValueError("reason: got none beside a null judgment, allowed: why there is no judgment")
        if self.judgment is not None and self.reason is not None:
            raise ValueError("reason: got one beside a judgment, allowed: null")
        if self.judgment is not None and set(self.judgment) != set(Dimension):
            got = ", ".join(self.judgment) or "no dimension"
            raise ValueError(f"judgment: got {got}, allowed: all of {', '.join(Dimension)}")
        return self


def parse_line(line: bytes, path: Path, number: int) -> VerdictRecord:
    """Reads one line.

    Raises:
        InputError: The line is not a record; the message names the file and the line.
    """
    try:
        return VerdictRecord.model_validate_json(line)
    except ValidationError as error:
        raise InputError(
            f"{path}: line {number} is no verdict record ({first_problem(error, '')}); mend or remove that "
            "line, then run again"
        ) from None


def whole_lines(descriptor: int, offset: int, path: Path) -> Iterator[bytes]:
    """Yields the lines from byte `offset` on, without their ends. An unfinished last line is skipped.

    Raises:
        InputError: A line is too long; the message names the file.
    """
    rest = b""
    while chunk := os.pread(descriptor, _READ_BYTES, offset):
        offset += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > MAX_LINE_BYTES:
            raise InputError(
                f"{path}: got a line of more than {MAX_LINE_BYTES} bytes, which no verdict has; choose "
                "another output"
            )


def read_verdicts(path: str | os.PathLike[str]) -> list[VerdictRecord]:
    """Reads a results file, or what is written of it so far.

    A last line without its end counts if it is a complete record. Otherwise it is ignored. For a table of
    verdicts (.csv, .parquet) see `verdict_table.read_verdict_table`.

    Raises:
        InputError: The file cannot be read, is no regular file, or has a line that is not a record.
    """
    file = Path(path)
    records = []
    for number, line in read_lines(file, MAX_LINE_BYTES):
        if not line.strip():
            continue
        record = parse_line(line, file, number) if line.endswith(b"\n") else unfinished(line)
        if record is not None:
            records.append(record)
    return records


def unfinished(tail: bytes) -> VerdictRecord | None:
    """The record in a line without its end; None if the record is not complete."""
    try:
        return VerdictRecord.model_validate_json(tail)
    except ValidationError:
        return None
