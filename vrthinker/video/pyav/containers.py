"""Checks from a file's outermost structure, without decoding, whether the file is complete.

Demuxers stop without an error at the end of a cut Matroska, MPEG-TS or GIF file. This module reads the sizes
that containers state and compares them with the file's size. Invariant: it reports only a file that ends
before its own structure says so, and accepts what it does not understand.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

_EBML_HEADER = 0x1A45DFA3
_MATROSKA_SEGMENT = 0x18538067
_TRANSPORT_PACKET_BYTES = 188
_MAX_BOXES = 100_000


@dataclass(frozen=True)
class MissingEnd:
    """A file that is not complete.

    Attributes:
        reason: What shows that the end is missing.
        whole_frames: The number of complete frames, if the structure tells it.
    """

    reason: str
    whole_frames: int | None = None


def missing_end(path: str, format_name: str) -> MissingEnd | None:
    """The reason why a file is not complete; None if its structure reaches its end.

    Args:
        path: A regular file.
        format_name: FFmpeg's name of the container, such as "mov,mp4,m4a,3gp,3g2,mj2".

    Raises:
        OSError: The file cannot be read.
    """
    name = format_name.partition(",")[0]
    with open(path, "rb") as file:
        if name == "gif":
            return _gif_missing_end(file)
        check = _ENDS.get(name)
        end = None if check is None else check(file)
        size = os.fstat(file.fileno()).st_size
    if end is None or end <= size:
        return None
    return MissingEnd(f"the file is cut short ({size} bytes, at least {end} expected)")


def _mov_end(file: BinaryIO) -> int | None:
    """The offset at which the last top-level box ends."""
    size = os.fstat(file.fileno()).st_size
    position = 0
    for _ in range(_MAX_BOXES):
        if position >= size:
            break
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return None if position == 0 or not header.strip(b"\0") else position + 8
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0 means "to the end of the file"; anything else is not a box
            break
        position += length
    return position


def _matroska_end(file: BinaryIO) -> int | None:
    """The offset at which the segment ends; None if it was written live, without a size."""
    header = file.read(4)
    if int.from_bytes(header, "big") != _EBML_HEADER:
        return None
    header_size = _read_vint(file)
    if header_size is None:
        return None
    file.seek(header_size, os.SEEK_CUR)
    if int.from_bytes(file.read(4), "big") != _MATROSKA_SEGMENT:
        return None
    segment_size = _read_vint(file)
    return None if segment_size is None else file.tell() + segment_size


def _read_vint(file: BinaryIO) -> int | None:
    """Reads an EBML size; None if it is unknown (all ones) or missing."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big")
    mask = (1 << (7 * length)) - 1
    return None if value & mask == mask else value & mask


def _riff_end(file: BinaryIO) -> int | None:
    header = file.read(8)
    if len(header) < 8 or header[:4] != b"RIFF":
        return None
    length = int.from_bytes(header[4:], "little")
    # These values mean that the writer did not finish the file.
    return None if length in (0, 0xFFFFFFFF) else 8 + length


def _transport_stream_end(file: BinaryIO) -> int | None:
    """The next packet boundary. A stream that stops inside a packet was cut."""
    head = file.read(_TRANSPORT_PACKET_BYTES + 1)
    if len(head) <= _TRANSPORT_PACKET_BYTES or head[0] != 0x47 or head[_TRANSPORT_PACKET_BYTES] != 0x47:
        return None
    size = os.fstat(file.fileno()).st_size
    return -(-size // _TRANSPORT_PACKET_BYTES) * _TRANSPORT_PACKET_BYTES


_ENDS = {
    "mov": _mov_end,
    "matroska": _matroska_end,
    "avi": _riff_end,
    "mpegts": _transport_stream_end,
}


def _gif_missing_end(file: BinaryIO) -> MissingEnd | None:
    """Walks the blocks to the trailer, because a GIF decoder shows half of a picture as if it were whole."""
    images = 0
    header = file.read(13)
    _skip_colour_table(file, header[10] if len(header) == 13 else 0)
    while kind := file.read(1):
        if kind == b";":
            return None
        if kind == b"!":
            file.seek(1, os.SEEK_CUR)  # the kind of extension
        elif kind == b",":
            descriptor = file.read(9)
            _skip_colour_table(file, descriptor[8] if len(descriptor) == 9 else 0)
            file.seek(1, os.SEEK_CUR)  # the code size
        else:
            return MissingEnd(f"the file is damaged at byte {file.tell() - 1}", images)
        if not _skip_sub_blocks(file):
            break
        images += kind == b","
    return MissingEnd("the file is cut short (its trailer is missing)", images)


def _skip_sub_blocks(file: BinaryIO) -> bool:
    """Whether the sub-blocks end inside the file."""
    while length := file.read(1):
        if length == b"\0":
            return True
        file.seek(length[0], os.SEEK_CUR)
    return False


def _skip_colour_table(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << ((flags & 7) + 1), os.SEEK_CUR)
