"""What a command writes to stdout and stderr if those cannot take it: a full disk, a stream that is closed.

Invariant: a command never ends early because its output cannot be written. What stdout did not take goes to
stderr at the end, because a verdict that was computed must not be nowhere; what stderr did not take is lost.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Descriptor(io.RawIOBase):
    """A file descriptor that takes all that is written to it, and keeps what could not be written.

    Args:
        descriptor: The descriptor. None if the stream was closed before the process began.

    Attributes:
        error: Why something could not be written; None if everything could.
        kept: What could not be written.

    Raises:
        BrokenPipeError: The reader is gone. This is raised once; afterwards nothing is written or kept.
    """

    def __init__(self, descriptor: int | None) -> None:
        self.error: str | None = None
        self.kept = bytearray()
        self._descriptor = descriptor
        self._file = None if descriptor is None else io.FileIO(descriptor, "w", closefd=False)
        self._reader_is_gone = False

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._descriptor is not None and os.isatty(self._descriptor)

    def fileno(self) -> int:
        if self._descriptor is None:
            raise io.UnsupportedOperation("the stream is closed")
        return self._descriptor

    def write(self, content: Any, /) -> int:
        data = bytes(memoryview(content))
        if self._reader_is_gone:
            return len(data)
        if self.error is None:
            try:
                if self._file is not None:
                    while (written := self._file.write(data)) is None:  # its reader is slow
                        select.select([], [self._file], [])
                    return written
                self.error = "it is closed"
            except BrokenPipeError:
                self._reader_is_gone = True
                raise
            except OSError as error:
                self.error = error.strerror or str(error)
        self.kept += data
        return len(data)


@contextlib.contextmanager
def safe_output() -> Iterator[Output]:
    """Replaces `sys.stdout` and `sys.stderr` by streams that take everything, and puts them back.

    A stream without a descriptor (in a notebook, under a test's capture) stays as it is.
    """
    before = sys.stdout, sys.stderr
    output = Output()
    output.out, sys.stdout = _stand_in(before[0])
    output.err, sys.stderr = _stand_in(before[1], line_buffering=True)
    try:
        yield output
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


class Output:
    """The streams of a command.

    Attributes:
        out: Standard output.
        err: Standard error.
    """

    out: _Descriptor | None = None
    err: _Descriptor | None = None

    def deliver(self) -> bool:
        """Writes what stdout did not take to stderr, after a line that says so.

        Returns:
            Whether stdout took everything.

        Raises:
            BrokenPipeError: The reader of stdout is gone.
        """
        sys.stdout.flush()
        if self.out is None or self.out.error is None:
            return True
        sys.stderr.write(f"vrthinker: stdout: cannot be written ({self.out.error}); what it lacks follows\n")
        sys.stderr.write(self.out.kept.decode("utf-8", "backslashreplace"))
        sys.stderr.flush()
        return False


def _stand_in(stream: TextIO | None, *, line_buffering: bool = False) -> tuple[_Descriptor | None, TextIO]:
    if stream is None:  # the process was started without this stream
        raw = _Descriptor(None)
        return raw, _text(raw, "utf-8", line_buffering)
    try:
        raw = _Descriptor(stream.fileno())
        stream.flush()
    except (OSError, ValueError):
        return None, stream
    return raw, _text(raw, stream.encoding, line_buffering or raw.isatty())


def _text(raw: _Descriptor, encoding: str, line_buffering: bool) -> TextIO:
    # A name that the encoding cannot spell is spelled with escapes: it must not cost the verdict beside it.
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=line_buffering
    )
