"""Sixty ways of a hostile server, one pair for each, in one run: a verdict or a reason, and nothing hangs."""

from __future__ import annotations

import json
import re
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip
from fuzz_counts import record
from loopback import serving
from texts import ANSWER, CALL, HEAD, RECOMMEND

from vrthinker.data.pairs import Pair
from vrthinker.episode.trajectory import StopReason
from vrthinker.judge import Judge

GOOD = HEAD + ANSWER
Mode = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as the mode that the caption names."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # the name that http.server calls
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        match = re.search(r"mode (\d+)\.", body)
        assert match is not None
        number = int(match[1])
        self.server.asked[number] += 1  # type: ignore[attr-defined]
        self.close_connection = True
        MODES[number][1](self)

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        """Sends a whole reply."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class Server(ThreadingHTTPServer):
    """A server that counts what it was asked, and forgives clients that went away."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[int] = Counter()

    def handle_error(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as server:
        yield server


def completion(content: object = GOOD, finish: object = "stop", **message: object) -> dict[str, Any]:
    said = {"role": "assistant", "content": content, **message}
    return {"choices": [{"message": said, "finish_reason": finish}], "usage": {"prompt_tokens": 9}}


def says(value: object, status: int = 200, **headers: str) -> Mode:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda handler: handler.send(body, status, **headers)


def writes(data: bytes) -> Mode:
    return lambda handler: handler.wfile.write(data) and None


def drips(data: bytes) -> Mode:
    """Sends a beginning, then a byte at a time, for longer than any attempt may take."""

    def mode(handler: Handler) -> None:
        handler.wfile.write(data)
        for _ in range(90):
            time.sleep(0.1)
            handler.wfile.write(b" ")

    return mode


def resets(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def endless(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        handler.wfile.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


def chunked(*chunks: bytes) -> Mode:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return writes(head + b"".join(chunks))


WHOLE = json.dumps(completion()).encode()
REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: "
VERDICT, NONE = True, False
MODES: list[tuple[bool, Mode]] = [
    (VERDICT, says(completion())),
    (VERDICT, says(completion([{"type": "text", "text": GOOD}]))),
    (VERDICT, says(completion(GOOD, None))),
    (VERDICT, says(completion() | {"usage": {"prompt_tokens": -1, "completion_tokens": "x"}})),
    (VERDICT, says(completion() | {"usage": [1]})),
    (VERDICT, says(completion(ANSWER, reasoning_content="so"))),
    (VERDICT, says(completion("\x00" + GOOD + "\ud800"))),
    (VERDICT, chunked(b"%x\r\n" % len(WHOLE), WHOLE, b"\r\n0\r\n\r\n")),
    (VERDICT, says(completion(GOOD.replace("TA=1,", "TA: Video 1;")))),
    (VERDICT, says(completion(GOOD), Set_Cookie="a=b", X_Odd="\xff")),
    (NONE, says(completion(GOOD + ANSWER))),
    (NONE, says(completion(HEAD + RECOMMEND + CALL + ANSWER))),
    (NONE, says(completion(HEAD + "<an\u017fwer>TA=1, VQ=1, MQ=0, OA=1</an\u017fwer>"))),
    (NONE, says(completion("<answer>" * 5000))),
    (NONE, says(completion("<answer>TA=1, VQ=1, MQ=0, OA=9</answer>"))),
    (NONE, says(completion(HEAD + RECOMMEND + CALL * 3))),
    (NONE, says(completion(HEAD + RECOMMEND + "<tool_call>" + "[" * 20_000))),
    (NONE, says(completion("x" * 3_000_000))),
    (
        NONE,
        says(completion("")),
    ),
    (NONE, says(completion(None))),
    (NONE, says(completion(17))),
    (NONE, says(completion([[[]]]))),
    (NONE, says(completion({"text": GOOD}))),
    (NONE, says(completion(None, refusal="I cannot\x1b[31m"))),
    (NONE, says(completion(GOOD, "content_filter"))),
    (NONE, says(completion(None, tool_calls=[{"function": {"name": "x", "arguments": "{"}}] * 9))),
    (NONE, says(completion(None, tool_calls=7))),
    (NONE, says({"choices": []})),
    (NONE, says({"choices": {"0": 1}})),
    (NONE, says({"choices": [None]})),
    (NONE, says({"choices": [{"message": []}]})),
    (NONE, says({"error": {"message": ["odd"], "code": {}}})),
    (NONE, says([])),
    (NONE, says(None)),
    (NONE, says(1e308)),
    (NONE, says(b"")),
    (NONE, says(b"\xff\xfe" * 100)),
    (NONE, says(b"[" * 200_000)),
    (NONE, says(b'{"choices": ' + b"9" * 100_000 + b"}")),
    (NONE, says(b'{"a": NaN, "choices": Infinity}')),
    (NONE, says(WHOLE[:-20])),
    (NONE, says(WHOLE, Content_Encoding="gzip")),
    (NONE, says(WHOLE, Content_Encoding="br")),
    (NONE, says(WHOLE, 301, Location="http://127.0.0.1:9/")),
    (NONE, says(WHOLE, 307, Location="file:///etc/passwd")),
    (NONE, says(WHOLE, 400)),
    (NONE, says({"error": {"message": "\x1b]0;title\x07" + "m" * 100_000}}, 401)),
    (NONE, says(WHOLE, 404)),
    (NONE, says(WHOLE, 429, Retry_After="99999999")),
    (NONE, says(WHOLE, 500)),
    (NONE, says(WHOLE, 503, Retry_After="-1")),
    (NONE, says(WHOLE, 599)),
    (NONE, writes(b"SSH-2.0-OpenSSH_9\r\n")),
    (NONE, writes(b"HTTP/9.9 abc\r\n\r\n")),
    (NONE, writes(b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n")),
    (NONE, writes(REPLY + b"-5\r\n\r\n" + WHOLE)),
    (NONE, writes(REPLY + b"99999\r\n\r\n" + WHOLE)),
    (NONE, chunked(b"ZZ\r\n", WHOLE)),
    (NONE, chunked(b"FFFFFFFFFFFFFFFF\r\n", WHOLE)),
    (NONE, drips(b"")),
    (NONE, drips(b"HTTP/1.1 200 OK\r\nX: ")),
    (NONE, drips(REPLY + b"9999\r\n\r\n")),
    (NONE, endless),
    (NONE, resets),
]


@pytest.mark.slow
def test_sixty_modes_of_a_hostile_server(server: Server, tmp_path: Path) -> None:
    clips = [make_clip(tmp_path / f"{name}.mp4", 6, size=(48, 64)) for name in ("a", "b")]
    pairs = [
        Pair(id=str(n), prompt=f"a dog in mode {n}.", video_1=clips[0], video_2=clips[1])
        for n in range(len(MODES))
    ]
    connections: set[tuple[Any, ...]] = set()
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "socket.connect":
            connections.add(arguments[1])

    sys.addaudithook(watch)
    options = {"timeout_seconds": 6.0, "max_retries": 1, "backoff_seconds": 0.01, "max_backoff_seconds": 0.05}
    port = server.server_address[1]
    kinds: Counter[str] = Counter()
    try:
        with Judge.from_endpoint(
            f"http://127.0.0.1:{port}/v1", "judge", engine_options=options, max_rounds=1
        ) as judge:
            for finished in judge.judge_pairs(pairs):
                trajectory = finished.trajectory
                assert trajectory is not None, finished.error
                number = int(finished.item.id)
                outcome = trajectory.outcome
                assert (outcome.judgments is not None) == MODES[number][0], (number, outcome)
                if outcome.judgments is not None:
                    assert outcome.judgments.as_dict() == {"TA": 1, "VQ": 1, "MQ": 0, "OA": 1}
                else:
                    assert outcome.reason is not None
                    assert outcome.reason.isprintable()
                    assert len(outcome.reason) < 700
                    assert outcome.stop_reason is not StopReason.INTERNAL_ERROR, outcome
                kinds[str(outcome.stop_reason)] += 1
    finally:
        watching = False
    assert sum(kinds.values()) == len(MODES) >= 60
    assert set(server.asked) == set(range(len(MODES)))
    assert max(server.asked.values()) <= 2
    assert {address[1] for address in connections} == {port}, "nobody else is asked"
    record("servers", dict(kinds))
