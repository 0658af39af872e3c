"""Checks of a compressed packet without decoding it: whether it shows a frame, and whether it is damaged.

Invariant: a packet that a conforming encoder can write is never called damaged. Damage that is only visible
in the pixels is not found here. For codecs without checksums, it is not found anywhere.
"""

from __future__ import annotations

_ZERO_HEAD_BYTES = 16
_ZERO_TAIL_BYTES = 8
_NAL_CODECS = frozenset({"h264", "hevc"})
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
