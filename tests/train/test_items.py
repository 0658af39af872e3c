"""The pairs that a stage samples episodes of: one source or several, every id once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vrthinker.data.pairs import load_pairs
from vrthinker.errors import InputError
from vrthinker.train.grpo_settings import grpo_settings
from vrthinker.train.items import Items, pairs_of_items
from vrthinker.train.loop.ranks import current_ranks
from vrthinker.world.files import PAIRS_FILE, load_truths, make_world
from vrthinker.world.world import PRESETS


def _items(value: dict[str, Any]) -> Items:
    return grpo_settings({"model": "nano", "items": value, "learn": {"steps": 1}}).items


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of two pairs in files."""
    folder = tmp_path_factory.mktemp("items") / "world"
    make_world(folder, PRESETS["easy"], pairs=2, seed=7, workers=1)
    return folder


def test_several_sources_are_one_list_and_worlds_bring_their_truths(easy: Path, tmp_path: Path) -> None:
    world = {"kind": "world", "pairs": 2, "seed": 8, "world": PRESETS["medium"].model_dump(mode="json")}
    items = _items({"kind": "mixed", "of": [{"kind": "file", "path": str(easy / PAIRS_FILE)}, world]})
    pairs, truths = pairs_of_items(items, tmp_path, current_ranks())

    (made,) = (folder for folder in tmp_path.iterdir() if folder.is_dir())
    assert pairs == load_pairs(easy / PAIRS_FILE) + load_pairs(made / PAIRS_FILE)
    assert list(truths.values()) == load_truths(made), "of files no truth is known, of worlds all"
    assert {id: truth.id for id, truth in truths.items()} == {pair.id: pair.id for pair in pairs[2:]}
    alone, _ = pairs_of_items(_items(world), tmp_path, current_ranks())
    assert alone == pairs[2:], "one source gives what it gives among others"


def test_an_id_in_two_sources_is_refused(easy: Path, tmp_path: Path) -> None:
    world = {"kind": "world", "pairs": 1, "seed": 7}
    items = _items({"kind": "mixed", "of": [{"kind": "file", "path": str(easy / PAIRS_FILE)}, world]})
    with pytest.raises(InputError, match="is in two sources; give worlds different seeds"):
        pairs_of_items(items, tmp_path, current_ranks())


def test_no_source_is_refused() -> None:
    with pytest.raises(InputError, match="items"):
        _items({"kind": "mixed", "of": []})
