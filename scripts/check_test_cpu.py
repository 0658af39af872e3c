"""Compares what the tests cost with their budgets.

    python scripts/check_test_cpu.py [build/test-cpu.json]

The budgets stand in CONTRIBUTING.md, a row per folder, in CPU seconds of the machine that they were set on.
What pytest's gauge measured (tests/gauge.py) is first divided by how much slower this machine is. It fails if
a folder is more than 20 % over its budget or has none, or if one test takes more than 8 seconds
besides its fixtures, which tests share.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

TOLERANCE = 1.2
MOST_SECONDS_OF_A_TEST = 8.0
ROOT = Path(__file__).resolve().parents[1]


def budgets(text: str) -> dict[str, float]:
    """The budgets by folder, from the table in CONTRIBUTING.md."""
    rows = re.findall(r"^\| `(tests[\w/]*)` \| (\d+) \|", text, re.MULTILINE)
    return {folder: float(seconds) for folder, seconds in rows}


def complaints(report: dict[str, object], allowed: dict[str, float]) -> list[str]:
    """What is over its budget, a line each.

    Args:
        report: The gauge's file.
        allowed: CPU seconds by folder.
    """
    slowness = max(1.0, float(report["slowness"]))  # type: ignore[arg-type]
    lines = []
    for folder, seconds in report["folders"].items():  # type: ignore[attr-defined]
        took = seconds / slowness
        if folder not in allowed:
            lines.append(f"{folder}: has no budget; add a row to CONTRIBUTING.md")
        elif took > TOLERANCE * allowed[folder]:
            lines.append(f"{folder}: took {took:.0f} CPU seconds, its budget is {allowed[folder]:.0f}")
    for test, seconds in report["without_fixtures"].items():  # type: ignore[attr-defined]
        if seconds / slowness > MOST_SECONDS_OF_A_TEST:
            lines.append(
                f"{test}: took {seconds / slowness:.1f} CPU seconds, allowed: {MOST_SECONDS_OF_A_TEST:.0f}"
            )
    return lines


def main() -> int:
    """Prints what is over; 1 if anything is."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "test-cpu.json"
    report = json.loads(path.read_text("utf-8"))
    lines = complaints(report, budgets((ROOT / "CONTRIBUTING.md").read_text("utf-8")))
    total, slowness = float(report["total"]), max(1.0, float(report["slowness"]))
    print(f"the tests took {total:.0f} CPU seconds; {total / slowness:.0f} on the machine of the budgets")  # noqa: T201
    for line in lines:
        print(f"over budget: {line}; make it cheaper, mark it slow, or raise the budget with a reason")  # noqa: T201
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
