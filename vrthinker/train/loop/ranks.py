"""The processes of one training run: who they are, and what they have to agree on.

`torchrun` starts the processes and tells each its number in the environment. One process alone needs none of
this: without `WORLD_SIZE`, or with 1, torch.distributed is never initialised, and every function here acts on
the one process.

Invariant: all processes call the functions below in the same order. What can fail on one process (a file, a
clip) runs inside `together` or `first`, so that a failure ends the others too, instead of leaving them
waiting for a message that never comes. What processes tell each other is JSON in tensors; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from vrthinker.errors import InputError, VRThinkerError
from vrthinker.progress import silence

Result = TypeVar("Result")
Failure = TypeVar("Failure", bound=VRThinkerError)

_PATIENCE = timedelta(days=2)
"""How long a process waits for another one that works alone (it writes traces, or an export). A process that
ends is noticed at once, because its connections close."""
_LOST = ("closed by peer", "reset by peer", "remote process exited", "broken pipe", "socket closed")
"""Words in the errors of torch.distributed when another process is gone."""


@dataclass(frozen=True)
class Ranks:
    """One process's place among those of the run.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
        local_rank: The number of this process on its machine, and so of its GPU.
        control: The group that messages go through; None for a process alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes metrics, progress and exports."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this process: its GPU, or the CPU if the machine has none."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        """What each process says, by rank.

        Args:
            value: A JSON value, which may hold NaN and infinities.
        """
        if self.size == 1:
            return [value]
        told = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([told.numel()]), group=self.control)
        longest = max(int(length) for length in lengths)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: told.numel()] = told
        distributed.all_gather(parts, padded, group=self.control)
        return [
            json.loads(bytes(part[: int(length)].tolist()))
            for part, length in zip(parts, lengths, strict=True)
        ]

    def together(self, act: Callable[[], Result]) -> Result:
        """Runs `act` on every process. If it fails on one, it fails on all, with one error.

        Returns:
            What `act` returned here.

        Raises:
            VRThinkerError: `act` raised one on some process. Other exceptions pass as they are, and end this
                process.
        """
        if self.size == 1:
            return act()
        failure: VRThinkerError | None = None
        try:
            result = act()
        except VRThinkerError as error:
            failure = error
        said = [None if failure is None else {"line": str(failure), "input": isinstance(failure, InputError)}]
        told = [report[0] for report in self.gather(said)]
        failed = [rank for rank, report in enumerate(told) if report is not None]
        if not failed:
            return result
        if failed[0] == self.rank and failure is not None:
            raise failure
        report = told[failed[0]]
        kind = InputError if report["input"] else VRThinkerError
        elsewhere = kind(report["line"])
        elsewhere.said_elsewhere = True  # type: ignore[attr-defined]
        raise elsewhere

    def told_once(self, error: Failure) -> Failure:
        """An error that every process raises by itself, for the same reason: the first one alone tells it."""
        if not self.is_first:
            error.said_elsewhere = True  # type: ignore[attr-defined]
        return error

    def first(self, act: Callable[[], Any]) -> Any:
        """Runs `act` on the first process alone; the others wait for it.

        Args:
            act: A function whose result is a JSON value.

        Returns:
            The result, on every process.

        Raises:
            VRThinkerError: `act` raised one.
        """
        result = self.together(lambda: act() if self.is_first else None)
        return self.gather(result)[0]

    def first_then_others(self, act: Callable[[], Result]) -> Result:
        """Runs `act` on the first process, and then on the others, which find what the first one made.

        Returns:
            What `act` returned here.

        Raises:
            VRThinkerError: `act` raised one.
        """
        made = self.together(lambda: act() if self.is_first else None)
        return self.together(lambda: act() if made is None else made)


ALONE = Ranks()
"""The only process of a run."""

_joined = ALONE


def current_ranks() -> Ranks:
    """This process among those of its run: what `joined_ranks` gave, or `ALONE` outside of it."""
    return _joined


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Joins the other processes that `torchrun` started, if it did; leaves them at the end.

    The process that found an error raises it. The others end with its exit code and without a line of their
    own. They show no progress either (`progress.silence`).

    Raises:
        InputError: The environment names no possible rank.
        VRThinkerError: Another process ended early.
    """
    global _joined
    size = _number("WORLD_SIZE", 1)
    if size == 1 or _joined.size > 1:
        yield _joined
        return
    rank, local_rank = _number("RANK", None), _number("LOCAL_RANK", None)
    if not 0 <= rank < size:
        raise InputError(f"RANK: got {rank}, allowed: 0 to {size - 1}; start the processes with torchrun")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"LOCAL_RANK: got {local_rank}, this machine has {torch.cuda.device_count()} GPUs; give "
                "torchrun as many processes as there are GPUs"
            )
        torch.cuda.set_device(local_rank)
    try:
        distributed.init_process_group("nccl" if on_gpu else "gloo")
        control = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        _joined = Ranks(rank, size, local_rank, control)
        silence(rank > 0)
        yield _joined
        distributed.barrier(control)
        distributed.destroy_process_group()
    except VRThinkerError as error:
        if getattr(error, "said_elsewhere", False):
            raise SystemExit(error.exit_code) from None
        raise
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise VRThinkerError(
            f"process {rank} of {size}: another process of this run ended early; what it said comes first; "
            "run the same command again to go on from the last checkpoint"
        ) from None
    finally:
        _joined = ALONE
        silence(False)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone."""
    if isinstance(error, distributed.DistError):
        return True
    said = str(error).lower()
    return type(error) is RuntimeError and any(word in said for word in _LOST)


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdigit() and len(text) < 9):
        raise InputError(f"{name}: got {text!r}, allowed: a whole number; start the processes with torchrun")
    return int(text)
