"""The frames of traces as PNG files, each distinct picture once.

A file is named by the digest of its pixels, so that equal pictures are one file, also those of two clips.
Invariant: a file under its name is complete. The clip must still be the one that was judged.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vrthinker.episode.trajectory import FrameRecord, Trajectory
from vrthinker.errors import InputError, VideoError, one_line, unwritable
from vrthinker.records.files import spare_name
from vrthinker.video.content import clip_content
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.frames import on_host
from vrthinker.video.open import open_reader
from vrthinker.visibility import Region

FOLDER = "images"
_CACHE_BYTES = 64 << 20


class FrameFiles:
    """Writes frames into a folder.

    Args:
        folder: The folder for the pictures. It is made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader, self._cache = open_reader(), FrameCache(_CACHE_BYTES)
        self._names: dict[tuple[str, int, int, int, Region | None], str] = {}
        self._checked: set[tuple[str, str | None]] = set()

    @property
    def count(self) -> int:
        """The number of distinct pictures."""
        return len(set(self._names.values()))

    def write(
        self, trajectory: Trajectory, frames: Iterable[FrameRecord]
    ) -> dict[tuple[int, Region | None], str]:
        """Writes frames of a trajectory that are not there yet.

        Returns:
            (frame number, region) -> the file's name in the folder.

        Raises:
            InputError: A clip is not the one that was judged, a frame does not decode, or the folder cannot
                be written.
        """
        wanted = {(frame.frame_number, frame.view): frame for frame in frames}
        names = {}
        for video in sorted({frame.video for frame in wanted.values()}):
            self._check_clip(trajectory, video)
        for place, frame in wanted.items():
            key = self._key(trajectory, frame)
            if key not in self._names:
                self._decode(trajectory, [other for other in wanted.values() if self._alike(frame, other)])
            names[place] = self._names[key]
        return names

    @staticmethod
    def _key(trajectory: Trajectory, frame: FrameRecord) -> tuple[str, int, int, int, Region | None]:
        path = trajectory.videos[frame.video - 1].path
        return path, frame.frame_index, frame.height, frame.width, frame.view

    @staticmethod
    def _alike(frame: FrameRecord, other: FrameRecord) -> bool:
        """Whether two frames can be decoded in one pass."""
        return (frame.video, frame.height, frame.width, frame.view) == (
            other.video,
            other.height,
            other.width,
            other.view,
        )

    def _decode(self, trajectory: Trajectory, frames: list[FrameRecord]) -> None:
        first = frames[0]
        pixels = self._cache.get(
            trajectory.videos[first.video - 1].path,
            [frame.frame_index for frame in frames],
            (first.height, first.width),
            self._reader,
            trajectory.settings.tolerate_truncation,
            first.view,
        )
        for frame, array in zip(frames, pixels, strict=True):
            self._names[self._key(trajectory, frame)] = self._written(array)

    def _check_clip(self, trajectory: Trajectory, video: int) -> None:
        record = trajectory.videos[video - 1]
        if record.sha256 is None or (record.path, record.sha256) in self._checked:
            return
        content = clip_content(record.path)
        if content is None:
            raise InputError(
                f"{one_line(record.path)}: cannot be read; trajectory {one_line(repr(trajectory.id))} was "
                "judged on it: put the clip back where it was"
            )
        if content != (record.size_bytes, record.sha256):
            raise VideoError(
                record.path, f"another clip than trajectory {one_line(repr(trajectory.id))} was judged on"
            )
        self._checked.add((record.path, record.sha256))

    def _written(self, pixels: Any) -> str:
        """The name of the file of a picture, which is written if it is not there."""
        import numpy as np
        from PIL import Image

        array = np.ascontiguousarray(on_host(pixels))
        name = hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()[:40] + ".png"
        path = self.folder / name
        try:
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                buffer = io.BytesIO()
                Image.fromarray(array).save(buffer, "PNG")
                spare = spare_name(path)
                spare.write_bytes(buffer.getvalue())
                os.replace(spare, path)
        except OSError as error:
            raise unwritable(path, error, "give another folder") from None
        return name
