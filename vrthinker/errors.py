"""The errors that a user can cause, and the one line each of them says.

Every message names what was got, what is allowed, and what to do. The command line prints the
message on one line of stderr, without a traceback, and exits with `exit_code`.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_MAX_NAME_CHARS = 40
_MAX_PLACE_CHARS = 160
_MAX_VALUE_CHARS = 80
_MAX_MESSAGE_CHARS = 300


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
        super().__init__(f"{_printable(str(path))}: {reason}")
        self.path = str(path)
        self.reason = reason


class EngineError(VRThinkerError):
    """An engine could not write a round (out of memory, endpoint unreachable, closed session)."""


class MachineError(VRThinkerError):
    """The machine ran out of something, such as memory: a statement about it, not about what was given."""


class UnexpectedError(VRThinkerError):
    """A failure that nobody foresaw: a bug in the package, or in a library or a checkpoint that it uses."""


def as_reason(error: BaseException) -> VRThinkerError:
    """Turns whatever was raised into an error with one line that says what to do.

    Args:
        error: Anything but a request to stop (`KeyboardInterrupt`, `SystemExit`, `GeneratorExit`).

    Returns:
        The error itself where the package raised it on purpose; else a `MachineError` or `UnexpectedError`.

    Raises:
        BaseException: The error is a request to stop.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    if isinstance(error, VRThinkerError):
        return error
    if isinstance(error, MemoryError):
        return MachineError("out of memory; run it again with less beside it, or with a smaller batch")
    said = _short(str(error).strip(), _MAX_MESSAGE_CHARS)
    kind = _short(type(error).__name__, _MAX_NAME_CHARS)
    return UnexpectedError(f"{kind}: {said or 'no message'}; not foreseen: please report it with the log")


def first_problem(error: ValidationError, default: str = "(file)", *, quote: bool = False) -> str:
    """Says the first thing that is wrong with data that pydantic refused: `where: message`.

    It never raises, and what it quotes of the data is cut short: the data may be a stranger's file.

    Args:
        error: The refusal.
        default: The place to name where the data as a whole are refused. Nothing is named when it is empty.
        quote: Whether the refused value is quoted before the message.

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
        # A problem is spelled out by code of the data's types and validators, which may fail in its turn.
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


def _short(text: str, limit: int) -> str:
    """The beginning of a text on one printable line, with dots where it was cut."""
    line = _printable(text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _printable(text: str) -> str:
    """A text on one line: control characters, line ends and lone surrogates are spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
