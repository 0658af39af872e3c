"""A group's trajectories as one packed sequence: the prefix tree of what its rounds were sampled from.

What a round saw is read off the visibility record that the trajectory carries (`RoundRecord.expired`), by
replaying the trajectory through the engine's own `Context`; nothing here decides it again. Under `rerender`
every round whose context was written anew is a path of its own, at its own positions. Under `evict` an
episode is one path, and a token sees its ancestors minus the frames that had expired when it was read; a
round's last token is read together with what follows it, after the expiry, because that is when the engine
feeds it. `renumber` turns
keys in the cache, which no forward with one position per token computes: it is refused.

Every context token stands in the pack once. Every sampled token is a *prediction*: the place of the token
before it, in the context in which it was sampled, and its id.

Source: method sections 3 and 5; docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from vrthinker.engine.base import Message
from vrthinker.engine.hf.context import Context, FramePiece
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.positions import mrope_positions
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.train.prefix_tree import NEVER, Node, PrefixTree, Stretch
from vrthinker.train.sequences import FrameKey, frame_key, replayed_messages, round_ids
from vrthinker.visibility import ShownFrame, WindowMemory


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a pack without a branch between them, all read in one round.

    Attributes:
        start: Its first token.
        end: Behind its last token.
        subtree_end: Behind the last token of its last descendant.
        parent: Index of the segment that it continues; -1 for a root.
        round: In which round it was read.
    """

    start: int
    end: int
    subtree_end: int
    parent: int
    round: int


@dataclass(frozen=True)
class Pack:
    """One flattened prefix tree. A token sees its ancestors and itself, minus what expired before its round.

    Attributes:
        token_ids: int64 `[tokens]`; a parent's come before its children's.
        positions: int64 `[3, tokens]`, as sampled.
        rounds: int32 `[tokens]`, in which round each was read.
        expires: int32 `[tokens]`, the first round that each is hidden from.
        segments: In order; they tile the tokens.
        frames: Distinct frames, by what makes their pixels distinct.
        frame_order: Which of `frames` each showing is, in order of the tokens.
        is_image: bool `[tokens]`, True at placeholders.
        sources: int64 `[predictions]`, the token that each distinct prediction is made from.
        labels: int64 `[predictions]`, the id that was sampled there.
        sampled: Per trajectory the predictions of its sampled tokens, round by round, int64 `[sampled]`;
            equal ones of several trajectories are one prediction.
        trajectories: Which trajectories of the group these are; one that was split (`rerender` only) is in
            several packs.
        rounds_of: Per trajectory which of its rounds (from 0) each sampled token belongs to, int32
            `[sampled]`.
        n_context_tokens: Tokens of its contexts without sharing: of each path that was merged.
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
        """Tokens of the pack."""
        return len(self.token_ids)

    @cached_property
    def loss_mask(self) -> np.ndarray:
        """Bool `[tokens]`: tokens of the pack that were sampled there.

        A round's last token is one only where a later round follows; it is predicted all the same.
        """
        previous = np.arange(-1, self.n_tokens - 1)
        for segment in self.segments:
            # The first token of a segment follows the last one of the segment's parent.
            previous[segment.start] = self.segments[segment.parent].end - 1 if segment.parent >= 0 else -1
        base = 1 + max(int(self.token_ids.max()), int(self.labels.max(initial=0)))
        wanted = self.sources * base + self.labels
        found: np.ndarray = (previous >= 0) & np.isin(previous * base + self.token_ids, wanted)
        return found

    @cached_property
    def segment_of(self) -> np.ndarray:
        """int32 `[tokens]`, the segment of each."""
        lengths = [segment.end - segment.start for segment in self.segments]
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)

    def visible(self, index: int) -> list[tuple[int, int]]:
        """What a segment sees before itself: ranges of tokens, ascending; touching ones are one."""
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
        """A segment's tokens in runs of equal expiry."""
        part = self.expires[segment.start : segment.end]
        edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(part)]
        return [(segment.start + a, segment.start + b) for a, b in pairwise(edges)]


def pack_group(
    trajectories: Sequence[Trajectory],
    markup: Markup,
    frame_factor: tuple[int, int],
    *,
    max_tokens: int | None = None,
) -> list[Pack]:
    """Packs the trajectories of a group.

    Args:
        trajectories: Usually of one item, so that they share their first input; any will do.
        markup: The model's tokenizer side.
        frame_factor: (height, width) pixels of one merged patch.
        max_tokens: Most tokens of a pack. The group is split where it has more, and what packs share is in
            each. A single context that is longer is a pack by itself.

    Returns:
        The packs; together they hold every sampled token of every trajectory once.

    Raises:
        InputError: A trajectory was sampled under `renumber`, does not fit its own record, or has a frame
            that is not on the model's grid.
    """
    paths = [path for i, t in enumerate(trajectories) for path in _paths(i, t, markup, frame_factor)]
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


# Trajectories as paths


@dataclass
class _Path:
    """One context, up to its last sampled token, and what was sampled in it.

    Attributes:
        trajectory: Whose.
        stretches: The context without its last token, which predicts nothing.
        learned: (round index, first token, behind the last token) of each round that was sampled in it.
        tokens: The ids of the context.
    """

    trajectory: int
    stretches: list[Stretch]
    learned: list[tuple[int, int, int]]
    tokens: np.ndarray


def _paths(number: int, trajectory: Trajectory, markup: Markup, factor: tuple[int, int]) -> list[_Path]:
    memory = trajectory.settings.memory
    if memory == "renumber":
        raise InputError(
            f"trajectory {trajectory.id!r}: memory: got 'renumber', allowed in training: rerender, evict; "
            "its cache holds keys that were turned, which no packed forward reproduces"
        )
    first, outcomes = replayed_messages(trajectory, factor)
    window = WindowMemory(trajectory.settings.window)
    if trajectory.settings.guided:
        raise InputError(
            f"trajectory {trajectory.id!r}: guided: got rounds under a grammar, allowed in training: free "
            "ones; forced tokens were not sampled from the policy"
        )
    replay = _Replay(number, Context(markup, factor, memory), window)
    replay.read(first)
    for index, record in enumerate(trajectory.rounds):
        if index:
            try:
                replay.next_round(record.expired, outcomes[index - 1])
            except ValueError as error:
                raise InputError(f"trajectory {trajectory.id!r}, round {index + 1}: {error}") from None
        replay.write(round_ids(record, markup))
    return replay.finish()


@dataclass
class _Replay:
    """A trajectory run through the engine's context, with every stretch kept that was ever in it."""

    trajectory: int
    context: Context
    window: WindowMemory
    stretches: list[Stretch] = field(default_factory=list)
    learned: list[tuple[int, int, int]] = field(default_factory=list)
    paths: list[_Path] = field(default_factory=list)
    last: tuple[int, int] | None = None  # the last sampled token, read in the next round, and its position
    round: int = 1
    length: int = 0

    @property
    def evicts(self) -> bool:
        return self.context.memory == "evict"

    def read(self, messages: Sequence[Message]) -> None:
        seen = len(self.context.pieces)
        self.context.append_messages(messages)
        self._take(seen)

    def write(self, ids: Sequence[int]) -> None:
        if ids:
            self.learned.append((self.round - 1, self.length, self.length + len(ids)))
            start = self.context.next_position
            self.context.append_round(ids)
            self._text(np.asarray(ids[:-1], dtype=np.int64), start)
            self.last = ids[-1], start + len(ids) - 1
            self.length += 1
        else:
            self.last = None

    def next_round(self, expired: Sequence[ShownFrame], messages: Sequence[Message]) -> None:
        self.round += 1
        last_id = self.last[0] if self.last is not None else None
        anew = bool(expired) and not self.evicts
        if anew:
            self._end_path()
            self.context.expire(expired)
            self.stretches, self.length = [], 0
            self._take(0)
        elif self.evicts:
            self._check_expiry(set(expired))
            self.context.cached = len(self.context)
            self.context.expire(expired)
        if self.last is not None and not anew:
            self._text(np.asarray([self.last[0]], dtype=np.int64), self.last[1], counted=False)
        self.last = None
        seen = len(self.context.pieces)
        self.context.close_turn(last_id)
        self.context.append_messages(messages)
        self._take(seen)

    def finish(self) -> list[_Path]:
        self._end_path()
        return self.paths

    def _end_path(self) -> None:
        """Files the context so far, if anything was sampled in it."""
        if self.learned:
            last = [] if self.last is None else [self.last[0]]
            tokens = np.concatenate([*(s.ids for s in self.stretches), np.asarray(last, dtype=np.int64)])
            end = self.learned[-1][2]
            self.paths.append(
                _Path(self.trajectory, _up_to(self.stretches, end - 1), self.learned, tokens[:end])
            )
        self.learned = []

    def _take(self, first: int) -> None:
        """Adds the context's pieces from `first` on."""
        markup = self.context.markup
        for piece, start in zip(self.context.pieces[first:], self.context.starts[first:], strict=True):
            if isinstance(piece, FramePiece):
                pads = [markup.image_pad] * (len(piece) - 2)
                ids = np.asarray([markup.vision_start, *pads, markup.vision_end], dtype=np.int64)
                key, expires = frame_key(piece.segment), self._expires(piece.segment.shown)
                self.stretches.append(Stretch(ids, start, self._round, expires, key, piece.grid))
                self.length += len(ids)
            else:
                self._text(np.asarray(piece.ids, dtype=np.int64), start)

    def _text(self, ids: np.ndarray, start: int, *, counted: bool = True) -> None:
        """Adds text, joined to text before it that was read in the same round."""
        if not len(ids):
            return
        self.length += len(ids) if counted else 0
        if self.stretches:
            before = self.stretches[-1]
            if before.frame is None and before.round == self._round and before.start + len(before) == start:
                self.stretches[-1] = Stretch(np.concatenate([before.ids, ids]), before.start, before.round)
                return
        self.stretches.append(Stretch(ids, start, self._round))

    def _expires(self, shown: ShownFrame) -> int:
        """Known from the start: an episode that ends before shares the frame with one that goes on."""
        hidden_from = self.window.hidden_from(shown.outcome) if self.evicts else None
        return NEVER if hidden_from is None else hidden_from

    def _check_expiry(self, expired: set[ShownFrame]) -> None:
        """The record must say what the window says."""
        shown = {piece.segment.shown for _, piece in self.context.frames()}
        due = {one for one in shown if self._expires(one) == self.round}
        if expired != due:
            raise ValueError(f"expired: got {sorted(expired)}, the window says {sorted(due)}")

    @property
    def _round(self) -> int:
        return self.round if self.evicts else 0


def _up_to(stretches: Sequence[Stretch], length: int) -> list[Stretch]:
    """The first `length` tokens."""
    kept: list[Stretch] = []
    for stretch in stretches:
        if len(stretch) > length:
            if length:
                kept.append(stretch.cut(length)[0])
            break
        kept.append(stretch)
        length -= len(stretch)
    return kept


# Paths as a pack


class _Building:
    """A pack under way."""

    def __init__(self) -> None:
        self.tree = PrefixTree()
        self.paths: list[tuple[_Path, Node]] = []
        self.tokens = 0

    def tokens_with(self, path: _Path) -> int:
        """Tokens of the pack if `path` were added: what it does not share comes on top."""
        return self.tokens + self._new_tokens(path)

    def add(self, path: _Path) -> None:
        self.tokens += self._new_tokens(path)
        self.paths.append((path, self.tree.add(path.stretches)))

    def finish(self) -> Pack:
        return _flatten(self.tree, self.paths)

    def _new_tokens(self, path: _Path) -> int:
        total = sum(map(len, path.stretches))
        return total - self.tree.shared(path.stretches)


def _flatten(tree: PrefixTree, paths: Sequence[tuple[_Path, Node]]) -> Pack:
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
        positions=np.concatenate([_positions(stretch) for stretch in stretches], axis=1),
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


def _positions(stretch: Stretch) -> np.ndarray:
    if stretch.frame is not None:
        return mrope_positions([1, stretch.grid, 1], stretch.start)
    return mrope_positions([len(stretch)], stretch.start)


def _segments(nodes: Sequence[Node], starts: dict[int, int]) -> tuple[Segment, ...]:
    """Nodes joined where one is its parent's only child and was read in the same round."""
    index_of: dict[int, int] = {}
    found: list[list[int]] = []  # start, end, parent, round
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
            found[index][1] = end
        else:
            index = len(found)
            found.append([start, end, -1 if parent is None else index_of[id(parent)], node.stretch.round])
        index_of[id(node)] = index
    ends = [end for _, end, _, _ in found]
    for index in range(len(found) - 1, -1, -1):
        parent_index = found[index][2]
        if parent_index >= 0:
            ends[parent_index] = max(ends[parent_index], ends[index])
    return tuple(
        Segment(start, end, ends[index], parent_index, number)
        for index, (start, end, parent_index, number) in enumerate(found)
    )


def _predictions(
    paths: Sequence[tuple[_Path, Node]], starts: dict[int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...], tuple[int, ...]]:
    """Distinct (source, label) pairs, and per trajectory which of them its sampled tokens are."""
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
    """Where in the pack each token of a context stands."""
    ranges = []
    node: Node | None = leaf
    while node is not None:
        start = starts[id(node)]
        ranges.append(np.arange(start, start + len(node.stretch)))
        node = node.parent
    return np.concatenate(ranges[::-1])
