"""A line of `items.jsonl`: one judged item of an evaluation, with all that tables and pages need of it.

An evaluation writes the file when it ends, in the order of its pairs, so that runs can be compared and shown
without their episodes.
Invariant: every item that belongs to the denominator has a line, judged or not. An item without a verdict has
a status and a reason that say why.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vrthinker.bounded_files import read_lines
from vrthinker.data.pairs import DimensionLabels, Text
from vrthinker.errors import InputError, first_problem
from vrthinker.records.files import replace_file
from vrthinker.records.verdicts import Count, Remark

ITEMS_FILE = "items.jsonl"
MAX_LINE_BYTES = 1 << 20

Seconds = Annotated[float, Field(ge=0)]


class ItemStatus(enum.StrEnum):
    """What became of an item."""

    JUDGED = "judged"
    """There is a verdict."""
    UNPARSED = "unparsed"
    """The judge answered, and its answer holds no verdict that can be read."""
    FAILED = "failed"
    """An error (a clip, the engine, the machine) kept the judge from answering."""
    MISSING = "missing"
    """There is no answer."""


class ItemCost(BaseModel):
    """What an item cost, over all its episodes. None is unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    episodes: Count = 1
    rounds: Count | None = None
    tool_calls: Count | None = None
    frames_seen: Count | None = None
    prompt_tokens: Count | None = None
    sampled_tokens: Count | None = None
    latency_seconds: Seconds | None = None


class EvalItem(BaseModel):
    """One item of an evaluation: what people said, what the judge said, and what that cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1
    id: Text
    prompt: Text
    video_1: Remark
    video_2: Remark
    dataset: str | None = None
    labels: DimensionLabels
    tie_kind: str | None = None
    """The kind of the tie, where a set has several."""
    status: ItemStatus
    judgment: DimensionLabels | None = None
    """The verdict per dimension: 0 tie, 1 video 1 is better, 2 video 2 is better."""
    scores: dict[str, float] | None = None
    """The score of video 1 minus that of video 2 per dimension, if the judge gives scores."""
    reason: Remark | None = None
    """Why there is no verdict, or why it lacks a dimension."""
    confidence: Annotated[int, Field(ge=1, le=3)] | None = None
    """The stated confidence: 1 high, 2 middle, 3 low."""
    agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """The share of votes that agree with the overall verdict, if there were several."""
    orders: tuple[DimensionLabels | None, DimensionLabels | None] | None = None
    """The verdicts with the clips in the file's order and in the other one, both in the file's order; null
    where an order has no verdict. Only if both orders were judged."""
    well_formed: bool | None = None
    cost: ItemCost = ItemCost()
    frames: tuple[Count, Count] | None = None
    """The number of frames of both clips, if they were looked up."""
    seconds: tuple[Seconds, Seconds] | None = None
    """The duration of both clips, if they were looked up."""
    notes: list[Remark] = []

    @model_validator(mode="after")
    def _is_consistent(self) -> EvalItem:
        answered = bool(self.judgment or self.scores)
        if answered != (self.status is ItemStatus.JUDGED):
            raise ValueError(
                f"status: got {self.status}, allowed: judged if there is a verdict, and only then"
            )
        if not answered and not (self.reason or "").strip():
            raise ValueError("reason: got none, allowed: why there is no verdict")
        return self


def write_items(folder: Path, items: Sequence[EvalItem]) -> None:
    """Writes a run's items atomically.

    Raises:
        VRThinkerError: The file could not be written.
    """
    replace_file(folder / ITEMS_FILE, "".join(item.model_dump_json() + "\n" for item in items).encode())


def read_items(folder: Path) -> list[EvalItem]:
    """Reads a run's items.

    Raises:
        InputError: There are none, or a line is no item or names an id again.
    """
    path = folder / ITEMS_FILE
    if not path.is_file():
        raise InputError(
            f"{folder}: has no {ITEMS_FILE}; name the folder of an evaluation that ended (the same command "
            "finishes one that was stopped)"
        )
    items: dict[str, EvalItem] = {}
    for number, line in read_lines(path, MAX_LINE_BYTES):
        if not line.strip():
            continue
        try:
            item = EvalItem.model_validate_json(line)
        except ValidationError as error:
            raise InputError(f"{path}: line {number} is no item ({first_problem(error, '')})") from None
        if items.setdefault(item.id, item) is not item:
            raise InputError(f"{path}: line {number}: got {item.id!r} again, allowed: each id once")
    return list(items.values())
