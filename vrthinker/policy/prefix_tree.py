"""A prefix tree of contexts: every token that contexts share is there once.

A context is a list of stretches. Text is compared token by token, so that contexts part wherever they differ;
a frame is shared whole or not at all. Two tokens are the same when everything before them is, and they have
the same id, position, pixels and visibility.

Invariant: a node's tokens were all read in the same round, so that one set of ancestors is visible to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.positions import Positions, mrope_positions

NEVER = np.iinfo(np.int32).max
"""The round in which a token that does not expire is hidden."""


@dataclass(frozen=True)
class Stretch:
    """Some text, or one frame with its two markers.

    Attributes:
        ids: int64 `[tokens]`.
        start: Position of its first token; text counts on from there.
        round: In which round it was read: as queries, its tokens see what was live then. 0 where nothing in
            the context ever expires.
        expires: First round to which its tokens are hidden.
        frame: Whose pixels stand at its placeholders; None for text.
        grid: (height, width) of the frame in merged patches.
    """

    ids: np.ndarray
    start: int
    round: int = 0
    expires: int = NEVER
    frame: FrameKey | None = None
    grid: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def key(self) -> tuple[object, ...]:
        """Children of one node differ in it. Texts with the same key share at least their first token."""
        if self.frame is not None:
            return (self.frame, self.start, self.round, self.expires)
        return (int(self.ids[0]), self.start, self.round)

    @property
    def positions(self) -> Positions:
        """int64 `[3, tokens]`."""
        if self.frame is None:
            return mrope_positions([len(self)], self.start)
        return mrope_positions([1, self.grid, 1], self.start)

    @property
    def next_position(self) -> int:
        """The position of the token that follows."""
        return self.start + (len(self) if self.frame is None else max(self.grid) + 2)

    def cut(self, at: int) -> tuple[Stretch, Stretch]:
        """A text before and from token `at` on."""
        assert self.frame is None
        return (
            Stretch(self.ids[:at], self.start, self.round),
            Stretch(self.ids[at:], self.start + at, self.round),
        )


@dataclass
class Node:
    """A stretch in the tree.

    Attributes:
        stretch: What it holds.
        parent: None for the first of a context.
        children: By their keys.
    """

    stretch: Stretch
    parent: Node | None
    children: dict[tuple[object, ...], Node] = field(default_factory=dict)


class PrefixTree:
    """Contexts that were added, merged. There may be more than one root."""

    def __init__(self) -> None:
        self.roots: dict[tuple[object, ...], Node] = {}

    def add(self, context: Sequence[Stretch]) -> Node:
        """Adds a context of at least one token.

        Returns:
            The node that its last token is the last of. It stays so, whatever is added later.
        """
        node: Node | None = None
        pending = [stretch for stretch in reversed(context) if len(stretch)]
        while pending:
            stretch = pending.pop()
            siblings = self.roots if node is None else node.children
            found = siblings.get(stretch.key)
            if found is None:
                node = siblings[stretch.key] = Node(stretch, node)
                continue
            if stretch.frame is None:
                shared = _common(stretch.ids, found.stretch.ids)
                if shared < len(found.stretch):
                    found = self._split(found, shared)
                if shared < len(stretch):
                    pending.append(stretch.cut(shared)[1])
            node = found
        assert node is not None, "a context has tokens"
        return node

    def shared(self, context: Sequence[Stretch]) -> int:
        """How many of a context's first tokens are in the tree."""
        siblings, tokens = self.roots, 0
        pending = [stretch for stretch in reversed(context) if len(stretch)]
        while pending:
            stretch = pending.pop()
            found = siblings.get(stretch.key)
            if found is None:
                break
            if stretch.frame is not None:
                tokens += len(stretch)
            else:
                common = _common(stretch.ids, found.stretch.ids)
                tokens += common
                if common < len(stretch):
                    pending.append(stretch.cut(common)[1])
                if common < len(found.stretch):
                    # Inside this node: what follows goes on in its text, or parts from it here.
                    rest = found.stretch.cut(common)[1]
                    siblings = {rest.key: Node(rest, None, found.children)}
                    continue
            siblings = found.children
        return tokens

    def nodes(self) -> Iterator[Node]:
        """All nodes, a parent before its children, and each with its descendants right behind it."""
        pending = list(reversed(self.roots.values()))
        while pending:
            node = pending.pop()
            yield node
            pending += reversed(node.children.values())

    def _split(self, node: Node, at: int) -> Node:
        """Splits a text; the node itself keeps the later part, so that it still ends where it did."""
        before, behind = node.stretch.cut(at)
        siblings = self.roots if node.parent is None else node.parent.children
        upper = siblings[node.stretch.key] = Node(before, node.parent)
        node.stretch, node.parent = behind, upper
        upper.children[behind.key] = node
        return upper


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens are the same from the start."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length
