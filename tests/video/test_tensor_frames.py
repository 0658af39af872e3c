"""Frames that are torch tensors, as a reader on a GPU gives them: the same pixels, down to the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import make_clip, read_number
from hypothesis import example, given
from hypothesis import strategies as st
from quick_judge import make_quick_judge

from vrthinker.engine.endpoint.wire import data_uri
from vrthinker.engine.hf.model import _stacked
from vrthinker.errors import MachineError, VideoError
from vrthinker.judge import Judge
from vrthinker.kernels.patchify.op import patchify
from vrthinker.video import FrameCache, Frames, ResizeSettings, Workspace, resize_frame, tensor_resize
from vrthinker.video.frames import on_host
from vrthinker.video.pyav.reader import PyAVReader
from vrthinker.video.tensor_resize import resize_tensor
from vrthinker.visibility import Region


class TensorReader(PyAVReader):
    """The CPU reader, with frames in tensors. On a machine with a GPU they would live there."""

    def frames_at(self, path: Any, frame_indices: Sequence[int], **options: Any) -> Frames:
        frames = super().frames_at(path, frame_indices, **options)
        return replace(frames, data=torch.from_numpy(frames.data))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "a.mp4", 12, (96, 140))


sizes = st.integers(1, 70)


@given(before=st.tuples(sizes, sizes), after=st.tuples(sizes, sizes), black_and_white=st.booleans())
@example(before=(68, 17), after=(49, 9), black_and_white=False)
@example(before=(29, 69), after=(3, 47), black_and_white=True)
@example(before=(64, 64), after=(64, 28), black_and_white=True)
@example(before=(62, 10), after=(3, 3), black_and_white=True)
@example(before=(54, 28), after=(2, 4), black_and_white=True)
def test_the_bits_are_pillows(before: tuple[int, int], after: tuple[int, int], black_and_white: bool) -> None:
    frames = np.random.default_rng(before).integers(0, 256, (2, *before, 3), dtype=np.uint8)
    if black_and_white:
        frames = (frames > 127).astype(np.uint8) * 255
    resized = resize_tensor(torch.from_numpy(frames), after)
    assert np.array_equal(resized.numpy(), [resize_frame(frame, after) for frame in frames])
    # Little may be left to the host, or this proves nothing: outputs so small that both orders give the same.
    told = tensor_resize._order(before, after, torch.device("cpu")) is not None
    assert told or before == after or min(*before, *after) < 8


def test_sizes_that_cannot_be_matched_are_resized_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 41, 37, 3), dtype=np.uint8))
    expected = [resize_frame(frame, (28, 56)) for frame in frames.numpy()]
    monkeypatch.setattr(tensor_resize, "_order", lambda before, after, device: None)
    assert np.array_equal(resize_tensor(frames, (28, 56)).numpy(), expected)


def test_many_frames_are_resized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (5, 40, 30, 3), dtype=np.uint8))
    whole = resize_tensor(frames, (28, 28))
    monkeypatch.setattr(tensor_resize, "_CHUNK_PIXELS", 2 * 40 * 30)
    assert torch.equal(resize_tensor(frames, (28, 28)), whole)


@pytest.mark.parametrize(
    ("frames", "size", "message"),
    [
        (torch.zeros(2, 8, 8, 4, dtype=torch.uint8), (4, 4), r"got torch.uint8 \[2, 8, 8, 4\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), (4, 4), r"got torch.uint8 \[8, 8, 3\]"),
        (torch.zeros(2, 8, 8, 3), (4, 4), "got torch.float32"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), (0, 4), r"size: got \(0, 4\)"),
    ],
)
def test_what_is_refused(frames: torch.Tensor, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_tensor(frames, size)


def test_the_cache_keeps_tensors_within_its_bound(clip: Path) -> None:
    settings = ResizeSettings(max_pixels=56 * 84)
    size = settings.grid_size(96, 140)
    cache = FrameCache(3 * size[0] * size[1] * 3)
    opened = Workspace.open(clip, clip, reader=TensorReader(), resize=settings, cache=cache)
    usual = Workspace.open(clip, clip, reader=PyAVReader(), resize=settings, cache=FrameCache(1 << 24))
    for wanted in ([5, 1, 5], [2, 9], [1, 2]):
        shown, expected = opened.pixels(wanted), usual.pixels(wanted)
        assert all(isinstance(frame, torch.Tensor) for frame in shown)
        assert all(
            np.array_equal(on_host(frame), other) for frame, other in zip(shown, expected, strict=True)
        )
        assert cache.size_bytes <= cache.max_bytes
    assert cache.hits > 0
    assert len(cache) == 3


@pytest.mark.parametrize("view", [Region(8, 16, 64, 100), None])
def test_regions_and_frames_that_have_their_size_already(clip: Path, view: Region | None) -> None:
    kept: list[list[Any]] = []
    for reader in (TensorReader(), PyAVReader()):
        cache = FrameCache(1 << 24)
        kept.append(cache.get(clip, [3, 7], (56, 84) if view else (96, 140), reader, view=view))
    assert all(np.array_equal(on_host(a), b) for a, b in zip(*kept, strict=True))
    if view is None:
        tensor = kept[0][0]
        assert read_number(on_host(tensor)) == 3
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # not a view of the decoder's batch
    with pytest.raises(VideoError, match=r"view: got .* allowed: a region within 96 x 140 pixels"):
        FrameCache(1 << 24).get(clip, [3], (56, 84), TensorReader(), view=Region(0, 0, 97, 10))


def test_a_gpu_without_memory_is_no_fault_of_the_clip(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tensor_resize, "resize_tensor", full)
    with pytest.raises(MachineError, match=r"a\.mp4: the GPU has too little memory .* --reader pyav"):
        FrameCache(1 << 20).get(clip, [3], (56, 84), TensorReader())


def test_the_vision_tower_takes_tensors_and_arrays(clip: Path) -> None:
    frames = list(PyAVReader().frames_at(clip, [4, 9]).numpy())
    expected = torch.from_numpy(np.stack(frames))
    for pictures in (frames, [torch.from_numpy(frame) for frame in frames], [frames[0], expected[1]]):
        assert torch.equal(_stacked(pictures, torch.device("cpu")), expected)


def test_a_picture_for_an_endpoint(clip: Path) -> None:
    frame = PyAVReader().frames_at(clip, [4]).numpy()[0]
    for image_format in ("png", "jpeg"):
        uris = [data_uri(pixels, (96, 140), image_format, 90) for pixels in (frame, torch.from_numpy(frame))]
        assert uris[0] == uris[1]


@pytest.mark.gpu
def test_a_gpu_resizes_to_the_bits_of_pillow_and_its_patches_are_those_of_a_cpu() -> None:
    frames = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (5, 270, 480, 3), dtype=np.uint8))
    for size in ((112, 196), (280, 504), (28, 476)):
        resized = resize_tensor(frames.cuda(), size)
        assert resized.is_cuda
        assert np.array_equal(resized.cpu().numpy(), [resize_frame(frame, size) for frame in frames.numpy()])
        settings = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
        statistics = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
        on_gpu = patchify(resized, **settings, **statistics)
        assert torch.equal(on_gpu.cpu(), patchify(resized.cpu(), **settings, **statistics))


@pytest.mark.slow
def test_the_verdict_is_that_of_frames_in_arrays(tmp_path: Path, clip: Path) -> None:
    other = make_clip(tmp_path / "b.mp4", 10, (64, 96), first_number=100)
    folder = make_quick_judge(tmp_path / "judge")
    records = []
    for reader in (PyAVReader(), TensorReader()):
        with Judge.from_pretrained(folder, reader=reader) as judge:
            verdict = judge("two clips", clip, other, seed=3)
        records.append(verdict.trajectory.model_dump(exclude={"latency_seconds"}))
    assert records[0]["rounds"]
    assert records[0] == records[1]
