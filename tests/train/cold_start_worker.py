"""Runs `vrthinker` commands in processes that send themselves signals in the middle of a training step.

Like `training_worker`: reads lists of jobs, one a line, and forks a process for each, before torch starts a
thread.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import training_worker

from vrthinker import cli
from vrthinker.train import cold_start
from vrthinker.train.loop.loop import MicroLoss


def job_command(run: str, arguments: list[str], signal_at: dict[str, str]) -> object:
    """Runs a command; `{"17.1": "SIGKILL"}` means step 17, micro-batch 1. Returns the exit code."""
    whole = cold_start._Curriculum.micro_losses

    def micro_losses(self: cold_start._Curriculum, policy: Any, step: int) -> Iterator[MicroLoss]:
        for number, micro in enumerate(whole(self, policy, step)):
            if (name := signal_at.get(f"{step}.{number}")) is not None:
                os.kill(os.getpid(), signal.Signals[name])
            yield micro

    cold_start._Curriculum.micro_losses = micro_losses  # type: ignore[method-assign]
    try:
        cli.main(arguments)
    except SystemExit as left:
        return {"exit": left.code}
    return None


if __name__ == "__main__":
    training_worker.JOBS["command"] = job_command
    training_worker.main()
