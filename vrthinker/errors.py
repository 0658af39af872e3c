"""The errors that a user can cause. Each has a message of one line.

Every message says what was got, what is allowed, and what to do. The command line prints the message on one
line of stderr, without a traceback, and exits with `exit_code`.
"""

from __future__ import annotations

import errno
import os
import re
import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_MAX_NAME_CHARS = 40
_MAX_PLACE_CHARS = 160
_MAX_VALUE_CHARS = 80
_MAX_MESSAGE_CHARS = 300
_MAX_SPELLED_CHARS = 2000
_MAKE_ROOM = "make room, then run again"
_RAISE_LIMIT = "raise the limit of file sizes (ulimit -f), then run again"
_NO_ROOM = {errno.ENOSPC: _MAKE_ROOM, errno.EDQUOT: _MAKE_ROOM, errno.EFBIG: _RAISE_LIMIT}
_BAD_NAMES = frozenset(
    (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
)


class VRThinkerError(Exception):
    """Base of every error that the package raises on purpose. The command line exits with 1."""

    exit_code: int = 1


class InputError(VRThinkerError, ValueError):
    """Something that the caller gave cannot be used (a clip, a pairs file, an option). The exit code is 2."""

    exit_code = 2


class VideoError(InputError):
    """A clip cannot be read. The message is `<file>: <reason>`.

    Attributes:
        path: The file as it was given.
        reason: The reason why it cannot be used, without the file's name.
    """

    def __init__(self, path: object, reason: str) -> None:
        # A file name may contain anything but "/" and NUL, but the message has to be one printable line.
        super().__init__(f"{_printable(str(path))}: {reason}")
        self.path = str(path)
        self.reason = reason


class EngineError(VRThinkerError):
    """An engine could not write a round (out of memory, endpoint unreachable, closed session)."""


class MachineError(VRThinkerError):
    """The machine ran out of something, such as memory. The input is not to blame."""


class UnexpectedError(VRThinkerError):
    """An unexpected failure: a bug in the package, or in a library or a checkpoint that it uses."""


def as_reason(error: BaseException) -> VRThinkerError:
    """Turns any error into an error of the package, with a message of one line that says what to do.

    Args:
        error: The error. It may not be a request to stop (`KeyboardInterrupt`, `SystemExit`,
            `GeneratorExit`).

    Returns:
        The error itself if the package raised it on purpose. Otherwise a `MachineError` (no memory, a full
        disk), an `InputError` (a file name that cannot be used), or an `UnexpectedError`.

    Raises:
        BaseException: The error is a request to stop.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    if isinstance(error, VRThinkerError):
        return error
    if isinstance(error, MemoryError):
        return MachineError("out of memory; run it again with less beside it, or with a smaller batch")
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return unwritable(error.filename or "a file", error, "")
    # Libraries in Rust raise their own errors, which spell the system's: "... (os error 28)".
    spelled = re.search(r"\(os error (\d{1,4})\)", str(error)[:_MAX_SPELLED_CHARS])
    if spelled is not None and int(spelled[1]) in _NO_ROOM:
        number = int(spelled[1])
        return unwritable("a file", OSError(number, os.strerror(number)), "")
    if isinstance(error, OSError) and error.errno in _BAD_NAMES and error.filename is not None:
        name = _short(str(error.filename), _MAX_PLACE_CHARS)
        return InputError(f"{name}: cannot be used ({error.strerror}); give another file or grant access")
    said = _short(str(error).strip(), _MAX_MESSAGE_CHARS)
    kind = _short(type(error).__name__, _MAX_NAME_CHARS)
    return UnexpectedError(f"{kind}: {said or 'no message'}; not foreseen: please report it with the log")


def unwritable(
    place: object, error: OSError, otherwise: str, *, failed: str = "cannot be written"
) -> VRThinkerError:
    """The error for a file that cannot be written. If its disk is full, another name would not help.

    Args:
        place: What names the file in the message: its path, perhaps after the option's name.
        error: The system's error.
        otherwise: What to do if the disk is not full, such as `give another file`.
        failed: What failed.

    Returns:
        A `MachineError` if the disk has no room, else an `InputError`.
    """
    said = error.strerror or _short(str(error), _MAX_MESSAGE_CHARS)
    remedy = _NO_ROOM.get(error.errno or 0)
    line = f"{_printable(str(place))}: {failed} ({said}); {remedy or otherwise}"
    return InputError(line) if remedy is None else MachineError(line)


def first_problem(error: ValidationError, default: str = "(file)", *, quote: bool = False) -> str:
    """The first problem of data that pydantic refused, as `where: message`.

    This function never raises, and it shortens what it quotes of the data, which may come from an untrusted
    file.

    Args:
        error: The error of pydantic.
        default: The place to name if the data are refused as a whole. If it is empty, no place is named.
        quote: Whether to quote the refused value before the message.

    Returns:
        One printable line.
    """
    try:
        first = error.errors(include_url=False, include_context=False, include_input=quote)[0]
        names = [_short(str(name), _MAX_NAME_CHARS) for name in first["loc"]]
        message = _short(first["msg"], _MAX_MESSAGE_CHARS)
        if quote:
            message = f"got {_quoted(first['input'])}: {message}"
    except Exception:
        # The description of a problem runs code of the data's types and validators, which may fail too.
        names, message = [], "cannot be read as what it should be"
    where = _short(".".join(names), _MAX_PLACE_CHARS) or default
    return f"{where}: {message}" if where else message


def _quoted(value: object) -> str:
    spelling = reprlib.Repr()
    spelling.maxstring = spelling.maxother = spelling.maxlong = _MAX_VALUE_CHARS
    try:
        return _short(spelling.repr(value), _MAX_VALUE_CHARS)
    except Exception:
        return f"a value of type {_short(type(value).__name__, _MAX_NAME_CHARS)}"


def one_line(text: str) -> str:
    """The beginning of a text that somebody else may have written, as one printable line for a message."""
    return _short(text, _MAX_MESSAGE_CHARS)


def _short(text: str, limit: int) -> str:
    """The beginning of a text on one printable line, with dots if it was cut."""
    line = _printable(text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _printable(text: str) -> str:
    """A text on one line, with control characters, line ends and lone surrogates as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
