"""transformers' own server of a checkpoint, in a process that a test may kill and start again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import pytest
from loopback import free_port

LAUNCHER = Path(__file__).with_name("engine") / "serve_tiny.py"
NEEDED = ("fastapi", "uvicorn", "openai", "typer", "accelerate")


def skip_without_a_server() -> None:
    """Skips the test, or at a module's top all of its tests, where a library of the server is missing."""
    for needed in NEEDED:
        pytest.importorskip(needed, reason=f"transformers serve needs {needed}")


class Served:
    """A server, which is up inside a `with` block. Its port stays the same when it is started again.

    Args:
        checkpoint: The folder of the checkpoint. Its path is the name of the model.
        log: The file for what the server says, which is shown if it does not come up.
        options: Further arguments of `serve_tiny.py`.
        patience_seconds: How long to wait until it is up. The default ends before a test's usual time does.
    """

    def __init__(self, checkpoint: Path, log: Path, *options: str, patience_seconds: float = 280) -> None:
        self.port = free_port()
        self._log = log
        self._patience_seconds = patience_seconds
        self._command = [sys.executable, str(LAUNCHER), str(checkpoint), str(self.port), *options]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def start(self) -> None:
        """Starts the server, and returns when it answers."""
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(self._command, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + self._patience_seconds
        try:
            while not self._is_up():
                assert self._process.poll() is None, f"the server ended:\n{self._said()}"
                assert time.monotonic() < deadline, f"the server did not come up:\n{self._said()}"
                time.sleep(0.1)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Ends the server as SIGKILL does: what it was writing stays unsaid."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health", timeout=1).status_code == 200
        except httpx.TransportError:
            return False

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]
