"""Turns SIGTERM and Ctrl-C into a flag that the loop reads between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_active: list[Interrupts] = []
_NOTICE = b"\nfinishing this step, then writing a checkpoint; once more to stop at once\n"


class StepInterrupted(Exception):
    """A stage left a step because of a signal. Every process raises it, and nothing of the step is kept."""


def signal_seen() -> str | None:
    """The name of the signal that the loop that runs has caught; None without one."""
    return next((interrupts.seen for interrupts in _active if interrupts.seen), None)


class Interrupts:
    """A context manager that catches the first SIGTERM or SIGINT. A second signal has its usual effect.

    A signal that the process was told to ignore (`nohup`, a shell's background job) stays ignored. Only a
    process's main thread gets signals, so in another thread nothing is caught.

    Args:
        told: Whether to say on stderr that a signal was caught.

    Attributes:
        seen: The name of the signal that was caught, or None.
    """

    def __init__(self, *, told: bool = True) -> None:
        self._told = told
        self.seen: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        _active.append(self)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                # None means a handler that Python did not install and could not restore.
                if before is not None and before != signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self)
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = signal.Signals(number).name
        self._restore()
        if self._told:
            os.write(2, _NOTICE)  # not through sys.stderr, which may be in the middle of a write

    def _restore(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)
