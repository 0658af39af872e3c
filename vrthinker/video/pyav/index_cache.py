"""A bounded memory of clips' indexes, so that a file is listed once while it does not change.

Invariant: an index is returned only for a file of the same name, modification time and size, and under the
limits under which it was made. Two threads that want the same index make it once. A forked process keeps the
indexes, and waits for no thread of its parent.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable

from vrthinker.video.pyav.index import ClipIndex

_MAX_INDEXES = 256
_MAX_FRAMES = 2_000_000
"""The frames of all indexes together, at some 80 bytes each. A keyframe counts as more of them."""
_KEYFRAME_FRAMES = 3
"""The frames that take as much as a keyframe does beside its own frame."""


class IndexCache:
    """Indexes by the state of their file; the least recently used ones are dropped first. Thread-safe.

    Attributes:
        hits: How many indexes were found here.
        misses: How many had to be made.
    """

    def __init__(self, max_indexes: int = _MAX_INDEXES, max_frames: int = _MAX_FRAMES) -> None:
        self.max_indexes, self.max_frames = max_indexes, max_frames
        self.hits = self.misses = 0
        self._n_frames = 0
        self._indexes: OrderedDict[Hashable, ClipIndex] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[Hashable, threading.Lock] = {}
        _CACHES.add(self)

    def __len__(self) -> int:
        return len(self._indexes)

    def get(self, key: Hashable, make: Callable[[], ClipIndex]) -> ClipIndex:
        """Returns the index under a key, and makes it if it is not here. An error of `make` is passed on."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            try:
                with self._lock:
                    if key in self._indexes:
                        self._indexes.move_to_end(key)
                        self.hits += 1
                        return self._indexes[key]
                index = make()
                with self._lock:
                    self.misses += 1
                    if (replaced := self._indexes.pop(key, None)) is not None:
                        self._n_frames -= self._weight(replaced)
                    self._indexes[key] = index
                    self._n_frames += self._weight(index)
                    self._drop_oldest()
                return index
            finally:
                with self._lock:
                    self._making.pop(key, None)

    @staticmethod
    def _weight(index: ClipIndex) -> int:
        """What an index takes, in frames."""
        return index.info.n_frames + _KEYFRAME_FRAMES * len(index.keyframes)

    def _begin_in_child(self) -> None:
        """Forgets the locks of threads that a forked process does not have, and what they left half done."""
        self._lock, self._making = threading.Lock(), {}
        self._n_frames = sum(map(self._weight, self._indexes.values()))

    def _drop_oldest(self) -> None:
        while len(self._indexes) > self.max_indexes or (
            self._n_frames > self.max_frames and len(self._indexes) > 1
        ):
            _, dropped = self._indexes.popitem(last=False)
            self._n_frames -= self._weight(dropped)


_CACHES: weakref.WeakSet[IndexCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in list(_CACHES):
        cache._begin_in_child()


os.register_at_fork(after_in_child=_after_fork)

SHARED = IndexCache()
"""The indexes that all readers of this process share that `vrthinker.video.open_reader` makes."""
