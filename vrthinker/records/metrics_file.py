"""The metrics of a training run: one JSON line per finished step.

    {"step": 120, "time_seconds": 1790000000.1, "loss/sft": 1.42, "optim/learning_rate": 1.5e-06, ...}

`step` is the number of finished steps, `time_seconds` is the Unix time of the line. NaN and infinities are
null.
Invariant: steps increase from line to line, so that each is there once, however often the run was killed and
resumed. If a killed writer wrote an unfinished line, readers ignore it and the next writer removes it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vrthinker.bounded_files import parse_json, read_lines
from vrthinker.errors import InputError, VRThinkerError, one_line
from vrthinker.records.files import replace_file, spare_name, write_whole

METRICS_FILE = "metrics.jsonl"
_RESERVED = ("step", "time_seconds")
_MAX_LINE_BYTES = 1 << 20


class MetricsFile:
    """A metrics file, open for writing. There may be one writer at a time, which holds the run folder.

    Args:
        path: The file. It is made, with its folder, if it is missing.

    Raises:
        InputError: The file cannot be opened, or its content is not metrics.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._last_step = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                spare_name(path).unlink()
            path.touch()
        except OSError as error:
            raise InputError(f"{path}: cannot be opened ({error.strerror}); choose another folder") from None
        self._rewrite(read_metrics(path))

    @property
    def has_lines(self) -> bool:
        """Whether the file has a line."""
        return self._last_step >= 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends one line.

        Args:
            metrics: Slash name (`loss/sft`) -> value. Values that are not finite are stored as null.
            step: The number of finished steps.

        Raises:
            ValueError: A metric is named `step` or `time_seconds`, or `step` is not above the last line's.
            VRThinkerError: The line could not be written (a full disk). The file is unchanged.
        """
        if taken := [name for name in _RESERVED if name in metrics]:
            raise ValueError(f"metrics: got the name {taken[0]!r}, which the file writes; name it otherwise")
        if step <= self._last_step:
            raise ValueError(
                f"step: got {step}, allowed: above {self._last_step}, the last one in {self.path}"
            )
        values = {name: _finite(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, "time_seconds": round(time.time(), 3), **values}, allow_nan=False)
        try:
            write_whole(self._fd, line.encode() + b"\n")
        except OSError as error:
            raise VRThinkerError(
                f"{self.path}: cannot be written ({error.strerror}); make room, then resume"
            ) from None
        self._last_step = step

    def drop_after(self, step: int) -> None:
        """Removes the lines of later steps atomically, because a resumed run writes them again.

        Raises:
            VRThinkerError: The file could not be written. It is unchanged.
        """
        self._rewrite([line for line in read_metrics(self.path) if line["step"] <= step])

    def sync(self) -> None:
        """Returns when all lines are on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Closes the file. Closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        """Replaces the file's content by these lines, and opens it again."""
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        if content != self.path.read_bytes():
            replace_file(self.path, content)
        self.close()
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._last_step = lines[-1]["step"] if lines else -1


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file.

    Returns:
        For each line, a dict with `step` (int), `time_seconds` (float) and the metrics (float, or None for a
        value that was not finite).

    Raises:
        InputError: The file cannot be read, or a complete line is not one of metrics.
    """
    lines: list[dict[str, Any]] = []
    for number, text in read_lines(path, _MAX_LINE_BYTES):
        if not text.endswith(b"\n"):
            break  # a killed writer's
        line = _line(text, f"{path}: line {number}")
        if lines and line["step"] <= lines[-1]["step"]:
            raise InputError(
                f"{path}: line {number} has step {line['step']} after step {lines[-1]['step']}; remove one"
            )
        lines.append(line)
    return lines


def _line(text: bytes, where: str) -> dict[str, Any]:
    """Reads one line, and checks that it is one of metrics."""
    try:
        line = parse_json(text, where)
    except InputError as error:
        raise InputError(f"{error}; remove it") from None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise InputError(f"{where} has no step; it is no metrics file")
    for name, value in line.items():
        if (value is not None or name == "time_seconds") and type(value) not in (int, float):
            got = one_line(f"{name}: {value!r}")
            raise InputError(f"{where} has {got}, wanted: a number; remove the line")
    if "time_seconds" not in line:
        raise InputError(f"{where} has no time_seconds; it is no metrics file")
    return line


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
