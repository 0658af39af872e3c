"""Runs `vrthinker` commands in the test's own process: starting one costs twenty times what most commands do.

A command finds what a process would give it: file descriptors 1 and 2 of its own (so that what libraries
write in C is seen too), no logging handlers, Python's usual warnings, its own command line, and a Ctrl-C that
raises KeyboardInterrupt. What only a process has (what importing loads, kills, several writers of one file)
is tested with processes: `forks.py`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vrthinker import cli

_STREAMS = ("stdout", "stderr")


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code: The exit status.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
    """

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The only line of stderr."""
        (line,) = self.err.strip().splitlines()
        return line

    @property
    def last_line(self) -> str:
        """The last line of stderr, after those that say what takes long."""
        return self.err.splitlines()[-1]


def vrthinker(*arguments: object, stdout: str | None = None, stderr: str | None = None) -> Done:
    """Runs a command to its end.

    Args:
        arguments: Its command line.
        stdout: A device to write stdout to.
        stderr: A device to write stderr to.
    """
    given = list(map(str, arguments))
    with contextlib.ExitStack() as stack:
        out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        devices = [
            file if device is None else stack.enter_context(open(device, "wb", buffering=0))
            for file, device in ((out, stdout), (err, stderr))
        ]
        with _streams(devices[0].fileno(), devices[1].fileno()), _as_in_a_process(given):
            code = _exit_status(given)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8"))
    return Done(code, texts[0], texts[1])


def _exit_status(given: list[str]) -> int:
    """The status that the interpreter would end with."""
    try:
        cli.main(given)
        code: Any = None
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not (code is None or isinstance(code, int)):
        sys.stderr.write(f"{code}\n")
        code = 1
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # its reader is gone, or it is closed
        return 120
    return code or 0


@contextlib.contextmanager
def _streams(out: int, err: int) -> Iterator[None]:
    """Descriptors 1 and 2 and their streams are those of a process whose output goes to two files."""
    before = [getattr(sys, name) for name in _STREAMS]
    for stream in before:
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        for number, (name, target) in enumerate(zip(_STREAMS, (out, err), strict=True), start=1):
            os.dup2(target, number)
            raw = open(number, "wb", closefd=False)  # noqa: SIM115 - the command may close it, as its own
            stream = io.TextIOWrapper(
                raw,
                encoding="utf-8",
                errors="backslashreplace" if name == "stderr" else "strict",
                line_buffering=name == "stderr",
            )
            setattr(sys, name, stream)
        yield
    finally:
        for name, stream in zip(_STREAMS, before, strict=True):
            with contextlib.suppress(OSError, ValueError):
                getattr(sys, name).flush()
            setattr(sys, name, stream)
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def _as_in_a_process(given: list[str]) -> Iterator[None]:
    """Command line, environment, logging, warnings and Ctrl-C: a process's own, and put back afterwards."""
    environment, root = dict(os.environ), logging.getLogger()
    lines, handlers, level = (sys.argv, sys.orig_argv), root.handlers[:], root.level
    in_main = threading.current_thread() is threading.main_thread()
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler) if in_main else None
    sys.argv, sys.orig_argv = ["vrthinker", *given], [sys.executable, "-m", "vrthinker", *given]
    root.handlers[:] = []
    root.setLevel(logging.WARNING)
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    # Theirs write to stderr as it was when the library was imported.
    libraries = [h for logger in loggers for h in logger.handlers if type(h) is logging.StreamHandler]
    streams = [handler.stream for handler in libraries]
    for handler in libraries:
        handler.stream = sys.stderr
    try:
        with warnings.catch_warnings():
            warnings.resetwarnings()
            for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", kind)
            warnings.showwarning = _to_stderr
            yield
    finally:
        for handler, stream in zip(libraries, streams, strict=True):
            handler.stream = stream
        (sys.argv, sys.orig_argv), root.handlers[:] = lines, handlers
        root.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)
        if in_main:
            signal.signal(signal.SIGINT, interrupt)


def _to_stderr(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
