"""Folders of images as clips.

Invariant: the frames are the folder's images in natural order of their names ("2.png" before "10.png"), all
of one size as displayed (EXIF orientation applied). A folder does not state a frame rate, so the caller gives
it.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from vrthinker import limits
from vrthinker.errors import InputError, MachineError, VideoError
from vrthinker.video import transparency
from vrthinker.video.frames import Frames
from vrthinker.video.reader import VideoInfo, broken_error, check_amount, check_side, checked_indices

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""The only decoders in use, whatever a file's name says. Others start programs or were never tried here."""
_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = (5, 6, 7, 8)
_VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts", ".flv", ".gif", ".m4v")
_NAMED_VIDEOS = 2
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, IndexError, Image.DecompressionBombError)
"""What Pillow raises on damaged images, depending on the format."""


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
            MachineError: There is too little memory.
        """
        names = _image_names(folder)
        sizes: list[tuple[int, int]] = []
        has_alpha = False
        broken: str | None = None
        for name in names:
            try:
                size, alpha = _read_header(os.path.join(folder, name), load=tolerate_truncation)
            except IMAGE_ERRORS as error:
                broken = f"{name} is not a readable image"
                if not tolerate_truncation:
                    raise broken_error(folder, broken, len(sizes)) from error
                break
            _check_size(folder, name, size, names[0], sizes[0] if sizes else size)
            sizes.append(size)
            has_alpha = has_alpha or alpha
            check_amount(folder, size[1], size[0], len(sizes))
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
            notes=(transparency.NOTE,) if has_alpha else (),
        )

    def frames_at(
        self, folder: str, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Loads the images at these 0-based positions, in any order; repeats are allowed.

        Raises:
            VideoError: An index is not in the folder, or the folder cannot be used (see `probe`).
            MachineError: There is too little memory.
        """
        info = self.probe(folder, tolerate_truncation=tolerate_truncation)
        wanted = checked_indices(folder, frame_indices, info.n_frames)
        names = _image_names(folder)
        data = np.empty((len(wanted), info.height, info.width, 3), dtype=np.uint8)
        for slot, frame_index in enumerate(wanted):
            try:
                picture = _read_picture(os.path.join(folder, names[frame_index]))
            except IMAGE_ERRORS as error:
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
        videos = sorted((name for name in files if name.lower().endswith(_VIDEO_ENDINGS)), key=_natural_key)
        if videos:
            named = ", ".join(videos[:_NAMED_VIDEOS]) + (", ..." if len(videos) > _NAMED_VIDEOS else "")
            raise VideoError(
                folder,
                f"a folder of videos ({named}), where one clip is wanted: give one of its files, or list "
                "pairs of them in a file for --pairs",
            )
        raise VideoError(folder, f"a folder without images (allowed: {', '.join(_ENDINGS)})")
    check_amount(folder, 1, 1, len(names))
    return sorted(names, key=_natural_key)


def _natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key that compares numbers by value and text by letters, then the name itself."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], name


def open_image(file: str | IO[bytes], formats: tuple[str, ...]) -> Image.Image:
    """Opens an image with Pillow, without its warnings: what matters of them is checked and said by us.

    Raises:
        Exception: Any of `IMAGE_ERRORS`, if the file is not a readable image.
    """
    # `warnings.catch_warnings` would also change what other threads see.
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW)
    return Image.open(file, formats=formats)


_PILLOW = r"PIL\."
_QUIET = ("ignore", None, Warning, re.compile(_PILLOW), 0)
"""The filter that keeps Pillow's warnings away from stderr, as Python keeps it."""


def visible(image: Image.Image) -> np.ndarray[Any, Any]:
    """The pixels of an image that was loaded, uint8 `[height, width, 3]`, RGB, on the common ground."""
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey at 255 instead of scaling it.
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    rgba = np.asarray(image.convert("RGBA"))
    return transparency.on_ground(rgba[..., :3], rgba[..., 3])


def out_of_memory(path: str) -> MachineError:
    """The error for a picture that cannot be decoded for lack of memory."""
    return MachineError(str(VideoError(path, _NO_MEMORY)))


_NO_MEMORY = "decoding it needs more memory than there is; run it again with less beside it"


def _read_header(path: str, *, load: bool) -> tuple[tuple[int, int], bool]:
    """The (height, width) as displayed, and whether there may be transparent pixels.

    With `load`, also checks that the pixels decode.
    """
    try:
        with open_image(path, _FORMATS) as image:
            width, height = image.size
            sideways = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
            if load and max(width, height) <= limits.MAX_SIDE_PIXELS.value:
                image.load()
            return (width, height) if sideways else (height, width), image.has_transparency_data
    except MemoryError as error:
        raise out_of_memory(path) from error


def _check_size(
    folder: str, name: str, size: tuple[int, int], first_name: str, first_size: tuple[int, int]
) -> None:
    check_side(folder, size[1], size[0], f"{name} is")
    if size != first_size:
        raise VideoError(
            folder,
            f"{name} is {size[1]}x{size[0]}, {first_name} is {first_size[1]}x{first_size[0]}; "
            "all images of a clip must have one size",
        )


def _read_picture(path: str) -> np.ndarray[Any, Any]:
    try:
        with open_image(path, _FORMATS) as image:
            return visible(ImageOps.exif_transpose(image))
    except MemoryError as error:
        raise out_of_memory(path) from error
