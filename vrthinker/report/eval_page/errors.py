"""The errors of a run that are worth looking at: the wrong verdicts that the judge was surest of.

Sure means, in this order: a stated confidence, a larger share of votes, a larger difference of scores.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vrthinker.bounded_files import read_lines
from vrthinker.episode.trajectory import MAX_LINE_BYTES, Trajectory
from vrthinker.records.eval_items import EvalItem

_LINE_START = b'{"schema_version":1,"id":'
_MAX_ID_BYTES = 1 << 14


def surest_errors(items: Sequence[EvalItem], most: int, *, tie_threshold: float = 0.0) -> list[EvalItem]:
    """The items whose overall verdict is wrong, the surest ones first.

    Args:
        items: The items of a run.
        most: The most that are returned.
        tie_threshold: The largest difference of scores that is a tie.
    """
    wrong = [
        item
        for item in items
        if "OA" in item.labels
        and (verdict := verdict_in(item, "OA", tie_threshold)) is not None
        and verdict != item.labels["OA"]
    ]
    wrong.sort(
        key=lambda item: (
            4 if item.confidence is None else item.confidence,
            -(item.agreement or 0.0),
            -abs((item.scores or {}).get("OA", 0.0)),
            item.id,
        )
    )
    return wrong[:most]


def verdict_in(item: EvalItem, code: str, tie_threshold: float) -> int | None:
    """The verdict in a dimension, given or by the scores; None without one.

    Args:
        item: The item.
        code: The dimension's code, such as `OA`.
        tie_threshold: The largest difference of scores in this dimension that is a tie.
    """
    if item.judgment is not None and code in item.judgment:
        return item.judgment[code]
    difference = (item.scores or {}).get(code)
    if difference is None:
        return None
    return 0 if abs(difference) <= tie_threshold else 1 if difference > 0 else 2


def tie_threshold(about: Mapping[str, Any], code: str) -> float:
    """The largest difference of scores in a dimension that the run's summary reads as a tie.

    Args:
        about: The content of the run's `eval.json`.
        code: The dimension's code.
    """
    try:
        return float(about["summary"]["scores"][code]["tie_threshold"])
    except (KeyError, TypeError, ValueError):
        return 0.0


def episodes_of(path: Path, ids: Collection[str]) -> dict[str, Trajectory]:
    """Id -> the last recorded episode of that item. The arguments are those of `recorded_episodes`."""
    return {episode.id: episode for episode in recorded_episodes(path, ids)}


def recorded_episodes(path: Path, ids: Collection[str]) -> Iterator[Trajectory]:
    """Yields the recorded episodes of some items, without parsing those of the others.

    An item whose judging was tried again has several; the last one counts. Lines that cannot be read are
    passed over.

    Args:
        path: The file of trajectories. It may be missing.
        ids: The ids of the items.
    """
    if not path.is_file() or not ids:
        return
    for _, line in read_lines(path, MAX_LINE_BYTES):
        if _id_of(line) in ids:
            try:
                yield Trajectory.model_validate_json(line)
            except ValidationError:
                continue


def _id_of(line: bytes) -> str | None:
    """The id at the beginning of a line."""
    if not line.startswith(_LINE_START):
        return None
    start = line[len(_LINE_START) : len(_LINE_START) + _MAX_ID_BYTES].decode("utf-8", "replace")
    try:
        value, _ = json.JSONDecoder().raw_decode(start)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
