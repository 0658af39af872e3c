"""Run folders, and jobs in processes that are killed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import commands as commands
from forks import outcomes_of as outcomes_of
from forks import pytest_collection_finish as pytest_collection_finish
from forks import ranked as ranked


@pytest.fixture
def run() -> Iterator[Path]:
    """A run folder in memory where there is one: hundreds of syncs take minutes on a busy disk.

    What a killed process leaves behind is the same there; only a crash of the machine is not.
    """
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder) / "run"
