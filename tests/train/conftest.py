"""Run folders, and processes in which jobs are run and killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Outcomes = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture
def run() -> Iterator[Path]:
    """A run folder in memory where there is one: hundreds of syncs take minutes on a busy disk.

    What a killed process leaves behind is the same there; only a crash of the machine is not.
    """
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder) / "run"


@pytest.fixture(scope="session")
def outcomes_of() -> Iterator[Outcomes]:
    """Runs jobs one after another, each in a process of its own. What forks them is started once."""
    yield from _outcomes("training_worker.py")


@pytest.fixture(scope="session")
def commands() -> Iterator[Outcomes]:
    """The same for whole commands."""
    yield from _outcomes("cold_start_worker.py")


def _outcomes(program: str) -> Iterator[Outcomes]:
    worker = Path(__file__).with_name(program)
    with subprocess.Popen(
        [sys.executable, worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(jobs) + "\n")
            process.stdin.flush()
            found: list[dict[str, Any]] = json.loads(process.stdout.readline())
            return found

        yield ask
        process.communicate()
