"""Where the time of a step goes: wall-clock seconds by name, for the metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Clock:
    """Adds up the seconds of named parts.

    Args:
        device: The device that computes. A part waits for what it has started there, so that each part has
            its own time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def counts(self, name: str) -> Iterator[None]:
        """Counts what happens inside for a part."""
        self._wait()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last call, as metrics `perf/<part>_seconds`."""
        taken = {f"perf/{name}_seconds": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
