"""The page that goes from preferences to a judge: its commands, one after the other, on real clips."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shlex
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cli_run import vrthinker
from loopback import serving

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "walkthrough.md"
REAL = ROOT.parent / "shared" / "data" / "videoalign"

# By the captions' words: TA, VQ, MQ, OA as the set has them, the last by majority.
LABELS = {"braided hair": (1, 2, 2, 2), "young explorer": (1, 0, 0, 1)}


class Teacher(BaseHTTPRequestHandler):
    """Looks once, then answers. It knows the preferences, but not in which order it sees the clips."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # the name that http.server calls
        body = self.rfile.read(int(self.headers["Content-Length"]))
        messages = json.loads(body)["messages"]
        text = json.dumps(messages, ensure_ascii=False)
        labels = next(labels for words, labels in LABELS.items() if words in text)
        # One guess per episode, which its later rounds repeat: the seed stands beside the messages.
        guess = random.Random(hashlib.sha256(str(json.loads(body).get("seed")).encode()).digest())
        turned = guess.random() < 0.5
        said = [label if label == 0 or not turned else 3 - label for label in labels]
        answer = ", ".join(
            f"{code}={label}" for code, label in zip(("TA", "VQ", "MQ", "OA"), said, strict=True)
        )
        is_first = not any(message["role"] == "assistant" for message in messages)
        ending = (
            f"<recommend answer>{answer}, CF=2</recommend answer>"
            '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [9, 10]}}</tool_call>'
            if is_first
            else f"<answer>{answer}</answer>"
        )
        content = f"<snapshot>two clips</snapshot><think>I compare them.</think>{ending}"
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        reply = {"choices": [choice], "usage": {"prompt_tokens": len(text), "completion_tokens": 40}}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def teacher() -> Iterator[str]:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Teacher)) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"


def commands_of(page: Path) -> list[list[str]]:
    """The arguments of every command on a page."""
    blocks = re.findall(r"^```\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("vrthinker ")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_works_from_its_first_command_to_its_last(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not REAL.is_dir():
        pytest.skip("the real clips are not here (../shared/data/videoalign)")
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(REAL / "pairs.csv", "pairs.csv")
    Path("videos").symlink_to(REAL / "videos")
    for name in ("A", "B"):
        Path(f"{name}.mp4").symlink_to(REAL / "videos" / f"example_1_{name}.mp4")
    said: dict[str, str] = {}
    for arguments in commands_of(PAGE):
        done = vrthinker(*[{"URL": teacher}.get(word, word) for word in arguments])
        assert done.code == 0, (arguments, done.out, done.err)
        said[" ".join(arguments[:2])] = done.out
    assert "2 pairs of 2 rows" in said["data import"]
    assert re.search(r"kept \d+ of 48 episodes", said["train traces"])
    model = json.loads(Path("stage2/model/config.json").read_text())
    text = model.get("text_config", model)
    assert text["num_hidden_layers"] == 4
    selected = json.loads(Path("stage2/traces.json").read_text())["phases"][0]
    assert selected["read"] == 32
    assert selected["kept"] > 0
    assert "oa/tau" in said["eval pairs"]
    assert Path("page.html").stat().st_size > 10_000
