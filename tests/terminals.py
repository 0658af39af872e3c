"""A terminal in place of stderr."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
import threading
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def stderr_on_terminal() -> Iterator[list[str]]:
    """Lets stderr be a terminal; the list holds what reached it, as one text, after leaving."""
    ours, theirs = pty.openpty()
    parts: list[bytes] = []
    said: list[str] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while part := os.read(ours, 4096):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(theirs, "w") as terminal, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            patch.setenv("TERM", "xterm")
            patch.setenv("COLUMNS", "120")
            yield said
    finally:
        reader.join()
        os.close(ours)
        said.append(b"".join(parts).decode())
