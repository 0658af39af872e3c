"""Clips that are kept open between reads, because opening one reads the index of the whole file.

Long clips are kept after every read. A clip that was opened to index it waits for its first read, long or
short; a few of those wait at a time, and they never push out a clip that has been read.

Invariant: a clip is lent to one borrower at a time, and only under the key (file state) under which it was
opened. A clip on which a read failed is closed, not kept. A forked process uses none of its parent's clips,
because both would move the same position in the file.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

from vrthinker.video.pyav.clip import OpenClip

LONG_FRAMES = 1000
"""Clips of fewer frames open in no time and are not kept after a read."""
_MAX_IDLE = 8
"""The most clips of either kind: those that were read, and those that wait for their first read."""
_MAX_IDLE_PIXELS = 8 * 1280 * 720
"""The pixels of one picture of each clip of a kind, together. A decoder keeps the memory of some 20."""

_Opened = tuple[OpenClip, contextlib.ExitStack, int]
_Waiting = OrderedDict[Hashable, _Opened]


class ClipPool:
    """Open clips that wait for the next read. Thread-safe. When it is freed, its files are closed."""

    def __init__(self) -> None:
        self._idle: _Waiting = OrderedDict()
        self._unread: _Waiting = OrderedDict()
        self._process = os.getpid()
        self._of_parent: list[_Waiting] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._idle) + len(self._unread)

    @contextlib.contextmanager
    def borrow(
        self,
        key: Hashable,
        open_new: Callable[[], contextlib.AbstractContextManager[OpenClip]],
        *,
        n_frames: int,
        n_pixels: int,
        fresh: bool,
    ) -> Iterator[OpenClip]:
        """Lends an open clip: an idle one, or a new one.

        Args:
            key: What the clip has to be the same in: the file's state, and how it is decoded.
            open_new: Opens the clip.
            n_frames: The number of frames of the clip. Short ones are closed after the read.
            n_pixels: The pixels of a picture.
            fresh: Whether the clip has to stand at its beginning, as only a new one does.
        """
        self._begin_in_child()
        with self._lock:
            opened = None if fresh else self._idle.pop(key, None) or self._unread.pop(key, None)
        if opened is None:
            stack = contextlib.ExitStack()
            opened = stack.enter_context(open_new()), stack, n_pixels
        clip, stack, _ = opened
        try:
            yield clip
            clip.rest()
        except BaseException:
            stack.close()
            raise
        closing = [stack] if n_frames < LONG_FRAMES else self._keep(self._idle, key, opened)
        for stack in closing:
            stack.close()

    def add(self, key: Hashable, clip: OpenClip, stack: contextlib.ExitStack, *, n_pixels: int) -> None:
        """Takes over a clip that was opened for something else, until the next read, short ones too.

        Args:
            key: What the clip is the same in, as in `borrow`.
            clip: The clip.
            stack: What closes it.
            n_pixels: The pixels of a picture.
        """
        self._begin_in_child()
        clip.rest()
        for closing in self._keep(self._unread, key, (clip, stack, n_pixels)):
            closing.close()

    def close_idle(self) -> None:
        """Closes the clips that wait for a read. Later reads open theirs anew."""
        self._begin_in_child()
        with self._lock:
            waiting = [*self._idle.values(), *self._unread.values()]
            self._idle, self._unread = OrderedDict(), OrderedDict()
        for _, stack, _ in waiting:
            stack.close()

    def _begin_in_child(self) -> None:
        if self._process != os.getpid():
            self._of_parent += [self._idle, self._unread]  # closing them is the parent's business
            self._idle, self._unread = OrderedDict(), OrderedDict()
            self._lock, self._process = threading.Lock(), os.getpid()

    def _keep(self, waiting: _Waiting, key: Hashable, opened: _Opened) -> list[contextlib.ExitStack]:
        """Keeps a clip among those that wait, and returns what has to be closed for it."""
        if opened[2] > _MAX_IDLE_PIXELS:
            return [opened[1]]
        with self._lock:
            replaced = waiting.pop(key, None)
            waiting[key] = opened
            dropped = [] if replaced is None else [replaced]
            while len(waiting) > _MAX_IDLE or sum(kept[2] for kept in waiting.values()) > _MAX_IDLE_PIXELS:
                dropped.append(waiting.popitem(last=False)[1])
        return [stack for _, stack, _ in dropped]
