"""The errors that a user can cause, and the one line each of them says.

Every message names what was got, what is allowed, and what to do. The command line prints the
message on one line of stderr, without a traceback, and exits with `exit_code`.
"""

from __future__ import annotations


class VRThinkerError(Exception):
    """Base of every error that the package raises on purpose. The command line exits with 1."""

    exit_code: int = 1


class InputError(VRThinkerError, ValueError):
    """Something the caller gave cannot be used (a clip, a pairs file, an option): exit code 2."""

    exit_code = 2


class VideoError(InputError):
    """A clip that cannot be read. The message is `<file>: <reason>`.

    Attributes:
        path: The file as it was given.
        reason: Why it cannot be used, without the file's name.
    """

    def __init__(self, path: object, reason: str) -> None:
        # A file name may hold anything but "/" and NUL; the message stays one printable line.
        named = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
        super().__init__(f"{named}: {reason}")
        self.path = str(path)
        self.reason = reason


class EngineError(VRThinkerError):
    """An engine could not write a round (out of memory, endpoint unreachable, closed session)."""
