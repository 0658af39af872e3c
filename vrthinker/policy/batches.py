"""Training sequences as padded batches, each with the pixels of its distinct frames.

The sequences that step `n` trains on are a pure function of (seed, n), so that a resumed run continues
exactly where it was. A batch holds sequences of similar length, drawn from a shuffled window, so that there
is little padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from vrthinker.engine.base import FrameKey
from vrthinker.errors import VideoError
from vrthinker.policy.sequences import TrainingSequence
from vrthinker.video.frame_cache import FrameCache, file_state
from vrthinker.video.reader import VideoReader

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
        frames: The pixels of each distinct frame, uint8 `[height, width, 3]`.
        frame_order: For every showing in the batch, row by row, the index of its frame in `frames`.
        n_tokens: The number of tokens that are not padding.
        n_learned: The number of tokens that the loss falls on.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    loss_mask: torch.Tensor
    frames: tuple[np.ndarray, ...]
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

    def load(self, keys: Sequence[FrameKey]) -> list[np.ndarray]:
        """Loads the pixels of each key, uint8 `[height, width, 3]`.

        Raises:
            VideoError: A frame does not decode, or a clip changed since its key was made.
        """
        # Frames of one file, size and view come out of one decoding pass.
        by_pass: dict[FrameKey, list[FrameKey]] = {}
        for key in dict.fromkeys(keys):
            by_pass.setdefault(key._replace(frame_index=0), []).append(key)
        pixels: dict[FrameKey, np.ndarray] = {}
        decoded = self._pool.map(self._pixels, by_pass.values())
        for wanted, arrays in zip(by_pass.values(), decoded, strict=True):
            pixels.update(zip(wanted, arrays, strict=True))
        return [pixels[key] for key in keys]

    def _pixels(self, keys: Sequence[FrameKey]) -> list[np.ndarray]:
        first = keys[0]
        if first.file_state is not None and file_state(first.path) != first.file_state:
            problem = "changed since its traces were read; resume the run to have it checked again"
            raise VideoError(first.path, problem)
        indices, size = [key.frame_index for key in keys], (first.height, first.width)

        def read(tolerate_truncation: bool) -> list[np.ndarray]:
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


class BatchSource:
    """The batches of a training phase, step by step, decoded ahead of time.

    Args:
        sequences: The sequences to train on.
        loader: The loader of pixels.
        batch_size: The number of sequences per step.
        micro_batch_size: The number of sequences per forward. The gradients of a step's forwards are summed.
        seed: The seed of the order.
    """

    def __init__(
        self,
        sequences: Sequence[TrainingSequence],
        loader: FrameLoader,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
    ) -> None:
        self._sequences, self._loader = sequences, loader
        self._batch_size, self._micro, self._seed = batch_size, micro_batch_size, seed
        self._lengths = [len(sequence) for sequence in sequences]
        self._epochs: dict[int, list[list[int]]] = {}
        self._ahead: dict[int, Future[tuple[Batch, ...]]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vrthinker-batches")

    def indices(self, step: int) -> list[int]:
        """The indices of the sequences that the 0-based step `step` trains on."""
        per_epoch = len(self._epoch(0))
        return self._epoch(step // per_epoch)[step % per_epoch]

    def batches(self, step: int) -> tuple[Batch, ...]:
        """The micro-batches of a step.

        Raises:
            VideoError: A frame does not decode.
        """
        future = self._ahead.pop(step, None)
        for ahead in range(step + 1, step + 1 + _READ_AHEAD):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._pool.submit(self._make, ahead)
        return self._make(step) if future is None else future.result()

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

    def _make(self, step: int) -> tuple[Batch, ...]:
        chosen = [self._sequences[i] for i in self.indices(step)]
        parts = [chosen[i : i + self._micro] for i in range(0, len(chosen), self._micro)]
        return tuple(collate(part, self._loader.load) for part in parts)


def collate(
    sequences: Sequence[TrainingSequence], load: Callable[[Sequence[FrameKey]], list[np.ndarray]]
) -> Batch:
    """Pads sequences to the length of the longest and loads their distinct frames."""
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
    return Batch(
        token_ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        loss_mask=torch.from_numpy(mask),
        frames=tuple(load(list(distinct))),
        frame_order=tuple(distinct[key] for key in showings),
        n_tokens=sum(map(len, sequences)),
        # No token comes before a sequence's first token, so nothing predicts it.
        n_learned=int(mask[:, 1:].sum()),
    )


def _showings(sequences: Sequence[TrainingSequence]) -> Iterator[FrameKey]:
    for sequence in sequences:
        for _, key in sequence.frames:
            yield key
