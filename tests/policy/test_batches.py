"""Batches: which sequences, in which order, with which pixels."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import cut, make_clip, read_number
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled import Sampled

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import VideoError
from vrthinker.policy.batches import Batch, BatchSource, FrameLoader, batch_order, collate
from vrthinker.policy.forward import learned_hidden
from vrthinker.policy.sequences import TrainingSequence, training_sequences
from vrthinker.video.frame_cache import FrameCache, file_state
from vrthinker.video.open import open_reader
from vrthinker.video.reader import VideoPath, VideoReader

SEED = 20261121
MakeCheckpoint = Callable[[str], Path]
MakeEpisodes = Callable[[str, int | None], list[tuple[Trajectory, list[Sampled]]]]


class CountingReader:
    """The machine's reader, counting what it decodes."""

    def __init__(self) -> None:
        self._reader = open_reader()
        self.decoded: Counter[tuple[str, int]] = Counter()
        self.passes: Counter[str] = Counter()

    def frames_at(self, path: VideoPath, frame_indices: Sequence[int], **options: Any) -> Any:
        self.passes[str(path)] += 1
        self.decoded.update((str(path), index) for index in frame_indices)
        return self._reader.frames_at(path, frame_indices, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def loader_of(reader: Any = None, max_bytes: int = 64 << 20) -> FrameLoader:
    given: VideoReader = open_reader() if reader is None else reader
    return FrameLoader(given, FrameCache(max_bytes))


def sequence(length: int, frames: Sequence[FrameKey] = (), name: str = "s") -> TrainingSequence:
    """A sequence of counted tokens; the frames' places in it say nothing."""
    mask = np.zeros(length, dtype=bool)
    mask[length // 2 :] = True
    positions = np.arange(length)[None].repeat(3, 0)
    return TrainingSequence(
        name, np.arange(1, length + 1), positions, mask, tuple((0, key) for key in frames)
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "numbered.mp4", 24, size=(64, 96))


@pytest.fixture
def source(clip: Path) -> Iterator[Callable[..., BatchSource]]:
    """Makes sources and closes them."""
    made: list[BatchSource | FrameLoader] = []

    def make(
        sequences: Sequence[TrainingSequence], size: int = 4, micro: int = 4, seed: int = SEED
    ) -> BatchSource:
        loader = loader_of()
        found = BatchSource(sequences, loader, batch_size=size, micro_batch_size=micro, seed=seed)
        made.extend([found, loader])
        return found

    yield make
    for one in made:
        one.close()


# Order


@settings(derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    size=st.integers(1, 12),
    seed=st.integers(0, 1 << 40),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_is_a_pure_function_without_repeats(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    batches = batch_order(lengths, size, seed, epoch)
    assert batch_order(lengths, size, seed, epoch) == batches
    shown = [index for batch in batches for index in batch]
    assert len(set(shown)) == len(shown)
    assert set(shown) <= set(range(len(lengths)))
    assert all(type(index) is int for index in shown)
    if len(lengths) < size:
        assert [len(batch) for batch in batches] == [len(lengths)]
    else:
        assert [len(batch) for batch in batches] == [size] * (len(lengths) // size)


def test_epochs_and_seeds_differ() -> None:
    orders = {str(batch_order([5] * 40, 4, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_no_sequence_is_left_out_of_every_epoch() -> None:
    """Neither the longest nor any other: what does not fill a batch is left out by chance."""
    lengths = list(range(100, 135))  # 35: three of them do not fill a batch of 32
    left: Counter[int] = Counter()
    for epoch in range(200):
        shown = {index for batch in batch_order(lengths, 32, SEED, epoch) for index in batch}
        left.update(set(range(35)) - shown)
    assert sum(left.values()) == 600
    assert len(left) == 35
    # 600 draws over 35 sequences: 17 each, with a standard deviation of 4.
    assert max(left.values()) < 17 + 6 * 4


def test_similar_lengths_come_together_in_an_order_that_is_not_by_length() -> None:
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(100, 2000, 1600).tolist()
    batches = batch_order(lengths, 20, SEED, 0)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    padding = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) / sum(lengths) - 1
    assert np.median(spread) < 200
    assert padding < 0.1, "unsorted batches of 20 would be 85% padding"
    trends = []
    for epoch in range(20):  # 16 batches: one window
        means = [
            np.mean([lengths[i] for i in batch]) for batch in batch_order(lengths[:320], 20, SEED, epoch)
        ]
        trends.append(np.corrcoef(means, np.arange(16))[0, 1])
    assert abs(np.mean(trends)) < 0.25, "in order of length it would be 1"
    members = {tuple(sorted(batch)) for batch in batches}
    assert not members & {tuple(sorted(batch)) for batch in batch_order(lengths, 20, SEED, 1)}


# Steps


def ids_of(batches: Sequence[Batch]) -> list[list[int]]:
    return [row.tolist() for batch in batches for row in batch.token_ids]


def test_a_step_is_a_pure_function_of_its_number(source: Callable[..., BatchSource]) -> None:
    sequences = [sequence(length) for length in range(3, 25)]  # 5 batches of 4 an epoch, 2 left out
    straight = source(sequences)
    shown = [ids_of(straight.batches(step)) for step in range(12)]
    assert [straight.indices(step) for step in range(12)] == [
        index for epoch in range(3) for index in batch_order(range(3, 25), 4, SEED, epoch)
    ][:12]
    for begin in (0, 4, 7, 11):  # as a run that is resumed there
        resumed = source(sequences)
        assert [ids_of(resumed.batches(step)) for step in range(begin, 12)] == shown[begin:]
    assert ids_of(straight.batches(3)) == shown[3], "also backwards"
    assert len({str(ids) for ids in shown[:5]}) == 5
    assert shown[:5] != shown[5:10]
    assert ids_of(source(sequences, seed=SEED + 1).batches(0)) != shown[0]


def test_micro_batches_are_the_batch_in_parts(source: Callable[..., BatchSource]) -> None:
    sequences = [sequence(length) for length in range(5, 35)]
    for step in range(4):
        (whole,) = source(sequences, size=7, micro=7).batches(step)
        parts = source(sequences, size=7, micro=3).batches(step)
        assert [len(part.token_ids) for part in parts] == [3, 3, 1]
        assert sum(part.n_learned for part in parts) == whole.n_learned == int(whole.loss_mask.sum())
        assert sum(part.n_tokens for part in parts) == whole.n_tokens
        rows = [row[row > 0].tolist() for part in parts for row in part.token_ids]
        assert rows == [row[row > 0].tolist() for row in whole.token_ids]


def test_padding_is_on_the_right_and_counts_for_nothing() -> None:
    batch = collate([sequence(3), sequence(7), sequence(1)], lambda keys: [])
    assert batch.token_ids.tolist() == [[1, 2, 3, 0, 0, 0, 0], list(range(1, 8)), [1] + [0] * 6]
    assert batch.positions.shape == (3, 3, 7)
    assert batch.positions[:, 1].tolist() == [list(range(7))] * 3
    assert not batch.positions[:, 0, 3:].any()
    assert batch.loss_mask.sum(1).tolist() == [2, 4, 1]
    assert batch.n_tokens == 11
    assert batch.n_learned == 2 + 4, "a sequence's first token is predicted by nothing"


# Pixels


def test_frames_are_the_ones_that_were_asked_for(clip: Path) -> None:
    keys = [FrameKey(str(clip), index, 64, 96) for index in (7, 3, 7, 23, 0)] + [
        FrameKey(str(clip), 5, 112, 84)
    ]
    frames = loader_of().load(keys)
    assert [read_number(frame) for frame in frames] == [7, 3, 7, 23, 0, 5]
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 5 + [(112, 84, 3)]
    assert loader_of().load([]) == []


def test_a_frame_that_is_shown_often_is_decoded_once(clip: Path) -> None:
    other = shutil.copyfile(clip, clip.with_name("copy.mp4"))
    keys = [FrameKey(str(path), index, 64, 96) for path in (clip, other) for index in (2, 9, 4)]
    sequences = [sequence(9, [*keys, keys[0]]), sequence(5, keys[::-1]), sequence(4, keys[:2])]
    reader = CountingReader()
    loader = loader_of(reader)
    batch = collate(sequences, loader.load)
    assert len(batch.frames) == 6
    assert batch.frame_order == (0, 1, 2, 3, 4, 5, 0, 5, 4, 3, 2, 1, 0, 0, 1)
    assert [read_number(batch.frames[place]) for place in batch.frame_order[:7]] == [2, 9, 4, 2, 9, 4, 2]
    again = collate(sequences[:1], loader.load)
    assert all(np.array_equal(a, b) for a, b in zip(again.frames, batch.frames, strict=True))
    assert set(reader.decoded.values()) == {1}, "each frame once, in both batches together"
    assert set(reader.passes.values()) == {1}, "each file in one pass"


def test_a_frame_that_is_shown_often_is_encoded_once(
    checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    folder = checkpoint_of("nano")
    policy = VisionLanguageModel(folder, device=torch.device("cpu"), dtype=torch.float32)
    from vrthinker.engine.hf.markup import Markup

    markup = Markup(policy.tokenizer, policy.vocabulary_size)
    trajectories = [trajectory for trajectory, _ in episodes_of("nano", 1)]
    sequences = [s for trajectory in trajectories for s in training_sequences(trajectory, markup, (28, 28))]
    shown = [key for found in sequences for _, key in found.frames]
    encoded: list[int] = []
    policy.model.model.visual.register_forward_pre_hook(
        lambda module, args, named: encoded.append(len(named["grid_thw"])), with_kwargs=True
    )
    learned_hidden(policy, collate(sequences, loader_of().load))
    assert encoded == [len(set(shown))]
    assert encoded[0] < len(shown) / 2


def test_a_cache_that_keeps_nothing_still_gives_every_frame(clip: Path) -> None:
    keys = [FrameKey(str(clip), index, 64, 96) for index in (7, 3, 23)]
    assert [read_number(frame) for frame in loader_of(max_bytes=0).load(keys)] == [7, 3, 23]


def test_a_clip_that_disappears_is_one_clear_error(
    clip: Path, tmp_path: Path, source: Callable[..., BatchSource]
) -> None:
    gone = Path(shutil.copyfile(clip, tmp_path / "gone.mp4"))
    sequences = [sequence(4, [FrameKey(str(clip), 1, 64, 96)]), sequence(5, [FrameKey(str(gone), 2, 64, 96)])]
    made = source(sequences, size=1, micro=1)
    wanted = {step: sequences[made.indices(step)[0]].frames[0][1][0] == str(gone) for step in range(8)}
    first = next(step for step, is_gone in wanted.items() if not is_gone)
    os.unlink(gone)
    made.batches(first)
    for step in range(first + 1, 8):  # what was read ahead fails at its own step, and no other
        if wanted[step]:
            with pytest.raises(VideoError, match=r"gone\.mp4: ") as caught:
                made.batches(step)
            assert "\n" not in str(caught.value)
        else:
            (batch,) = made.batches(step)
            assert read_number(batch.frames[0]) == 1


def test_a_clip_that_changes_while_training_is_refused(clip: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.mp4"
    shutil.copyfile(clip, copy)
    key = FrameKey(str(copy), 3, 64, 96, None, file_state(str(copy)))
    loader = loader_of()
    assert [read_number(frame) for frame in loader.load([key])] == [3]
    shutil.copyfile(make_clip(tmp_path / "other.mp4", 24, size=(64, 96), first_number=100), copy)
    with pytest.raises(VideoError, match=r"copy\.mp4: changed since its traces were read"):
        loader.load([key])


def test_a_frame_that_is_not_there_is_one_clear_error(clip: Path) -> None:
    for index in (24, -1, 10**9):
        with pytest.raises(VideoError, match=r"numbered\.mp4: "):
            loader_of().load([FrameKey(str(clip), 3, 64, 96), FrameKey(str(clip), index, 64, 96)])


def test_a_clip_that_was_judged_up_to_its_break_gives_those_frames(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "whole.mkv", 40, size=(64, 96))
    broken = cut(whole, tmp_path / "cut.mkv", 0.5)
    n_frames = open_reader().probe(broken, tolerate_truncation=True).n_frames
    assert 4 < n_frames < 40
    frames = loader_of().load([FrameKey(str(broken), index, 64, 96) for index in (0, n_frames - 1)])
    assert [read_number(frame) for frame in frames] == [0, n_frames - 1]
    with pytest.raises(VideoError, match=r"cut\.mkv: "):
        loader_of().load([FrameKey(str(broken), 39, 64, 96)])
