"""Compares what the tests cost with their budgets.

    python scripts/check_test_cpu.py [build/test-cpu.json]

The budgets stand in CONTRIBUTING.md, a row per folder, in CPU seconds of the machine that they were set on.
What pytest's gauge measured (tests/gauge.py) is first divided by how much slower this machine is. What is
over is printed: a folder over its budget, or a test over 8 seconds besides its fixtures, which tests share.
A shared machine has slow moments, so what is over by much is run again by itself, and the smaller number
counts. The check fails where that is still over by much, or where a folder has no budget.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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


def over_budget(report: dict[str, Any], allowed: dict[str, float]) -> tuple[dict[str, str], list[str]]:
    """What is over its budget: by much (a line by folder or test), and by little (lines).

    Args:
        report: The gauge's file.
        allowed: CPU seconds by folder.
    """
    much: dict[str, str] = {}
    little: list[str] = []
    for name, took in on_reference_machine(report, "folders").items():
        if name not in allowed:
            much[name] = f"{name}: has no budget; add a row to CONTRIBUTING.md"
            continue
        line = f"{name}: took {took:.0f} CPU seconds, its budget is {allowed[name]:.0f}"
        if took > max(FOLDER_TOLERANCE * allowed[name], allowed[name] + NOISE_SECONDS):
            much[name] = line
        elif took > allowed[name]:
            little.append(line)
    for name, took in on_reference_machine(report, "without_fixtures").items():
        line = f"{name}: took {took:.1f} CPU seconds, allowed: {MOST_SECONDS_OF_A_TEST:.0f}"
        if took > TEST_TOLERANCE * MOST_SECONDS_OF_A_TEST:
            much[name] = line
        elif took > MOST_SECONDS_OF_A_TEST:
            little.append(line)
    return much, little


def on_reference_machine(report: dict[str, Any], key: str) -> dict[str, float]:
    """CPU seconds of the machine that the budgets were set on, by folder or test."""
    slowness = max(1.0, float(report["slowness"]))
    return {name: float(seconds) / slowness for name, seconds in report[key].items()}


def measured_again(names: list[str], report: dict[str, Any]) -> dict[str, Any]:
    """The report with the smaller of two numbers for each of these folders and tests, which are run again."""
    merged: dict[str, Any] = {"slowness": 1.0}
    for key in ("folders", "without_fixtures"):
        merged[key] = on_reference_machine(report, key)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "cpu.json")
            # In a worker of its own, with the threads that the tests of `make test` have.
            # `tests` itself is the files that lie in no folder of it.
            chosen = [name] if name != "tests" else sorted(map(str, ROOT.glob("tests/test_*.py")))
            try:
                subprocess.run(
                    [sys.executable, "-m", "pytest", "-q", "-n", "1", *chosen],
                    cwd=ROOT,
                    env={**os.environ, "TEST_CPU_JSON": str(path)},
                    stdout=subprocess.DEVNULL,
                    timeout=900,
                    check=True,
                )
            except subprocess.SubprocessError as error:
                print(f"{name}: could not be run again: {error}")  # noqa: T201
                continue
            again = json.loads(path.read_text("utf-8"))
        for key in ("folders", "without_fixtures"):
            took = on_reference_machine(again, key).get(name)
            if took is not None and name in merged[key]:
                merged[key][name] = min(merged[key][name], took)
    return merged


def main() -> int:
    """Prints what is over its budget; 1 if anything is over by much, measured twice."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "test-cpu.json"
    report = json.loads(path.read_text("utf-8"))
    allowed = budgets((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    much, little = over_budget(report, allowed)
    total, slowness = float(report["total"]), max(1.0, float(report["slowness"]))
    print(f"the tests took {total:.0f} CPU seconds; {total / slowness:.0f} on the machine of the budgets")  # noqa: T201
    for line in little:
        print(f"a little over budget: {line}")  # noqa: T201
    if much:
        for line in much.values():
            print(f"run again: {line}")  # noqa: T201
        much, _ = over_budget(measured_again([n for n in much if n in allowed or "::" in n], report), allowed)
    for line in much.values():
        print(f"over budget: {line}; make it cheaper, mark it slow, or raise the budget with a reason")  # noqa: T201
    return 1 if much else 0


if __name__ == "__main__":
    sys.exit(main())
