"""The sample table of an mp4 or mov file: every packet's place and times, without reading a packet.

FFmpeg reads the table when it opens the file and tells where each sample lies and when it is decoded, with
edit lists applied. It does not tell when a sample is shown, so the composition offsets are read here. An hour
of video has a table of a megabyte or two.

Invariant: a table is returned only if it describes every sample that FFmpeg gives, in FFmpeg's order and with
FFmpeg's times up to one constant. Anything else (fragments, an edit list that hides samples, tables that
disagree, more samples than a clip may have) is None, and the packets themselves are listed instead.

Source: ISO/IEC 14496-12, 8.6.1.3 (ctts) and 8.7.3 (stsz).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from vrthinker.video.pyav.packets import damage
from vrthinker.video.reader import most_frames

_MAX_MOOV_BYTES = 1 << 28
_MAX_BOXES = 10_000
_KEYFRAME, _DISCARD = 1, 2
"""Flags of FFmpeg's index entries."""
_EXAMINED_SAMPLES = 1024
"""The most samples whose first and last bytes are looked at when a file is opened."""
_HEAD_BYTES, _TAIL_BYTES = 16, 8
_FIRST_UNIT_BYTES = 4096
_BYTES_WORTH_A_READ = 8192
"""Bytes that are copied from the page cache in about the time of two calls of the system."""

_ENTRY = np.dtype([(name, np.int64) for name in ("timestamp", "pos", "size", "flags")])

_Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class SampleTable:
    """Every sample of a track, in the order in which they are stored and decoded.

    Attributes:
        decoded: The decoding time of each sample in the track's ticks, int64 `[n]`, increasing.
        shown: The time at which each is shown, int64 `[n]`, up to a constant that the first packet tells.
        offset: The offset of each in the file, int64 `[n]`.
        size: The size of each in bytes, int64 `[n]`.
        is_keyframe: Whether decoding may start there, bool `[n]`.
    """

    decoded: _Ints
    shown: _Ints
    offset: _Ints
    size: _Ints
    is_keyframe: np.ndarray[Any, np.dtype[np.bool_]]

    def __len__(self) -> int:
        return len(self.decoded)

    def first_damage(self, path: str, codec: str) -> str | None:
        """Why a sample cannot be what the encoder wrote, from its first and last bytes (`packets.damage`).

        Of a file of more samples than `_EXAMINED_SAMPLES`, as many are looked at, evenly spread, so that
        opening a long clip does not read it. Damage elsewhere is noticed when a frame that needs it is read.
        """
        n_examined = min(len(self), _EXAMINED_SAMPLES)
        chosen = np.arange(n_examined) * len(self) // n_examined
        offsets, sizes = self.offset[chosen], self.size[chosen]
        with open(path, "rb", buffering=0) as file:
            suspects = _look_empty_in_one_read(file.fileno(), offsets, sizes)
            for place in range(n_examined) if suspects is None else suspects:
                head, tail = _ends(file.fileno(), int(offsets[place]), int(sizes[place]))
                # Nearly all have other bytes than zero at both ends, and are told apart quickly.
                looks_empty = not head.strip(b"\0") or not tail.strip(b"\0")
                if looks_empty and (reason := damage(codec, memoryview(head + tail))) is not None:
                    return reason
        return None


def _ends(file: int, offset: int, size: int) -> tuple[bytes, bytes]:
    """A sample's first and last bytes."""
    if size <= _HEAD_BYTES + _TAIL_BYTES:
        both = os.pread(file, size, offset)
        return both[:_HEAD_BYTES], both[_HEAD_BYTES:]
    return os.pread(file, _HEAD_BYTES, offset), os.pread(file, _TAIL_BYTES, offset + size - _TAIL_BYTES)


def _look_empty_in_one_read(file: int, offsets: _Ints, sizes: _Ints) -> list[int] | None:
    """The places of samples with nothing but zeros at an end; None if they lie too far apart for one read.

    Reading small samples at once is cheaper than two calls of the system for each.
    """
    begin, end = int(offsets.min()), int((offsets + sizes).max())
    if end - begin > _BYTES_WORTH_A_READ * len(offsets) or int(sizes.min()) < _HEAD_BYTES + _TAIL_BYTES:
        return None
    content = os.pread(file, end - begin, begin)
    if len(content) < end - begin:
        return None
    filled = np.frombuffer(content, np.uint8)
    starts, tails = offsets - begin, offsets + sizes - begin - _TAIL_BYTES
    heads_filled = filled[starts[:, None] + np.arange(_HEAD_BYTES)].any(axis=1)
    tails_filled = filled[tails[:, None] + np.arange(_TAIL_BYTES)].any(axis=1)
    return np.flatnonzero(~(heads_filled & tails_filled)).tolist()


def sample_table(path: str, stream: Any) -> SampleTable | None:
    """The table of a stream that FFmpeg opened; None if it does not describe all samples as FFmpeg does.

    A small file may claim any number of samples, so a table of more than are allowed is not read: it is None,
    and the listing of the packets, which counts those that are there, refuses the clip.

    Args:
        path: The file. Only its boxes and its `moov` box are read.
        stream: PyAV's stream of the track.
    """
    if len(stream.index_entries) > most_frames(stream.width, stream.height):
        return None
    entries = np.fromiter(
        ((entry.timestamp, entry.pos, entry.size, entry.flags) for entry in stream.index_entries), _ENTRY
    )
    if not len(entries):
        return None
    decoded, offset, size, flags = (np.ascontiguousarray(entries[name]) for name in _ENTRY.names or ())
    with open(path, "rb") as file:
        ends = os.fstat(file.fileno()).st_size
        offsets = _composition_offsets(_movie(file), stream.id, len(entries))
    if offsets is None or (flags & _DISCARD).any() or (size <= 0).any() or (offset + size > ends).any():
        return None
    shown = decoded + offsets
    if (np.diff(decoded) <= 0).any() or (np.diff(np.sort(shown)) == 0).any():
        return None
    return SampleTable(decoded, shown, offset, size, (flags & _KEYFRAME) != 0)


def has_edits(path: str, track: int) -> bool:
    """Whether an edit list of a track does more than show the track from its beginning."""
    with open(path, "rb") as file:
        movie = _movie(file)
    for kind, content in _boxes(movie):
        if kind == b"trak" and _track_id(_inside(content, b"tkhd")) == track:
            edits = _inside(content, b"edts", b"elst")
            if len(edits) < 8:
                return False
            form = ">qhh" if edits[0] == 1 else ">ihh"
            first = 8 + (8 if edits[0] == 1 else 4)  # behind the length of the edit
            if int.from_bytes(edits[4:8], "big") != 1 or len(edits) < first + struct.calcsize(form):
                return True
            return struct.unpack_from(form, edits, first) != (0, 1, 0)
    return False


def first_bytes(path: str, offset: int, size: int) -> bytes:
    """The first bytes of a sample, enough to tell what kind of picture it begins with, or all of it."""
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), min(size, _FIRST_UNIT_BYTES), offset)


def _movie(file: BinaryIO) -> memoryview:
    """The content of a file's `moov` box; empty without one, or if it is compressed or absurdly large."""
    end, position = os.fstat(file.fileno()).st_size, 0
    for _ in range(_MAX_BOXES):
        file.seek(position)
        head = file.read(16)
        if len(head) < 8:
            break
        length, skipped = int.from_bytes(head[:4], "big"), 8
        if length == 1:
            length, skipped = int.from_bytes(head[8:16], "big"), 16
        length = length or end - position
        if length < skipped:
            break
        if head[4:8] == b"moov":
            if length > _MAX_MOOV_BYTES:
                break
            file.seek(position + skipped)
            return memoryview(file.read(length - skipped))
        position += length
    return memoryview(b"")


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The boxes of a container box, as (type, content). Ends at the first that does not fit."""
    position = 0
    for _ in range(_MAX_BOXES):
        if position + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, position)
        skipped = 8
        if length == 1 and position + 16 <= len(data):
            (length,) = struct.unpack_from(">Q", data, position + 8)
            skipped = 16
        length = length or len(data) - position
        if length < skipped or position + length > len(data):
            return
        yield kind, data[position + skipped : position + length]
        position += length


def _inside(data: memoryview, *kinds: bytes) -> memoryview:
    """The content of the first box of each kind within the one before; empty if one is missing."""
    for kind in kinds:
        data = next((content for name, content in _boxes(data) if name == kind), memoryview(b""))
    return data


def _composition_offsets(movie: memoryview, track: int, n_samples: int) -> _Ints | None:
    """How much later than it is decoded each sample of a track is shown, in ticks; None if it is unknown."""
    tables = [
        _inside(content, b"mdia", b"minf", b"stbl")
        for kind, content in _boxes(movie)
        if kind == b"trak" and _track_id(_inside(content, b"tkhd")) == track
    ]
    if len(tables) != 1 or len(_inside(movie, b"mvex")) or _n_samples(tables[0]) != n_samples:
        return None
    table = dict(_boxes(tables[0]))
    if b"ctts" not in table:
        return np.zeros(n_samples, dtype=np.int64)
    content = table[b"ctts"]
    if len(content) < 8:
        return None
    n_runs = int.from_bytes(content[4:8], "big")
    if len(content) < 8 + 8 * n_runs:
        return None
    runs = np.frombuffer(content, dtype=[("count", ">u4"), ("offset", ">i4")], count=n_runs, offset=8)
    counts = runs["count"].astype(np.int64)
    if counts.sum() != n_samples:  # checked before anything of that length is made
        return None
    return np.repeat(runs["offset"].astype(np.int64), counts)


def _track_id(header: memoryview) -> int:
    """The track's number, which stands behind two times of 4 bytes (version 0) or 8."""
    at = 20 if len(header) and header[0] == 1 else 12
    return int.from_bytes(header[at : at + 4], "big")


def _n_samples(table: memoryview) -> int:
    """The number of samples as the size box states it. Both kinds of the box have it in the same place."""
    for kind in (b"stsz", b"stz2"):
        if len(content := _inside(table, kind)) >= 12:
            return int.from_bytes(content[8:12], "big")
    return 0
