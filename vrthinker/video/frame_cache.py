"""A bounded cache of resized frames, so that each distinct frame is decoded once.

Invariant: the pixels in the cache never exceed `max_bytes`, and a returned frame equals what the reader would
decode now: if a file was replaced (its modification time or size differs), it is read again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from vrthinker.errors import MachineError, VideoError
from vrthinker.video.frames import Frames, Picture, on_host
from vrthinker.video.reader import VideoPath, VideoReader
from vrthinker.video.resize import resize_frame
from vrthinker.visibility import Region

_FileState = tuple[int, int]
_Key = tuple[str, _FileState, int, int, int, Region | None]


class FrameCache:
    """A cache that drops the least recently used frames first. It is thread-safe.

    The returned arrays are shared with the cache: copy an array before writing into it. Frames of a reader
    that decodes on a GPU are kept there, so the bound is then one of the GPU's memory.

    Attributes:
        max_bytes: The most bytes of pixels that are kept.
        hits: The number of requested frames that were in the cache.
        misses: The number of requested frames that had to be decoded.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes: got {max_bytes}, allowed: 0 (keep nothing) or above")
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._size_bytes = 0
        self._frames: OrderedDict[_Key, Picture] = OrderedDict()
        self._lock = threading.Lock()
        self._file_locks: dict[str, tuple[threading.Lock, int]] = {}

    @property
    def size_bytes(self) -> int:
        """The number of bytes of pixels in the cache."""
        return self._size_bytes

    def __len__(self) -> int:
        return len(self._frames)

    def clear(self) -> None:
        """Removes every frame. The counters are kept."""
        with self._lock:
            self._frames.clear()
            self._size_bytes = 0

    def get(
        self,
        path: VideoPath,
        frame_indices: Sequence[int],
        size: tuple[int, int],
        reader: VideoReader,
        tolerate_truncation: bool = False,
        view: Region | None = None,
    ) -> list[Picture]:
        """Returns resized frames of one file. Missing frames are decoded in one pass.

        Args:
            path: The file, or the folder of images.
            frame_indices: The 0-based positions in the file, in any order; repeats are allowed.
            size: The (height, width) in pixels that every frame is resized to.
            reader: The reader that decodes missing frames.
            tolerate_truncation: Whether the reader may read a damaged file up to the break.
            view: The region that is cut out before resizing; None for the whole frame.

        Returns:
            The frames, uint8 `[height, width, 3]` each, in the order of the indices: arrays, or tensors on
            the GPU that the reader decodes on.

        Raises:
            VideoError: The reader could not give a frame, or the region does not lie within it.
        """
        name = os.fspath(path)
        lock = self._borrow_file_lock(name)
        try:
            # Only one thread at a time decodes a file, so that a frame wanted by two threads is decoded once.
            with lock:
                return self._get(name, frame_indices, size, reader, tolerate_truncation, view)
        finally:
            self._return_file_lock(name)

    def _get(
        self,
        name: str,
        frame_indices: Sequence[int],
        size: tuple[int, int],
        reader: VideoReader,
        tolerate_truncation: bool,
        view: Region | None,
    ) -> list[Picture]:
        state = file_state(name)
        frames_by_index: dict[int, Picture] = {}
        with self._lock:
            for index in dict.fromkeys(frame_indices):
                key = (name, state, index, *size, view)
                if key in self._frames:
                    self._frames.move_to_end(key)
                    frames_by_index[index] = self._frames[key]
            missing = [index for index in dict.fromkeys(frame_indices) if index not in frames_by_index]
            self.hits += len(frame_indices) - len(missing)
        if missing:
            decoded = reader.frames_at(name, missing, tolerate_truncation=tolerate_truncation)
            for index, frame in zip(missing, _resized(name, decoded, size, view), strict=True):
                frames_by_index[index] = frame
            with self._lock:
                self.misses += len(missing)
                for index in missing:
                    self._keep((name, state, index, *size, view), frames_by_index[index])
        return [frames_by_index[index] for index in frame_indices]

    def _keep(self, key: _Key, frame: Picture) -> None:
        size_bytes = int(frame.nbytes)
        if size_bytes > self.max_bytes or key in self._frames:
            return
        self._frames[key] = frame
        self._size_bytes += size_bytes
        while self._size_bytes > self.max_bytes:
            _, dropped = self._frames.popitem(last=False)
            self._size_bytes -= int(dropped.nbytes)

    def _borrow_file_lock(self, name: str) -> threading.Lock:
        with self._lock:
            lock, users = self._file_locks.get(name, (threading.Lock(), 0))
            self._file_locks[name] = (lock, users + 1)
            return lock

    def _return_file_lock(self, name: str) -> None:
        with self._lock:
            lock, users = self._file_locks[name]
            if users > 1:
                self._file_locks[name] = (lock, users - 1)
            else:
                del self._file_locks[name]


def _resized(name: str, frames: Frames, size: tuple[int, int], view: Region | None) -> Iterator[Picture]:
    """The frames after resizing, where they are: in the host's memory or on a GPU.

    No frame is a view of the decoder's batch, which would keep the whole batch in memory. Regions, whose
    sizes are all different, are resized on the host.
    """
    import numpy as np

    data = frames.data
    if isinstance(data, np.ndarray):
        for frame in data:
            seen = frame if view is None else _cut_out(name, frame, view)
            resized = resize_frame(seen, size)
            yield resized.copy() if resized is seen else resized
        return
    import torch

    from vrthinker.video.tensor_resize import resize_tensor

    if view is None:
        try:
            yield from (picture.clone() for picture in resize_tensor(data, size))
        except torch.OutOfMemoryError as error:
            reason = "the GPU has too little memory to resize its frames; --reader pyav decodes on the CPU"
            raise MachineError(str(VideoError(name, reason))) from error
        return
    for picture in data:
        seen = on_host(_cut_out(name, picture, view))
        yield torch.from_numpy(resize_frame(seen, size).copy()).to(data.device)


def _cut_out(name: str, frame: Picture, view: Region) -> Picture:
    height, width = frame.shape[:2]
    if not (0 <= view.top < view.bottom <= height and 0 <= view.left < view.right <= width):
        raise VideoError(name, f"view: got {tuple(view)}, allowed: a region within {height} x {width} pixels")
    return frame[view.top : view.bottom, view.left : view.right]


def file_state(name: str) -> _FileState:
    """Modification time (ns) and size (bytes) of a file, or two numbers computed from a folder's files.

    If either differs, the cached pixels are not used.
    """
    try:
        status = os.stat(name)
        if not stat.S_ISDIR(status.st_mode):
            return status.st_mtime_ns, status.st_size
        with os.scandir(name) as entries:
            files = sorted((e.name, e.stat().st_mtime_ns, e.stat().st_size) for e in entries)
    except (OSError, ValueError):
        return 0, 0  # the reader's error says what is wrong with the file
    digest = hashlib.sha256(repr(files).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big"), len(files)
