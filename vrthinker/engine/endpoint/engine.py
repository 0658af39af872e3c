"""An engine for any server that speaks OpenAI's chat completions: remote judges, writers of traces.

Every round posts the whole live context. The memory mode is therefore always `rerender`, and only the server
may have a cache. Token ids and logprobs are unknown, so that rounds from here can be judged and learned from
by SFT, but cannot serve as a policy's own samples.

Invariants:

- `collect` never raises for what a server or a network does. A round that failed is a `RoundResult` with
  `FinishReason.ERROR` and a message of one clear line.
- A failed round keeps the context that it was submitted with, so that submitting again without new messages
  tries again.
- No attempt takes longer than `timeout_seconds`, however slowly bytes come.
- The API key appears in no error, name or repr, and redirects are not followed.

The server decides the following, and this engine cannot see it: whether pictures are resized, how the chat
template renders a conversation (some templates drop `<think>` from earlier turns), and which spellings of
special tokens besides `<|…|>` are read in text.

Requests run on an event loop in the engine's own thread, `concurrency` at a time. Only asyncio's cancellation
can stop a request to a server that sends its headers a byte at a time, and lets `shutdown` end at once. All
methods must be called from one thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import queue
import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from vrthinker.engine.base import (
    Engine,
    FinishReason,
    FrameSegment,
    Message,
    RoundRequest,
    RoundResult,
    Session,
)
from vrthinker.engine.context import LiveContext
from vrthinker.engine.endpoint.client import ChatClient, ChatFailure, EndpointUsage, ReplyMemory
from vrthinker.engine.endpoint.token_scores import watched_tokens
from vrthinker.engine.endpoint.wire import ImageFormat, chat_messages, clean_line, data_uri
from vrthinker.engine.sessions import SessionTable
from vrthinker.errors import EngineError, InputError
from vrthinker.visibility import MemoryMode

_IMAGE_CACHE_BYTES = 256 * 2**20
_FrameKey = tuple[Hashable, ...]
_LOGPROBS = {"logprobs": True, "top_logprobs": 5}
"""The fields that ask for log-probabilities. Five a token make a reply some hundred kilobytes; more would not
help, because the three labels of an answer are likelier than anything else in its place."""
_OPTIONAL_FIELDS = frozenset({"temperature", "top_p", "max_tokens", "seed", "stream", *_LOGPROBS})
"""The fields of a request that a server may refuse and `extra_body` may leave out."""


@dataclass
class _State:
    seed: int
    context: LiveContext
    images: dict[_FrameKey, str] = field(default_factory=dict)
    future: concurrent.futures.Future[None] | None = None


class EndpointEngine(Engine):
    """Implements `vrthinker.engine.base.Engine` over HTTP.

    The engine is a context manager, which calls `shutdown` at its end. `close` closes a session.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        timeout_seconds: float = 120.0,
        max_retries: int = 5,
        concurrency: int = 8,
        image_format: ImageFormat = "png",
        jpeg_quality: int = 95,
        max_sessions: int = 64,
        extra_body: Mapping[str, Any] | None = None,
        backoff_seconds: float = 0.5,
        max_backoff_seconds: float = 30.0,
        max_reply_bytes: int = 8 * 2**20,
        memory: ReplyMemory | None = None,
    ) -> None:
        """Makes the engine. Nothing is sent yet.

        Args:
            base_url: The address in front of `/chat/completions`, with or without a slash at its end, as
                OpenAI's client takes it. If it has no path, `/v1` is added. The full address of
                `/chat/completions` is accepted too.
            model: The name that the server knows the model by.
            api_key: The API key. None reads OPENAI_API_KEY; if that is not set or empty, no key is sent.
            timeout_seconds: The longest time of one attempt, from connecting to the last byte.
            max_retries: The most further attempts after a failed connection, a timeout, a broken reply, or a
                status of 408, 409, 429 or 5xx. Other statuses end the round at once.
            concurrency: The number of requests under way at once.
            image_format: The format of pictures: `png` is exact, `jpeg` is about a tenth of the size.
            jpeg_quality: The JPEG quality, 1 to 95.
            max_sessions: The number of sessions that may be open at once.
            extra_body: Further fields of the request, which override the engine's own. The value None removes
                a field (`{"max_tokens": None, "max_completion_tokens": 2048}` for servers that need that).
            backoff_seconds: The first wait before a retry. It doubles with every retry, with jitter.
            max_backoff_seconds: The longest wait, even if the server's Retry-After asks for more.
            max_reply_bytes: The most bytes of a reply. A longer reply is refused.
            memory: What keeps replies, so that a request that was answered before is not sent again.

        Raises:
            InputError: An argument is out of range, or the address or the key cannot be used.
        """
        for name, value, least in (
            ("max_retries", max_retries, 0),
            ("concurrency", concurrency, 1),
            ("max_sessions", max_sessions, 1),
            ("max_reply_bytes", max_reply_bytes, 1),
        ):
            if value < least:
                raise InputError(f"{name}: got {value}, allowed: at least {least}")
        for name, seconds in (
            ("timeout_seconds", timeout_seconds),
            ("backoff_seconds", backoff_seconds),
            ("max_backoff_seconds", max_backoff_seconds),
        ):
            if not 0.0 < seconds < float("inf"):
                raise InputError(f"{name}: got {seconds}, allowed: above 0, finite")
        if image_format not in ("png", "jpeg"):
            raise InputError(f"image_format: got {image_format!r}, allowed: 'png' or 'jpeg'")
        if not 1 <= jpeg_quality <= 95:
            raise InputError(f"jpeg_quality: got {jpeg_quality}, allowed: 1 to 95")
        self._extra_body = _checked_extra_body(extra_body)
        self._client = ChatClient(
            base_url,
            api_key,
            timeout_seconds=timeout_seconds,
            max_retries=max_retries,
            concurrency=concurrency,
            backoff_seconds=backoff_seconds,
            max_backoff_seconds=max_backoff_seconds,
            max_reply_bytes=max_reply_bytes,
            optional_fields=_OPTIONAL_FIELDS | self._extra_body.keys(),
            memory=memory,
        )
        self._model = model
        # Replies that are kept stay what they were, and small.
        self._asks_logprobs = memory is None
        self._image_format: ImageFormat = image_format
        self._jpeg_quality = jpeg_quality
        self._sessions: SessionTable[_State] = SessionTable(max_sessions, name=self.name)
        self._images: dict[_FrameKey, str] = {}
        self._finished: queue.SimpleQueue[RoundResult] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vrthinker-endpoint", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        """Shows engine, model and address, but never the key."""
        return f"EndpointEngine(model={self._model!r}, address={self._client.address!r})"

    def __enter__(self) -> Self:
        """Returns the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shuts the engine down."""
        self.shutdown()

    @property
    def name(self) -> str:
        """The name of engine and model in records."""
        return f"endpoint:{self._model}"

    @property
    def policy_version(self) -> int:
        """Always 0: the weights are the server's."""
        return 0

    @property
    def max_sessions(self) -> int:
        """The number of sessions that may be open at once."""
        return self._sessions.max_sessions

    @property
    def usage(self) -> EndpointUsage:
        """A copy of the counts so far."""
        return self._client.usage

    def open(self, messages: Sequence[Message], *, seed: int = 0, memory: MemoryMode = "rerender") -> Session:
        """Starts a session. Nothing is sent until its first round.

        Raises:
            EngineError: `max_sessions` are open, the engine is shut down, a message cannot be sent, or
                    `memory` is not `rerender`, because a server's cache cannot be changed from here.
        """
        if memory != "rerender":
            raise EngineError(
                f"{self.name}: memory: got {memory!r}, allowed over an endpoint: rerender; use an engine "
                "that runs the model itself"
            )
        return self._sessions.add(_State(seed, _sendable(LiveContext().extended(messages))))

    def fork(self, session: Session, seeds: Sequence[int]) -> list[Session]:
        """Copies a session that has written nothing yet, once per seed. The copies share encoded frames.

        Raises:
            EngineError: The session is not open or has begun, or there is no room.
        """
        state = self._sessions.check_fork(session, len(seeds))
        return [self.open(state.context.messages, seed=seed) for seed in seeds]

    def submit(self, request: RoundRequest) -> None:
        """Queues a round. New frames are loaded and encoded here, in the caller's thread.

        Raises:
            EngineError: The request breaks the protocol, or asks for a guided round, which a
                chat-completions server cannot write.
        """
        state = self._sessions.check_submit(request.session)
        if request.limits.form is not None:
            raise EngineError(
                f"{self.name}: guided rounds (RoundLimits.form) are not supported over an endpoint; "
                "use form=None, or an engine that runs the model itself"
            )
        assert self._loop is not None  # a session is open, so the engine runs
        context = _sendable(state.context.entered(request))
        failed = None
        try:
            images = {frame.key: self._image(state, frame) for frame in context.frames}
            self._trim()
        # `load` is the caller's code and may fail in any way. That fails this round, but must not fail
        # `collect`.
        except Exception as error:
            failed = f"{self.name}: a frame cannot be sent: {clean_line(str(error) or repr(error))}"
        # This comes after the loading of frames: if that is interrupted, the round must not stay under way.
        self._sessions.begin_round(request.session)
        state.context = context
        if failed is not None:
            self._finished.put(RoundResult(request.session, "", FinishReason.ERROR, error=failed))
            return
        state.images = images
        work = self._round(request, context, images, state.seed)
        state.future = asyncio.run_coroutine_threadsafe(work, self._loop)

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        """Waits for at least one round or the timeout; returns all finished rounds (see `Engine.collect`)."""
        results: list[RoundResult] = []
        while self._sessions.rounds_under_way and (not results or not self._finished.empty()):
            try:
                result = self._finished.get(timeout=timeout_seconds)
            except queue.Empty:
                break
            state = self._sessions.end_round(result.session)
            if state is None:
                continue  # its session was closed meanwhile
            state.future = None
            if result.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                state.context = state.context.written(result.text)
            results.append(result)
        return results

    def close(self, session: Session) -> None:
        """Closes a session and cancels its round. Closing twice is harmless.

        Raises:
            EngineError: The session was never opened here.
        """
        state = self._sessions.close(session)
        if state is not None and state.future is not None:
            state.future.cancel()

    def shutdown(self) -> None:
        """Cancels all rounds, closes all sessions and connections. Shutting down twice is harmless."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        for session in self._sessions.open_sessions:
            self.close(session)
        self._sessions.shut_down()
        asyncio.run_coroutine_threadsafe(self._end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def update_weights(
        self, named_tensors: Iterable[tuple[str, Any]] | Mapping[str, Any], policy_version: int
    ) -> None:
        """Always refused.

        Raises:
            EngineError: Always, because the weights are the server's.
        """
        raise EngineError(f"{self.name}: an endpoint's weights cannot be replaced from here")

    async def _end(self) -> None:
        """Waits until the cancelled rounds have ended, then closes the connections."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()
        await asyncio.get_running_loop().shutdown_default_executor()

    def _image(self, state: _State, frame: FrameSegment) -> str:
        """A frame's data URI: the session's own, one that another session made recently, or a new one."""
        shared = self._images.pop(frame.key, None)
        image = state.images.get(frame.key) or shared
        if image is None:
            image = data_uri(frame.load(), frame.size, self._image_format, self._jpeg_quality)
        self._images[frame.key] = image  # added at the end: the first entry is the least recently used
        return image

    def _trim(self) -> None:
        """Limits the images that sessions share. Each session also keeps those of its own live frames."""
        size_bytes = sum(len(image) for image in self._images.values())
        while size_bytes > _IMAGE_CACHE_BYTES:
            size_bytes -= len(self._images.pop(next(iter(self._images))))

    async def _round(
        self, request: RoundRequest, context: LiveContext, images: Mapping[_FrameKey, str], seed: int
    ) -> None:
        session = request.session
        try:
            body = {
                "model": self._model,
                "temperature": request.limits.temperature,
                "top_p": request.limits.top_p,
                "max_tokens": request.limits.max_tokens,
                "seed": seed,
                "stream": False,
            }

            def payload() -> bytes:
                asked = _LOGPROBS if request.limits.watch and self._asks_logprobs else {}
                fields = {
                    k: value for k, value in (body | asked | self._extra_body).items() if value is not None
                }
                return json.dumps(fields | {"messages": chat_messages(context, images)}).encode("ascii")

            try:
                reply = await self._client.complete(payload, pictures=len(context.frames), seed=seed)
            except ChatFailure as failure:
                if failure.field not in _LOGPROBS or failure.field in self._extra_body:
                    raise
                self._asks_logprobs = False  # this server does not give them; it is asked without from now on
                reply = await self._client.complete(payload, pictures=len(context.frames), seed=seed)
            watched, unwatched = watched_tokens(reply.tokens, reply.text, request.limits.watch)
            prompt, cached = reply.prompt_tokens, reply.cached_tokens
            computed = prompt - cached if prompt is not None and cached is not None else None
            result = RoundResult(
                session,
                reply.text,
                reply.finish_reason,
                prompt_tokens=prompt,
                prefilled_tokens=computed if computed is None or computed >= 0 else None,
                watched=watched,
                unwatched=unwatched,
                error=reply.error,
            )
        except ChatFailure as failure:
            reason = FinishReason.CONTEXT if failure.context else FinishReason.ERROR
            result = RoundResult(session, "", reason, error=str(failure))
        # A bug here must not make `collect` wait for ever.
        except Exception as error:
            said = self._client.clean(f"{type(error).__name__}: {error}")
            result = RoundResult(session, "", FinishReason.ERROR, error=said)
        if result.error is not None:
            result = replace(result, error=f"{self.name}: {result.error}")
        self._finished.put(result)


def _sendable(context: LiveContext) -> LiveContext:
    """Returns the context if pictures are only in user messages, as chat completions require.

    Raises:
        EngineError: A system message shows a frame.
    """
    for message in context.messages:
        if message.role != "user" and message.frames:
            raise EngineError(
                f"a {message.role} message shows a frame; endpoints take frames from users only"
            )
    return context


def _checked_extra_body(extra_body: Mapping[str, Any] | None) -> dict[str, Any]:
    extra = dict(extra_body or {})
    if taken := {"messages", "stream", "model"} & extra.keys():
        raise InputError(f"extra_body: got {sorted(taken)}, which the engine sets; give other fields")
    try:
        json.dumps(extra)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"extra_body: not JSON ({error})") from error
    return extra
