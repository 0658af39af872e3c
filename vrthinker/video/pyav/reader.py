"""The CPU reader, which uses PyAV, whose wheel contains FFmpeg.

Invariant: every returned frame was identified as the requested one, by its presentation time or by counting
from the file's start. Seeking is only an optimisation: if anything is inconsistent after a seek, the frame is
read again from the start, and only a failure there is an error.

Damage is noticed at different times. `probe` notices a missing index, a file that ends before its container
says so, packets that are marked damaged, missing or zeroed out, and a first frame that does not decode.
Damage inside a packet is noticed when a frame that depends on it is read. No codec here has checksums, so a
decoder may also turn damaged bytes into wrong pixels unnoticed. (H.264, MPEG-4, MJPEG and AV1 notice most
damage; HEVC, VP8, VP9 and GIF little.)
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vrthinker.video import webp
from vrthinker.video.frames import Frames
from vrthinker.video.images import ImageFolderReader
from vrthinker.video.pyav.clip import BreakError, OpenClip, Orientation, check_file, open_clip
from vrthinker.video.pyav.index import ClipIndex, Keyframe, build_index, decoded, frames_in_order
from vrthinker.video.reader import VideoInfo, VideoPath, broken_error, checked_indices

_MAX_INDEXES = 256
_SEEK_WORTH_FRAMES = 2
"""The number of frames up to which decoding them is cheaper than skipping them by a seek."""

_Slots = Mapping[int, list[int]]
"""frame_index -> the places of that frame in the result."""
_Key = tuple[str, int, int, bool]


class PyAVReader:
    """A `VideoReader` on the CPU. Folders of images are read too.

    Args:
        image_fps: The frame rate of folders of images.
    """

    def __init__(self, image_fps: float = 8.0) -> None:
        self._images = ImageFolderReader(image_fps)
        self._indexes: OrderedDict[_Key, ClipIndex] = OrderedDict()
        self._lock = threading.Lock()

    def probe(self, path: VideoPath, *, tolerate_truncation: bool = False) -> VideoInfo:
        """Probes a file (see `VideoReader.probe`). The result is remembered until the file changes."""
        name = os.fspath(path)
        if os.path.isdir(name):
            return self._images.probe(name, tolerate_truncation=tolerate_truncation)
        # The result is remembered under the file's full name, but returned with the path that the caller
        # gave.
        return replace(self._index(name, tolerate_truncation).info, path=name)

    def frames_at(
        self, path: VideoPath, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Returns frames of a file (see `VideoReader.frames_at`)."""
        name = os.fspath(path)
        if os.path.isdir(name):
            return self._images.frames_at(name, frame_indices, tolerate_truncation=tolerate_truncation)
        index = self._index(name, tolerate_truncation)
        if index.info.codec == "webp":
            return webp.frames_at(replace(index.info, path=name), frame_indices)
        wanted = checked_indices(name, frame_indices, index.info.n_frames)
        data = np.empty((len(wanted), index.info.height, index.info.width, 3), dtype=np.uint8)
        _read(name, index, wanted, data)
        return Frames(data, wanted, tuple(index.info.pts_seconds[i] for i in wanted))

    def read_many(
        self, requests: Sequence[tuple[VideoPath, Sequence[int]]], *, tolerate_truncation: bool = False
    ) -> list[Frames]:
        """Returns frames of several files (see `VideoReader.read_many`)."""
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
        if webp.is_animated_webp(name):
            info = webp.probe(name, tolerate_truncation=tolerate_truncation)
            index = ClipIndex(info, Orientation(), (info.height, info.width))
        else:
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


def _read(path: str, index: ClipIndex, wanted: Sequence[int], data: np.ndarray[Any, Any]) -> None:
    """Fills `data[slot]` with the displayed pixels of frame `wanted[slot]`."""
    slots: dict[int, list[int]] = {}
    for slot, frame_index in enumerate(wanted):
        slots.setdefault(frame_index, []).append(slot)
    if not slots:
        return
    if index.ticks is not None:
        # A break is either a bad seek or real damage: reading from the start tells which.
        with contextlib.suppress(BreakError):
            return _read_by_seeking(path, index, slots, data)
    _read_from_start(path, index, slots, data)


def _read_from_start(path: str, index: ClipIndex, slots: _Slots, data: np.ndarray[Any, Any]) -> None:
    last = max(slots)
    n_decoded = 0
    try:
        with open_clip(path, end_byte=index.end_byte) as clip:
            for frame_index, frame in enumerate(frames_in_order(clip, index.ticks, index.stored_size)):
                if frame_index in slots:
                    data[slots[frame_index]] = clip.to_rgb(frame, index.orientation)
                if frame_index == last:
                    return
                n_decoded = frame_index + 1
    except BreakError as error:
        raise broken_error(path, str(error), n_decoded) from error
    raise broken_error(path, "the frames after it do not decode", n_decoded)


def _read_by_seeking(path: str, index: ClipIndex, slots: _Slots, data: np.ndarray[Any, Any]) -> None:
    """Decodes each frame from the keyframe before it.

    Raises:
        BreakError: Something is inconsistent, so that none of the read frames can be trusted.
    """
    with open_clip(path, end_byte=index.end_byte) as clip:
        if index.has_open_groups:
            clip.allow_missing_references()
        for keyframe, last in _runs(index, sorted(slots)):
            for frame_index, frame in _decode_run(clip, index, keyframe, last):
                if frame_index in slots:
                    data[slots[frame_index]] = clip.to_rgb(frame, index.orientation)


def _runs(index: ClipIndex, wanted: Sequence[int]) -> Iterator[tuple[Keyframe, int]]:
    """The runs of frames to decode, as (start, last frame), split where a seek saves enough frames."""
    keyframe, last = index.keyframe_before(wanted[0]), wanted[0]
    for frame_index in wanted[1:]:
        nearest = index.keyframe_before(frame_index)
        if nearest.frame_index - last > _SEEK_WORTH_FRAMES:
            yield keyframe, last
            keyframe = nearest
        last = frame_index
    yield keyframe, last


def _decode_run(clip: OpenClip, index: ClipIndex, start: Keyframe, last: int) -> Iterator[tuple[int, Any]]:
    """Yields (frame_index, frame) from a keyframe up to `last`, without a gap."""
    next_index = start.frame_index
    packets = clip.packets() if start.pts is None else clip.packets_from(start.pts, start.dts)
    for frame in decoded(clip, packets):
        frame_index = index.position(frame.pts)
        if frame_index is None:
            raise BreakError(f"a frame came out that the index does not have (pts {frame.pts})")
        if frame_index < start.frame_index:
            continue  # it belongs to the previous group of pictures
        if frame_index != next_index or (frame.height, frame.width) != index.stored_size:
            raise BreakError(f"frame_index {next_index} did not come out")
        yield frame_index, frame
        if frame_index == last:
            return
        next_index += 1
    raise BreakError(f"frame_index {next_index} did not come out")
