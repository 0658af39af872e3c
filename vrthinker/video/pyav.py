"""The CPU reader: PyAV, whose wheel carries FFmpeg.

Invariant: every frame that it returns was matched, by its presentation time or by counting from the file's
start, with the frame that was asked for. Seeking is an optimisation: whatever does not add up after a seek is
read again from the start, and only what fails there is an error.

What is noticed when: `probe` sees a missing index, a file that ends before its container says so, packets
that are marked damaged, missing or zeroed out, and a first frame that does not decode. Damage inside a packet
is seen when a frame is read that depends on it. Where a codec carries no checksum (VP8, VP9, GIF), a flipped
bit may decode to other pixels without anyone being able to tell.
"""

from __future__ import annotations

import operator
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vrthinker.video.clip import BreakError, OpenClip, check_file, open_clip, to_rgb
from vrthinker.video.frames import Frames
from vrthinker.video.images import ImageFolderReader
from vrthinker.video.index import ClipIndex, Keyframe, build_index, frames_in_order
from vrthinker.video.reader import VideoInfo, VideoPath, broken_error, checked_indices

_MAX_INDEXES = 1024
_SEEK_WORTH_FRAMES = 2
"""Decoding on is cheaper than a seek that skips no more frames than this."""

_Pixels = np.ndarray[Any, Any]
_Key = tuple[str, int, int, bool]


class PyAVReader:
    """A `VideoReader` on the CPU. Folders of images are read too.

    Args:
        image_fps: The frame rate that a folder of images is given.
    """

    def __init__(self, image_fps: float = 8.0) -> None:
        self._images = ImageFolderReader(image_fps)
        self._indexes: OrderedDict[_Key, ClipIndex] = OrderedDict()
        self._lock = threading.Lock()

    def probe(self, path: VideoPath, *, tolerate_truncation: bool = False) -> VideoInfo:
        """See `VideoReader.probe`. Remembers the answer until the file changes."""
        name = os.fspath(path)
        if os.path.isdir(name):
            return self._images.probe(name, tolerate_truncation=tolerate_truncation)
        return self._index(name, tolerate_truncation).info

    def frames_at(
        self, path: VideoPath, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """See `VideoReader.frames_at`."""
        name = os.fspath(path)
        if os.path.isdir(name):
            return self._images.frames_at(name, frame_indices, tolerate_truncation=tolerate_truncation)
        index = self._index(name, tolerate_truncation)
        wanted = checked_indices(name, frame_indices, index.info.n_frames)
        pixels = _read(name, index, sorted(set(wanted)))
        height, width = index.info.height, index.info.width
        data = np.empty((len(wanted), height, width, 3), dtype=np.uint8)
        for slot, frame_index in enumerate(wanted):
            data[slot] = pixels[frame_index]
        return Frames(data, wanted, tuple(index.info.pts_seconds[i] for i in wanted))

    def read_many(
        self, requests: Sequence[tuple[VideoPath, Sequence[int]]], *, tolerate_truncation: bool = False
    ) -> list[Frames]:
        """See `VideoReader.read_many`."""
        by_file: dict[str, list[int]] = {}
        for path, frame_indices in requests:
            by_file.setdefault(os.fspath(path), []).extend(frame_indices)
        read = {
            name: self.frames_at(name, list(dict.fromkeys(indices)), tolerate_truncation=tolerate_truncation)
            for name, indices in by_file.items()
        }
        return [_select(read[os.fspath(path)], frame_indices) for path, frame_indices in requests]

    def _index(self, name: str, tolerate_truncation: bool) -> ClipIndex:
        status = check_file(name)
        key = (os.path.abspath(name), status.st_mtime_ns, status.st_size, tolerate_truncation)
        with self._lock:
            if key in self._indexes:
                self._indexes.move_to_end(key)
                return self._indexes[key]
        index = build_index(name, tolerate_truncation=tolerate_truncation)
        with self._lock:
            self._indexes[key] = index
            while len(self._indexes) > _MAX_INDEXES:
                self._indexes.popitem(last=False)
        return index


def _select(frames: Frames, frame_indices: Sequence[int]) -> Frames:
    slots = [frames.frame_indices.index(operator.index(i)) for i in frame_indices]
    return Frames(
        frames.numpy()[slots],
        tuple(frames.frame_indices[slot] for slot in slots),
        tuple(frames.pts_seconds[slot] for slot in slots),
    )


def _read(path: str, index: ClipIndex, wanted: Sequence[int]) -> dict[int, _Pixels]:
    """Displayed pixels of the frames in `wanted`, which is ascending and without repeats."""
    if not wanted:
        return {}
    if index.ticks is not None:
        try:
            return _read_by_seeking(path, index, wanted)
        except BreakError:
            pass  # a bad seek or real damage: reading from the start tells which
    return _read_from_start(path, index, wanted)


def _read_from_start(path: str, index: ClipIndex, wanted: Sequence[int]) -> dict[int, _Pixels]:
    pixels: dict[int, _Pixels] = {}
    remaining = set(wanted)
    n_decoded = 0
    try:
        with open_clip(path, threads=1) as clip:
            for n_decoded, frame in enumerate(frames_in_order(clip, index.ticks, index.stored_size), start=1):
                if n_decoded - 1 in remaining:
                    pixels[n_decoded - 1] = to_rgb(frame, index.orientation)
                    remaining.discard(n_decoded - 1)
                    if not remaining:
                        return pixels
    except BreakError as error:
        raise broken_error(path, str(error), n_decoded) from error
    raise broken_error(path, "the frames after it do not decode", n_decoded)


def _read_by_seeking(path: str, index: ClipIndex, wanted: Sequence[int]) -> dict[int, _Pixels]:
    """Decodes only from the keyframe before each frame on.

    Raises:
        BreakError: Something does not add up; nothing that was read can be trusted.
    """
    pixels: dict[int, _Pixels] = {}
    with open_clip(path) as clip:
        for keyframe, run in _runs(index, wanted):
            needed = set(run)
            for frame_index, frame in _decode_run(clip, index, keyframe, run[-1]):
                if frame_index in needed:
                    pixels[frame_index] = to_rgb(frame, index.orientation)
    return pixels


def _runs(index: ClipIndex, wanted: Sequence[int]) -> Iterator[tuple[Keyframe, list[int]]]:
    """Splits frame indices where seeking to a later keyframe skips something worth skipping."""
    keyframe, run = index.keyframe_before(wanted[0]), [wanted[0]]
    for frame_index in wanted[1:]:
        nearest = index.keyframe_before(frame_index)
        if nearest.frame_index - run[-1] > _SEEK_WORTH_FRAMES:
            yield keyframe, run
            keyframe, run = nearest, []
        run.append(frame_index)
    yield keyframe, run


def _decode_run(clip: OpenClip, index: ClipIndex, start: Keyframe, last: int) -> Iterator[tuple[int, Any]]:
    """Yields (frame_index, frame) from a keyframe up to `last`, without a gap."""
    next_index = start.frame_index
    for frame in _decoded_after(clip, start):
        frame_index = index.position(frame.pts)
        if frame_index is None:
            raise BreakError(f"a frame came out that the index does not have (pts {frame.pts})")
        if frame_index < start.frame_index:
            continue  # belongs to the group of pictures before
        if frame_index != next_index or (frame.height, frame.width) != index.stored_size:
            raise BreakError(f"frame_index {next_index} did not come out")
        yield frame_index, frame
        if frame_index == last:
            return
        next_index += 1
    raise BreakError(f"frame_index {next_index} did not come out")


def _decoded_after(clip: OpenClip, start: Keyframe) -> Iterator[Any]:
    packets = clip.packets() if start.pts is None else clip.packets_from(start.pts, start.dts)
    started = False
    for packet in packets:
        started = started or packet.is_keyframe
        if started:
            yield from clip.decode(packet)
    yield from clip.decode(None)
