"""Animated WebP files as clips. FFmpeg does not read them, Pillow does.

Invariant: frame i is the i-th picture of the animation as a browser composes it, and its time comes from the
durations in the file's own chunks. A file is whole only if its chunks reach its stated end.

Source: RFC 9649 (the WebP container).
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vrthinker.errors import VideoError
from vrthinker.video import transparency
from vrthinker.video.frames import Frames
from vrthinker.video.images import IMAGE_ERRORS, open_image, out_of_memory, visible
from vrthinker.video.reader import (
    VideoInfo,
    VideoPath,
    broken_error,
    check_amount,
    check_side,
    checked_indices,
)

_HEADER_BYTES = 30
_ANIMATION, _ALPHA = 0x02, 0x10
_FRAME_HEADER_BYTES = 16
_PICTURES = (b"VP8 ", b"VP8L", b"ALPH")
"""What a frame begins with behind its header."""
_SHORTEST_MS = 10
_REPLACED_MS = 100
"""Browsers show frames of up to 10 ms for 100 ms, since such files mean "as usual"."""


@dataclass(frozen=True)
class _Chunks:
    """What the chunks of a file say.

    Attributes:
        size: The (height, width) of the canvas.
        durations_ms: How long each whole frame is shown.
        ends: The offset at which each whole frame ends.
        broken: Why the file is not whole; None if it is.
    """

    size: tuple[int, int]
    durations_ms: tuple[int, ...]
    ends: tuple[int, ...]
    broken: str | None


def is_animated_webp(path: str) -> bool:
    """Whether a regular file is a WebP file with several pictures."""
    with open(path, "rb") as file:
        head = file.read(_HEADER_BYTES)
    is_webp = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) == _HEADER_BYTES
    return is_webp and bool(head[20] & _ANIMATION)


def probe(path: VideoPath, *, tolerate_truncation: bool) -> VideoInfo:
    """Reads the chunks of a file, and decodes every picture once (see `VideoReader.probe`).

    Only the pictures tell whether any pixel is transparent: encoders use transparency to store differences.

    Raises:
        VideoError: The file has no whole picture, is over a limit, or breaks and that is not tolerated.
        MachineError: There is too little memory.
    """
    name = os.fspath(path)
    chunks = _read_chunks(name)
    n_frames, is_transparent, damage = _count(name, chunks)
    broken = damage or chunks.broken
    if n_frames == 0 or (broken is not None and not tolerate_truncation):
        raise broken_error(name, broken or "there is none", n_frames)
    durations = [ms if ms > _SHORTEST_MS else _REPLACED_MS for ms in chunks.durations_ms[:n_frames]]
    starts_ms = [0, *itertools.accumulate(durations)]
    duration_seconds = starts_ms[-1] / 1000
    height, width = chunks.size
    return VideoInfo(
        path=name,
        codec="webp",
        width=width,
        height=height,
        n_frames=n_frames,
        fps=n_frames / duration_seconds,
        duration_seconds=duration_seconds,
        # Writers round every time to a millisecond.
        is_variable_frame_rate=max(durations[:-1], default=0) - min(durations[:-1], default=0) > 1,
        rotation_degrees=0,
        pts_seconds=tuple(ms / 1000 for ms in starts_ms[:-1]),
        truncated=broken,
        notes=(transparency.NOTE,) if is_transparent else (),
    )


def frames_at(info: VideoInfo, frame_indices: Sequence[int]) -> Frames:
    """Decodes frames in one pass (see `VideoReader.frames_at`).

    Args:
        info: What `probe` found out about the file.
        frame_indices: The 0-based positions of the frames, in any order; repeats are allowed.

    Raises:
        VideoError: An index is not in the file, or a frame does not decode.
        MachineError: There is too little memory.
    """
    name = info.path
    wanted = checked_indices(name, frame_indices, info.n_frames)
    slots: dict[int, list[int]] = {}
    for slot, frame_index in enumerate(wanted):
        slots.setdefault(frame_index, []).append(slot)
    frame_index = 0
    try:
        data = np.empty((len(wanted), info.height, info.width, 3), dtype=np.uint8)
        chunks = _read_chunks(name)
        with open_image(_whole_part(name, chunks, min(info.n_frames, len(chunks.ends))), ("WEBP",)) as image:
            for frame_index in sorted(slots):
                image.seek(frame_index)
                data[slots[frame_index]] = visible(image)
    except MemoryError as error:
        raise out_of_memory(name) from error
    except (*IMAGE_ERRORS, EOFError) as error:
        raise broken_error(name, "a frame does not decode", frame_index) from error
    return Frames(data, wanted, tuple(info.pts_seconds[i] for i in wanted))


def _count(name: str, chunks: _Chunks) -> tuple[int, bool, str | None]:
    """The number of frames that decode, whether a pixel is transparent, and why no more decode."""
    stated = len(chunks.ends)
    # The decoder refuses a whole file for one damaged frame, so the longest part that it opens is looked for.
    opened = stated if _opens(name, chunks, stated) else _last_that_opens(name, chunks, stated)
    is_transparent, n_frames = False, 0
    try:
        if opened:
            with open_image(_whole_part(name, chunks, opened), ("WEBP",)) as image:
                for n_frames in range(opened):
                    image.seek(n_frames)
                    image.load()
                    if image.has_transparency_data and not is_transparent:
                        is_transparent = image.getextrema()[-1] != (255, 255)
    except MemoryError as error:
        raise out_of_memory(name) from error
    except (*IMAGE_ERRORS, EOFError):
        return n_frames, is_transparent, "a frame does not decode"
    return opened, is_transparent, None if opened == stated else "a frame does not decode"


def _last_that_opens(name: str, chunks: _Chunks, refused: int) -> int:
    """The most frames, below a number that is refused, that the decoder accepts."""
    accepted = 0
    while refused - accepted > 1:
        middle = (accepted + refused) // 2
        accepted, refused = (middle, refused) if _opens(name, chunks, middle) else (accepted, middle)
    return accepted


def _opens(name: str, chunks: _Chunks, n_frames: int) -> bool:
    try:
        with open_image(_whole_part(name, chunks, n_frames), ("WEBP",)):
            return True
    except (*IMAGE_ERRORS, EOFError):
        return False


def _whole_part(name: str, chunks: _Chunks, n_frames: int) -> io.BytesIO:
    """The file up to the end of its n-th frame, with a length that says so, because a decoder reads no other.

    It is also said to have an opacity. Without it, Pillow shows what no frame covers in black.
    """
    with open(name, "rb") as file:
        data = bytearray(file.read(chunks.ends[n_frames - 1] if n_frames else 0))
    data[20] |= _ALPHA  # an empty part raises an IndexError, which is one of `IMAGE_ERRORS`
    data[4:8] = (len(data) - 8).to_bytes(4, "little")
    return io.BytesIO(bytes(data))


def _read_chunks(name: str) -> _Chunks:
    """Walks the chunks of an animated WebP file.

    Raises:
        VideoError: The file cannot be read, or it is over a limit.
    """
    try:
        with open(name, "rb") as file:
            return _walk(name, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise VideoError(name, f"cannot be read ({error.strerror})") from error


def _walk(name: str, file: io.BufferedReader, size: int) -> _Chunks:
    head = file.read(_HEADER_BYTES)
    width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
    check_side(name, width, height)
    stated_end = 8 + int.from_bytes(head[4:8], "little")
    position = _HEADER_BYTES
    durations: list[int] = []
    ends: list[int] = []
    broken = None
    if stated_end > size:
        broken = f"the file is cut short ({size} bytes, at least {stated_end} expected)"
    while position + 8 <= min(size, stated_end):
        file.seek(position)
        chunk = file.read(8 + _FRAME_HEADER_BYTES + 4)
        length = int.from_bytes(chunk[4:8], "little")
        if not _is_name(chunk[:4]):
            broken = broken or f"the file is damaged at byte {position} (not a chunk)"
            break
        begin, position = position, position + 8 + length + length % 2
        if position > min(size, stated_end):
            broken = broken or f"the file is damaged at byte {begin} (a chunk that is larger than the file)"
            break
        if chunk[:4] != b"ANMF" and chunk[-4:] in _PICTURES and length > _FRAME_HEADER_BYTES:
            broken = broken or f"the file is damaged at byte {begin} (a frame under another name)"
            break
        if chunk[:4] == b"ANMF" and len(chunk) >= 8 + _FRAME_HEADER_BYTES:
            durations.append(int.from_bytes(chunk[20:23], "little"))
            ends.append(position)
            check_amount(name, width, height, len(durations))
    return _Chunks((height, width), tuple(durations), tuple(ends), broken)


def _is_name(kind: bytes) -> bool:
    """Whether four bytes can name a chunk. Readers have to skip names that they do not know (RFC 9649)."""
    return kind.isascii() and kind.decode().isprintable()
