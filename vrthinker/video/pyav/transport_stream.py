"""Walks the packets of an MPEG transport stream, to notice packets that are missing.

Every packet has 188 bytes, begins with the same byte, and counts on within its stream (modulo 16). Invariant:
a stream is called damaged only where a packet does not begin as it must, says itself that it is damaged, or
does not count on although its sender announced no jump. A loss of 16 packets, or a multiple, is not seen.

Source: ISO/IEC 13818-1, 2.4.3.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np

from vrthinker.video.pyav.matroska import Loss

PACKET_BYTES = 188
_SYNC = 0x47
_OTHER_SIZES = (192, 204)
"""Sizes of packets that have a time stamp or a checksum beside them."""
_PACKETS_AT_ONCE = 1 << 14


def lost_part(file: BinaryIO, stream_id: int) -> Loss | None:
    """The first place at which packets of one stream are missing or damaged; None if there is none.

    Args:
        file: The file.
        stream_id: The packet ID of the video stream.
    """
    last_count, last_start, offset = -1, 0, 0
    while data := file.read(PACKET_BYTES * _PACKETS_AT_ONCE):
        packets = np.frombuffer(data, np.uint8)[: len(data) // PACKET_BYTES * PACKET_BYTES]
        packets = packets.reshape(-1, PACKET_BYTES)
        if offset == 0 and not _is_aligned(packets):
            if len(packets) < 2 or data[0] != _SYNC or any(data[at : at + 1] == b"G" for at in _OTHER_SIZES):
                return None  # another kind of transport stream, or garbage before it
            return Loss("the file is damaged at byte 188 (not a packet)", 0)
        bad = packets[:, 0] != _SYNC
        ours = (packets[:, 1] & 0x1F).astype(int) << 8 | packets[:, 2]
        mine = np.flatnonzero((ours == stream_id) & ~bad)
        bad[mine] = (packets[mine, 1] & 0x80) != 0
        bad[_jumps(packets[mine], mine, last_count)] = True
        starts = mine[(packets[mine, 1] & 0x40) != 0]
        if bad.any():
            first = int(np.argmax(bad))
            before = starts[starts < first]
            at_byte = offset + int(before[-1]) * PACKET_BYTES if len(before) else last_start
            return Loss(
                f"the file is damaged at byte {offset + first * PACKET_BYTES} (packets are lost)", at_byte
            )
        last_start = offset + int(starts[-1]) * PACKET_BYTES if len(starts) else last_start
        carrying = mine[(packets[mine, 3] & 0x10) != 0]
        last_count = int(packets[carrying[-1], 3] & 15) if len(carrying) else last_count
        offset += len(data)
    return None


def _is_aligned(packets: np.ndarray[Any, Any]) -> bool:
    return len(packets) > 1 and bool((packets[:2, 0] == _SYNC).all())


def _jumps(
    packets: np.ndarray[Any, Any], places: np.ndarray[Any, Any], last_count: int
) -> np.ndarray[Any, Any]:
    """The places of packets that do not count on. Only those with data count, and each may come twice."""
    has_field = (packets[:, 3] & 0x20 != 0) & (packets[:, 4] > 0)
    announced = has_field & (packets[:, 5] & 0x80 != 0)
    carrying = packets[:, 3] & 0x10 != 0
    counts, announced, places = packets[carrying, 3] & 15, announced[carrying], places[carrying]
    before = np.concatenate([[last_count if last_count >= 0 else 256], counts[:-1]]).astype(int)
    wrong = (counts != (before + 1) % 16) & (counts != before) & (before != 256) & ~announced
    jumps: np.ndarray[Any, Any] = places[wrong]
    return jumps
