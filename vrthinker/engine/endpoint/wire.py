"""Requests to a chat-completions server, and its replies, as pure functions without a network.

Invariants: `chat_messages` sends exactly the live context, with frames as `data:` URIs and with the markup of
special tokens broken up in text; `read_reply` takes any bytes and either returns a `Reply` or raises
`BadReply`; every text that this module returns can be encoded as UTF-8.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vrthinker.engine.base import FinishReason, FrameSegment, Message
from vrthinker.engine.context import LiveContext
from vrthinker.engine.endpoint.token_scores import TokenScores, token_scores

ImageFormat = Literal["png", "jpeg"]

_ERROR_CHARACTERS = 300
_MARKUP = re.compile(r"<\|(?=[^\s<>|]{1,64}\|>)")
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTEXT_ERRORS = re.compile(
    r"context[_ ]length|context[_ ](window|size)|maximum (model|input|sequence) length|max_model_len"
    r"|prompt is too long|input is too long|too many (input )?tokens|max_new_tokens` must be",
    re.IGNORECASE,
)
_FILTER_ERRORS = re.compile(r"content_filter|content_policy|content management policy", re.IGNORECASE)
_LENGTH_REASONS = frozenset({"length", "max_tokens", "model_length"})


class BadReply(Exception):
    """A reply that cannot be used. The message is one clean line."""


@dataclass(frozen=True)
class Reply:
    """The answer of a server.

    Attributes:
        text: The round's text.
        finish_reason: The reason why the text ended: STOP, LENGTH or REFUSED.
        error: The words of the refusal, if `finish_reason` is REFUSED.
        prompt_tokens: The prompt tokens as the server counts them; None if it does not report them.
        completion_tokens: The completion tokens as the server counts them; None if it does not report them.
        cached_tokens: The prompt tokens that came from the server's prefix cache; None if not reported.
        tokens: The tokens of the message's content with their log-probabilities, as far as the server tells.
    """

    text: str
    finish_reason: FinishReason
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    tokens: tuple[TokenScores, ...] = ()


def clean_text(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD, so that it can be encoded."""
    return _LONE_SURROGATES.sub("\ufffd", text)


def plain_text(text: str) -> str:
    """The text as it is sent, with a zero-width space between the first two characters of every `<|name|>`.

    A server reads special tokens anywhere in a text, and a caption must not be able to end a turn or to
    announce a picture that is not there. Only this spelling (Qwen's, Llama 3's, GPT's) is broken up.
    """
    return _MARKUP.sub("<\u200b|", clean_text(text))


def clean_line(text: str, limit: int = _ERROR_CHARACTERS, *, secret: str = "") -> str:
    """One printable line of at most `limit` characters from untrusted text.

    The secret is removed before the text is cut, so that no part of it remains.
    """
    text = text.replace(secret, "***") if secret else text
    head = text[: 4 * limit]
    line = " ".join("".join(c if c.isprintable() else " " for c in head).split())
    return line if len(line) <= limit and len(head) == len(text) else line[: limit - 1] + "…"


def data_uri(pixels: Any, size: tuple[int, int], image_format: ImageFormat, jpeg_quality: int) -> str:
    """Encodes a frame as a data URI.

    Args:
        pixels: The pixels, uint8 `[height, width, 3]`, RGB: an array, or a tensor on any device.
        size: The (height, width) that the segment promised.
        image_format: The format: `png` is exact; `jpeg` is about a tenth of the size.
        jpeg_quality: The JPEG quality, 1 to 95 (100 switches parts of JPEG off and gains nothing).

    Raises:
        ValueError: The pixels are not what the segment promised.
    """
    import numpy as np
    from PIL import Image

    array = np.ascontiguousarray(pixels.cpu() if hasattr(pixels, "cpu") else pixels)
    if array.dtype != np.uint8 or array.shape != (*size, 3):
        raise ValueError(f"got {array.dtype} {list(array.shape)}, expected uint8 {[*size, 3]}")
    buffer = io.BytesIO()
    if image_format == "png":
        Image.fromarray(array).save(buffer, "PNG", compress_level=1)
    else:
        # Colour is kept at full resolution (4:4:4), so that colour bleeding is not mistaken for a flaw of the
        # clip.
        Image.fromarray(array).save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def chat_messages(context: LiveContext, images: Mapping[tuple[Hashable, ...], str]) -> list[dict[str, Any]]:
    """The live context as chat messages.

    A message with frames is a list of content parts, in which adjacent texts form one part, because some chat
    templates put line breaks between parts. A message without frames is a plain string. A message that has
    become empty is omitted. Messages are never merged.

    Args:
        context: The context that the round is written from.
        images: The data URI of every live frame, by `FrameSegment.key`.
    """
    messages: list[dict[str, Any]] = []
    for turn in context.turns:
        if isinstance(turn, str):
            messages.append({"role": "assistant", "content": plain_text(turn)})
        elif turn.segments:
            messages.append({"role": turn.role, "content": _content(turn, images)})
    return messages


def _content(message: Message, images: Mapping[tuple[Hashable, ...], str]) -> str | list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for segment in message.segments:
        if isinstance(segment, FrameSegment):
            parts.append({"type": "image_url", "image_url": {"url": images[segment.key]}})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += segment.text
        else:
            parts.append({"type": "text", "text": segment.text})
    # Markup is broken up last, because two segments could spell it together.
    for part in parts:
        if part["type"] == "text":
            part["text"] = plain_text(part["text"])
    return parts if message.frames else "".join(part["text"] for part in parts)


def error_message(body: bytes, *, secret: str = "") -> str:
    """The server's error message as one clean line: from the usual JSON fields, else the head of the body."""
    text = body[:65536].decode("utf-8", "replace")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return clean_line(text, secret=secret)
    code = ""
    for key in ("error", "detail", "message"):
        if isinstance(value, dict) and value.get(key) is not None:
            if isinstance(value.get("code"), str):
                code = value["code"]
            value = value[key]
    message = value if isinstance(value, str) else text
    return clean_line(f"{message} ({code})" if code and code not in message else message, secret=secret)


def is_context_error(status: int, message: str) -> bool:
    """Whether a refusal says that the context is too long. Servers share no code for that; words decide."""
    return status in (400, 413, 422) and _CONTEXT_ERRORS.search(message) is not None


def is_filter_error(status: int, message: str) -> bool:
    """Whether a refusal says that a content filter in front of the model stopped the request."""
    return status in (400, 403, 422) and _FILTER_ERRORS.search(message) is not None


def refused_field(body: bytes, fields: Collection[str]) -> str | None:
    """The field of a request that a server's error is about: the one of `fields` that it names first.

    OpenAI's servers name it in `error.param`, others only in the message.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    error = value.get("error") if isinstance(value, dict) else None
    named = error.get("param") if isinstance(error, dict) else None
    if isinstance(named, str) and named in fields:
        return named
    text = body[:65536].decode("utf-8", "replace")
    found = {name: re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) for name in fields}
    places = {name: match.start() for name, match in found.items() if match is not None}
    return min(places, key=lambda name: (places[name], name)) if places else None


def read_reply(body: bytes, *, secret: str = "") -> Reply:
    """Reads the body of a chat completion.

    The `finish_reason` `length` (and `max_tokens`, `model_length`) becomes LENGTH. `content_filter`, and a
    message without a text but with a `refusal`, become REFUSED. All others (`stop`, `tool_calls`, `eos`, none
    at all) become STOP.

    Servers that parse the text (`transformers serve`, vLLM with parsers) move `<think>` and `<tool_call>`
    into separate fields. Those are put back into the text unless it has such a tag itself: the thinking after
    `</snapshot>` if there is one, else at the beginning; the calls at the end.

    Args:
        body: The body as received.
        secret: A text that no error may repeat, such as the API key.

    Raises:
        BadReply: The body is not a chat completion with a text in it.
    """
    try:
        said = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadReply("the reply is not UTF-8") from None
    except (ValueError, RecursionError):
        head = clean_line(body.decode("utf-8", "replace"), 80, secret=secret)
        raise BadReply(f"the reply is not JSON: {head}") from None
    choices = said.get("choices") if isinstance(said, dict) else None
    if not isinstance(choices, list) or not choices:
        raise BadReply(f"the reply has no choices: {error_message(body, secret=secret)}")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        raise BadReply("the reply's first choice has no message")
    reason = choices[0].get("finish_reason")
    finish, error = FinishReason.STOP, _refusal(message, reason, secret)
    if error is not None:
        finish = FinishReason.REFUSED
    elif isinstance(reason, str) and reason in _LENGTH_REASONS:
        finish = FinishReason.LENGTH
    text = clean_text(_text(message, may_be_empty=error is not None))
    usage = said.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    return Reply(
        text,
        finish,
        error,
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        _count(details.get("cached_tokens")) if isinstance(details, dict) else None,
        token_scores(choices[0].get("logprobs")),
    )


def _count(value: object) -> int | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return value if good and isinstance(value, int) else None


def _refusal(message: dict[str, Any], reason: object, secret: str) -> str | None:
    """The words of a refusal; None if the model answered."""
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(refusal, str) and refusal.strip() and content in (None, "", []):
        return f"the model refused: {clean_line(refusal, secret=secret)}"
    return "the server's content filter cut the reply" if reason == "content_filter" else None


def _text(message: dict[str, Any], *, may_be_empty: bool) -> str:
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str)) if texts else None
    thought = message.get("reasoning_content") or message.get("reasoning")
    calls = [call for call in map(_call, _listed(message.get("tool_calls"))) if call is not None]
    if not isinstance(content, str):
        if content is not None:
            raise BadReply(f"the reply's content is {type(content).__name__}, not text")
        if not isinstance(thought, str) and not calls and not may_be_empty:
            raise BadReply("the reply has no content")
        content = ""
    if isinstance(thought, str) and thought and not re.search(r"<\s*think", content, re.IGNORECASE):
        snapshot = re.search(r"</\s*snapshot\s*>", content, re.IGNORECASE)
        at = snapshot.end() if snapshot else 0
        content = f"{content[:at]}<think>{thought}</think>{content[at:]}"
    if not re.search(r"<\s*tool_call", content, re.IGNORECASE):
        content += "".join(calls)
    return content


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _call(call: object) -> str | None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # If the model did not write JSON, its text is kept, so that the grammar sees the mistake.
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    try:
        said = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
    except RecursionError:
        return None
    return f"<tool_call>{said}</tool_call>"
