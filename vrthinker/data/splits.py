"""Splits of a pairs file through which nothing leaks: no caption and no clip is in two parts.

Two pairs are linked if their captions are equal after normalisation (Unicode NFKC, case, blanks) or if they
share a clip. Clips are equal if their content is equal, whatever their names (`video/content.py`). A clip
that cannot be read is known by its path only, and counted. Connected pairs form components, and a component
goes into one part as a whole.

Invariant: the split depends on the pairs, the shares and the seed, and not on the order of the lines.
"""

from __future__ import annotations

import hashlib
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vrthinker.data.pairs import Pair
from vrthinker.episode.dimensions import Dimension
from vrthinker.errors import InputError, one_line
from vrthinker.video.content import clip_content

_MOST_PARTS = 32
_LARGE = 1.1
"""A part may get this much more than its share without a word, or one pair."""


@dataclass(frozen=True)
class Split:
    """The parts of a split.

    Attributes:
        parts: Name -> its pairs, in the order of the file.
        components: The number of connected components.
        largest: The number of pairs of the largest component.
        by_path: The number of distinct clips that could not be read, which are known by their paths only.
        warnings: What did not come out as asked.
    """

    parts: Mapping[str, tuple[Pair, ...]]
    components: int
    largest: int
    by_path: int
    warnings: tuple[str, ...]


def parse_parts(text: str) -> dict[str, float]:
    """Reads `train=0.9,test=0.1`.

    Raises:
        InputError: A name is no plain word or is there twice, or the shares are not above 0 and do not add up
            to 1.
    """
    parts: dict[str, float] = {}
    for item in text.split(",")[: _MOST_PARTS + 1]:
        name, _, share = item.partition("=")
        name = name.strip()
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        plain = name.replace("-", "").replace("_", "")
        if (
            not (plain.isascii() and plain.isalnum() and len(name) <= 40)
            or name in parts
            or not 0 < value <= 1
        ):
            raise InputError(
                f"--parts: got {one_line(repr(item))}, allowed: distinct names with shares above 0, like "
                "train=0.9,test=0.1"
            )
        parts[name] = value
    if len(parts) > _MOST_PARTS:
        raise InputError(f"--parts: got more than {_MOST_PARTS} parts, allowed: up to {_MOST_PARTS}")
    if abs(sum(parts.values()) - 1) > 1e-6:
        raise InputError(f"--parts: got shares that add up to {sum(parts.values()):g}, allowed: 1")
    return parts


def normalised(caption: str) -> str:
    """A caption without what does not make it another caption: case, blanks, spellings of one character."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


def split_pairs(pairs: Sequence[Pair], parts: Mapping[str, float], seed: int) -> Split:
    """Splits pairs so that no caption and no clip crosses parts.

    Components are drawn in an order that depends on the seed and on what they hold. The largest come first.
    Each goes to the part that lacks most of its share.

    Args:
        pairs: The pairs.
        parts: Name -> share; the shares add up to 1.
        seed: The seed of the order.

    Raises:
        InputError: A part would get no pair.
    """
    components, by_path = _components(pairs)
    order = sorted(components, key=lambda component: (-len(component), _drawn(seed, pairs, component)))
    wanted = {name: share * len(pairs) for name, share in parts.items()}
    members: dict[str, list[int]] = {name: [] for name in parts}
    for component in order:
        fitting = [name for name in parts if len(members[name]) + len(component) <= wanted[name] + 0.5]
        if fitting:
            chosen = max(fitting, key=lambda name: (wanted[name] - len(members[name])) / wanted[name])
        else:
            chosen = max(parts, key=lambda name: wanted[name] - len(members[name]))
        members[chosen] += component
    largest = max(map(len, components))
    if empty := [name for name, indices in members.items() if not indices]:
        raise InputError(
            f"--parts: {', '.join(empty)} would be empty: {len(pairs)} pairs are {len(components)} groups "
            f"that share captions or clips, the largest of {largest} pairs; ask for fewer parts or other "
            "shares"
        )
    return Split(
        {name: tuple(pairs[index] for index in sorted(indices)) for name, indices in members.items()},
        len(components),
        largest,
        by_path,
        tuple(_warnings(wanted, members, len(pairs), largest)),
    )


def _warnings(
    wanted: Mapping[str, float], members: Mapping[str, list[int]], total: int, largest: int
) -> list[str]:
    warnings = []
    for name, indices in members.items():
        got, share = len(indices), wanted[name]
        if abs(got - share) > max(1.0, (_LARGE - 1) * share):
            warnings.append(
                f"{name} has {got} of {total} pairs ({got / total:.0%}) where {share / total:.0%} was asked "
                "for: pairs that share a caption or a clip stay together, and the largest such group has "
                f"{largest} pairs"
            )
    return warnings


def _components(pairs: Sequence[Pair]) -> tuple[list[list[int]], int]:
    """The connected components as lists of indices, and the number of clips that cannot be read."""
    parent = list(range(len(pairs)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[tuple[str, object], int] = {}
    unread: set[str] = set()
    keys: dict[Path, tuple[str, object]] = {}
    for index, pair in enumerate(pairs):
        linked: list[tuple[str, object]] = []
        if caption := normalised(pair.prompt):  # pairs without a caption have none in common
            linked.append(("caption", caption))
        for clip in (pair.video_1, pair.video_2):
            if clip not in keys:
                content = clip_content(clip)
                path = os.path.realpath(clip)
                if content is None:
                    unread.add(path)
                keys[clip] = ("path", path) if content is None else ("content", content)
            linked.append(keys[clip])
        for key in linked:
            parent[root(index)] = root(first_with.setdefault(key, index))
    components: dict[int, list[int]] = {}
    for index in range(len(pairs)):
        components.setdefault(root(index), []).append(index)
    return list(components.values()), len(unread)


def _drawn(seed: int, pairs: Sequence[Pair], component: Sequence[int]) -> bytes:
    """What orders components of one size: a digest of the seed and of the smallest id in the component."""
    name = min(pairs[index].id for index in component)
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def label_balance(pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """Dimension code -> how many labels say video 1, video 2 and tie, for the dimensions that have labels."""
    balance: dict[str, dict[str, int]] = {}
    for code in Dimension:
        counts = Counter((pair.labels or {}).get(code) for pair in pairs)
        if counts[0] or counts[1] or counts[2]:
            balance[code.value] = {"video_1": counts[1], "video_2": counts[2], "ties": counts[0]}
    return balance
