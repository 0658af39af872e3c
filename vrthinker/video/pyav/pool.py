"""Long clips that are kept open between reads, because opening one reads the index of the whole file.

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
_MAX_IDLE_PIXELS = 8 * 1280 * 720
"""The pixels of one picture of each idle clip, together. A decoder keeps the memory of some 20 pictures."""

_Opened = tuple[OpenClip, contextlib.ExitStack, int]


class ClipPool:
    """Open clips that wait for the next read. Thread-safe. When it is freed, its files are closed."""

    def __init__(self) -> None:
        self._idle: OrderedDict[Hashable, _Opened] = OrderedDict()
        self._process = os.getpid()
        self._of_parent: list[OrderedDict[Hashable, _Opened]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._idle)

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
            opened = None if fresh else self._idle.pop(key, None)
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
        closing = [stack] if n_frames < LONG_FRAMES else self._keep(key, opened)
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
        for closing in self._keep(key, (clip, stack, n_pixels)):
            closing.close()

    def close_idle(self) -> None:
        """Closes the clips that wait for a read. Later reads open theirs anew."""
        self._begin_in_child()
        with self._lock:
            idle, self._idle = self._idle, OrderedDict()
        for _, stack, _ in idle.values():
            stack.close()

    def _begin_in_child(self) -> None:
        if self._process != os.getpid():
            self._of_parent.append(self._idle)  # closing them is the parent's business
            self._idle, self._lock, self._process = OrderedDict(), threading.Lock(), os.getpid()

    def _keep(self, key: Hashable, opened: _Opened) -> list[contextlib.ExitStack]:
        """Keeps a clip, and returns what has to be closed for it."""
        with self._lock:
            replaced = self._idle.pop(key, None)
            self._idle[key] = opened
            dropped = [] if replaced is None else [replaced]
            while (
                len(self._idle) > _MAX_IDLE or sum(kept[2] for kept in self._idle.values()) > _MAX_IDLE_PIXELS
            ):
                dropped.append(self._idle.popitem(last=False)[1])
        return [stack for _, stack, _ in dropped]
