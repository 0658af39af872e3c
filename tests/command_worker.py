"""Jobs for `forks.py`: whole `vrthinker` commands that die, are told to stop, or wait for each other.

Where they do is counted in calls of a function, so that no clock decides it.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vrthinker import cli


def prepare() -> None:
    """Loads what each job would load."""
    import heavy  # noqa: F401
    import torch
    import tyro

    torch.set_num_threads(1)
    tyro.cli(cli.Command, args=["demo"])  # compiles hundreds of regular expressions


def at(
    function: str,
    call: int,
    send: str | None = None,
    meet: Path | None = None,
    *,
    after: bool = False,
    tear: int | None = None,
) -> dict[str, Any]:
    """A moment of a job, for its `moments`.

    Args:
        function: `module:name` or `module:Class.name`.
        call: Which of its calls, from 1.
        send: The signal that the job then sends to itself.
        meet: A folder in which two jobs meet: whoever comes first waits for the other.
        after: The moment is the call's end rather than its beginning.
        tear: The moment is the middle of a write: so many bytes of its content are written.
    """
    return {
        "function": function,
        "call": call,
        "send": send,
        "meet": None if meet is None else str(meet),
        "after": after,
        "tear": tear,
    }


def command(*arguments: object, moments: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A job that runs a command; its result is the exit code.

    Args:
        arguments: The command's.
        moments: See `at`.
    """
    given = {"given": list(map(str, arguments)), "moments": list(moments)}
    return {"job": "command_worker:job_command", "arguments": given}


def job_command(given: list[str], moments: list[dict[str, Any]]) -> object:
    """Runs a command; see `command`."""
    for moment in moments:
        _watch(moment)
    try:
        cli.main(given)
    except SystemExit as left:
        return left.code
    return None


def _watch(moment: dict[str, Any]) -> None:
    module, _, path = moment["function"].partition(":")
    owner: Any = importlib.import_module(module)
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    @functools.wraps(real)
    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        due = calls == moment["call"]
        if due and moment["tear"] is not None:
            real(*arguments[:-1], arguments[-1][: moment["tear"]])
        if due and not moment["after"]:
            _act(moment)
        found = real(*arguments, **options)
        if due and moment["after"]:
            _act(moment)
        return found

    setattr(owner, name, watched)


def _act(moment: dict[str, Any]) -> None:
    if moment["meet"] is not None:
        there = Path(moment["meet"])
        there.mkdir(exist_ok=True)
        (there / str(os.getpid())).touch()
        while len(list(there.iterdir())) < 2:
            time.sleep(0.002)
    if moment["send"] is not None:
        os.kill(os.getpid(), signal.Signals[moment["send"]])
