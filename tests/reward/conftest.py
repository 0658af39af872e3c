"""The clips of all episodes here."""

from __future__ import annotations

from pathlib import Path

import pytest
from reward.plays import Stage


@pytest.fixture(scope="session")
def stage(clip_pair: tuple[Path, Path]) -> Stage:
    return Stage(clip_pair)
