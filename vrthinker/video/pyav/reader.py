"""The CPU reader, which uses PyAV, whose wheel contains FFmpeg.

Invariant: every returned frame was identified as the requested one, by its presentation time or by counting
from the file's start. Seeking is only an optimisation: if anything is inconsistent after a seek, the frame is
read again from the start, and only a failure there is an error.

Damage is noticed at different times. `probe` notices a missing index, a file that ends before its container
says so, packets that are marked damaged, missing or zeroed out, and a first frame that does not decode. Of an
mp4 or mov file that is listed from its table, it looks at 1,024 packets at most, evenly spread.
Damage inside a packet is noticed when a frame that depends on it is read. No codec here has checksums, so a
decoder may also turn damaged bytes into wrong pixels unnoticed. (H.264, MPEG-4, MJPEG and AV1 notice most
damage; HEVC, VP8, VP9 and GIF little.)
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vrthinker import limits
from vrthinker.video import webp
from vrthinker.video.frames import Frames
from vrthinker.video.images import ImageFolderReader
from vrthinker.video.pyav.clip import BreakError, OpenClip, Orientation, check_file, open_clip
from vrthinker.video.pyav.index import ClipIndex, KeepClip, Keyframe, build_index
from vrthinker.video.pyav.index_cache import IndexCache
from vrthinker.video.pyav.pool import ClipPool
from vrthinker.video.pyav.sequence import decoded, frames_in_order
from vrthinker.video.reader import (
    ReadCounts,
    VideoInfo,
    VideoPath,
    broken_error,
    checked_indices,
    select_frames,
)

_SEEK_WORTH_FRAMES = 2
"""The number of frames up to which decoding them is cheaper than skipping them by a seek."""

_Slots = Mapping[int, list[int]]
"""frame_index -> the places of that frame in the result."""


class PyAVReader:
    """A `VideoReader` on the CPU. Folders of images are read too.

    Args:
        image_fps: The frame rate of folders of images.
        indexes: The memory of clips' indexes, which several readers may share; one of its own by default.

    Attributes:
        counts: What was read so far.
    """

    name = "pyav"

    def __init__(self, image_fps: float = 8.0, indexes: IndexCache | None = None) -> None:
        self._images = ImageFolderReader(image_fps)
        self._indexes = IndexCache() if indexes is None else indexes
        self._pool = ClipPool()
        self.counts = ReadCounts()

    def probe(self, path: VideoPath, *, tolerate_truncation: bool = False) -> VideoInfo:
        """Probes a file (see `VideoReader.probe`). The result is remembered until the file changes."""
        name = os.fspath(path)
        if os.path.isdir(name):
            return self._images.probe(name, tolerate_truncation=tolerate_truncation)
        # The result is remembered under the file's full name, but returned with the path that the caller
        # gave.
        return replace(self._index(name, tolerate_truncation)[1].info, path=name)

    def frames_at(
        self, path: VideoPath, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Returns frames of a file (see `VideoReader.frames_at`)."""
        name = os.fspath(path)
        if os.path.isdir(name):
            return self._images.frames_at(name, frame_indices, tolerate_truncation=tolerate_truncation)
        key, index = self._index(name, tolerate_truncation)
        if index.info.codec == "webp":
            return webp.frames_at(replace(index.info, path=name), frame_indices)
        wanted = checked_indices(name, frame_indices, index.info.n_frames)
        data = np.empty((len(wanted), index.info.height, index.info.width, 3), dtype=np.uint8)
        self._read(name, key, index, wanted, data)
        return Frames(data, wanted, tuple(index.info.pts_seconds[i] for i in wanted))

    def reader_of(self, path: VideoPath, *, tolerate_truncation: bool = False) -> str:
        """The name of the reader that shows the frames of a clip: this one."""
        return self.name

    def index_of(self, name: str, *, tolerate_truncation: bool = False) -> ClipIndex:
        """The index of a file, which is remembered until the file changes.

        Raises:
            VideoError: The file cannot be used.
        """
        return self._index(name, tolerate_truncation, keep_open=False)[1]

    def close_idle(self) -> None:
        """Closes the clips that are kept open for the next read. The reader can be used on."""
        self._pool.close_idle()

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
        return [select_frames(read[os.fspath(path)], frame_indices) for path, frame_indices in requests]

    def _index(
        self, name: str, tolerate_truncation: bool, *, keep_open: bool = True
    ) -> tuple[Hashable, ClipIndex]:
        """The index of a file, and the state of the file and of the limits for which it holds."""
        status = check_file(name)
        allowed = (limits.MAX_FRAMES.value, limits.MAX_CLIP_PIXELS.value, limits.MAX_SIDE_PIXELS.value)
        state = (status.st_mtime_ns, status.st_size)
        key = (os.path.abspath(name), state, tolerate_truncation, allowed)

        def keep(index: ClipIndex, clip: OpenClip, stack: contextlib.ExitStack) -> None:
            clip.counts = self.counts
            n_pixels = index.stored_size[0] * index.stored_size[1]
            self._pool.add((key, clip.marks_damage_late), clip, stack, n_pixels=n_pixels)

        make = functools.partial(_make_index, name, tolerate_truncation, keep if keep_open else None)
        return key, self._indexes.get(key, make)

    def _read(
        self, path: str, key: Hashable, index: ClipIndex, wanted: Sequence[int], data: np.ndarray[Any, Any]
    ) -> None:
        """Fills `data[slot]` with the displayed pixels of frame `wanted[slot]`."""
        slots: dict[int, list[int]] = {}
        for slot, frame_index in enumerate(wanted):
            slots.setdefault(frame_index, []).append(slot)
        if not slots:
            return
        self.counts.add(shown=len(slots))
        if index.ticks is not None:
            runs = list(_runs(index, sorted(slots)))
            lend = functools.partial(self._lend, path, key, index, runs)
            # A break is a seek that does not add up, pictures that were not as disposable as they said, or
            # real damage. Decoding everything after the seek, and then reading from the start, tells which.
            for skip in (True, False) if index.info.codec == "h264" else (False,):
                with contextlib.suppress(BreakError):
                    return _read_by_seeking(lend, index, runs, slots, data, skip)
        _read_from_start(path, index, slots, data, self.counts)

    def _lend(
        self, path: str, key: Hashable, index: ClipIndex, runs: Sequence[tuple[Keyframe, int]]
    ) -> contextlib.AbstractContextManager[OpenClip]:
        """Lends a clip that can decode these runs."""
        is_open = any(index.begins_openly(path, keyframe) for keyframe, _ in runs)

        @contextlib.contextmanager
        def opened() -> Iterator[OpenClip]:
            with open_clip(path, end_byte=index.end_byte) as clip:
                clip.counts = self.counts
                if is_open:
                    clip.allow_missing_references()
                yield clip

        return self._pool.borrow(
            (key, is_open),
            opened,
            n_frames=index.info.n_frames,
            n_pixels=index.stored_size[0] * index.stored_size[1],
            fresh=runs[0][0].pts is None,
        )


def _make_index(name: str, tolerate_truncation: bool, keep: KeepClip | None) -> ClipIndex:
    if webp.is_animated_webp(name):
        info = webp.probe(name, tolerate_truncation=tolerate_truncation)
        return ClipIndex(info, Orientation(), (info.height, info.width))
    return build_index(name, tolerate_truncation=tolerate_truncation, keep=keep)


def _read_from_start(
    path: str, index: ClipIndex, slots: _Slots, data: np.ndarray[Any, Any], counts: ReadCounts
) -> None:
    last = max(slots)
    n_decoded = 0
    try:
        with open_clip(path, end_byte=index.end_byte) as clip:
            clip.counts = counts
            for frame_index, frame in enumerate(frames_in_order(clip, index.ticks, index.stored_size)):
                if frame.key_frame:
                    clip.begin_group()
                if frame_index in slots:
                    _show(clip, frame, index, slots[frame_index], data)
                if frame_index == last:
                    return
                n_decoded = frame_index + 1
    except BreakError as error:
        raise broken_error(path, str(error), n_decoded) from error
    raise broken_error(path, "the frames after it do not decode", n_decoded)


def _read_by_seeking(
    lend: Callable[[], contextlib.AbstractContextManager[OpenClip]],
    index: ClipIndex,
    runs: Sequence[tuple[Keyframe, int]],
    slots: _Slots,
    data: np.ndarray[Any, Any],
    skip: bool,
) -> None:
    """Decodes each frame from the keyframe before it.

    Raises:
        BreakError: Something is inconsistent, so that none of the read frames can be trusted.
    """
    with lend() as clip:
        for keyframe, last in runs:
            clip.begin_group()
            for frame_index, frame in _decode_run(clip, index, keyframe, last, slots if skip else None):
                if frame.key_frame:
                    clip.begin_group()
                if frame_index in slots:
                    _show(clip, frame, index, slots[frame_index], data)


def _show(
    clip: OpenClip, frame: Any, index: ClipIndex, places: Sequence[int], data: np.ndarray[Any, Any]
) -> None:
    """Writes a frame's pixels to its places in `data`."""
    first, *others = places
    clip.to_rgb(frame, index.orientation, data[first])
    if others:
        data[others] = data[first]


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


def _decode_run(
    clip: OpenClip, index: ClipIndex, start: Keyframe, last: int, wanted: _Slots | None
) -> Iterator[tuple[int, Any]]:
    """Yields (frame_index, frame) from a keyframe up to `last`, in order.

    With `wanted`, pictures on which no other depends are left out unless they are wanted.
    """
    next_index = start.frame_index
    packets = clip.packets() if start.pts is None else clip.packets_from(start.pts, start.dts)
    skipped: set[int] = set()
    if wanted is not None:
        packets = _without_disposable(clip, index, packets, wanted, skipped)
    for frame in decoded(clip, packets):
        frame_index = index.position(frame.pts)
        if frame_index is None:
            raise BreakError(f"a frame came out that the index does not have (pts {frame.pts})")
        if frame_index < start.frame_index:
            continue  # it belongs to the previous group of pictures
        while next_index in skipped:
            next_index += 1
        if frame_index != next_index or (frame.height, frame.width) != index.stored_size:
            raise BreakError(f"frame_index {next_index} did not come out")
        yield frame_index, frame
        if frame_index == last:
            return
        next_index += 1
    raise BreakError(f"frame_index {next_index} did not come out")


def _without_disposable(
    clip: OpenClip, index: ClipIndex, packets: Iterator[Any], wanted: _Slots, skipped: set[int]
) -> Iterator[Any]:
    """The packets that the wanted frames may depend on. What is left out is added to `skipped`."""
    for packet in packets:
        frame_index = index.position(packet.pts)
        if frame_index is not None and frame_index not in wanted and clip.is_disposable(packet):
            skipped.add(frame_index)
        else:
            yield packet
