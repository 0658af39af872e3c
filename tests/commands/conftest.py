"""What the commands are given: a judge of random weights, clips, files of pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip
from forks import commands as commands
from forks import pytest_collection_finish as pytest_collection_finish
from quick_judge import make_quick_judge


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge of random weights that always has a verdict."""
    return make_quick_judge(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `a.mp4` and `b.mp4`."""
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "a.mp4", 24, size=(64, 96), fps=12)
    make_clip(folder / "b.mp4", 30, size=(48, 80), fps=15)
    return folder


class PairsFile:
    """Writes files of pairs, all of the same two clips."""

    def __init__(self, clips: Path) -> None:
        self._clips = clips

    def __call__(self, path: Path, count: int, extra: Sequence[dict[str, Any]] = ()) -> Path:
        rows = [
            {"id": f"p{index}", "prompt": f"caption {index}", "video_1": "a.mp4", "video_2": "b.mp4"}
            for index in range(count)
        ]
        for name in ("a.mp4", "b.mp4"):
            if not (path.parent / name).exists():
                (path.parent / name).symlink_to(self._clips / name)
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *extra]))
        return path


@pytest.fixture(scope="session")
def write_pairs(clips: Path) -> PairsFile:
    """`write_pairs(path, count, extra=[...])`."""
    return PairsFile(clips)
