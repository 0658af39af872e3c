"""A group's trajectories as one packed sequence: the prefix tree of the contexts of its rounds.

`replay.py` finds these contexts. Tokens that contexts share are in the pack once. Every sampled token is a
*prediction*: the index of the token before it, in the context in which it was sampled, and its id.

Source: method sections 3 and 5; docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.markup import Markup
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.policy.prefix_tree import Node, PrefixTree
from vrthinker.policy.replay import Path, replayed_paths


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a pack, without a branch between them, that the model read in the same round.

    Attributes:
        start: The index of the first token.
        end: The index after the last token.
        subtree_end: The index after the last token of the last descendant.
        parent: The index of the segment that this one continues; -1 for a root.
        round: The round in which the model read the tokens.
    """

    start: int
    end: int
    subtree_end: int
    parent: int
    round: int


@dataclass(frozen=True)
class Pack:
    """A flattened prefix tree. A token sees its ancestors and itself, except those expired by its round.

    Attributes:
        token_ids: The token ids, int64 `[tokens]`. A parent's come before its children's.
        positions: The M-RoPE positions as sampled, int64 `[3, tokens]`.
        rounds: The round in which each token was read, int32 `[tokens]`.
        expires: The first round that each token is hidden from, int32 `[tokens]`.
        segments: The segments in order. Together they cover the tokens without overlap.
        frames: The distinct frames, by what makes their pixels distinct.
        frame_order: For each showing, in the order of the tokens, the index of its frame in `frames`.
        is_image: True at placeholders, bool `[tokens]`.
        sources: The index of the token that each distinct prediction is made from, int64 `[predictions]`.
        labels: The id that was sampled at each prediction, int64 `[predictions]`.
        sampled: For each trajectory, the indices of the predictions of its sampled tokens, round by round,
            int64 `[sampled]`. Equal predictions of several trajectories are stored once.
        trajectories: The numbers of the pack's trajectories in the group. A trajectory that was split
            (`rerender` only) is in several packs.
        rounds_of: For each trajectory, the round (from 0) of each sampled token, int32 `[sampled]`.
        n_context_tokens: The number of tokens of all contexts together, without sharing.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    rounds: np.ndarray
    expires: np.ndarray
    segments: tuple[Segment, ...]
    frames: tuple[FrameKey, ...]
    frame_order: tuple[int, ...]
    is_image: np.ndarray
    sources: np.ndarray
    labels: np.ndarray
    sampled: tuple[np.ndarray, ...]
    trajectories: tuple[int, ...]
    rounds_of: tuple[np.ndarray, ...]
    n_context_tokens: int

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        return len(self.token_ids)

    @cached_property
    def loss_mask(self) -> np.ndarray:
        """True at tokens of the pack that were sampled there, bool `[tokens]`.

        A round's last token is in the pack only if a later round follows. It is predicted in either case.
        """
        previous = np.arange(-1, self.n_tokens - 1)
        for segment in self.segments:
            # The first token of a segment follows the last token of the segment's parent.
            previous[segment.start] = self.segments[segment.parent].end - 1 if segment.parent >= 0 else -1
        base = 1 + max(int(self.token_ids.max()), int(self.labels.max(initial=0)))
        predictions = self.sources * base + self.labels
        mask: np.ndarray = (previous >= 0) & np.isin(previous * base + self.token_ids, predictions)
        return mask

    @cached_property
    def segment_of(self) -> np.ndarray:
        """The index of each token's segment, int32 `[tokens]`."""
        lengths = [segment.end - segment.start for segment in self.segments]
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)

    def visible(self, index: int) -> list[tuple[int, int]]:
        """The ranges of earlier tokens that a segment sees, ascending, with adjacent ranges joined."""
        segment = self.segments[index]
        lineage = []
        parent = segment.parent
        while parent >= 0:
            lineage.append(self.segments[parent])
            parent = lineage[-1].parent
        ranges: list[tuple[int, int]] = []
        for ancestor in reversed(lineage):
            for start, end in self._expiry_runs(ancestor):
                if segment.round < self.expires[start]:
                    if ranges and ranges[-1][1] == start:
                        start = ranges.pop()[0]
                    ranges.append((start, end))
        return ranges

    def _expiry_runs(self, segment: Segment) -> list[tuple[int, int]]:
        """A segment's tokens as runs of equal expiry."""
        part = self.expires[segment.start : segment.end]
        edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(part)]
        return [(segment.start + a, segment.start + b) for a, b in pairwise(edges)]


def pack_group(
    trajectories: Sequence[Trajectory],
    markup: Markup,
    frame_factor: tuple[int, int],
    *,
    max_tokens: int | None = None,
    tools: ToolRegistry | None = None,
) -> list[Pack]:
    """Packs the trajectories of a group.

    Args:
        trajectories: The trajectories. They usually belong to one item and share their first input, but need
            not.
        markup: The token ids of markers, and the encoding of text.
        frame_factor: The (height, width) of one merged patch in pixels.
        max_tokens: The most tokens of a pack. If the group has more, it is split, and tokens that packs share
            are repeated in each. A single longer context is a pack by itself.
        tools: The tools that the rounds could call; `select_frames` by default.

    Returns:
        The packs. Together they hold every sampled token of every trajectory once.

    Raises:
        InputError: A trajectory was not sampled (texts alone), was sampled under `renumber`, under a grammar
            or with a nucleus, contradicts itself (`record_checks.py`), or has a frame that is not on the
            model's grid.
        VideoError: A clip is not the one that was judged.
    """
    for trajectory in trajectories:
        _refuse_what_was_not_sampled(trajectory)
    paths = [replayed_paths(i, t, markup, frame_factor, tools=tools) for i, t in enumerate(trajectories)]
    return pack_paths(paths, max_tokens=max_tokens)


def pack_paths(trajectories: Sequence[Sequence[Path]], *, max_tokens: int | None = None) -> list[Pack]:
    """Packs the contexts of trajectories that are replayed already.

    Args:
        trajectories: For each trajectory its contexts. Its number in the packs is its place.
        max_tokens: The most tokens of a pack, as in `pack_group`.

    Returns:
        The packs. Together they hold every learned token of every trajectory once.
    """
    paths = [replace(path, trajectory=i) for i, own in enumerate(trajectories) for path in own]
    packs: list[Pack] = []
    building = _Building()
    for path in paths:
        if max_tokens is not None and building.paths and building.tokens_with(path) > max_tokens:
            packs.append(building.finish())
            building = _Building()
        building.add(path)
    if building.paths:
        packs.append(building.finish())
    return packs


def pack_tokens(paths: Sequence[Path]) -> int:
    """The number of tokens that one pack of these contexts has."""
    building = _Building()
    for path in paths:
        building.add(path)
    return building.tokens


def _refuse_what_was_not_sampled(trajectory: Trajectory) -> None:
    """Only what the policy sampled, by the distribution that training computes, belongs in a pack."""
    if any(record.token_ids is None for record in trajectory.rounds):
        raise InputError(
            f"trajectory {trajectory.id!r}: token_ids: got rounds of text alone, allowed in a pack: rounds "
            "that were sampled; a teacher's texts are learned by stage 1 and 2 (`learned_paths`)"
        )
    if trajectory.settings.top_p < 1:
        raise InputError(
            f"trajectory {trajectory.id!r}: top_p: got {trajectory.settings.top_p}, allowed in training: 1; "
            "recorded log-probabilities are those before the nucleus was cut out"
        )
    if trajectory.settings.guided:
        raise InputError(
            f"trajectory {trajectory.id!r}: guided: got rounds under a grammar, allowed in training: free "
            "ones; forced tokens were not sampled from the policy"
        )


# The pack


class _Building:
    """A pack that is being built."""

    def __init__(self) -> None:
        self.tree = PrefixTree()
        self.paths: list[tuple[Path, Node]] = []
        self.tokens = 0

    def tokens_with(self, path: Path) -> int:
        """The number of tokens that the pack would have if `path` were added."""
        return self.tokens + self._new_tokens(path)

    def add(self, path: Path) -> None:
        self.tokens += self._new_tokens(path)
        self.paths.append((path, self.tree.add(path.stretches)))

    def finish(self) -> Pack:
        return _flatten(self.tree, self.paths)

    def _new_tokens(self, path: Path) -> int:
        total = sum(map(len, path.stretches))
        return total - self.tree.shared(path.stretches)


def _flatten(tree: PrefixTree, paths: Sequence[tuple[Path, Node]]) -> Pack:
    nodes = list(tree.nodes())
    starts: dict[int, int] = {}
    offset = 0
    for node in nodes:
        starts[id(node)] = offset
        offset += len(node.stretch)
    stretches = [node.stretch for node in nodes]
    lengths = [len(stretch) for stretch in stretches]
    frames: dict[FrameKey, int] = {}
    order = []
    is_image = np.zeros(offset, dtype=bool)
    for node, stretch in zip(nodes, stretches, strict=True):
        if stretch.frame is not None:
            order.append(frames.setdefault(stretch.frame, len(frames)))
            start = starts[id(node)]
            is_image[start + 1 : start + len(stretch) - 1] = True
    sources, labels, sampled, rounds_of, owners = _predictions(paths, starts)
    return Pack(
        token_ids=np.concatenate([stretch.ids for stretch in stretches]),
        positions=np.concatenate([stretch.positions for stretch in stretches], axis=1),
        rounds=np.repeat(np.array([stretch.round for stretch in stretches], dtype=np.int32), lengths),
        expires=np.repeat(np.array([stretch.expires for stretch in stretches], dtype=np.int32), lengths),
        segments=_segments(nodes, starts),
        frames=tuple(frames),
        frame_order=tuple(order),
        is_image=is_image,
        sources=sources,
        labels=labels,
        sampled=sampled,
        trajectories=owners,
        rounds_of=rounds_of,
        n_context_tokens=sum(len(path.tokens) - 1 for path, _ in paths),
    )


def _segments(nodes: Sequence[Node], starts: dict[int, int]) -> tuple[Segment, ...]:
    """The segments of the nodes. A node joins its parent's if it is the only child, of the same round."""
    index_of: dict[int, int] = {}
    bounds: list[list[int]] = []  # start, end, parent, round
    for node in nodes:
        start = starts[id(node)]
        end = start + len(node.stretch)
        parent = node.parent
        if (
            parent is not None
            and len(parent.children) == 1
            and parent.stretch.round == node.stretch.round
            and starts[id(parent)] + len(parent.stretch) == start
        ):
            index = index_of[id(parent)]
            bounds[index][1] = end
        else:
            index = len(bounds)
            bounds.append([start, end, -1 if parent is None else index_of[id(parent)], node.stretch.round])
        index_of[id(node)] = index
    ends = [end for _, end, _, _ in bounds]
    for index in range(len(bounds) - 1, -1, -1):
        parent_index = bounds[index][2]
        if parent_index >= 0:
            ends[parent_index] = max(ends[parent_index], ends[index])
    return tuple(
        Segment(start, end, ends[index], parent_index, number)
        for index, (start, end, parent_index, number) in enumerate(bounds)
    )


def _predictions(
    paths: Sequence[tuple[Path, Node]], starts: dict[int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...], tuple[int, ...]]:
    """The distinct (source, label) pairs, and for each trajectory the indices of its tokens' pairs."""
    base = 1 + max((int(path.tokens.max()) for path, _ in paths), default=0)
    pairs: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    rounds: list[np.ndarray] = []
    for path, leaf in paths:
        place = _places(leaf, starts)
        for number, begin, end in path.learned:
            pairs.append(place[begin - 1 : end - 1] * base + path.tokens[begin:end])
            owners.append(np.full(end - begin, path.trajectory))
            rounds.append(np.full(end - begin, number, dtype=np.int32))
    distinct, index = np.unique(np.concatenate(pairs), return_inverse=True)
    owner, number_of = np.concatenate(owners), np.concatenate(rounds)
    trajectories = tuple(dict.fromkeys(path.trajectory for path, _ in paths))
    return (
        distinct // base,
        distinct % base,
        tuple(index[owner == trajectory] for trajectory in trajectories),
        tuple(number_of[owner == trajectory] for trajectory in trajectories),
        trajectories,
    )


def _places(leaf: Node, starts: dict[int, int]) -> np.ndarray:
    """The index in the pack of each token of a context."""
    ranges = []
    node: Node | None = leaf
    while node is not None:
        start = starts[id(node)]
        ranges.append(np.arange(start, start + len(node.stretch)))
        node = node.parent
    return np.concatenate(ranges[::-1])
