"""Each distinct frame is decoded once, within a bound."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import make_clip, read_number
from PIL import Image

from vrthinker.errors import VideoError
from vrthinker.video import FrameCache, Frames, open_reader, resize_frame
from vrthinker.video.pyav.reader import PyAVReader

SIZE = (56, 84)
FRAME_BYTES = 56 * 84 * 3


class CountingReader(PyAVReader):
    """The real reader, with a list of what it was asked to decode."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.asked: list[list[int]] = []
        self.seconds = seconds

    def frames_at(
        self, path: Any, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        self.asked.append(list(frame_indices))
        time.sleep(self.seconds)
        return super().frames_at(path, frame_indices, tolerate_truncation=tolerate_truncation)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_clip(tmp_path / "a.mp4", 30)


def numbers(frames: Sequence[np.ndarray[Any, Any]]) -> list[int]:
    return [read_number(frame) for frame in frames]


def test_only_what_is_missing_is_decoded(clip: Path) -> None:
    cache, reader = FrameCache(10**8), CountingReader()
    assert numbers(cache.get(clip, [3, 9, 3], SIZE, reader)) == [3, 9, 3]
    assert numbers(cache.get(clip, [9, 4, 3], SIZE, reader)) == [9, 4, 3]
    assert cache.get(clip, [9], SIZE, reader)[0] is cache.get(clip, [9], SIZE, reader)[0]
    assert reader.asked == [[3, 9], [4]]
    assert (cache.hits, cache.misses, len(cache)) == (1 + 2 + 2, 3, 3)
    assert cache.size_bytes == 3 * FRAME_BYTES
    other_size = cache.get(clip, [3], (28, 28), reader)[0]
    assert other_size.shape == (28, 28, 3)
    assert reader.asked[-1] == [3]
    original = PyAVReader().frames_at(clip, [4]).numpy()[0]
    assert np.array_equal(cache.get(clip, [4], SIZE, reader)[0], resize_frame(original, SIZE))
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)


def test_the_least_recently_used_goes_first(clip: Path) -> None:
    cache, reader = FrameCache(3 * FRAME_BYTES), CountingReader()
    cache.get(clip, [0, 1, 2], SIZE, reader)
    cache.get(clip, [0], SIZE, reader)
    cache.get(clip, [5], SIZE, reader)
    assert cache.size_bytes == 3 * FRAME_BYTES
    cache.get(clip, [0, 2, 5], SIZE, reader)
    assert reader.asked == [[0, 1, 2], [5]]
    cache.get(clip, [1], SIZE, reader)
    assert reader.asked[-1] == [1]


def test_more_than_the_cache_holds_still_comes_back(clip: Path) -> None:
    for max_bytes in (0, FRAME_BYTES - 1, 2 * FRAME_BYTES):
        cache = FrameCache(max_bytes)
        assert numbers(cache.get(clip, list(range(20)), SIZE, PyAVReader())) == list(range(20))
        assert cache.size_bytes <= max_bytes
    with pytest.raises(ValueError, match="max_bytes: got -1"):
        FrameCache(-1)


def test_a_cached_frame_does_not_keep_its_batch(clip: Path) -> None:
    frame = FrameCache(10**8).get(clip, [1, 2, 3], (64, 96), PyAVReader())[0]
    assert frame.base is None or frame.base.nbytes == frame.nbytes


def test_a_replaced_file_is_read_again(clip: Path, tmp_path: Path) -> None:
    cache, reader = FrameCache(10**8), PyAVReader()
    assert numbers(cache.get(clip, [3], SIZE, reader)) == [3]
    os.replace(make_clip(tmp_path / "b.mp4", 30, first_number=200), clip)
    assert numbers(cache.get(clip, [3], SIZE, reader)) == [203]


def test_threads_that_want_the_same_frames_decode_them_once(clip: Path) -> None:
    cache, reader = FrameCache(10**8), CountingReader(seconds=0.05)
    ready = threading.Barrier(8)

    def ask(_: int) -> list[int]:
        ready.wait()
        return numbers(cache.get(clip, [1, 7], SIZE, reader))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [[1, 7]] * 8
    assert reader.asked == [[1, 7]]
    assert (cache.hits, cache.misses) == (14, 2)


def test_a_failure_leaves_the_cache_usable(clip: Path) -> None:
    cache, reader = FrameCache(10**8), PyAVReader()
    for _ in range(2):
        with pytest.raises(VideoError, match="frame_index: got 99"):
            cache.get(clip, [1, 99], SIZE, reader)
    assert (len(cache), cache.misses) == (0, 0)
    assert numbers(cache.get(clip, [1], SIZE, reader)) == [1]
    with pytest.raises(VideoError, match="no such file"):
        cache.get("gone.mp4", [0], SIZE, reader)


def test_an_image_that_was_replaced_in_its_folder_is_read_again(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (32, 32), (index, index, index)).save(tmp_path / f"{index}.png")
    cache, reader = FrameCache(10**6), open_reader()
    assert cache.get(tmp_path, [1], (32, 32), reader)[0].max() == 1
    Image.new("RGB", (32, 32), (200, 200, 200)).save(tmp_path / "1.png")
    assert cache.get(tmp_path, [1], (32, 32), reader)[0].max() == 200
