"""The folder of an evaluation: `eval.json` (the summary and how it was made) and `items.jsonl`.

Invariant: `eval.json` is written after `items.jsonl`, from the same items. Times and provenance apart, two
runs of one judge with one seed write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vrthinker.bounded_files import read_json
from vrthinker.errors import InputError, unwritable
from vrthinker.evals.pairs import EVAL_FILE, VERDICTS_FILE
from vrthinker.records.eval_items import EvalItem, read_items, write_items
from vrthinker.records.files import replace_file
from vrthinker.records.provenance import provenance

MAX_EVAL_BYTES = 1 << 28
SCHEMA_VERSION = 2


def check_no_model_run(out: Path) -> None:
    """Refuses a folder with a model's verdicts, whose tables another judge would overwrite.

    Raises:
        InputError: The folder has such verdicts.
    """
    if (out / VERDICTS_FILE).exists():
        raise InputError(
            f"--out: {out}: got the folder of a model's run (it has {VERDICTS_FILE}), allowed: a folder "
            "without one, so that the run's tables stay; give another"
        )


def write_run(
    out: Path, items: Sequence[EvalItem], summary: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Writes a run's items and its summary.

    Args:
        out: The folder, which is made if it is missing.
        items: The items.
        summary: Their summary (`summarise`).
        about: What was evaluated, and how, as JSON values: `judge`, `data`, `protocol`, ...

    Raises:
        InputError: The folder cannot be made.
        VRThinkerError: A file could not be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error, "name another", failed="the folder cannot be made") from None
    write_items(out, items)
    content = {"schema_version": SCHEMA_VERSION, **about, "summary": summary, "provenance": provenance()}
    replace_file(out / EVAL_FILE, (json.dumps(content, indent=2) + "\n").encode())


def read_run(folder: Path) -> tuple[list[EvalItem], dict[str, Any]]:
    """A run's items, and the content of its `eval.json`.

    Raises:
        InputError: The folder holds no evaluation that ended.
    """
    items = read_items(folder)
    about = read_json(folder / EVAL_FILE, MAX_EVAL_BYTES)
    if not isinstance(about, dict) or not isinstance(about.get("summary"), dict):
        raise InputError(
            f"{folder / EVAL_FILE}: holds no summary; an older version wrote it: give the same "
            "`vrthinker eval` command again, which judges nothing twice"
        )
    return items, about
