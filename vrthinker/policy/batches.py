"""What each step of a training phase learns, read ahead; and training sequences as padded batches.

The units (traces, or contexts) that step `n` trains on are a pure function of (seed, n), so that a resumed
run continues exactly where it was. A batch holds units of similar length, drawn from a shuffled window, so
that there is little padding, and processes wait little for each other. `trace_packs.py` makes packs of traces
of them.

If several processes train together, they deal a step's micro-batches among them (`deal`). All processes then
compute equally many, and each has at least one frame: the layers of a sharded model exchange messages, so
that a process without pictures, or with one micro-batch less, would leave the others waiting. In padded
batches, what is missing is filled up with a blank frame that nobody sees, and with micro-batches in which
nothing is learned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from vrthinker.engine.base import FrameKey
from vrthinker.errors import VideoError
from vrthinker.policy.sequences import TrainingSequence
from vrthinker.video.frame_cache import FrameCache, file_state
from vrthinker.video.frames import Picture
from vrthinker.video.reader import VideoReader

Unit = TypeVar("Unit")
Made = TypeVar("Made")

_WINDOW_BATCHES = 16
_READ_AHEAD = 3
_DECODE_THREADS = 2


@dataclass(frozen=True)
class Batch:
    """A batch of right-padded sequences.

    Attributes:
        token_ids: The token ids, int64 `[batch, tokens]`.
        positions: The M-RoPE positions, int64 `[3, batch, tokens]`.
        loss_mask: True at the tokens that the loss falls on, bool `[batch, tokens]`.
        frames: The pixels of each distinct frame, uint8 `[height, width, 3]`. A blank frame that only keeps
            the vision tower running is not in `frame_order`.
        frame_order: For every showing in the batch, row by row, the index of its frame in `frames`.
        n_tokens: The number of tokens that are not padding.
        n_learned: The number of tokens that the loss falls on.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    loss_mask: torch.Tensor
    frames: tuple[Picture, ...]
    frame_order: tuple[int, ...]
    n_tokens: int
    n_learned: int


class FrameLoader:
    """Loads pixels by frame key, through a bounded cache, with one decoding pass per file.

    Args:
        reader: The reader that decodes clips.
        cache: The cache of resized frames.
    """

    def __init__(self, reader: VideoReader, cache: FrameCache) -> None:
        self._reader, self._cache = reader, cache
        self._pool = ThreadPoolExecutor(_DECODE_THREADS, thread_name_prefix="vrthinker-frames")

    def load(self, keys: Sequence[FrameKey]) -> list[Picture]:
        """Loads the pixels of each key, uint8 `[height, width, 3]`.

        Raises:
            VideoError: A frame does not decode, or a clip changed since its key was made.
        """
        # Frames of one file, size and view come out of one decoding pass.
        by_pass: dict[FrameKey, list[FrameKey]] = {}
        for key in dict.fromkeys(keys):
            by_pass.setdefault(key._replace(frame_index=0), []).append(key)
        pixels: dict[FrameKey, Picture] = {}
        decoded = self._pool.map(self._pixels, by_pass.values())
        for wanted, arrays in zip(by_pass.values(), decoded, strict=True):
            pixels.update(zip(wanted, arrays, strict=True))
        return [pixels[key] for key in keys]

    def _pixels(self, keys: Sequence[FrameKey]) -> list[Picture]:
        first = keys[0]
        if first.file_state is not None and file_state(first.path) != first.file_state:
            problem = "changed since its traces were read; resume the run to have it checked again"
            raise VideoError(first.path, problem)
        indices, size = [key.frame_index for key in keys], (first.height, first.width)

        def read(tolerate_truncation: bool) -> list[Picture]:
            return self._cache.get(first.path, indices, size, self._reader, tolerate_truncation, first.view)

        try:
            return read(False)
        except VideoError as error:
            # A trace may come from a truncated clip, of which only the readable part was judged.
            try:
                return read(True)
            except VideoError:
                raise error from None

    def close(self) -> None:
        """Stops the decoding threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def batch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches as lists of indices: shuffled, sorted by length within windows, shuffled again.

    The incomplete last batch of an epoch is dropped, unless it is the only batch. Which sequences are dropped
    is drawn at random before sorting, so each epoch drops different ones.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if len(order) > batch_size:
        order = order[: len(order) - len(order) % batch_size]
    batches: list[list[int]] = []
    window = _WINDOW_BATCHES * batch_size
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [[int(i) for i in part[a : a + batch_size]] for a in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def deal(costs: Sequence[int], processes: int) -> list[list[int]]:
    """Deals micro-batches to processes: evenly many, and about equal costs for all.

    The processes wait for each other in every layer. For that reason the micro-batches that are computed at
    the same time have similar costs. The largest of each round goes to the process with the least so far.

    Args:
        costs: The cost of each micro-batch, such as its tokens.
        processes: The number of processes.

    Returns:
        The indices for each process, in the order in which they are computed. The numbers of indices differ
        by at most 1. One process gets all of them in their own order.
    """
    if processes == 1:
        return [list(range(len(costs)))]
    dealt: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    largest_first = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    for start in range(0, len(costs), processes):
        idlest_first = sorted(range(processes), key=lambda process: (loads[process], process))
        for process, index in zip(idlest_first, largest_first[start : start + processes], strict=False):
            dealt[process].append(index)
            loads[process] += costs[index]
    return dealt


class StepSource(ABC, Generic[Unit, Made]):
    """What a training phase computes, step by step, read ahead of time.

    Args:
        units: What is learned: contexts, or whole traces.
        lengths: The number of tokens of each unit.
        learned: The number of learned tokens of each unit.
        batch_size: The number of units per step.
        micro_batch_size: The number of units per forward. The gradients of a step's forwards are summed.
        seed: The seed of the order.
        rank: The number of this process among those that train together, from 0.
        processes: The number of those processes.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        lengths: Sequence[int],
        learned: Sequence[int],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._rank, self._processes = rank, processes
        self._units, self._lengths, self._learned = units, lengths, learned
        self._batch_size, self._micro, self._seed = batch_size, micro_batch_size, seed
        self._epochs: dict[int, list[list[int]]] = {}
        self._ahead: dict[int, Future[tuple[Made, ...]]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vrthinker-batches")

    @property
    def count(self) -> int:
        """The number of units."""
        return len(self._units)

    def indices(self, step: int) -> list[int]:
        """The indices of the units that the 0-based step `step` trains on."""
        per_epoch = len(self._epoch(0))
        return self._epoch(step // per_epoch)[step % per_epoch]

    def batches(self, step: int) -> tuple[Made, ...]:
        """The micro-batches of a step that this process computes.

        Raises:
            VideoError: A frame does not decode.
        """
        future = self._ahead.pop(step, None)
        for ahead in range(step + 1, step + 1 + _READ_AHEAD):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._pool.submit(self._make, ahead)
        return self._make(step) if future is None else future.result()

    def n_learned(self, step: int) -> int:
        """The number of tokens that the loss of a step falls on, in all processes together."""
        return sum(self._learned[index] for index in self.indices(step))

    def close(self) -> None:
        """Stops reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _epoch(self, epoch: int) -> list[list[int]]:
        batches = self._epochs.get(epoch)
        if batches is None:
            batches = batch_order(self._lengths, self._batch_size, self._seed, epoch)
            # This is a single assignment because the thread that reads ahead runs this code too.
            self._epochs = {e: b for e, b in self._epochs.items() if e in (0, epoch - 1)} | {epoch: batches}
        return batches

    def _make(self, step: int) -> tuple[Made, ...]:
        chosen = [self._units[i] for i in self.indices(step)]
        parts = [chosen[i : i + self._micro] for i in range(0, len(chosen), self._micro)]
        return self._computed(parts)

    @abstractmethod
    def _computed(self, parts: Sequence[Sequence[Unit]]) -> tuple[Made, ...]:
        """What this process computes of a step's parts, equally many for every process."""


class BatchSource(StepSource[TrainingSequence, "Batch"]):
    """The padded batches of a training phase.

    Args:
        sequences: The sequences to train on.
        loader: The loader of pixels.
        batch_size: The number of sequences per step.
        micro_batch_size: The number of sequences per forward.
        seed: The seed of the order.
        rank: The number of this process among those that train together, from 0.
        processes: The number of those processes.
        blank: The frame that fills up batches without frames if there are several processes, uint8 `[height,
            width, 3]` on the model's grid.
    """

    def __init__(
        self,
        sequences: Sequence[TrainingSequence],
        loader: FrameLoader,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        blank: np.ndarray | None = None,
    ) -> None:
        if processes > 1 and blank is None:
            raise ValueError(f"blank: got None, wanted a frame for {processes} processes")
        super().__init__(
            sequences,
            [len(sequence) for sequence in sequences],
            [_n_learned(sequence.loss_mask) for sequence in sequences],
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            seed=seed,
            rank=rank,
            processes=processes,
        )
        self._loader, self._blank = loader, blank if processes > 1 else None

    def _computed(self, parts: Sequence[Sequence[TrainingSequence]]) -> tuple[Batch, ...]:
        dealt = deal([max(map(len, part)) * len(part) for part in parts], self._processes)
        batches = [collate(parts[index], self._loader.load, self._blank) for index in dealt[self._rank]]
        while self._blank is not None and len(batches) < max(map(len, dealt)):
            batches.append(_nothing_learned(self._blank))
        return tuple(batches)


def collate(
    sequences: Sequence[TrainingSequence],
    load: Callable[[Sequence[FrameKey]], list[Picture]],
    blank: np.ndarray | None = None,
) -> Batch:
    """Pads sequences to the length of the longest and loads their distinct frames.

    Args:
        sequences: The sequences of one batch.
        load: A function that loads the pixels of frames.
        blank: The frame that a batch without frames gets; none by default.
    """
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), np.int64)
    positions = np.zeros((3, len(sequences), longest), np.int64)
    mask = np.zeros((len(sequences), longest), bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence.token_ids
        positions[:, row, : len(sequence)] = sequence.positions
        mask[row, : len(sequence)] = sequence.loss_mask
    showings = list(_showings(sequences))
    distinct = {key: place for place, key in enumerate(dict.fromkeys(showings))}
    frames = tuple(load(list(distinct)))
    return Batch(
        token_ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        loss_mask=torch.from_numpy(mask),
        frames=frames if frames or blank is None else (blank,),
        frame_order=tuple(distinct[key] for key in showings),
        n_tokens=sum(map(len, sequences)),
        n_learned=sum(_n_learned(row) for row in mask),
    )


def _n_learned(loss_mask: np.ndarray) -> int:
    # No token comes before a sequence's first token, so nothing predicts it.
    return int(loss_mask[1:].sum())


def _nothing_learned(blank: np.ndarray) -> Batch:
    """A micro-batch that keeps all layers running, and whose loss is 0."""
    return Batch(
        token_ids=torch.zeros(1, 2, dtype=torch.int64),
        positions=torch.arange(2).expand(3, 1, 2).contiguous(),
        loss_mask=torch.zeros(1, 2, dtype=torch.bool),
        frames=(blank,),
        frame_order=(),
        n_tokens=0,
        n_learned=0,
    )


def _showings(sequences: Sequence[TrainingSequence]) -> Iterator[FrameKey]:
    for sequence in sequences:
        for _, key in sequence.frames:
            yield key
