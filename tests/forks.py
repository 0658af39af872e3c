"""Jobs in processes that may be killed, forked from one process that has imported what they need.

Importing torch and transformers takes seconds, forking takes milliseconds. The process that forks is started
when the first test wants it and ends with the session; both count as work outside tests. It starts no thread,
so that its children begin as sound as itself.

A job is a function `module:name` with arguments that JSON can carry. What became of it is a dict: `pid`,
`code` (minus the signal that ended it), `stdout`, `stderr`, and `result`, or `error` with `exit_code`, or
`crash` with `text`. A job's process leads a session of its own, by which the processes that it started can be
found. A job that takes most of its test's time ends with the stack of each of its threads in `stderr`.

No test waits for the process that forks without end: where one gave up waiting, that process and its jobs are
killed, and the next test gets a new one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import pytest

Job = dict[str, Any]
Outcome = dict[str, Any]


class Outcomes(Protocol):
    """Runs jobs, one after another or at the same time."""

    def __call__(self, jobs: Sequence[Job], *, together: bool = False) -> list[Outcome]: ...


MODULES = {
    "forked": [],
    "outcomes_of": ["training_worker"],
    "ranked": ["ranks_worker"],
    "commands": ["command_worker"],
    "fuzzed": ["fuzz_worker"],
}
"""Fixture to the modules that are prepared before its jobs run."""


class _Server:
    """The process that forks."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.seconds = 240.0

    def ask(self, modules: Sequence[str], jobs: Sequence[Job] = (), *, together: bool = False) -> Any:
        if self._process is None:
            one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            path = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, **one, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        request = {
            "modules": list(modules),
            "jobs": list(jobs),
            "together": together,
            "seconds": self.seconds,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BaseException:  # the test's time is over: what comes later answers nobody
            self._kill()
            raise
        if not answer:
            raise RuntimeError(f"the process that forks ended with status {self._process.wait()}")
        return json.loads(answer)

    def stop(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:  # a process that a test forked may hold the other end of that pipe open
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._kill()
        self._process = None

    def _kill(self) -> None:
        assert self._process is not None
        for process in [*children_of(self._process.pid), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()
        self._process = None


_server = _Server()


class _Plugin:
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Imports happen before the gauge looks at the clock."""
        marker = item.get_closest_marker("timeout")
        timeout = (
            marker.args[0] if marker else item.config.getoption("timeout") or item.config.getini("timeout")
        )
        _server.seconds = 0.8 * float(timeout or 300)
        for name in set(MODULES) & set(getattr(item, "fixturenames", ())):
            with contextlib.suppress(RuntimeError, OSError):  # the test will hear of it
                _server.ask(MODULES[name])
        return (yield)

    def pytest_sessionfinish(self) -> None:
        _server.stop()


def pytest_collection_finish(session: pytest.Session) -> None:
    """For a folder's conftest.py to import, with the fixtures; registers later than the gauge."""
    if not session.config.pluginmanager.has_plugin("forks"):
        session.config.pluginmanager.register(_Plugin(), "forks")


@pytest.fixture
def forked() -> Outcomes:
    """Runs jobs of modules that take no time to import."""
    return functools.partial(_server.ask, MODULES["forked"])


@pytest.fixture
def outcomes_of() -> Outcomes:
    """Runs jobs of `training_worker`."""
    return functools.partial(_server.ask, MODULES["outcomes_of"])


@pytest.fixture
def ranked() -> Outcomes:
    """Runs jobs of `ranks_worker`: processes that train together."""
    return functools.partial(_server.ask, MODULES["ranked"])


@pytest.fixture
def commands() -> Outcomes:
    """Runs jobs of `command_worker`: whole commands."""
    return functools.partial(_server.ask, MODULES["commands"])


@pytest.fixture
def fuzzed() -> Outcomes:
    """Runs jobs of `fuzz_worker`: hostile clips and checkpoints."""
    return functools.partial(_server.ask, MODULES["fuzzed"])


def children_of(parent: int) -> list[int]:
    """The processes that a process started."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and int(_stat(entry)[1]) == parent:
                found.append(int(entry))
    return found


def _stat(process: str) -> list[str]:
    """The fields of a process after its name: its state, its parent, its group, its session and more."""
    return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()


def alive_in_session(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = _stat(entry)
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry))
    return found


def assert_session_ends(session: int) -> None:
    """Nothing that a killed job started outlives it; what takes longer than two minutes is killed."""
    give_up = time.monotonic() + 120
    while (left := alive_in_session(session)) and time.monotonic() < give_up:
        time.sleep(0.02)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left, "processes outlive the one that started them"


# The process that forks


class _Child:
    """A process that runs a job."""

    def __init__(self, job: Job, seconds: float) -> None:
        self._files: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        module, _, name = job["job"].partition(":")
        act = getattr(importlib.import_module(module), name)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.setsid()
                _run(act, job["arguments"], seconds, *(file.fileno() for file in self._files))
            finally:
                os._exit(70)

    def wait(self) -> Outcome:
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        answer, out, err = (os.pread(file.fileno(), 1 << 20, 0).decode() for file in self._files)
        for file in self._files:
            file.close()
        return {
            "pid": self._pid,
            "code": code,
            "stdout": out,
            "stderr": err,
            **json.loads(answer or "{}"),
        }


def _run(
    act: Callable[..., Any], arguments: dict[str, Any], seconds: float, answer: int, out: int, err: int
) -> None:
    from vrthinker.errors import VRThinkerError

    # Whoever runs the tests in the background may have left SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    faulthandler.dump_traceback_later(seconds, exit=True, file=err)
    try:
        said: dict[str, Any] = {"result": act(**arguments)}
    except VRThinkerError as error:
        said = {"error": str(error), "exit_code": error.exit_code}
    except BaseException as error:
        said = {"crash": type(error).__name__, "text": str(error)}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    os.pwrite(answer, json.dumps(said).encode(), 0)
    os._exit(0 if "result" in said else 1)


def main() -> None:
    """Answers requests, one a line."""
    for line in sys.stdin:
        request = json.loads(line)
        for name in request["modules"]:
            if name not in sys.modules:
                importlib.import_module(name).prepare()
                gc.freeze()  # a child's collections need not touch, and so copy, what is here
        if request["together"]:
            children = [_Child(job, request["seconds"]) for job in request["jobs"]]
            found = [child.wait() for child in children]
        else:
            found = [_Child(job, request["seconds"]).wait() for job in request["jobs"]]
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
    os._exit(0)  # some libraries complain on their way out


if __name__ == "__main__":
    main()
