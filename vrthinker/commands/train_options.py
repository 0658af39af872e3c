"""Options that several stages of `vrthinker train` have, and how they change a stage's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from vrthinker.commands.options import option
from vrthinker.errors import InputError
from vrthinker.records.trackers import TrackerName

Set = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, option("KEY=VALUE")]
"""An option that replaces one setting, and may be given again."""


def phase_overrides(
    prefix: str, steps: int | None, batch_size: int | None, learning_rate: float | None
) -> list[str]:
    """The options that say how a phase learns, as assignments of its settings.

    Raises:
        InputError: A number is out of range.
    """
    assignments = []
    for name, value, least in (("steps", steps, 1), ("batch_size", batch_size, 1)):
        if value is not None:
            if value < least:
                option_name = name.replace("_", "-")
                raise InputError(f"--{option_name}: got {value}, allowed: at least {least}")
            assignments.append(f"{prefix}{name}={value}")
    if learning_rate is not None:
        assignments.append(f"{prefix}learning_rate.peak={learning_rate!r}")
    return assignments


def with_watching(
    values: dict[str, Any],
    *,
    pairs: Path | None,
    every: int | None,
    limit: int | None,
    tracker: TrackerName | None,
) -> dict[str, Any]:
    """A stage's settings with the options that say how a run is watched.

    Args:
        values: The settings. A recipe's evaluation and tracker stay where an option is not given.
        pairs: The held-out pairs.
        every: The number of steps between evaluations.
        limit: The number of held-out pairs.
        tracker: The tracker.
    """
    given = {"pairs": pairs, "every": every, "limit": limit}
    evaluation = {name: value for name, value in given.items() if value is not None}
    if evaluation:
        stored = values.get("evaluation")
        values = {**values, "evaluation": {**(stored if isinstance(stored, dict) else {}), **evaluation}}
    return values if tracker is None else {**values, "tracker": tracker}
