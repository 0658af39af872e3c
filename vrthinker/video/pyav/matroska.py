"""Walks the elements of a Matroska or WebM file, because demuxers skip what they cannot read without a word.

FFmpeg looks for the next cluster when one is unreadable, so frames are lost in silence. Invariant: a file is
called damaged only where its own elements contradict the format: an element that Matroska does not have, one
that reaches beyond its parent or the file, a block of a track that does not exist or that the demuxer leaves
out, or a header that states a much later end than the last block has. Frames and codecs are not looked at.

Source: RFC 8794 (EBML) and RFC 9559 (Matroska).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

_EBML_HEADER = 0x1A45DFA3
_SEGMENT = 0x18538067
_INFO, _TRACKS, _CLUSTER = 0x1549A966, 0x1654AE6B, 0x1F43B675
_VOID, _CRC = 0xEC, 0xBF
_IN_SEGMENT = frozenset(
    {_INFO, _TRACKS, _CLUSTER, _VOID, _CRC, 0x114D9B74, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
)
"""The header elements, clusters, and the seek head, cues, attachments, chapters and tags."""
_TIME, _SIMPLE_BLOCK, _BLOCK_GROUP, _BLOCK, _BLOCK_DURATION = 0xE7, 0xA3, 0xA0, 0xA1, 0x9B
_IN_CLUSTER = frozenset({_TIME, _SIMPLE_BLOCK, _BLOCK_GROUP, _VOID, _CRC, 0x5854, 0xA7, 0xAB, 0xAF})
"""Also the silent tracks, the position, the previous cluster's size and the encrypted block of old files."""
_TIME_SCALE, _DURATION, _TRACK_ENTRY, _TRACK_NUMBER = 0x2AD7B1, 0x4489, 0xAE, 0xD7
_MAX_HEADER_BYTES = 1 << 20
_MAX_ELEMENTS = 2_000_000
"""Many more than the frames and sounds of the longest clip that is read."""
_SLACK_SECONDS = 1.0
"""How much earlier than the stated duration the last block may begin, whatever the distance of blocks is."""


class Loss(NamedTuple):
    """A place from which a file cannot be trusted.

    Attributes:
        reason: What shows it.
        at_byte: The offset of the first frame data that may be damaged.
    """

    reason: str
    at_byte: int


class _TooManyError(Exception):
    """The file has more elements than a clip can need, so that walking them would take for ever."""


class _Element(NamedTuple):
    """An element's ID, where it starts, and its content. The end is None if it was written without a size."""

    kind: int
    start: int
    content: int
    end: int | None


@dataclass
class _Walk:
    file: BinaryIO
    size: int
    tracks: set[int] = field(default_factory=set)
    ticks_a_second: float = 1000.0
    duration: float | None = None  # in ticks, as the header states it
    cluster_time: int = 0
    last_time: int | None = None
    last_end: int = 0
    largest_gap: int = 0
    n_elements: int = 0
    last_block: int = 0  # the offset of the block before the present position
    blocks: dict[int, dict[int, int]] = field(default_factory=dict)  # track -> content -> start of each block

    def element(self, position: int) -> _Element | None:
        """The element at an offset; None if there is none that could be one."""
        self.n_elements += 1
        if self.n_elements > _MAX_ELEMENTS:
            raise _TooManyError
        self.file.seek(position)
        head = self.file.read(12)
        if not head or head[0] < 0x10:  # IDs have at most four bytes
            return None
        id_bytes = 9 - head[0].bit_length()
        size_head = head[id_bytes : id_bytes + 1]
        if not size_head or size_head[0] == 0:
            return None
        size_bytes = 9 - size_head[0].bit_length()
        stated = head[id_bytes : id_bytes + size_bytes]
        if len(stated) < size_bytes:
            return None
        mask = (1 << (7 * size_bytes)) - 1
        length = int.from_bytes(stated, "big") & mask
        content = position + id_bytes + size_bytes
        end = None if length == mask else content + length
        return _Element(int.from_bytes(head[:id_bytes], "big"), position, content, end)

    def damaged(self, position: int, what: str) -> Loss:
        """Damage that shows at an offset. It may have begun in the block before, whose size led here."""
        return Loss(f"the file is damaged at byte {position} ({what})", self.last_block or position)

    def segment(self, start: int, end: int | None) -> Loss | None:
        """Walks a segment's elements up to its end, or to the file's end if it has none."""
        position, last = start, self.size if end is None else min(end, self.size)
        while position < last:
            element = self.element(position)
            if element is not None and end is None and element.kind == _EBML_HEADER:
                return None  # a live stream that begins anew
            if element is None or element.kind not in _IN_SEGMENT:
                return self.damaged(position, "not an element of a segment")
            if element.kind == _CLUSTER:
                loss, position = self.cluster(element, last)
                if loss is not None:
                    return loss
                continue
            if element.end is None:
                return self.damaged(position, "an element without a size")
            if element.kind == _INFO:
                self.info(element)
            elif element.kind == _TRACKS:
                self.list_tracks(element)
            position = element.end
        return self.missing_end() if end is None or end <= self.size else None

    def cluster(self, cluster: _Element, last: int) -> tuple[Loss | None, int]:
        """Walks a cluster's elements. Returns a loss, or where the next element of the segment begins."""
        position = cluster.content
        end = last if cluster.end is None else cluster.end
        while position < min(end, last):
            element = self.element(position)
            if element is not None and cluster.end is None and element.kind in _IN_SEGMENT - {_VOID, _CRC}:
                return None, position
            if element is None or element.kind not in _IN_CLUSTER or element.end is None:
                return self.damaged(position, "not an element of a cluster"), position
            if element.end > end:
                if element.end > self.size and cluster.end is None:
                    reason = f"the file is cut short ({self.size} bytes, at least {element.end} expected)"
                    return Loss(reason, position), position
                return self.damaged(position, "an element that is larger than its cluster"), position
            if element.kind == _TIME:
                self.cluster_time = self.unsigned(element)
            elif element.kind == _SIMPLE_BLOCK:
                loss = self.block(element)
                if loss is not None:
                    return loss, position
            elif element.kind == _BLOCK_GROUP:
                loss = self.block_group(element, element.end)
                if loss is not None:
                    return loss, position
            position = element.end
        return None, max(end, cluster.content)

    def block_group(self, group: _Element, end: int) -> Loss | None:
        position, duration = group.content, 0
        while position < end:
            element = self.element(position)
            if element is None or element.end is None or element.end > end:
                return self.damaged(position, "not an element of a group of blocks")
            if element.kind == _BLOCK:
                loss = self.block(element)
                if loss is not None:
                    return loss
            elif element.kind == _BLOCK_DURATION:
                duration = self.unsigned(element)
            position = element.end
        self.last_end = max(self.last_end, (self.last_time or 0) + duration)
        return None

    def block(self, block: _Element) -> Loss | None:
        """Reads a block's track and time."""
        self.file.seek(block.content)
        head = self.file.read(4)
        if len(head) < 4 or head[0] < 0x80:
            return None  # a track with a large number: not read further
        if self.tracks and head[0] & 0x7F not in self.tracks:
            return self.damaged(block.start, f"a block of track {head[0] & 0x7F}, which does not exist")
        self.blocks.setdefault(head[0] & 0x7F, {})[block.content] = block.start
        time = self.cluster_time + int.from_bytes(head[1:3], "big", signed=True)
        if self.last_time is not None:
            self.largest_gap = max(self.largest_gap, time - self.last_time)
        self.last_time = time if self.last_time is None else max(self.last_time, time)
        self.last_end = max(self.last_end, time)
        self.last_block = block.start
        return None

    def missing_end(self) -> Loss | None:
        """A loss if the header states a much later end than the last block has."""
        if self.duration is None or self.last_time is None or not self.ticks_a_second:
            return None
        slack = max(2 * self.largest_gap, _SLACK_SECONDS * self.ticks_a_second)
        if not self.duration > self.last_end + slack:  # not a number, too
            return None
        stated, last = self.duration / self.ticks_a_second, self.last_end / self.ticks_a_second
        reason = (
            f"its end is missing (its header states {stated:.2f} s, the last frame comes at {last:.2f} s)"
        )
        return Loss(reason, self.size)

    def unreachable(self, positions: Set[int]) -> Loss | None:
        """A loss if the demuxer gave packets of a track, and not those of all its blocks."""
        for blocks in self.blocks.values():
            if not positions.isdisjoint(blocks):
                for content, start in blocks.items():
                    if content not in positions:
                        return Loss(f"the frame at byte {start} cannot be reached", start)
        return None

    def info(self, info: _Element) -> None:
        for element in self.children(info):
            if element.kind == _TIME_SCALE:
                scale = self.unsigned(element)
                self.ticks_a_second = 1e9 / scale if scale else 0.0
            elif element.kind == _DURATION:
                data = self.bytes_of(element)
                if len(data) in (4, 8):
                    self.duration = struct.unpack(">f" if len(data) == 4 else ">d", data)[0]

    def list_tracks(self, tracks: _Element) -> None:
        for entry in self.children(tracks):
            if entry.kind == _TRACK_ENTRY:
                numbers = (e for e in self.children(entry) if e.kind == _TRACK_NUMBER)
                self.tracks.update(self.unsigned(element) for element in numbers)

    def children(self, parent: _Element) -> Iterator[_Element]:
        """The elements within a header element, as far as they make sense."""
        position, end = parent.content, min(parent.end or 0, parent.content + _MAX_HEADER_BYTES)
        while position < end:
            element = self.element(position)
            if element is None or element.end is None or element.end > end:
                return
            yield element
            position = element.end

    def bytes_of(self, element: _Element) -> bytes:
        self.file.seek(element.content)
        return self.file.read(min(8, (element.end or element.content) - element.content))

    def unsigned(self, element: _Element) -> int:
        return int.from_bytes(self.bytes_of(element), "big")


def examine(file: BinaryIO, positions: Set[int] = frozenset()) -> tuple[int | None, Loss | None]:
    """Walks a file.

    Args:
        file: The file.
        positions: The offsets of the packets that the demuxer gave; empty if they are not known.

    Returns:
        The offset at which the segment ends (None if it was written live, without a size, or if there is no
        segment), and the first place at which the file contradicts its format.
    """
    walk = _Walk(file, os.fstat(file.fileno()).st_size)
    try:
        segment = _find_segment(walk)
        if segment is None:
            return None, None
        return segment.end, walk.segment(segment.content, segment.end) or walk.unreachable(positions)
    except _TooManyError:
        return None, Loss(f"over {_MAX_ELEMENTS} elements, more than a clip can need", 0)


def _find_segment(walk: _Walk) -> _Element | None:
    element = walk.element(0)
    if element is None or element.kind != _EBML_HEADER:
        return None
    while element is not None and element.end is not None and element.kind != _SEGMENT:
        element = walk.element(element.end)  # the header, and perhaps an empty element
    return element if element is not None and element.kind == _SEGMENT else None
