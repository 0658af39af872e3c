"""The configuration beside a results file or in a run's folder. It is written once, and compared later."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vrthinker.bounded_files import read_json
from vrthinker.errors import InputError, one_line
from vrthinker.records.files import replace_file

_ABSENT = object()


def adopt_run(path: Path, run: Mapping[str, Any], ignore: Collection[str], output: Path) -> None:
    """Writes the configuration if there is none, else compares it with the existing one.

    Args:
        path: The configuration's file.
        run: The configuration, as JSON values.
        ignore: Dotted keys that may differ. A key includes everything below it.
        output: The results file, for the message.

    Raises:
        InputError: The file cannot be read or differs; the message names each differing key with both
            values.
        VRThinkerError: The configuration could not be written.
    """
    if not os.path.lexists(path):
        text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
        # A lone surrogate is written as JSON's escape.
        replace_file(path, text.encode("utf-8", "backslashreplace"))
        return
    try:
        stored = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; restore it or choose another output") from None
    if not isinstance(stored, dict):
        raise InputError(
            f"{path}: got {type(stored).__name__}, allowed: a JSON object; choose another output"
        )
    before, now = _flat(stored), _flat(run)
    differing = [
        key
        for key in dict.fromkeys((*before, *now))
        if not _equal(before.get(key, _ABSENT), now.get(key, _ABSENT)) and not _ignored(key, ignore)
    ]
    if differing:
        raise InputError(
            f"{output}: was made with {_spell(before, differing)}; this run has {_spell(now, differing)}; "
            "give the same settings, or another output file"
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested objects and lists of them, flattened to dotted keys. An empty object or list is a value."""
    flat: dict[str, object] = {}
    for key, inner in value.items():
        if isinstance(inner, list) and inner and all(isinstance(item, Mapping) for item in inner):
            inner = {str(number): item for number, item in enumerate(inner)}
        if isinstance(inner, Mapping) and inner:
            flat.update(_flat(inner, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


def _equal(before: object, now: object) -> bool:
    """Equality in which true is not 1."""
    return before == now and isinstance(before, bool) == isinstance(now, bool)


def _ignored(key: str, ignore: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in ignore)


def _spell(flat: Mapping[str, object], keys: list[str]) -> str:
    return ", ".join(
        f"{one_line(key)}={one_line(json.dumps(flat[key])) if key in flat else 'nothing'}" for key in keys
    )
