"""Reading a sharegpt file: conversations of `human`, `gpt`, `function_call` and `observation` turns.

Turns with `role` and `content` (`user`, `assistant`, `tool`) are read too. What is read is checked as
LLaMA-Factory checks it, which leaves broken samples out with a warning: human and observation stand at odd
places, gpt and function_call at even ones, and there are as many placeholders as pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vrthinker.bounded_files import parse_json
from vrthinker.data.datasets.rows import BadField, Row, read_rows, shown, unit_of
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.errors import InputError, first_problem
from vrthinker.exchange.formats import RECORD
from vrthinker.exchange.samples import IMAGE, revealed

_ROLES = {
    "human": "human",
    "user": "human",
    "observation": "observation",
    "tool": "observation",
    "gpt": "gpt",
    "assistant": "gpt",
    "function_call": "function_call",
    "system": "system",
}
MAX_TURNS = 200


class TraceRecord(BaseModel):
    """What an export of this package says beside the texts (`formats.record_of`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = Field(ge=1, le=1)
    id: str
    seed: int
    round: int | None = Field(ge=1, le=64)
    rounds: int = Field(ge=1, le=64)
    first_frames: tuple[int, ...]
    n_frames: int
    n_frames_1: int
    settings: EpisodeSettings


@dataclass(frozen=True)
class Conversation:
    """One sample of a sharegpt file.

    Attributes:
        place: File and row, for messages.
        id: The id of its pair, if the sample says it.
        system: The system message; empty if there is none.
        asked: The turns at odd places: the task, then each tool outcome. A text is cut at its placeholders.
        rounds: The texts of the turns at even places.
        record: What the exporter said beside the texts; None for samples of others.
    """

    place: str
    id: str | None
    system: str
    asked: tuple[tuple[str, ...], ...]
    rounds: tuple[str, ...]
    record: TraceRecord | None


def read_conversations(source: Path) -> Iterator[Conversation | InputError]:
    """The samples of a file. One that cannot be used gives the error that says why.

    Raises:
        InputError: The file cannot be read.
    """
    unit = unit_of(source)
    for row in read_rows(source):
        place = f"{source}: {unit} {row.number}"
        try:
            yield _conversation(row, place)
        except BadField as bad:
            yield InputError(f"{place}, {bad.field}: got {bad.got}, allowed: {bad.allowed}")
        except InputError as error:
            yield error


def _conversation(row: Row, place: str) -> Conversation:
    name = row.any_of("conversations", "messages")
    turns = row.values[name]
    if not isinstance(turns, list) or not 2 <= len(turns) <= MAX_TURNS:
        raise BadField(name, shown(turns), f"a list of 2 to {MAX_TURNS} turns")
    said = [_turn(f"{name}[{index}]", turn) for index, turn in enumerate(turns)]
    system = row.values.get("system") or ""
    if not isinstance(system, str):
        raise BadField("system", shown(system), "a text")
    if said[0][0] == "system":
        system = said.pop(0)[1]
    asked, rounds = [], []
    for index, (role, text) in enumerate(said):
        place_of = f"{name}[{index}]"
        allowed = ("gpt", "function_call") if index % 2 else ("human", "observation")
        if role not in allowed or (index == 0 and role != "human"):
            wanted = "human first" if index == 0 else " or ".join(allowed)
            raise BadField(place_of, role, f"{wanted} at this place")
        if index % 2:
            if IMAGE in text:
                raise BadField(place_of, f"a placeholder {IMAGE}", "text only, since a round shows no frames")
            rounds.append(revealed(text) if role == "gpt" else _calls(place_of, text))
        else:
            wrapped = f"<tool_response>\n{text}\n</tool_response>" if role == "observation" else text
            asked.append(tuple(revealed(part) for part in wrapped.split(IMAGE)))
    if len(asked) != len(rounds):
        raise BadField(name, f"{len(said)} turns", "as many answers as questions")
    pictures = row.values.get("images") or []
    places = sum(len(parts) - 1 for parts in asked)
    if not isinstance(pictures, list) or len(pictures) != places:
        got = f"{len(pictures)} pictures" if isinstance(pictures, list) else shown(pictures)
        raise BadField("images", got, f"{places}, as many as there are placeholders")
    record = _record(row, place)
    identity = record.id if record is not None else row.identity()
    return Conversation(place, identity, revealed(system), tuple(asked), tuple(rounds), record)


def _turn(place: str, turn: Any) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise BadField(place, shown(turn), "an object with from and value")
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadField(f"{place}.from", shown(speaker), "human, gpt, function_call, observation or system")
    if not isinstance(text, str):
        raise BadField(f"{place}.value", shown(text), "a text")
    return role, text


def _calls(place: str, text: str) -> str:
    """The text of a round that only calls tools: a thought, if there is one, and each call as an element."""
    thought, closing, rest = text.rpartition("</think>")
    try:
        value = parse_json(rest, place)
    except InputError:
        raise BadField(
            place, shown(rest), "the JSON of a call, or a list of calls, after a thought"
        ) from None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise BadField(place, shown(value), "an object with name and arguments, or a list of them")
    spelled = (f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>" for call in calls)
    return f"{thought}{closing}{''.join(spelled)}"


def _record(row: Row, place: str) -> TraceRecord | None:
    value = row.values.get(RECORD)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadField(RECORD, shown(value), "the text that an export wrote")
    try:
        return TraceRecord.model_validate(parse_json(value, f"{place}, {RECORD}"))
    except ValidationError as error:
        raise BadField(RECORD, first_problem(error), "the text that an export wrote") from None
