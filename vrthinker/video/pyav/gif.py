"""Walks the blocks of a GIF file, because a decoder shows half of a picture as if it were whole.

A part that is cut out of the middle may lead the walk from the data of one picture into that of another, and
so lose pictures in silence. Encoders fill every sub-block but the last of a picture, so sub-blocks of other
sizes make a picture suspect. Whether its data fit its size is then counted. Invariant: a file is called
damaged only if its blocks contradict the format, if a picture's data give more or fewer pixels than it has,
or if much follows the trailer.

Source: the GIF89a specification.
"""

from __future__ import annotations

from typing import BinaryIO

_HEADER_BYTES = 13
_EXTENSIONS = {0x01: 12, 0xF9: 4, 0xFE: None, 0xFF: 11}
"""The labels of texts, graphic controls, comments and applications, and the size of their first block."""
_MAX_COUNTED_BYTES = 4 << 20
"""The most bytes of suspect pictures whose pixels are counted. It is slow, so the rest is believed."""
_MAX_REST_BYTES = 64
"""The most bytes that may follow the trailer."""
_MAX_LOOKED_AT_BYTES = 1 << 20
"""The most bytes behind the trailer that are looked at. Zeros are padding."""
_MAX_CODES = 4096
_LARGEST_MIN_SIZE = 11
_MAX_PADDING_BYTES = 8
"""The most bytes at the end of a picture's data from its last code on. FFmpeg writes a byte too many."""


def examine(file: BinaryIO) -> tuple[int, str | None]:
    """Walks the blocks to the trailer.

    Args:
        file: The file, at its start.

    Returns:
        The number of whole pictures, and why the file is not whole; None if it is.
    """
    n_pictures, n_counted = 0, 0
    header = file.read(_HEADER_BYTES)
    _skip_colour_table(file, header[10] if len(header) == _HEADER_BYTES else 0)
    while kind := file.read(1):
        start = file.tell() - 1
        if kind == b";":
            rest = file.read(_MAX_LOOKED_AT_BYTES)
            is_last = len(rest) <= _MAX_REST_BYTES or not rest.strip(b"\0")
            return (
                n_pictures,
                None if is_last else f"the file is damaged at byte {start} (it goes on after its end)",
            )
        if kind == b"!":
            label = file.read(1)
            blocks = _sub_blocks(file)
            is_known = label[:1] and label[0] in _EXTENSIONS
            if blocks is not None and not (is_known and _starts_as(blocks, _EXTENSIONS[label[0]])):
                return n_pictures, f"the file is damaged at byte {start}"
        elif kind == b",":
            descriptor = file.read(9)
            _skip_colour_table(file, descriptor[8] if len(descriptor) == 9 else 0)
            min_size = file.read(1)
            blocks = _sub_blocks(file)
            if blocks is not None:
                n_bytes = sum(map(len, blocks))
                if not 1 <= min_size[0] <= _LARGEST_MIN_SIZE:
                    return n_pictures, f"the file is damaged in the picture at byte {start}"
                if _is_suspect(blocks) and n_counted + n_bytes <= _MAX_COUNTED_BYTES:
                    n_counted += n_bytes
                    sides = (int.from_bytes(descriptor[at : at + 2], "little") for at in (4, 6))
                    if not _fills(next(sides) * next(sides), min_size[0], b"".join(blocks)):
                        return n_pictures, f"the file is damaged in the picture at byte {start}"
                n_pictures += 1
        else:
            return n_pictures, f"the file is damaged at byte {start}"
        if blocks is None:
            break
    return n_pictures, "the file is cut short (its trailer is missing)"


def _sub_blocks(file: BinaryIO) -> list[bytes] | None:
    """The data of sub-blocks up to the empty one that ends them; None if the file ends before."""
    blocks: list[bytes] = []
    while length := file.read(1):
        if length == b"\0":
            return blocks
        block = file.read(length[0])
        if len(block) < length[0]:
            return None
        blocks.append(block)
    return None


def _starts_as(blocks: list[bytes], first_bytes: int | None) -> bool:
    return first_bytes is None or (bool(blocks) and len(blocks[0]) == first_bytes)


def _is_suspect(blocks: list[bytes]) -> bool:
    """Whether sub-blocks before the last are not all of the first one's size, or the last is larger."""
    sizes = [len(block) for block in blocks]
    return any(size != sizes[0] for size in sizes[:-1]) or (bool(sizes) and sizes[-1] > sizes[0])


def _fills(n_pixels: int, min_size: int, data: bytes) -> bool:
    """Whether compressed data give exactly a number of pixels, and end there.

    Only the lengths of the strings are kept that each code stands for.
    """
    clear, end = 1 << min_size, (1 << min_size) + 1
    lengths = [1] * clear + [0, 0]
    width, previous, total, bits, n_bits = min_size + 1, 0, 0, 0, 0
    for position, byte in enumerate(data):
        bits |= byte << n_bits
        n_bits += 8
        while n_bits >= width:
            code = bits & ((1 << width) - 1)
            bits >>= width
            n_bits -= width
            if code == end:
                return total == n_pixels and len(data) - position <= _MAX_PADDING_BYTES
            if code == clear:
                del lengths[clear + 2 :]
                width, previous = min_size + 1, 0
                continue
            if code > len(lengths) or (code == len(lengths) and not previous):
                return False
            length = lengths[code] if code < len(lengths) else previous + 1
            if previous and len(lengths) < _MAX_CODES:
                lengths.append(previous + 1)
                if len(lengths) == 1 << width and len(lengths) < _MAX_CODES:
                    width += 1
            previous = length
            total += length
    return total == n_pixels  # some writers leave the end code out


def _skip_colour_table(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << ((flags & 7) + 1), 1)
