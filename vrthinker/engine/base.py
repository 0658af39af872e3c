"""The protocol of engines, which write the rounds of episodes in sessions.

An engine holds *sessions*, one per episode. A session's context is a list of messages. A round appends new
messages, removes the frames that expired, and writes the assistant's text. Rounds are *submitted* and
*collected*, so that many episodes advance together and each continues as soon as its own round is finished;
`write_rounds` is the simple way to use both. Engines may use a key-value cache with eviction, a prefix cache
or a remote endpoint. None of them decides what expires: `RoundRequest.expired` comes from the visibility
record.

There is no single blocking call for a batch of rounds, because episodes differ in length, and the batch would
wait for the longest.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from vrthinker.visibility import MemoryMode, Region, ShownFrame

Role = Literal["system", "user"]

MIN_TEMPERATURE = 1e-3
"""The lowest temperature but 0: below it, dividing logits by the temperature overflows."""


@dataclass(frozen=True)
class TextSegment:
    """Plain text. If it contains the markup of special tokens, engines read that as plain text too."""

    text: str


class FrameKey(NamedTuple):
    """What makes a frame's pixels distinct: two frames with equal keys are the same picture.

    Caches of encoded frames, training sequences and packs identify frames by this key.

    Attributes:
        path: The path of the clip's file.
        frame_index: The 0-based index of the frame in the file.
        height: The height in pixels, as the model sees the frame.
        width: The width in pixels, as the model sees the frame.
        view: The region of the frame that is shown; None for the whole frame.
        file_state: The (modification time in ns, size in bytes) of the file; None if it is not known.
    """

    path: str
    frame_index: int
    height: int
    width: int
    view: Region | None = None
    file_state: tuple[int, int] | None = None


@dataclass(frozen=True)
class FrameSegment:
    """One showing of one frame, by reference: the pixels are loaded when the engine needs them.

    Attributes:
        shown: The identity of the showing, by which `RoundRequest.expired` names it.
        key: What makes the pixels distinct: a `FrameKey`, if the frame comes from a clip.
        size: The (height, width) in pixels, already on the model's patch grid.
        load: A function that returns the pixels, uint8 `[height, width, 3]`, RGB: a numpy array, or a torch
            tensor on the GPU that decoded them.
    """

    shown: ShownFrame
    key: tuple[Hashable, ...]
    size: tuple[int, int]
    load: Callable[[], Any] = field(compare=False, repr=False)


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

    A single option is a forced text.

    Attributes:
        options: The texts to pick from. No option may be the beginning of another, or the longer one could
            never be picked; add terminators ("1," and "12,").
        then: One continuation per option, or empty. The continuation of the picked option comes before the
            rest of the form.
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
"""The parts of a guided round, in order. `docs/engines.md` says how a form changes the distribution."""


@dataclass(frozen=True)
class RoundLimits:
    """How one round is sampled.

    Attributes:
        max_tokens: The most tokens of the round. A round that reaches it ends with `FinishReason.LENGTH`.
        temperature: The sampling temperature; 0 is greedy.
        top_p: The nucleus mass in (0, 1]; 1 keeps every token.
        form: The form of a guided round; None lets the model write freely.
        watch: Texts of one token each. Wherever the round writes one of them, the result says how likely each
            of them was there (`RoundResult.watched`).
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    form: Form | None = None
    watch: tuple[str, ...] = ()

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
    """The model ended its turn, or a guided form was complete."""
    LENGTH = "length"
    """`max_tokens` was reached."""
    CONTEXT = "context"
    """The context reached the limit of the model or the cache. The text is incomplete or empty."""
    REFUSED = "refused"
    """The model, or a filter in front of it, refused to answer; `RoundResult.error` has its words."""
    ERROR = "error"
    """The engine failed; `RoundResult.error` says why."""


@dataclass(frozen=True)
class Session:
    """A handle of a session. The engine that opened it stores everything else."""

    id: int


@dataclass(frozen=True)
class RoundRequest:
    """One round to write.

    Attributes:
        session: The session that the round belongs to.
        new: The messages that are added to the context before the round (empty in round 1).
        expired: The showings that expire before the round.
        limits: The sampling limits.
    """

    session: Session
    new: tuple[Message, ...] = ()
    expired: tuple[ShownFrame, ...] = ()
    limits: RoundLimits = RoundLimits()


@dataclass(frozen=True)
class WatchedToken:
    """A sampled token that is one of `RoundLimits.watch`, and how likely each of those was in its place.

    Attributes:
        start: The index in `RoundResult.text` of the character at which the token begins.
        scores: The log-probability of each watched text, up to one constant that they share. It is the
            model's own: before temperature, nucleus and form, so that it does not depend on how the token was
            drawn. None where the engine does not know it.
    """

    start: int
    scores: tuple[float | None, ...]


@dataclass(frozen=True)
class RoundResult:
    """A round that an engine wrote.

    Attributes:
        session: The session that the round belongs to.
        text: The round's text, without the end-of-turn token.
        finish_reason: The reason why the text ended.
        token_ids: The ids as sampled, with the end-of-turn token if it was sampled. None if the engine cannot
            know them (an endpoint).
        logprobs: The natural log of each sampled token's probability under the distribution that it was drawn
            from, with temperature and banned tokens applied. Greedy rounds use temperature 1 here. With a
            `top_p` below 1 they are those before the nucleus was cut out, which no training may use.
        prompt_tokens: The number of context tokens that the round was written from.
        prefilled_tokens: The number of those that were computed for this round. The rest came from a cache.
        watched: The sampled tokens that are one of `RoundLimits.watch`, in order; None if there are none to
            watch, or if the engine cannot tell.
        unwatched: The reason why the engine cannot tell.
        error: The reason of the failure, if `finish_reason` is ERROR, REFUSED or CONTEXT.
        logits: The logits before temperature and bans, float32 `[tokens, vocabulary]`, if the engine was
            asked to keep them (for tests and the drift report).
    """

    session: Session
    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    prompt_tokens: int | None = None
    prefilled_tokens: int | None = None
    watched: tuple[WatchedToken, ...] | None = None
    unwatched: str | None = None
    error: str | None = None
    logits: Any = field(default=None, compare=False, repr=False)


@runtime_checkable
class Engine(Protocol):
    """An engine that writes rounds. The module's docstring states the contract."""

    @property
    def name(self) -> str:
        """The name of engine and model in records."""

    @property
    def policy_version(self) -> int:
        """The version of the weights: what the last `update_weights` gave, 0 as loaded."""

    @property
    def max_sessions(self) -> int:
        """The number of sessions that may be open at once."""

    def open(self, messages: Sequence[Message], *, seed: int = 0, memory: MemoryMode = "rerender") -> Session:
        """Starts a session from its first input X. Equal seeds sample equal texts in any batch.

        Args:
            messages: The first input X.
            seed: The seed of the session's samples.
            memory: The memory mode, which decides how expired frames are removed. An engine that does not
                support it raises `EngineError`.
        """

    def fork(self, session: Session, seeds: Sequence[int]) -> list[Session]:
        """Copies a session that has written nothing yet into one session per seed (a group)."""

    def submit(self, request: RoundRequest) -> None:
        """Queues a round. It is under way until `collect` returns it; a session has at most one under way."""

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        """Waits until at least one submitted round is finished; returns all finished ones.

        Args:
            timeout_seconds: The longest wait, approximately, so that the caller can submit what became ready
                meanwhile. An engine that computes in this call does at least one step. None waits on.

        Returns:
            The finished rounds; empty if nothing is under way, or nothing finished in time.
        """

    def close(self, session: Session) -> None:
        """Frees what the session holds. Closing twice is harmless, also after `shutdown`."""

    def shutdown(self) -> None:
        """Closes every session and frees what the engine holds. Shutting down twice is harmless."""

    def update_weights(
        self, named_tensors: Iterable[tuple[str, Any]] | Mapping[str, Any], policy_version: int
    ) -> None:
        """Replaces weights in place. Every session must be closed before."""


def write_rounds(engine: Engine, requests: Sequence[RoundRequest]) -> list[RoundResult]:
    """Submits rounds, waits for all of them, and returns the results in the order of the requests."""
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
