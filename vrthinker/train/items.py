"""The pairs that a stage samples episodes of: those of a file, of a synthetic world, or of several of these.

Invariant: no two pairs of a run have one id. Episodes are recorded by it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from vrthinker.data.pairs import Pair, load_pairs
from vrthinker.errors import InputError
from vrthinker.train.loop.ranks import Ranks
from vrthinker.train.settings import StageSettings
from vrthinker.train.trials import check_clips
from vrthinker.world.files import MAX_PAIRS, PAIRS_FILE, load_truths, make_world
from vrthinker.world.world import PairTruth, WorldConfig


class FilePairs(StageSettings):
    """The pairs of a pairs file. A pair without a label for a dimension is not checked in it."""

    kind: Literal["file"] = "file"
    path: Path

    @field_validator("path")
    @classmethod
    def _from_anywhere(cls, path: Path) -> Path:
        """Makes a path absolute, because a run may be resumed from another folder."""
        return path.absolute()


class WorldPairs(StageSettings):
    """The pairs of a synthetic world, which is generated for them."""

    kind: Literal["world"] = "world"
    world: WorldConfig = WorldConfig()
    pairs: int = Field(ge=1, le=MAX_PAIRS)
    seed: int = Field(0, ge=0, le=1 << 40)
    """Seed of the pairs. It should differ from seeds that are trained or evaluated on."""


class MixedPairs(StageSettings):
    """The pairs of several sources."""

    kind: Literal["mixed"] = "mixed"
    of: tuple[Annotated[FilePairs | WorldPairs, Field(discriminator="kind")], ...] = Field(min_length=1)
    """The sources. No id may be in two of them, so worlds need different seeds."""


Items = Annotated[FilePairs | WorldPairs | MixedPairs, Field(discriminator="kind")]


def sources_of(items: Items) -> tuple[FilePairs | WorldPairs, ...]:
    """The sources that the pairs come from."""
    return items.of if isinstance(items, MixedPairs) else (items,)


def check_items(items: Items) -> None:
    """Refuses files that cannot be read, before a run's folder is written.

    Raises:
        InputError: A file cannot be read, or a clip is missing.
    """
    for source in sources_of(items):
        if isinstance(source, FilePairs):
            _pairs_of(source.path)


def pairs_of_items(items: Items, data: Path, ranks: Ranks) -> tuple[list[Pair], dict[str, PairTruth]]:
    """The pairs to sample, and by id the truths of those of synthetic worlds, which are made in `data`.

    Raises:
        InputError: A file cannot be read, a clip is missing, an id is there twice, or a folder holds another
            world.
        VRThinkerError: A clip could not be written.
    """
    pairs: list[Pair] = []
    truths: dict[str, PairTruth] = {}
    for source in sources_of(items):
        if isinstance(source, FilePairs):
            pairs += ranks.together(functools.partial(_pairs_of, source.path))
            continue
        world = _world_folder(source, data)
        pairs += ranks.first_then_others(functools.partial(_world_pairs, source, world))
        for truth in ranks.together(functools.partial(load_truths, world)):
            truths[truth.id] = truth
    _check_ids(pair.id for pair in pairs)
    return pairs, truths


def _check_ids(ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise InputError(
                f"items: the id {one!r} is in two sources; give worlds different seeds, and pairs other ids"
            )
        seen.add(one)


def _pairs_of(path: Path) -> list[Pair]:
    pairs = load_pairs(path)
    check_clips(pairs, path)
    return pairs


def _world_folder(source: WorldPairs, data: Path) -> Path:
    return data / hashlib.sha256(source.model_dump_json().encode()).hexdigest()[:12]


def _world_pairs(source: WorldPairs, folder: Path) -> list[Pair]:
    make_world(folder, source.world, pairs=source.pairs, seed=source.seed)
    return load_pairs(folder / PAIRS_FILE)
