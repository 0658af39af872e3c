"""Short names for files that tell them apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def distinct_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The shortest ends of paths that tell them apart: `a/1.mp4` and `b/1.mp4`, but `1.mp4` beside `2.mp4`.

    Each path gets as few of its last parts as tell it from all others. A path that is there twice gets its
    last part only, because nothing would tell it apart.
    """
    parts = [Path(os.fspath(path)).parts or (os.fspath(path),) for path in paths]
    names: list[str] = []
    for own in parts:
        others = {other for other in parts if other != own}
        taken = next(n for n in range(1, len(own) + 1) if n == len(own) or not _share(others, own, n))
        names.append(str(Path(*own[-taken:])))
    return names


def _share(others: set[tuple[str, ...]], own: tuple[str, ...], n_parts: int) -> bool:
    """Whether another path has the same last parts."""
    return any(other[-n_parts:] == own[-n_parts:] for other in others)
