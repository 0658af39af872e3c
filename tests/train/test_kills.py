"""Real commands that are killed again and again, at random moments, and given again.

A moment is drawn as a number of finished steps, or of requests, and a short time after it. That time is a
part of what a step or an answer takes, and ends when the command gets on, so that no machine is too slow or
too fast. Each run draws other moments; a failure shows the seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import assert_session_ends, children_of
from loopback import serving
from served import Served, skip_without_a_server

from vrthinker.engine.hf.checkpoint import resolve_checkpoint
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.train.teacher import EPISODES, REPLIES, SELECTION, TRACES
from vrthinker.world.files import PAIRS_FILE, make_world
from vrthinker.world.world import PRESETS

pytestmark = [pytest.mark.slow, pytest.mark.multi_process, pytest.mark.timeout(3600)]

KILLS = 10
STEPS_PER_KILL = 4
STEPS = KILLS * STEPS_PER_KILL + 8
"""The last steps are not for killing: a kill that comes late must not find a finished run."""
SAVE_EVERY = 2
RECIPE: dict[str, Any] = {
    "model": "nano-from-nothing",
    "tracker": "none",
    "checkpoint_every": SAVE_EVERY,
    "phases": [
        {
            "steps": STEPS,
            "batch_size": 2,
            "micro_batch_size": 1,
            "learning_rate": {"peak": 1e-3},
            "traces": {"kind": "world", "pairs": 5, "seed": 11, "calls": 1, "filter": False},
        }
    ],
}
ALONE = (sys.executable, "-m", "vrthinker")
TWO = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "vrthinker"),
)
PATIENCE_SECONDS = 900
"""How long to wait for a command that must end by itself, or a server that must come up."""

Process = subprocess.Popen[bytes]


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201
    return random.Random(seed)


@contextlib.contextmanager
def started(command: tuple[object, ...], log: Path) -> Iterator[Process]:
    """A command in a session of its own. What it says goes to a file."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **one},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in [*children_of(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            process.wait()


def kill_group(process: Process) -> None:
    """Kills a command and what it started."""
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert_session_ends(process.pid)


def run_to_the_end(command: tuple[object, ...], log: Path) -> str:
    """Runs a command that must succeed; returns what it said."""
    with started(command, log) as process:
        code = process.wait()
    said = log.read_text()
    assert code == 0, said
    return said


# Training


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run, without what tells the time; none before its first step."""
    path = run / METRICS_FILE
    lines = read_metrics(path) if path.exists() else []
    timed = ("time_seconds", "perf/")
    return [{name: value for name, value in line.items() if not name.startswith(timed)} for line in lines]


def finished_steps(run: Path) -> int:
    lines = metrics_of(run)
    return lines[-1]["step"] if lines else 0


def wait_until(run: Path, wanted: int, process: Process, log: Path, rng: random.Random) -> None:
    """Waits until a process has finished so many steps, and then for a random part of the next ones."""
    while finished_steps(run) < wanted:
        assert process.poll() is None, f"ended before step {wanted}: {log.read_text()}"
        time.sleep(0.01)
    seconds = read_metrics(run / METRICS_FILE)[-1]["perf/step_seconds"]
    end = time.monotonic() + rng.uniform(0, SAVE_EVERY) * seconds
    while time.monotonic() < end and finished_steps(run) < wanted + SAVE_EVERY:
        time.sleep(0.005)
    assert process.poll() is None, f"ended before it was killed: {log.read_text()}"


def kill_one_of_two(process: Process, rng: random.Random) -> None:
    """Kills one of the two processes that torchrun started; it and the other must end by themselves."""
    ranks: dict[bytes, int] = {}
    for pid in children_of(process.pid):
        environment = Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
        ranks |= {value: pid for value in environment if value.startswith(b"RANK=")}
    assert ranks.keys() == {b"RANK=0", b"RANK=1"}
    assert all(os.getsid(pid) == pid for pid in ranks.values())
    os.kill(ranks[rng.choice((b"RANK=0", b"RANK=1"))], signal.SIGKILL)
    assert process.wait(PATIENCE_SECONDS) > 0
    for session in (*ranks.values(), process.pid):
        assert_session_ends(session)


def kill_ten_times(
    start: tuple[str, ...],
    recipe: Path,
    run: Path,
    rng: random.Random,
    kill: Callable[[Process], None],
) -> None:
    """Kills a run in each tenth of its steps, and resumes it.

    Each process has to get further than the one before it, and begins with the last checkpoint that is whole.
    """
    reached = 0
    for number in range(KILLS):
        wanted = max(number * STEPS_PER_KILL + rng.randint(1, STEPS_PER_KILL), reached + 1)
        given = ("--resume", run) if reached else ("--recipe", recipe, "--out", run)
        log = run.parent / f"{run.name}-{number}.log"
        with started((*start, "train", "cold-start", *given), log) as process:
            wait_until(run, wanted, process, log, rng)
            kill(process)
        assert not (run / "model").exists()
        assert_resumed(log, reached)
        reached = finished_steps(run)
        print(f"killed after step {reached}, drawn: {wanted}")  # noqa: T201
        assert wanted <= reached < STEPS


def assert_resumed(log: Path, reached: int) -> None:
    """A process that followed one killed after so many steps began with the last checkpoint that is whole."""
    found = re.search(r"resumed from \S+/step-(\d+)", log.read_text())
    saved = reached - reached % SAVE_EVERY
    # A step's line is written before its checkpoint.
    allowed = {saved} if reached > saved else {saved, max(0, saved - SAVE_EVERY)}
    assert (0 if found is None else int(found[1])) in allowed, log.read_text()


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_kills_change_no_bit(
    start: tuple[str, ...], run: Path, rng: random.Random, kill: Callable[[Process], None]
) -> None:
    straight, broken, recipe = run / "straight", run / "broken", run / "recipe.yaml"
    run.mkdir()
    recipe.write_text(yaml.safe_dump(RECIPE))
    given = (*start, "train", "cold-start")
    run_to_the_end((*given, "--recipe", recipe, "--out", straight), run / "straight.log")
    kill_ten_times(start, recipe, broken, rng, kill)
    reached = finished_steps(broken)
    run_to_the_end((*given, "--resume", broken), run / "last.log")
    assert_resumed(run / "last.log", reached)

    lines = metrics_of(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert len({line["sft/tokens"] for line in lines}) > 1, "the order of the data shows in its tokens"
    assert metrics_of(broken) == lines
    for folder in ("model", "checkpoints"):
        whole = digests(straight / folder)
        assert any(name.endswith(".safetensors") for name in whole)
        assert digests(broken / folder) == whole


def test_ten_kills_spread_over_a_run_change_no_bit(run: Path, rng: random.Random) -> None:
    assert_kills_change_no_bit(ALONE, run, rng, kill_group)


def test_ten_kills_of_one_of_two_processes_change_no_bit(run: Path, rng: random.Random) -> None:
    assert_kills_change_no_bit(TWO, run, rng, lambda process: kill_one_of_two(process, rng))


# A teacher in another process


class Relay(ThreadingHTTPServer):
    """Stands between a command and a server, and counts what arrives there and what is answered.

    A request is counted by the key under which its reply is kept. While the server is away, a connection ends
    without an answer, as it would without a relay.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port
        self.changed = threading.Condition()
        self.begin(Path(os.devnull))

    def begin(self, replies: Path) -> None:
        """Counts from the beginning, for a command that keeps its replies in this file."""
        self.replies = replies
        self.asked: list[str] = []
        self.answered: list[str] = []
        self.asked_though_kept: list[str] = []
        self.statuses: set[int] = set()
        self.seconds: list[float] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def kept(self) -> list[str]:
        """The keys of the replies that are on the disk."""
        lines = self.replies.read_bytes().splitlines(keepends=True) if self.replies.is_file() else []
        return [json.loads(line)["key"] for line in lines if line.endswith(b"\n")]

    def wait_for(self, count: int, process: Process, seconds: float = math.inf) -> bool:
        """Waits until so many requests have arrived at the server; False if the command or the time ended."""
        end = time.monotonic() + seconds
        with self.changed:
            while len(self.asked) < count:
                left = end - time.monotonic()
                if left <= 0 or process.poll() is not None:
                    return False
                self.changed.wait(min(left, 0.2))
        return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Relay

    def do_POST(self) -> None:
        relay = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = hashlib.sha256(f"{json.loads(body)['seed']}\0".encode() + body).hexdigest()
        if key in relay.kept():
            relay.asked_though_kept.append(key)
        self.close_connection = True
        connection = http.client.HTTPConnection("127.0.0.1", relay.port)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.connect()
            with relay.changed:
                relay.asked.append(key)
                relay.changed.notify_all()
            began = time.monotonic()
            connection.request("POST", self.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            relay.seconds.append(time.monotonic() - began)
            relay.statuses.add(answer.status)
            relay.answered.append(key)
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    make_world(folder, PRESETS["easy"], pairs=8, seed=31, workers=1)
    return folder


def recorded(file: Path) -> list[dict[str, Any]]:
    """The episodes of a file, without what tells the time."""
    return [trace.model_dump(mode="json", exclude={"latency_seconds"}) for trace in load_trajectories(file)]


def test_a_killed_teacher_and_a_killed_command_lose_nothing_and_ask_nothing_twice(
    world: Path, tmp_path: Path, rng: random.Random
) -> None:
    skip_without_a_server()
    nano = resolve_checkpoint("nano")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    with (
        Served(nano, tmp_path / "serve.log", "plain", patience_seconds=PATIENCE_SECONDS) as server,
        serving(Relay(server.port)) as relay,
    ):
        teacher = ("--pairs", world / PAIRS_FILE, "--endpoint", relay.url, "--model", nano, "--like", "nano")
        given = (*ALONE, "train", "traces", *teacher, "--batch-size", "1", "--out")

        relay.begin(straight / REPLIES)
        run_to_the_end((*given, straight), tmp_path / "straight.log")
        wanted, answer_seconds = relay.asked, statistics.median(relay.seconds)
        assert relay.answered == relay.kept() == wanted
        assert len(set(wanted)) == len(wanted) >= 8

        relay.begin(broken / REPLIES)
        half = len(wanted) // 2
        first, second = rng.randint(1, half), rng.randint(half + 1, len(wanted) - 2)
        print(f"{len(wanted)} requests; server killed at {first}, command at {second}")  # noqa: T201

        with contextlib.ExitStack() as commands:

            def ask(number: int) -> tuple[Process, Path]:
                log = tmp_path / f"broken-{number}.log"
                return commands.enter_context(started((*given, broken), log)), log

            number = 0
            process, log = ask(number)
            assert relay.wait_for(first, process), log.read_text()
            relay.wait_for(first + 1, process, rng.uniform(0, 1.2) * answer_seconds)
            server.kill()
            assert process.poll() is None, log.read_text()
            server.start()
            while not relay.wait_for(second, process):  # it gave up before the server was back
                assert process.returncode == 1, log.read_text()
                assert "give the same command again" in log.read_text()
                number += 1
                process, log = ask(number)
            relay.wait_for(second + 1, process, rng.uniform(0, 1.2) * answer_seconds)
            kill_group(process)
            assert len(relay.kept()) < len(wanted), "killed in the middle"
        run_to_the_end((*given, broken), tmp_path / "last.log")

        asked_again, answered_again = (
            sum((Counter(keys) - Counter(wanted)).values()) for keys in (relay.asked, relay.answered)
        )
        print(f"{number} times given up; {asked_again} asked and {answered_again} answered again")  # noqa: T201
        assert relay.statuses == {200}
        assert relay.asked_though_kept == [], "a reply that is on the disk is never asked for again"
        assert sorted(relay.kept()) == sorted(set(relay.asked)) == sorted(wanted)
        # One request is under way at a time: each kill costs at most that one.
        assert asked_again <= 2
        assert answered_again <= 1

    assert recorded(broken / TRACES) == recorded(straight / TRACES) != []
    assert (broken / SELECTION).read_bytes() == (straight / SELECTION).read_bytes()
    by_id = [{trace["id"]: trace for trace in recorded(folder / EPISODES)} for folder in (straight, broken)]
    assert by_id[0] == by_id[1]
