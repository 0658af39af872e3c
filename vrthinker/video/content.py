"""The content of a clip, by which a record knows its clip again, also when it was copied elsewhere.

The modification time of a file says whether it changed on this machine since it was looked at (`file_state`),
but a copy has another one. The size in bytes and a digest of the content survive copying.

A file of up to `WHOLE_BYTES` is hashed whole, so its digest is what `sha256sum` prints. Of a larger file, the
size and 16 blocks of 1 MiB are hashed, spread evenly from its first byte to its last. That bounds the cost
of opening a clip. Encoding a clip again changes its bytes from beginning to end, so it is noticed all the
same.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from typing import NamedTuple

from vrthinker.video.frame_cache import file_state
from vrthinker.video.reader import VideoPath

WHOLE_BYTES = 16 << 20
"""The largest file, in bytes, that is hashed whole."""
_BLOCKS = 16
_BLOCK_BYTES = WHOLE_BYTES // _BLOCKS
_LEAST_BYTES = 4096
"""The fewest bytes that are hashed of each file of a folder."""
_REMEMBERED = 4096


class ClipContent(NamedTuple):
    """What a clip's file contains.

    Attributes:
        size_bytes: The size in bytes; of a folder, the sum over its files.
        sha256: The digest, in hexadecimal digits.
    """

    size_bytes: int
    sha256: str


def clip_content(path: VideoPath) -> ClipContent | None:
    """The content of a clip. While its file does not change, it is read once.

    Args:
        path: The file, or the folder of images.

    Returns:
        The content; None if it cannot be read (the reader's error says why).
    """
    name = os.fspath(path)
    try:
        return _content(name, file_state(name))
    except (OSError, ValueError):
        return None


@functools.lru_cache(_REMEMBERED)
def _content(name: str, state: tuple[int, int]) -> ClipContent:
    """The content of a file in a state that `file_state` returned. Errors are not remembered."""
    return _folder_content(name) if os.path.isdir(name) else _file_content(name, WHOLE_BYTES)


def _folder_content(folder: str) -> ClipContent:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))
    digest, size_bytes = hashlib.sha256(), 0
    share = max(_LEAST_BYTES, WHOLE_BYTES // max(1, len(names)))
    for name in names:
        content = _file_content(os.path.join(folder, name), share)
        digest.update(f"{name}\0{content.size_bytes}\0{content.sha256}\n".encode("utf-8", "surrogatepass"))
        size_bytes += content.size_bytes
    return ClipContent(size_bytes, digest.hexdigest())


def _file_content(name: str, most_bytes: int) -> ClipContent:
    """The content of a regular file, of which at most `most_bytes` are read."""
    # Opening a pipe would wait for its writer.
    with open(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{name}: not a file")
        size = status.st_size
        if size <= most_bytes:
            return ClipContent(size, hashlib.file_digest(stream, "sha256").hexdigest())
        digest = hashlib.sha256(f"{size}\n".encode())
        length = min(_BLOCK_BYTES, most_bytes // _BLOCKS)
        for number in range(_BLOCKS):
            digest.update(os.pread(stream.fileno(), length, number * (size - length) // (_BLOCKS - 1)))
        return ClipContent(size, digest.hexdigest())
