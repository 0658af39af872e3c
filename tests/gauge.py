"""The gauge of the test suite: CPU seconds of every test, the children that it waited for included.

Wall time on a shared machine says little; CPU seconds say what a test costs everywhere. The sums go to
`build/test-cpu.json`, and a line per folder ends pytest's report. Work outside tests (imports, collection)
stands in a line of its own. `scripts/check_test_cpu.py` compares the file with CONTRIBUTING.md's budgets.

Machines differ in speed, and a shared machine differs from minute to minute. A fixed piece of work is timed
every few seconds between tests; `slowness` is its median relative to the machine of the budgets.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_REFERENCE_SECONDS = 0.0125
"""CPU seconds of `_calibrate` on the machine that the budgets were set on (two busy cores of an AMD EPYC)."""
_SECONDS_BETWEEN_CALIBRATIONS = 3.0


def cpu_seconds() -> float:
    """User and system seconds of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


class Gauge:
    """Adds up CPU seconds; a pytest plugin. Under xdist every worker has one, and the controller sums up."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._tests: dict[str, float] = {}
        self._calls: dict[str, float] = {}
        self._process_seconds = 0.0
        self._calibrations: list[float] = []
        self._calibrated = 0.0
        self._before_teardown: float | None = None
        self._others: list[dict[str, Any]] = []
        self._start = time.monotonic()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Times one test with its set-up and tear-down."""
        if time.monotonic() - self._calibrated > _SECONDS_BETWEEN_CALIBRATIONS:
            self._calibrations.append(_calibrate())
            self._calibrated = time.monotonic()
        self._before_teardown = None
        before = cpu_seconds()
        try:
            return (yield)
        finally:
            self._tests[item.nodeid] = (self._before_teardown or cpu_seconds()) - before

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Times the test itself, without fixtures, which it may share with others."""
        before = cpu_seconds()
        try:
            return (yield)
        finally:
            self._calls[item.nodeid] = cpu_seconds() - before

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """The last test is not charged for ending what the whole session shared (a browser, servers)."""
        if nextitem is None:
            self._before_teardown = cpu_seconds()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """A worker hands its sums to the controller."""
        output = getattr(self._config, "workeroutput", None)
        if output is not None:
            output["cpu_gauge"] = self._own()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """The controller takes a worker's sums."""
        if "cpu_gauge" in getattr(node, "workeroutput", {}):
            self._others.append(node.workeroutput["cpu_gauge"])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Writes the file, and a line per folder."""
        parts = [*self._others, self._own()]
        tests = {name: seconds for part in parts for name, seconds in part["tests"].items()}
        calls = {name: seconds for part in parts for name, seconds in part["calls"].items()}
        if not tests:
            return
        calibrations = [seconds for part in parts for seconds in part["calibrations"]]
        slowness = statistics.median(calibrations) / _REFERENCE_SECONDS
        folders: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for name, seconds in tests.items():
            folders[folder_of(name)] += seconds
            counts[folder_of(name)] += 1
        total = sum(part["process_seconds"] for part in parts)
        outside = max(0.0, total - sum(tests.values()))
        report = {
            "total": round(total, 1),
            "outside_tests": round(outside, 1),
            "slowness": round(slowness, 2),
            "wall_seconds": round(time.monotonic() - self._start, 1),
            "folders": {name: round(folders[name], 1) for name in sorted(folders)},
            "tests": {n: round(s, 2) for n, s in sorted(tests.items(), key=lambda pair: -pair[1])},
            "without_fixtures": {n: round(s, 2) for n, s in sorted(calls.items(), key=lambda pair: -pair[1])},
        }
        default = Path(self._config.rootpath) / "build" / "test-cpu.json"
        path = Path(os.environ.get("TEST_CPU_JSON", default))
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        write = terminalreporter.write_line
        terminalreporter.section("CPU seconds")
        for name in sorted(folders):
            write(f"{folders[name]:8.1f}  {name} ({counts[name]} tests)")
        write(f"{outside:8.1f}  outside tests (imports, collection)")
        write(f"{total:8.1f}  in all; {slowness:.2f} times the reference machine's seconds")

    def _own(self) -> dict[str, Any]:
        # The controller waits for its workers, whose seconds it was handed: they must not count twice.
        seconds = sum(os.times()[:2]) if self._others else cpu_seconds()
        return {
            "tests": self._tests,
            "calls": self._calls,
            "process_seconds": seconds,
            "calibrations": self._calibrations,
        }


def folder_of(nodeid: str) -> str:
    """The folder whose budget a test counts against: `tests/video`, or `tests` for what lies in none."""
    parts = nodeid.partition("::")[0].split("/")[:-1]
    return "/".join(parts[:2])


def _calibrate() -> float:
    """CPU seconds of a fixed piece of work, of the kind that tests spend their time with."""
    start = time.process_time()
    values = {str(number): [number, number / 7, str(number) * 3] for number in range(1000)}
    for _ in range(3):
        values = json.loads(json.dumps(values, sort_keys=True))
    return time.process_time() - start
