"""A server's replies on the disk, so that a killed run asks nothing twice, and an account of them.

One JSON line per answered request. A request is known by a hash of its body and of its session's seed.
Invariant: `keep` returns when the line is written; a killed writer's unfinished line is ignored and removed.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vrthinker.bounded_files import read_lines
from vrthinker.engine.base import FinishReason
from vrthinker.engine.endpoint.wire import Reply
from vrthinker.errors import InputError, first_problem, unwritable
from vrthinker.records.files import append_line

_MAX_LINE_BYTES = 64 << 20


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    key: str = Field(pattern="^[0-9a-f]{64}$")
    text: str
    finish_reason: FinishReason
    error: str | None
    prompt_tokens: int | None = Field(ge=0)
    completion_tokens: int | None = Field(ge=0)
    cached_tokens: int | None = Field(ge=0)

    def reply(self) -> Reply:
        values = self.model_dump(exclude={"schema_version", "key"})
        return Reply(**values)


@dataclass(frozen=True)
class Account:
    """What a server answered and counted, over all runs of a collection.

    Attributes:
        requests: The number of requests that were answered.
        prompt_tokens: The prompt tokens, as the server counts them.
        completion_tokens: The written tokens, as the server counts them.
        uncounted: The number of replies without a count of tokens.
        cost: The price of the counted tokens; None if no prices were given.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    uncounted: int
    cost: float | None

    def as_json(self) -> dict[str, Any]:
        """The account as JSON values."""
        return asdict(self)


class StoredReplies:
    """Implements `ReplyMemory` with a file. Threads may share it.

    Args:
        path: The file. It is made by the first reply.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._replies: dict[str, Reply] = {}
        for number, line in read_lines(path, _MAX_LINE_BYTES) if path.exists() else ():
            if not line.endswith(b"\n"):
                break  # of a writer that was killed; the next line takes its place
            try:
                stored = _Line.model_validate_json(line)
            except ValidationError as error:
                raise InputError(
                    f"{path}: line {number} is no reply ({first_problem(error, '')}); mend or remove it"
                ) from None
            self._replies[stored.key] = stored.reply()

    def find(self, key: str) -> Reply | None:
        """The reply to a request that was answered; None if it was not."""
        with self._lock:
            return self._replies.get(key)

    def keep(self, key: str, reply: Reply) -> None:
        """Adds a reply to the file.

        Raises:
            InputError: The file cannot be written.
            MachineError: The disk is full.
        """
        fields = asdict(replace(reply, tokens=()))
        del fields["tokens"]  # nobody asks for log-probabilities of replies that are kept
        line = _Line(key=key, **fields).model_dump_json() + "\n"
        with self._lock:
            try:
                append_line(self._path, line, unfinished="cut")
            except OSError as error:
                raise unwritable(self._path, error, "choose another folder") from None
            self._replies[key] = reply

    def account(self, price_input: float | None = None, price_output: float | None = None) -> Account:
        """The account of all replies.

        Args:
            price_input: The price of a million prompt tokens.
            price_output: The price of a million written tokens.
        """
        with self._lock:
            replies = list(self._replies.values())
        read = sum(reply.prompt_tokens or 0 for reply in replies)
        written = sum(reply.completion_tokens or 0 for reply in replies)
        cost = None
        if price_input is not None or price_output is not None:
            cost = (read * (price_input or 0.0) + written * (price_output or 0.0)) / 1e6
        counted = (
            reply.prompt_tokens is not None and reply.completion_tokens is not None for reply in replies
        )
        uncounted = len(replies) - sum(counted)
        return Account(len(replies), read, written, uncounted, cost)
