"""The protocol of sessions: what writes a round.

An engine holds *sessions*, one per episode. A session's context is a list of messages; a round
appends new messages, drops the frames that expired, and writes the assistant's text. Rounds are
*submitted* and *collected*, so that many episodes advance together and each goes on as soon as its
own round is done; `write_rounds` is the simple way in. A key-value cache that evicts, a prefix cache
and a remote endpoint all fit behind it, and none of them decides what expires: `RoundRequest.expired`
is read off the visibility record.

Departure from the plan, with its reason: `submit`/`collect` instead of one blocking batched call,
because episodes of unequal length would leave a lock-step batch idle.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from vrthinker.visibility import MemoryMode, Region, ShownFrame

if TYPE_CHECKING:
    import numpy as np

Role = Literal["system", "user"]

MIN_TEMPERATURE = 1e-3
"""Below it, dividing by the temperature overflows; use 0."""


@dataclass(frozen=True)
class TextSegment:
    """Plain text. Special-token markup in it is text too: engines never read it as markup."""

    text: str


class FrameKey(NamedTuple):
    """What makes a frame's pixels distinct: two frames with equal keys are the same picture.

    Caches of encoded frames, training sequences and packs go by it.

    Attributes:
        path: The clip's file.
        frame_index: 0-based position in the file.
        height: In pixels, as the model sees it.
        width: In pixels, as the model sees it.
        view: The region of the frame that is shown; None for the whole frame.
        file_state: (modification time in ns, size in bytes) of the file; None where it is not known.
    """

    path: str
    frame_index: int
    height: int
    width: int
    view: Region | None = None
    file_state: tuple[int, int] | None = None


@dataclass(frozen=True)
class FrameSegment:
    """One showing of one frame, by reference: pixels are loaded when the engine needs them.

    Attributes:
        shown: Which showing this is; `expired` names it when it leaves.
        key: What makes the pixels distinct; a `FrameKey`, where the frame comes from a clip.
        size: (height, width) in pixels, already on the model's patch grid.
        load: Returns the pixels, uint8 `[height, width, 3]`, RGB.
    """

    shown: ShownFrame
    key: tuple[Hashable, ...]
    size: tuple[int, int]
    load: Callable[[], np.ndarray[Any, Any]] = field(compare=False, repr=False)


Segment = TextSegment | FrameSegment


@dataclass(frozen=True)
class Message:
    """A turn that the engine did not write: the system prompt, the task, or a tool outcome."""

    role: Role
    segments: tuple[Segment, ...]

    @property
    def frames(self) -> tuple[FrameSegment, ...]:
        """The message's frames, in order."""
        return tuple(segment for segment in self.segments if isinstance(segment, FrameSegment))


@dataclass(frozen=True)
class Free:
    """A part of a guided round that the model writes as it likes, up to `max_tokens` tokens."""

    max_tokens: int


@dataclass(frozen=True)
class Choice:
    """A part of a guided round where the model may only pick one of `options`.

    One option is a forced text.

    Attributes:
        options: The texts to pick from. None may be the beginning of another: give them terminators
            ("1," and "12,"), or the longer one could never be picked.
        then: Empty, or one continuation per option: what follows when that option was picked, before
            the rest of the form.
    """

    options: tuple[str, ...]
    then: tuple[Form, ...] = ()

    def __post_init__(self) -> None:
        if not self.options or not all(self.options):
            raise ValueError(f"options: got {self.options!r}, allowed: at least one, none of them empty")
        ordered = sorted(self.options)
        for shorter, longer in pairwise(ordered):
            if longer.startswith(shorter):
                raise ValueError(f"options: {shorter!r} is the beginning of {longer!r}, or the same")
        if self.then and len(self.then) != len(self.options):
            raise ValueError(f"then: got {len(self.then)} continuations for {len(self.options)} options")


Form = tuple["Free | Choice", ...]
"""A guided round: its parts, in order. `docs/engines.md` says what it does to the distribution."""


@dataclass(frozen=True)
class RoundLimits:
    """How one round is sampled.

    Attributes:
        max_tokens: At most so many tokens; a round that reaches it ends with `FinishReason.LENGTH`.
        temperature: 0 is greedy.
        top_p: Nucleus mass in (0, 1]; 1 keeps every token.
        form: A guided round, or None to let the model write freely.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    form: Form | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: got {self.max_tokens}, allowed: at least 1")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < float("inf"):
            allowed = f"0 (greedy), or {MIN_TEMPERATURE} and above"
            raise ValueError(f"temperature: got {self.temperature}, allowed: {allowed}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: got {self.top_p}, allowed: above 0, up to 1")


class FinishReason(enum.StrEnum):
    """Why a round's text ended."""

    STOP = "stop"
    """The model ended its turn (or a guided form was complete)."""
    LENGTH = "length"
    """`max_tokens` was reached."""
    CONTEXT = "context"
    """The context would have outgrown the model or the cache; nothing, or only a part, was written."""
    ERROR = "error"
    """The engine failed; `RoundResult.error` says why."""


@dataclass(frozen=True)
class Session:
    """A handle. The engine that opened it knows the rest."""

    id: int


@dataclass(frozen=True)
class RoundRequest:
    """One round to write.

    Attributes:
        session: Whose round.
        new: Messages that the context gains before the round (empty in round 1).
        expired: Showings that leave the context on entry to this round.
        limits: Sampling limits.
    """

    session: Session
    new: tuple[Message, ...] = ()
    expired: tuple[ShownFrame, ...] = ()
    limits: RoundLimits = RoundLimits()


@dataclass(frozen=True)
class RoundResult:
    """What an engine wrote.

    Attributes:
        session: Whose round.
        text: The round's text, without the end-of-turn token.
        finish_reason: Why it ended.
        token_ids: The ids as sampled, end-of-turn token included where it was sampled. None where
            the engine cannot know them (an endpoint).
        logprobs: Natural log of each sampled token's probability under the distribution that it was
            drawn from (temperature and banned tokens applied; at temperature 0, of temperature 1).
        prompt_tokens: Tokens of context that the round was written from.
        prefilled_tokens: How many of them were computed for this round (the rest came from a cache).
        error: Why the engine failed, when `finish_reason` is ERROR or CONTEXT.
        logits: float32 `[tokens, vocabulary]` before temperature and bans, when the engine was asked
            to keep them (tests, the drift report).
    """

    session: Session
    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    prompt_tokens: int | None = None
    prefilled_tokens: int | None = None
    error: str | None = None
    logits: Any = field(default=None, compare=False, repr=False)


@runtime_checkable
class Engine(Protocol):
    """What writes a round. See the module's docstring for the contract."""

    @property
    def name(self) -> str:
        """Engine and model, as records name them."""

    @property
    def policy_version(self) -> int:
        """Counts weight updates; 0 as loaded."""

    @property
    def max_sessions(self) -> int:
        """How many sessions may be open at once."""

    def open(self, messages: Sequence[Message], *, seed: int = 0, memory: MemoryMode = "rerender") -> Session:
        """Starts a session from its first input X. Equal seeds sample equal texts, batched or alone.

        Args:
            messages: X.
            seed: Of its samples.
            memory: How expired frames leave. An engine that cannot do that refuses with `EngineError`.
        """

    def fork(self, session: Session, seeds: Sequence[int]) -> list[Session]:
        """Copies a session that has written nothing yet into one session per seed (a group)."""

    def submit(self, request: RoundRequest) -> None:
        """Queues a round. It is under way until `collect` returns it; a session has at most one under way."""

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        """Waits until at least one submitted round is finished; returns all finished ones.

        Args:
            timeout_seconds: Return, maybe with nothing, after about so long (an engine that computes
                here does at least one step), so that the caller can submit what became ready meanwhile.

        Returns:
            An empty list when nothing is under way, or nothing finished in time.
        """

    def close(self, session: Session) -> None:
        """Frees what the session holds. Closing twice is harmless, also after `shutdown`."""

    def shutdown(self) -> None:
        """Closes every session, frees what the engine holds, and ends its use. Twice is harmless."""

    def update_weights(
        self, named_tensors: Iterable[tuple[str, Any]] | Mapping[str, Any], policy_version: int
    ) -> None:
        """Replaces weights in place. Every session must be closed."""


def write_rounds(engine: Engine, requests: Sequence[RoundRequest]) -> list[RoundResult]:
    """Submits rounds and waits for all of them; results in the order of the requests."""
    for request in requests:
        engine.submit(request)
    results: dict[int, RoundResult] = {}
    while len(results) < len(requests):
        finished = engine.collect()
        if not finished:
            missing = [r.session.id for r in requests if r.session.id not in results]
            raise RuntimeError(f"{engine.name}: sessions {missing} have no round under way")
        results.update((result.session.id, result) for result in finished)
    return [results[request.session.id] for request in requests]
