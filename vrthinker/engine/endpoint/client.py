"""A client of completions over HTTP, with retries, limits and a usage count.

Invariants: an attempt ends within its timeout; at most `max_reply_bytes` of a reply are kept in memory; every
failure is a `ChatFailure` whose text is one clean line without the API key.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Protocol

import httpx
import tenacity

from vrthinker.engine.base import FinishReason
from vrthinker.engine.endpoint.wire import (
    BadReply,
    Reply,
    clean_line,
    error_message,
    is_context_error,
    is_filter_error,
    read_reply,
    refused_field,
)
from vrthinker.errors import InputError

_RETRIED = frozenset({408, 409, 429})
_ERROR_BYTES = 64 * 1024
_QUIET_SECONDS = 1.0
_logger = logging.getLogger(__name__)


class ChatFailure(Exception):
    """A completion failed. The message is one clean line.

    Attributes:
        context: Whether the server says that the context is too long for the model.
        field: The field of the request that the server refuses, if it names one.
    """

    def __init__(self, message: str, *, context: bool = False, field: str | None = None) -> None:
        super().__init__(message)
        self.context, self.field = context, field


class ReplyMemory(Protocol):
    """Keeps the replies of a server, so that no request that was answered is ever sent again.

    Its methods are called from several threads.
    """

    def find(self, key: str) -> Reply | None:
        """The reply to the request with this key; None if it was not answered yet."""

    def keep(self, key: str, reply: Reply) -> None:
        """Keeps a reply. On return it outlives the process."""


class _Transient(ChatFailure):
    """A failure that may be retried, after `retry_after` seconds if the server said so."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class EndpointUsage:
    """Counts of what was requested from an endpoint.

    Attributes:
        requests: The number of HTTP requests sent, including retries.
        retries: The number of those that were retries.
        failures: The number of completions that failed after all retries, or that were refused.
        prompt_tokens: The prompt tokens as the server counted them; 0 if it does not report them.
        completion_tokens: The completion tokens as the server counted them; 0 if it does not report them.
        images: The number of pictures sent, over all requests.
    """

    requests: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    images: int = 0


class ChatClient:
    """Posts completions. `complete` runs on one event loop; `usage` may be read from any thread."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        timeout_seconds: float,
        max_retries: int,
        concurrency: int,
        backoff_seconds: float,
        max_backoff_seconds: float,
        max_reply_bytes: int,
        optional_fields: Collection[str] = (),
        memory: ReplyMemory | None = None,
        url: Callable[[str], str] | None = None,
        read: Callable[..., Reply] = read_reply,
    ) -> None:
        """Makes the client. `EndpointEngine` explains the arguments.

        Besides, `url` makes the address that is posted to from `base_url`, and `read` reads the body of a
        reply; by default they are those of chat completions.

        Raises:
            InputError: The address or the key cannot be used.
        """
        self._url = (url or completions_url)(base_url)
        self._read = read
        # The address for messages has no query, because some servers take a key there.
        self.address = self._url.partition("?")[0]
        self._key = _checked_key(os.environ.get("OPENAI_API_KEY") if api_key is None else api_key)
        # Compression is neither requested nor accepted: a compressed reply could grow a thousandfold in
        # memory.
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            self._http = httpx.AsyncClient(
                headers=headers,
                timeout=timeout_seconds,
                follow_redirects=False,
                limits=httpx.Limits(max_connections=concurrency),
            )
        except (ImportError, ValueError, OSError) as error:
            raise InputError(
                "endpoint: the environment's proxy or certificate settings cannot be used "
                f"({str(error)[:200]}); mend or unset them"
            ) from None
        self._slots = asyncio.Semaphore(concurrency)
        self._timeout = timeout_seconds
        self._max_reply_bytes = max_reply_bytes
        self._attempts = max_retries + 1
        self._optional_fields = frozenset(optional_fields)
        self._memory = memory
        self._max_backoff = max_backoff_seconds
        doubling = tenacity.wait_exponential(multiplier=backoff_seconds, max=max_backoff_seconds)
        self._exponential = doubling + tenacity.wait_random(0, backoff_seconds)
        self._lock = threading.Lock()
        self._usage = EndpointUsage()
        self._quiet_until = 0.0

    @property
    def usage(self) -> EndpointUsage:
        """The counts so far."""
        with self._lock:
            return self._usage

    def clean(self, text: str) -> str:
        """The text as one clean line without the API key."""
        return clean_line(text, secret=self._key)

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def complete(self, payload: Callable[[], bytes], *, pictures: int, seed: int = 0) -> Reply:
        """Posts a request until it is answered or refused, or all attempts have failed.

        A request that the memory has a reply to is not posted.

        Args:
            payload: A function that makes the body. It is called in a thread when the request is next to be
                sent.
            pictures: The number of pictures in the request, for `usage`.
            seed: The seed of the session. Equal requests of sessions with other seeds are other requests.

        Raises:
            ChatFailure: The request was refused, or all attempts failed.
        """
        try:
            async with self._slots:
                body = await asyncio.to_thread(payload)
                if self._memory is None:
                    reply = await self._attempt_all(body, pictures)
                else:
                    key = hashlib.sha256(f"{seed}\0".encode() + body).hexdigest()
                    known = self._memory.find(key)
                    if known is not None:
                        return known
                    reply = await self._attempt_all(body, pictures)
                    await asyncio.to_thread(self._memory.keep, key, reply)
        except Exception:
            self._count(failures=1)
            raise
        self._count(
            failures=0 if reply.error is None else 1,
            prompt_tokens=reply.prompt_tokens or 0,
            completion_tokens=reply.completion_tokens or 0,
        )
        return reply

    async def _attempt_all(self, body: bytes, pictures: int) -> Reply:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(_Transient),
            before_sleep=self._say_retry,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    again = attempt.retry_state.attempt_number > 1
                    self._count(requests=1, retries=int(again), images=pictures)
                    return await self._attempt(body)
        except tenacity.RetryError as error:
            last = error.last_attempt.exception()
            tries = f"gave up after {self._attempts} attempts" if self._attempts > 1 else "no retries allowed"
            raise ChatFailure(f"{last} ({tries})") from None
        raise AssertionError("unreachable: retrying ends by returning or raising")

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, _Transient) and error.retry_after is not None:
            return min(error.retry_after, self._max_backoff)
        return min(self._exponential(state), self._max_backoff)

    def _say_retry(self, state: tenacity.RetryCallState) -> None:
        """Logs that a request is sent again, but not for each of many requests that fail at the same time."""
        now = time.monotonic()
        with self._lock:
            if now < self._quiet_until:
                return
            self._quiet_until = now + _QUIET_SECONDS
        error = state.outcome.exception() if state.outcome is not None else None
        wait = state.next_action.sleep if state.next_action is not None else 0.0
        attempt = f"attempt {state.attempt_number + 1} of {self._attempts} follows in {wait:.1f} s"
        _logger.warning("%s; %s", error, attempt)

    async def _attempt(self, body: bytes) -> Reply:
        try:
            async with asyncio.timeout(self._timeout):
                async with self._http.stream(
                    "POST", self._url, content=body, headers={"Content-Type": "application/json"}
                ) as response:
                    limit = self._max_reply_bytes if response.status_code == 200 else _ERROR_BYTES
                    content, whole = await _read(response, limit)
        except (TimeoutError, httpx.TimeoutException):
            raise _Transient(f"no answer from {self.address} within {self._timeout:g} s") from None
        except httpx.TransportError as error:
            said = clean_line(str(error), secret=self._key) or type(error).__name__
            raise _Transient(f"no answer from {self.address}: {said}") from None
        if response.status_code != 200:
            failure = self._failure(response, content)
            if is_filter_error(response.status_code, str(failure)):
                return Reply("", FinishReason.REFUSED, str(failure))
            raise failure
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            said = clean_line(coding, 40, secret=self._key)
            raise ChatFailure(f"{self.address}: the reply is {said}-encoded, which was not asked for")
        if not whole:
            raise ChatFailure(f"{self.address}: the reply is longer than {self._max_reply_bytes} bytes")
        try:
            return self._read(content, secret=self._key)
        except BadReply as error:
            raise ChatFailure(f"{self.address}: {error}") from None

    def _failure(self, response: httpx.Response, content: bytes) -> ChatFailure:
        status = response.status_code
        said = error_message(content, secret=self._key) or "no message"
        line = f"{self.address}: HTTP {status}: {said}"
        if 300 <= status < 400:
            target = clean_line(response.headers.get("Location", "nowhere"), 100, secret=self._key)
            return ChatFailure(
                f"{self.address}: HTTP {status} redirects to {target}; redirects are not followed"
            )
        if status in _RETRIED or status >= 500:
            return _Transient(line, retry_after_seconds(response.headers.get("Retry-After")))
        context = is_context_error(status, said)
        field = None if context else self._refused_field(status, content)
        return ChatFailure(
            line if field is None else f"{line}; {_without(field)}", context=context, field=field
        )

    def _refused_field(self, status: int, content: bytes) -> str | None:
        return refused_field(content, self._optional_fields) if status in (400, 422) else None

    def _count(self, **more: int) -> None:
        with self._lock:
            now = self._usage
            self._usage = replace(now, **{key: getattr(now, key) + value for key, value in more.items()})


def completions_url(base_url: str) -> str:
    """The address that completions are posted to. `EndpointEngine` lists the accepted forms.

    Raises:
        InputError: The address is not http(s), or it carries a user name or a fragment.
    """
    url = checked_address(base_url)
    raw_path, _, query = url.raw_path.partition(b"?")
    path = raw_path.rstrip(b"/") or b"/v1"
    if not path.endswith(b"/chat/completions"):
        path += b"/chat/completions"
    return str(url.copy_with(raw_path=path + (b"?" + query if query else b"")))


def checked_address(base_url: str) -> httpx.URL:
    """A server's address, if it is one.

    Raises:
        InputError: The address is not http(s), or it carries a user name or a fragment.
    """
    try:
        url = httpx.URL(base_url.strip())
    except (httpx.InvalidURL, TypeError, AttributeError) as error:
        raise InputError(f"base_url: not an address ({error}); allowed: http://host:port/v1") from None
    if url.userinfo:
        raise InputError("base_url: it holds a user name or password; give the key as api_key")
    if url.scheme not in ("http", "https") or not url.host:
        # The message does not quote the whole address, which may contain a key.
        got = f"scheme {url.scheme!r}" if url.scheme else "no scheme"
        raise InputError(f"base_url: got {got}, allowed: http://host:port/v1 or https://…")
    if url.fragment:
        raise InputError("base_url: got a fragment (#…); leave it out")
    return url


def retry_after_seconds(value: str | None) -> float | None:
    """Reads a Retry-After header, which is seconds or a date. None if absent, unreadable or negative."""
    if value is None or len(value) > 100:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(value)
            if when.tzinfo is None:
                when = when.replace(tzinfo=datetime.UTC)
            seconds = max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    return seconds if 0.0 <= seconds < float("inf") else None


async def _read(response: httpx.Response, limit: int) -> tuple[bytes, bool]:
    """Reads the raw body up to `limit` bytes; also returns whether that is the whole body."""
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > limit:
            return bytes(content[:limit]), False
    return bytes(content), True


def _without(field: str) -> str:
    """How to send requests without a field that a server refuses, or under another name."""
    advice = f"it refuses the field {field}: leave it out with --endpoint-extra '{{\"{field}\": null}}'"
    if field == "max_tokens":
        advice += ', or rename it: \'{"max_tokens": null, "max_completion_tokens": 2048}\''
    return f"{advice} (extra_body in Python)"


def _checked_key(key: str | None) -> str:
    key = (key or "").strip()
    if not all(0x21 <= ord(character) <= 0x7E for character in key):
        # The check is ours because an HTTP library's error would show the key.
        raise InputError("api_key: it holds blanks or other characters that no key has; check how it was set")
    return key
