"""Readers of clips in memory, which are read by their names (`video/clips.py`).

A reader keeps its clip: as long as somebody holds it, an array is not freed and a file in memory stays open.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from vrthinker.errors import InputError, VideoError
from vrthinker.video.frames import Frames
from vrthinker.video.reader import VideoInfo, VideoPath, VideoReader, checked_indices, reader_name

if TYPE_CHECKING:
    import numpy as np


class FramesInMemory(Protocol):
    """What `ArrayReader` needs of a clip."""

    n_frames: int
    size: tuple[int, int]
    fps: float

    def pixels(self, frame_indices: Sequence[int]) -> np.ndarray[Any, Any]:
        """Frames on the host, uint8 `[n, height, width, 3]`, RGB."""


class _OneByOne:
    """What readers share that answer requests one by one."""

    def read_many(
        self, requests: Sequence[tuple[VideoPath, Sequence[int]]], *, tolerate_truncation: bool = False
    ) -> list[Frames]:
        """Does what `frames_at` does for several requests, in their order."""
        return [
            self.frames_at(path, indices, tolerate_truncation=tolerate_truncation)
            for path, indices in requests
        ]

    def frames_at(
        self, path: VideoPath, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Returns frames by their places (see `VideoReader.frames_at`)."""
        raise NotImplementedError


class NamedReader(_OneByOne):
    """Reads one file under another name.

    Args:
        owner: What keeps the file open.
        name: The name.
        path: The path of the file.
        files: The reader of files.
    """

    def __init__(self, owner: object, name: str, path: str, files: VideoReader) -> None:
        self._owner, self._name, self._path, self._files = owner, name, path, files

    def probe(self, path: VideoPath, *, tolerate_truncation: bool = False) -> VideoInfo:
        """Says what the clip contains."""
        try:
            info = self._files.probe(self._path, tolerate_truncation=tolerate_truncation)
        except VideoError as error:
            raise VideoError(path, error.reason) from error
        return replace(info, path=os.fspath(path))

    def reader_of(self, path: VideoPath, *, tolerate_truncation: bool = False) -> str | None:
        """The name of the reader that shows the clip; None if the reader does not say."""
        return reader_name(self._files, self._path, tolerate_truncation=tolerate_truncation)

    def frames_at(
        self, path: VideoPath, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Returns frames by their places (see `VideoReader.frames_at`)."""
        try:
            return self._files.frames_at(self._path, frame_indices, tolerate_truncation=tolerate_truncation)
        except VideoError as error:
            raise VideoError(path, error.reason) from error


class ArrayReader(_OneByOne):
    """Reads frames that are in an array or a tensor.

    Args:
        clip: The clip.
    """

    def __init__(self, clip: FramesInMemory) -> None:
        self._clip = clip

    def probe(self, path: VideoPath, *, tolerate_truncation: bool = False) -> VideoInfo:
        """Says what the clip contains."""
        clip = self._clip
        return VideoInfo(
            path=os.fspath(path),
            codec="memory",
            width=clip.size[1],
            height=clip.size[0],
            n_frames=clip.n_frames,
            fps=clip.fps,
            duration_seconds=clip.n_frames / clip.fps,
            is_variable_frame_rate=False,
            rotation_degrees=0,
            pts_seconds=tuple(index / clip.fps for index in range(clip.n_frames)),
        )

    def frames_at(
        self, path: VideoPath, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Returns frames by their places (see `VideoReader.frames_at`)."""
        wanted = checked_indices(path, frame_indices, self._clip.n_frames)
        try:
            pixels = self._clip.pixels(wanted)
        except InputError as error:
            raise VideoError(path, str(error)) from error
        return Frames(pixels, wanted, tuple(index / self._clip.fps for index in wanted))


class ReaderByName(_OneByOne):
    """Reads each path by a reader of its own.

    Args:
        readers: Name -> the reader of that clip.
        others: The reader of everything else.
    """

    def __init__(self, readers: Mapping[str, VideoReader], others: VideoReader) -> None:
        self._readers, self._others = dict(readers), others

    def probe(self, path: VideoPath, *, tolerate_truncation: bool = False) -> VideoInfo:
        """Says what a clip contains."""
        return self._reader(path).probe(path, tolerate_truncation=tolerate_truncation)

    def frames_at(
        self, path: VideoPath, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Returns frames by their places (see `VideoReader.frames_at`)."""
        return self._reader(path).frames_at(path, frame_indices, tolerate_truncation=tolerate_truncation)

    def _reader(self, path: VideoPath) -> VideoReader:
        return self._readers.get(os.fspath(path), self._others)
