"""A headless Chromium for tests of pages, driven over its debugging pipe: nothing listens on a port."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--mute-audio",
    "--remote-debugging-pipe",
)
_TIMEOUT_SECONDS = 240.0  # a busy machine may take its time


class Browser:
    """One page of a headless Chromium.

    Attributes:
        events: What the browser reported since the last `goto`, oldest first.
    """

    def __init__(self, program: str, profile: Path) -> None:
        from_here, self._to_browser = os.pipe()
        self._from_browser, to_here = os.pipe()

        def descriptors() -> None:
            # The browser reads commands from descriptor 3 and answers on 4; the pipes may have those numbers.
            read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (from_here, to_here))
            os.dup2(read, 3)
            os.dup2(write, 4)

        self._process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=descriptors,
            close_fds=False,  # everything else here is closed on exec
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_here)
        os.close(to_here)
        self._received = b""
        self._calls = 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends one command of the DevTools protocol and returns its result."""
        self._calls += 1
        command = {"id": self._calls, "method": method, "params": params, **self._session}
        data = json.dumps(command).encode() + b"\0"
        while data:
            data = data[os.write(self._to_browser, data) :]
        while (message := self._receive()).get("id") != self._calls:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return dict(message["result"])

    def goto(self, page: Path, *, width: int = 1280, height: int = 900) -> None:
        """Opens a file at a window size and waits until it is loaded."""
        mobile = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, script: str) -> Any:
        """Runs JavaScript in the page, past the page's policy; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors that the page or its policy caused."""
        return [
            json.dumps(event["params"])
            for event in self.events
            if event.get("method")
            in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        ]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, without its own data."""
        asked = [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not url.startswith("data:")]

    def close(self) -> None:
        """Ends the browser."""
        with contextlib.suppress(RuntimeError, OSError, TimeoutError, EOFError):
            self._session = {}
            self.call("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to_browser)
        os.close(self._from_browser)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while b"\0" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from_browser], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            chunk = os.read(self._from_browser, 1 << 20)
            if not chunk:
                raise EOFError("the browser ended")
            self._received += chunk
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        reason = "no chromium in PATH (Debian: apt install chromium)"
        if os.environ.get("VRTHINKER_REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"VRTHINKER_REQUIRE_CHROMIUM=1, but {reason}")
        pytest.skip(reason)
    running = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield running
    running.close()
