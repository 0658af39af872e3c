"""Checks from a file's structure, without decoding, whether the file is complete.

Demuxers stop without an error at the end of a cut Matroska, MPEG-TS or GIF file, and in Matroska, MPEG-TS,
FLV, AVI and fragmented MP4 files they skip a damaged part without an error. This module reads the sizes that
containers state, and compares them with the file. Invariant: it reports only a file that contradicts its own
structure, and accepts what it does not understand.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Set
from dataclasses import dataclass
from typing import BinaryIO

from vrthinker.video.pyav import gif, matroska, transport_stream
from vrthinker.video.pyav.matroska import Loss

_FLV_HEADER_BYTES = 9
_FLV_TAGS = (8, 9, 18)
"""Sound, pictures, and script data."""
_PNG_HEADER_BYTES = 8
_READ_BYTES = 1 << 20
_MAX_BOXES = 1_000_000


@dataclass(frozen=True)
class MissingPart:
    """A file that is not complete.

    Attributes:
        reason: What shows that a part is missing.
        whole_frames: The number of complete frames before it, if the structure tells it.
        at_byte: The offset from which frame data may be damaged; None for the end of the file.
    """

    reason: str
    whole_frames: int | None = None
    at_byte: int | None = None


def missing_part(
    path: str, format_name: str, stream_id: int = 0, positions: Set[int] = frozenset()
) -> MissingPart | None:
    """The reason why a file is not complete; None if its structure is whole and reaches its end.

    Args:
        path: A regular file.
        format_name: FFmpeg's name of the container, such as "mov,mp4,m4a,3gp,3g2,mj2".
        stream_id: The container's number of the video stream. Only MPEG transport streams need it.
        positions: The offsets in the file of the video packets that the demuxer gave. If they are known, a
            frame that the file holds and the demuxer leaves out is noticed (in Matroska and AVI).

    Raises:
        OSError: The file cannot be read.
    """
    name = format_name.partition(",")[0]
    end: int | None = None
    loss: Loss | None = None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if name == "gif":
            whole_frames, reason = gif.examine(file)
            return None if reason is None else MissingPart(reason, whole_frames)
        if name == "apng":
            return _png_missing_part(file)
        if name == "matroska":
            end, loss = matroska.examine(file, positions)
        elif name == "mov":
            end, loss = _examine_mov(file, size)
        elif name == "avi":
            end, loss = _riff_end(file), _avi_loss(file, size, positions)
        elif name == "mpegts":
            end = _transport_stream_end(file)
            file.seek(0)
            loss = transport_stream.lost_part(file, stream_id)
        elif name == "flv":
            loss = _flv_loss(file, size)
    at_byte = None if loss is None else loss.at_byte
    if end is not None and end > size:
        return MissingPart(f"the file is cut short ({size} bytes, at least {end} expected)", at_byte=at_byte)
    return None if loss is None else MissingPart(loss.reason, at_byte=at_byte)


def _damaged(position: int, what: str, before: int) -> Loss:
    """Damage that shows at an offset. It may have begun in the part before, whose size led there."""
    return Loss(f"the file is damaged at byte {position} ({what})", before)


def _examine_mov(file: BinaryIO, size: int) -> tuple[int | None, Loss | None]:
    """The offset at which the last top-level box ends, and damage between fragments.

    A file without fragments has one index of all frames. Only in a fragmented one does a damaged box lose
    frames.
    """
    position, before, fragments = 0, 0, False
    for _ in range(_MAX_BOXES):
        if position >= size:
            break
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return (None if position == 0 or not header.strip(b"\0") else position + 8), None
        fragments = fragments or header[4:8] == b"moof"
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        # A length of 0 means "to the end of the file".
        is_box = (length >= 8 or length == 0) and header[4:8].isalnum()
        if fragments and not is_box and _anything_but_zeros(file, position):
            return position, _damaged(position, "not a box", before)
        if length < 8:
            break
        before, position = position, position + length
    return position, None


def _anything_but_zeros(file: BinaryIO, position: int) -> bool:
    file.seek(position)
    return any(block.strip(b"\0") for block in iter(lambda: file.read(_READ_BYTES), b""))


def _riff_end(file: BinaryIO) -> int | None:
    header = file.read(8)
    if len(header) < 8 or header[:4] != b"RIFF":
        return None
    length = int.from_bytes(header[4:], "little")
    # These values mean that the writer did not finish the file.
    return None if length in (0, 0xFFFFFFFF) else 8 + length


def _avi_loss(file: BinaryIO, size: int, positions: Set[int]) -> Loss | None:
    """Damage between the chunks of an AVI file, or a chunk of the video that the demuxer does not give."""
    position, before, end = 0, 0, 0
    chunks: dict[bytes, list[int]] = {}  # the chunks that hold something, by the number of their stream
    for _ in range(_MAX_BOXES):
        if position + 8 > size:
            break
        file.seek(position)
        header = file.read(12)
        name, length = header[:4], int.from_bytes(header[4:8], "little")
        if name == b"RIFF" and (position == 0 or position >= end):
            # An unfinished file states no length.
            end = size if length in (0, 0xFFFFFFFF) else position + 8 + length
            position += 12
        elif position >= end:
            break  # what follows the end is no matter
        elif name == b"LIST" and header[8:] in (b"movi", b"rec "):
            position += 12
        elif not name.isascii() or not name.decode().isprintable():
            return _damaged(position, "not a chunk", before)
        else:
            if length and name[2:] in (b"dc", b"db"):
                chunks.setdefault(name[:2], []).append(position)
            before, position = position, position + 8 + length + length % 2
    for starts in chunks.values():
        left_out = [start for start in starts if start not in positions]
        if 0 < len(left_out) < len(starts):
            return Loss(f"the frame at byte {left_out[0]} cannot be reached", left_out[0])
    return None


def _flv_loss(file: BinaryIO, size: int) -> Loss | None:
    """Damage between the tags of an FLV file: each is followed by its size."""
    header = file.read(_FLV_HEADER_BYTES)
    if len(header) < _FLV_HEADER_BYTES or header[:3] != b"FLV":
        return None
    position = before = int.from_bytes(header[5:9], "big") + 4
    for _ in range(_MAX_BOXES):
        if position + 11 > size:
            break
        file.seek(position)
        tag = file.read(11)
        length = 11 + int.from_bytes(tag[1:4], "big")
        if tag[0] & 31 in _FLV_TAGS and position + length > size:
            return Loss("the file ends inside a frame", position)
        file.seek(position + length)
        after = file.read(4)
        if tag[0] & 31 not in _FLV_TAGS or (
            len(after) == 4 and int.from_bytes(after, "big") not in (length, 0)
        ):
            return _damaged(position, "not a tag", before)
        before, position = position, position + length + 4
    return None


def _transport_stream_end(file: BinaryIO) -> int | None:
    """The next packet boundary. A stream that stops inside a packet was cut."""
    packet_bytes = transport_stream.PACKET_BYTES
    head = file.read(packet_bytes + 1)
    if len(head) <= packet_bytes or head[0] != 0x47 or head[packet_bytes] != 0x47:
        return None
    size = os.fstat(file.fileno()).st_size
    return -(-size // packet_bytes) * packet_bytes


def _png_missing_part(file: BinaryIO) -> MissingPart | None:
    """Walks the chunks to the last one, and checks their checksums."""
    position, begun = _PNG_HEADER_BYTES, 0  # begun: the pictures whose first chunk was read
    file.seek(position)
    while True:
        head = file.read(8)
        kind, left = head[4:], int.from_bytes(head[:4], "big")
        checksum = zlib.crc32(kind)
        while left and (data := file.read(min(left, _READ_BYTES))):
            checksum = zlib.crc32(data, checksum)
            left -= len(data)
        stated = file.read(4)
        if left or len(stated) < 4:
            return MissingPart("the file is cut short (its last chunk is missing)", max(0, begun - 1))
        if int.from_bytes(stated, "big") != checksum:
            return MissingPart(f"the file is damaged in the chunk at byte {position}", max(0, begun - 1))
        if kind == b"IEND":
            return None
        begun += kind == b"fcTL"
        position = file.tell()
