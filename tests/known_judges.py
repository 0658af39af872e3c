"""Small labelled sets, and judges of which everything is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vrthinker.data.pairs import Pair

CODES = ("TA", "VQ", "MQ", "OA")


def labelled_pair(number: int, oa: int, **others: Any) -> Pair:
    """A pair with these labels; its prompt is its own unless another is given."""
    labels = {code: others.pop(code) for code in CODES[:3] if code in others}
    value = {
        "id": f"p{number}",
        "prompt": f"caption {number}",
        "video_1": Path(f"{number}-1.mp4"),
        "video_2": Path(f"{number}-2.mp4"),
        "labels": {**labels, "OA": oa},
    }
    return Pair.model_validate({**value, **others})


def write_pairs(path: Path, pairs: Sequence[Pair]) -> Path:
    """A pairs file."""
    rows = [pair.model_dump(mode="json", exclude_none=True) for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ten_pairs() -> list[Pair]:
    """Ten pairs: four where video 1 is better, three where video 2 is, three ties."""
    return [labelled_pair(n, label) for n, label in enumerate((1, 1, 1, 1, 2, 2, 2, 0, 0, 0))]


Judge = Callable[[Pair], Any]
KNOWN: dict[str, Judge] = {
    "always-1": lambda pair: 1,
    "always-2": lambda pair: 2,
    "always-tie": lambda pair: 0,
    "oracle": lambda pair: pair.labels["OA"],
    "contrary": lambda pair: {0: 1, 1: 2, 2: 1}[pair.labels["OA"]],
}
"""Judges that answer overall only."""
