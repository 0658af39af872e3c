"""Folders of images as clips.

Invariant: the frames are the folder's images in natural order of their names ("2.png" before "10.png"), all
of one size as displayed (EXIF orientation applied). A folder does not state a frame rate, so the caller gives
it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vrthinker.errors import InputError, VideoError
from vrthinker.video.frames import Frames
from vrthinker.video.reader import (
    MAX_FRAMES,
    MAX_SIDE_PIXELS,
    VideoInfo,
    broken_error,
    checked_indices,
)

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""The only decoders in use, whatever a file's name says. Others start programs or were never tried here."""
_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = (5, 6, 7, 8)
# Pillow raises these on damaged images, depending on the format.
_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, IndexError, MemoryError, Image.DecompressionBombError)


class ImageFolderReader:
    """Reads a folder of images as a clip of constant frame rate.

    Args:
        fps: The frame rate of the clip.

    Raises:
        InputError: `fps` is not above 0.
    """

    def __init__(self, fps: float = 8.0) -> None:
        if not 0 < fps < float("inf"):
            raise InputError(f"image_fps: got {fps}, allowed: above 0")
        self._fps = fps

    def probe(self, folder: str, *, tolerate_truncation: bool = False) -> VideoInfo:
        """Reads every image's header; with `tolerate_truncation`, every image.

        Raises:
            VideoError: There are no images, they differ in size, or one of them is damaged and that is
                not tolerated.
        """
        names = _image_names(folder)
        sizes: list[tuple[int, int]] = []
        broken: str | None = None
        for name in names:
            try:
                size = _read_size(os.path.join(folder, name), load=tolerate_truncation)
            except _IMAGE_ERRORS as error:
                broken = f"{name} is not a readable image"
                if not tolerate_truncation:
                    raise broken_error(folder, broken, len(sizes)) from error
                break
            _check_size(folder, name, size, names[0], sizes[0] if sizes else size)
            sizes.append(size)
        if not sizes:
            raise broken_error(folder, str(broken), 0)
        height, width = sizes[0]
        return VideoInfo(
            path=folder,
            codec="images",
            width=width,
            height=height,
            n_frames=len(sizes),
            fps=self._fps,
            duration_seconds=len(sizes) / self._fps,
            is_variable_frame_rate=False,
            rotation_degrees=0,
            pts_seconds=tuple(i / self._fps for i in range(len(sizes))),
            truncated=broken,
        )

    def frames_at(
        self, folder: str, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Loads the images at these 0-based positions, in any order; repeats are allowed.

        Raises:
            VideoError: An index is not in the folder, or the folder cannot be used (see `probe`).
        """
        info = self.probe(folder, tolerate_truncation=tolerate_truncation)
        wanted = checked_indices(folder, frame_indices, info.n_frames)
        names = _image_names(folder)
        data = np.empty((len(wanted), info.height, info.width, 3), dtype=np.uint8)
        for slot, frame_index in enumerate(wanted):
            try:
                picture = _read_picture(os.path.join(folder, names[frame_index]))
            except _IMAGE_ERRORS as error:
                raise broken_error(folder, f"{names[frame_index]} is damaged", frame_index) from error
            data[slot] = picture
        return Frames(data, wanted, tuple(info.pts_seconds[i] for i in wanted))


def _image_names(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            files = [entry.name for entry in entries if entry.is_file()]
    except OSError as error:
        raise VideoError(folder, f"the folder cannot be read ({error.strerror})") from error
    names = [name for name in files if name.lower().endswith(_ENDINGS) and not name.startswith(".")]
    if not names:
        raise VideoError(folder, f"a folder without images (allowed: {', '.join(_ENDINGS)})")
    if len(names) > MAX_FRAMES:
        raise VideoError(folder, f"{len(names)} images, allowed: up to {MAX_FRAMES}")
    return sorted(names, key=_natural_key)


def _natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key that compares numbers by value and text by letters, then the name itself."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], name


def _read_size(path: str, *, load: bool) -> tuple[int, int]:
    """The (height, width) as displayed, from the header. With `load`, also checks that the pixels decode."""
    with Image.open(path, formats=_FORMATS) as image:
        width, height = image.size
        sideways = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
        if load and max(width, height) <= MAX_SIDE_PIXELS:
            image.load()
    return (width, height) if sideways else (height, width)


def _check_size(
    folder: str, name: str, size: tuple[int, int], first_name: str, first_size: tuple[int, int]
) -> None:
    if max(size) > MAX_SIDE_PIXELS:
        raise VideoError(
            folder,
            f"{name} is {size[1]}x{size[0]} pixels, allowed: up to {MAX_SIDE_PIXELS}x{MAX_SIDE_PIXELS}",
        )
    if size != first_size:
        raise VideoError(
            folder,
            f"{name} is {size[1]}x{size[0]}, {first_name} is {first_size[1]}x{first_size[0]}; "
            "all images of a clip must have one size",
        )


def _read_picture(path: str) -> np.ndarray[Any, Any]:
    with Image.open(path, formats=_FORMATS) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            # Pillow would clip 16-bit grey at 255 instead of scaling it.
            grey = (np.asarray(upright) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.asarray(upright.convert("RGB"))
