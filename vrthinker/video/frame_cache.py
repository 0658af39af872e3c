"""A bounded store of resized frames, so that each distinct frame is decoded once.

Invariant: what it holds never exceeds `max_bytes`, and a frame that it returns is the one that the
reader would decode now: a file that was replaced (other modification time or size) is read again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vrthinker.errors import VideoError
from vrthinker.video.reader import VideoPath, VideoReader
from vrthinker.video.resize import resize_frame
from vrthinker.visibility import Region

if TYPE_CHECKING:
    import numpy as np

_FileState = tuple[int, int]
_Key = tuple[str, _FileState, int, int, int, Region | None]


class FrameCache:
    """Least recently used first out. Safe to use from several threads at once.

    The arrays that it hands out are shared: copy one before writing into it.

    Attributes:
        max_bytes: Upper limit of the pixels held.
        hits: Frames that were there when asked for.
        misses: Frames that had to be decoded.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes: got {max_bytes}, allowed: 0 (keep nothing) or above")
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._size_bytes = 0
        self._frames: OrderedDict[_Key, np.ndarray[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._file_locks: dict[str, tuple[threading.Lock, int]] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of pixels held now."""
        return self._size_bytes

    def __len__(self) -> int:
        return len(self._frames)

    def clear(self) -> None:
        """Forgets every frame; the counters stay."""
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
    ) -> list[np.ndarray[Any, Any]]:
        """Returns resized frames of one file; decodes those that are missing, in one pass.

        Args:
            path: The file, or the folder of images.
            frame_indices: 0-based positions in the file; any order, repeats allowed.
            size: (height, width) in pixels that every frame is resized to.
            reader: Decodes what is missing.
            tolerate_truncation: Passed to the reader.
            view: The region that is cut out before resizing; None for the whole frame.

        Returns:
            One uint8 `[height, width, 3]` per index, in their order.

        Raises:
            VideoError: The reader could not give a frame, or the region does not lie within it.
        """
        name = os.fspath(path)
        lock = self._borrow_file_lock(name)
        try:
            # One thread decodes a file at a time, so a frame that two threads want is decoded once.
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
    ) -> list[np.ndarray[Any, Any]]:
        state = file_state(name)
        found: dict[int, np.ndarray[Any, Any]] = {}
        with self._lock:
            for index in dict.fromkeys(frame_indices):
                key = (name, state, index, *size, view)
                if key in self._frames:
                    self._frames.move_to_end(key)
                    found[index] = self._frames[key]
            missing = [index for index in dict.fromkeys(frame_indices) if index not in found]
            self.hits += len(frame_indices) - len(missing)
        if missing:
            decoded = reader.frames_at(name, missing, tolerate_truncation=tolerate_truncation).numpy()
            for index, frame in zip(missing, decoded, strict=True):
                seen = frame if view is None else _cut_out(name, frame, view)
                resized = resize_frame(seen, size)
                # A view of the decoder's batch would keep the whole batch alive.
                found[index] = resized.copy() if resized is seen else resized
            with self._lock:
                self.misses += len(missing)
                for index in missing:
                    self._keep((name, state, index, *size, view), found[index])
        return [found[index] for index in frame_indices]

    def _keep(self, key: _Key, frame: np.ndarray[Any, Any]) -> None:
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


def _cut_out(name: str, frame: np.ndarray[Any, Any], view: Region) -> np.ndarray[Any, Any]:
    height, width = frame.shape[:2]
    if not (0 <= view.top < view.bottom <= height and 0 <= view.left < view.right <= width):
        raise VideoError(name, f"view: got {tuple(view)}, allowed: a region within {height} x {width} pixels")
    return frame[view.top : view.bottom, view.left : view.right]


def file_state(name: str) -> _FileState:
    """Modification time (ns) and size (bytes) of a file, or two numbers made of those of a folder's files.

    If either differs, the cached pixels are not used.
    """
    try:
        status = os.stat(name)
        if not stat.S_ISDIR(status.st_mode):
            return status.st_mtime_ns, status.st_size
        with os.scandir(name) as entries:
            files = sorted((e.name, e.stat().st_mtime_ns, e.stat().st_size) for e in entries)
    except (OSError, ValueError):
        return 0, 0  # the reader says what is wrong with it
    digest = hashlib.sha256(repr(files).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big"), len(files)
