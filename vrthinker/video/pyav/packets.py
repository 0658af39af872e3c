"""Checks of a compressed packet without decoding it: what it shows, what it refers to, if it is damaged.

Invariant: a packet that a conforming encoder can write is never called damaged. Damage that is only visible
in the pixels is not found here. For codecs without checksums, it is not found anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

_ZERO_HEAD_BYTES = 16
_ZERO_TAIL_BYTES = 8
_NAL_CODECS = frozenset({"h264", "hevc"})
_H264_IDR = 5
_H264_SLICE = 1
_H264_REMARKS = frozenset({6, 9, 12})
"""Units that say nothing of other pictures: supplemental information, delimiters and filling."""
_NEVER_ZERO = _NAL_CODECS | {"vp8", "vp9", "av1", "mjpeg", "mpeg4"}


def shows_frame(codec: str, packet: memoryview) -> bool:
    """Whether the packet shows a picture. Some packets of VP8 and VP9 are only references for later ones."""
    if codec == "vp8":
        return bool(packet[0] >> 4 & 1)
    if codec == "vp9":
        return any(_vp9_shows(packet[start]) for start in _vp9_frame_starts(packet))
    return True


def damage(codec: str, packet: memoryview) -> str | None:
    """The reason why a packet cannot be what the encoder wrote; None if there is none.

    Runs of zeros are what remains after an interrupted download or on a full disk.
    """
    if codec in _NEVER_ZERO and not any(packet[:_ZERO_HEAD_BYTES]):
        return "frame data is zeroed out"
    # H.264 and HEVC forbid three zero bytes in a row inside a unit.
    if codec in _NAL_CODECS and len(packet) > _ZERO_TAIL_BYTES and not any(packet[-_ZERO_TAIL_BYTES:]):
        return "frame data is partly zeroed out"
    return None


def starts_afresh(codec: str, packet: memoryview, extradata: bytes) -> bool:
    """Whether no picture after this keyframe refers to one before it, in its data or in its bookkeeping.

    In H.264 only an IDR picture guarantees that. At any other keyframe, pictures from before it may still be
    named: by pictures that come later in the file but are shown before the keyframe (which no decoder shows
    if it starts here), and by commands to forget a picture.

    Args:
        codec: FFmpeg's name of the codec.
        packet: A packet that the container marks as a keyframe.
        extradata: The codec's header from the container, which tells how units are separated.
    """
    if codec != "h264":
        return True
    kinds = (packet[start] & 31 for start in _nal_starts(packet, extradata))
    return next((kind for kind in kinds if 1 <= kind <= _H264_IDR), _H264_IDR) == _H264_IDR


def is_disposable(codec: str, packet: memoryview, extradata: bytes) -> bool:
    """Whether a packet may be left out without a change to any other picture. Only H.264 says so for certain.

    There, every unit states whether later pictures may refer to its picture (nal_ref_idc).

    Args:
        codec: FFmpeg's name of the codec.
        packet: The packet.
        extradata: The codec's header from the container, which tells how units are separated.
    """
    if codec != "h264":
        return False
    found = False
    for start in _nal_starts(packet, extradata):
        kind, is_reference = packet[start] & 31, packet[start] >> 5 & 3
        if kind == _H264_SLICE and not is_reference:
            found = True
        elif kind not in _H264_REMARKS:
            return False
    return found


def _nal_starts(packet: memoryview, extradata: bytes) -> Iterator[int]:
    """The offsets of the first bytes of an H.264 packet's units."""
    if len(extradata) > 4 and extradata[0] == 1:  # every unit is preceded by its length
        n_bytes, position = (extradata[4] & 3) + 1, 0
        while position + n_bytes < len(packet):
            yield position + n_bytes
            position += n_bytes + int.from_bytes(packet[position : position + n_bytes], "big")
        return
    data, position = bytes(packet), 0
    while (position := data.find(b"\0\0\1", position) + 3) > 2 and position < len(data):
        yield position


def _vp9_shows(first_byte: int) -> bool:
    """Reads show_existing_frame and show_frame from a VP9 frame's first byte."""
    profile = (first_byte >> 5 & 1) | (first_byte >> 4 & 1) << 1
    bits = first_byte << 1 if profile == 3 else first_byte
    return bool(bits & 0b1000 or bits & 0b10)


def _vp9_frame_starts(packet: memoryview) -> list[int]:
    """The offsets at which the frames of a VP9 packet start: several in a superframe, else one."""
    marker = packet[-1]
    if marker & 0xE0 != 0xC0:
        return [0]
    n_frames, size_bytes = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index_bytes = 2 + n_frames * size_bytes
    if len(packet) < index_bytes or packet[-index_bytes] != marker:
        return [0]
    sizes = packet[len(packet) - index_bytes + 1 : -1]
    starts, position = [], 0
    for i in range(n_frames):
        if position >= len(packet) - index_bytes:
            break
        starts.append(position)
        position += int.from_bytes(sizes[i * size_bytes : (i + 1) * size_bytes], "little")
    return starts
