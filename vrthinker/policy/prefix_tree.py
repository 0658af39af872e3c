"""A prefix tree of contexts, in which tokens that contexts share are stored once.

A context is a list of stretches. Text is compared token by token, so that contexts branch at their first
difference. A frame is either shared whole or not at all. Two tokens are the same if they have the same id,
position, pixels and visibility, and all tokens before them are the same.

Invariant: the model read a node's tokens in the same round, so that all of them see the same ancestors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.positions import Positions, mrope_positions

NEVER = np.iinfo(np.int32).max
"""The value of `expires` of a token that never expires."""


@dataclass(frozen=True)
class Stretch:
    """A piece of text, or one frame with its two markers.

    Attributes:
        ids: The token ids, int64 `[tokens]`.
        start: The position of the first token. Text continues from it in steps of one.
        round: The round in which the model read the tokens, which decides what they see. 0 if nothing in the
            context ever expires.
        expires: The first round from which the tokens are hidden.
        frame: The key of the frame at the placeholders; None for text.
        grid: The (height, width) of the frame in merged patches.
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
        """A key that differs between children of one node. Texts with equal keys share their first token."""
        if self.frame is not None:
            return (self.frame, self.start, self.round, self.expires)
        return (int(self.ids[0]), self.start, self.round)

    @property
    def positions(self) -> Positions:
        """The M-RoPE positions of the tokens, int64 `[3, tokens]`."""
        if self.frame is None:
            return mrope_positions([len(self)], self.start)
        return mrope_positions([1, self.grid, 1], self.start)

    @property
    def next_position(self) -> int:
        """The position of the token that follows."""
        return self.start + (len(self) if self.frame is None else max(self.grid) + 2)

    def cut(self, at: int) -> tuple[Stretch, Stretch]:
        """The text before token `at`, and the text from token `at` on."""
        assert self.frame is None
        return (
            Stretch(self.ids[:at], self.start, self.round),
            Stretch(self.ids[at:], self.start + at, self.round),
        )


@dataclass
class Node:
    """A node of the tree.

    Attributes:
        stretch: The stretch that the node holds.
        parent: The parent; None for the first node of a context.
        children: The children by their keys.
    """

    stretch: Stretch
    parent: Node | None
    children: dict[tuple[object, ...], Node] = field(default_factory=dict)


class PrefixTree:
    """The merged contexts that were added. There may be more than one root."""

    def __init__(self) -> None:
        self.roots: dict[tuple[object, ...], Node] = {}

    def add(self, context: Sequence[Stretch]) -> Node:
        """Adds a context of at least one token.

        Returns:
            The node whose last token is the context's last token. Contexts that are added later do not change
            that.
        """
        node: Node | None = None
        pending = [stretch for stretch in reversed(context) if len(stretch)]
        while pending:
            stretch = pending.pop()
            siblings = self.roots if node is None else node.children
            child = siblings.get(stretch.key)
            if child is None:
                node = siblings[stretch.key] = Node(stretch, node)
                continue
            if stretch.frame is None:
                shared = _common(stretch.ids, child.stretch.ids)
                if shared < len(child.stretch):
                    child = self._split(child, shared)
                if shared < len(stretch):
                    pending.append(stretch.cut(shared)[1])
            node = child
        assert node is not None, "a context has tokens"
        return node

    def shared(self, context: Sequence[Stretch]) -> int:
        """The number of a context's first tokens that are in the tree."""
        siblings, tokens = self.roots, 0
        pending = [stretch for stretch in reversed(context) if len(stretch)]
        while pending:
            stretch = pending.pop()
            child = siblings.get(stretch.key)
            if child is None:
                break
            if stretch.frame is not None:
                tokens += len(stretch)
            else:
                common = _common(stretch.ids, child.stretch.ids)
                tokens += common
                if common < len(stretch):
                    pending.append(stretch.cut(common)[1])
                if common < len(child.stretch):
                    # The match ends inside this node: later tokens may continue in its text or differ.
                    rest = child.stretch.cut(common)[1]
                    siblings = {rest.key: Node(rest, None, child.children)}
                    continue
            siblings = child.children
        return tokens

    def nodes(self) -> Iterator[Node]:
        """All nodes in depth-first order: each is followed by its descendants."""
        pending = list(reversed(self.roots.values()))
        while pending:
            node = pending.pop()
            yield node
            pending += reversed(node.children.values())

    def _split(self, node: Node, at: int) -> Node:
        """Splits a text. The node keeps the later part, so that its last token stays the same."""
        before, behind = node.stretch.cut(at)
        siblings = self.roots if node.parent is None else node.parent.children
        upper = siblings[node.stretch.key] = Node(before, node.parent)
        node.stretch, node.parent = behind, upper
        upper.children[behind.key] = node
        return upper


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """The number of equal tokens at the start of both."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length
