"""Compares what the tests cost with their budgets.

    python scripts/check_test_cpu.py [build/test-cpu.json]

The budgets stand in CONTRIBUTING.md, a row per folder, in CPU seconds of the machine that they were set on.
What pytest's gauge measured (tests/gauge.py) is first divided by how much slower this machine is. What is
over is printed: a folder over its budget, or a test over 8 seconds besides its fixtures, which tests share.
It fails where that is too much for a busy machine to explain, which makes single tests cost half more on some
runs, or where a folder has no budget.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

MOST_SECONDS_OF_A_TEST = 8.0
TEST_TOLERANCE, FOLDER_TOLERANCE = 1.6, 1.3
"""How many times its budget a test and a folder may take before the check fails."""
NOISE_SECONDS = 6.0
"""CPU seconds of a folder that a slow moment explains, however small its budget is."""
ROOT = Path(__file__).resolve().parents[1]


def budgets(text: str) -> dict[str, float]:
    """The budgets by folder, from the table in CONTRIBUTING.md."""
    rows = re.findall(r"^\| `(tests[\w/]*)` \| (\d+) \|", text, re.MULTILINE)
    return {folder: float(seconds) for folder, seconds in rows}


def complaints(report: dict[str, object], allowed: dict[str, float]) -> tuple[list[str], list[str]]:
    """What is over its budget, a line each: what must be mended, and what a busy machine may explain.

    Args:
        report: The gauge's file.
        allowed: CPU seconds by folder.
    """
    slowness = max(1.0, float(report["slowness"]))  # type: ignore[arg-type]
    failures: list[str] = []
    notices: list[str] = []
    for folder, seconds in report["folders"].items():  # type: ignore[attr-defined]
        took = seconds / slowness
        if folder not in allowed:
            failures.append(f"{folder}: has no budget; add a row to CONTRIBUTING.md")
            continue
        line = f"{folder}: took {took:.0f} CPU seconds, its budget is {allowed[folder]:.0f}"
        if took > max(FOLDER_TOLERANCE * allowed[folder], allowed[folder] + NOISE_SECONDS):
            failures.append(line)
        elif took > allowed[folder]:
            notices.append(line)
    for test, seconds in report["without_fixtures"].items():  # type: ignore[attr-defined]
        took = seconds / slowness
        line = f"{test}: took {took:.1f} CPU seconds, allowed: {MOST_SECONDS_OF_A_TEST:.0f}"
        if took > TEST_TOLERANCE * MOST_SECONDS_OF_A_TEST:
            failures.append(line)
        elif took > MOST_SECONDS_OF_A_TEST:
            notices.append(line)
    return failures, notices


def main() -> int:
    """Prints what is over its budget; 1 if anything is over by more than a busy machine explains."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "test-cpu.json"
    report = json.loads(path.read_text("utf-8"))
    failures, notices = complaints(report, budgets((ROOT / "CONTRIBUTING.md").read_text("utf-8")))
    total, slowness = float(report["total"]), max(1.0, float(report["slowness"]))
    print(f"the tests took {total:.0f} CPU seconds; {total / slowness:.0f} on the machine of the budgets")  # noqa: T201
    for line in notices:
        print(f"a little over budget: {line}")  # noqa: T201
    for line in failures:
        print(f"over budget: {line}; make it cheaper, mark it slow, or raise the budget with a reason")  # noqa: T201
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
