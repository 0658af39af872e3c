"""Two numbered clips of different length, size and rate, opened as workspaces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from clips import make_clip

from vrthinker.episode.episode import EpisodeItem
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace

N_1, N_2 = 32, 20
OpenWorkspace = Callable[[], Workspace]
MakeItem = Callable[..., EpisodeItem]


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    first, second = folder / "first.mp4", folder / "second.mkv"
    make_clip(first, N_1, size=(112, 112), fps=8)
    make_clip(second, N_2, size=(84, 140), fps=25)
    return first, second


@pytest.fixture(scope="session")
def open_workspace(clips: tuple[Path, Path]) -> OpenWorkspace:
    reader, cache = open_reader(), FrameCache(64 << 20)

    def open_it() -> Workspace:
        return Workspace.open(*clips, reader=reader, resize=ResizeSettings(), cache=cache)

    return open_it


@pytest.fixture(scope="session")
def make_item(open_workspace: OpenWorkspace) -> MakeItem:
    def make(item_id: str = "pair", prompt: str = "a dog", **more: object) -> EpisodeItem:
        return EpisodeItem(item_id, prompt, open_workspace, **more)  # type: ignore[arg-type]

    return make
