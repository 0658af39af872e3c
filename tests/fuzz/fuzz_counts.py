"""Counts of a fuzz run: printed, and kept in build/fuzz.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COUNTS = Path(__file__).resolve().parents[2] / "build" / "fuzz.json"


def record(what: str, counts: dict[str, Any]) -> None:
    """Adds the counts of one kind of input to the file."""
    COUNTS.parent.mkdir(exist_ok=True)
    before = json.loads(COUNTS.read_text("utf-8")) if COUNTS.exists() else {}
    COUNTS.write_text(json.dumps({**before, what: counts}, indent=1, sort_keys=True) + "\n", "utf-8")
    sys.stdout.write(f"\n{what}: {counts}\n")
