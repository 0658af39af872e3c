"""Traces of a teacher: what is kept, what is counted, and that nothing is asked twice."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest
from cli_run import Done, vrthinker
from command_worker import at, command
from forks import Outcomes
from loopback import serving

from vrthinker.data.pairs import load_pairs
from vrthinker.engine.base import FinishReason
from vrthinker.engine.endpoint.wire import Reply
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.errors import InputError
from vrthinker.train.replies import StoredReplies
from vrthinker.train.trace_sources import FileTraces
from vrthinker.train.traces import read_traces
from vrthinker.world.files import PAIRS_FILE, make_world
from vrthinker.world.world import PRESETS

N_PAIRS = 5
CAPTION = re.compile(r"pair \d+")
CALL = (
    "<snapshot>s</snapshot><think>t</think><recommend answer>TA=0, VQ=0, MQ=0, OA=0, CF=2</recommend answer>"
    '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [2, 3]}}</tool_call>'
)


class Teacher(ThreadingHTTPServer):
    """Answers in two rounds, by what its table says of a caption and of the clip that comes first."""

    daemon_threads = True

    def __init__(self, endings: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endings = endings
        self.asked: list[str] = []
        self.lock = threading.Lock()
        self.broken_after: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Teacher

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with self.server.lock:
            broken = (
                self.server.broken_after is not None and len(self.server.asked) >= self.server.broken_after
            )
            if not broken:
                self.server.asked.append(body)
        if broken:
            self.answer(401, {"error": {"message": "the key has expired"}})
            return
        found = CAPTION.search(body)
        assert found is not None
        rounds = sum(message["role"] == "assistant" for message in json.loads(body)["messages"])
        message = {"content": CALL} if rounds == 0 else self.server.endings[found[0]]
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        self.answer(200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

    def answer(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Silence."""


def says(**judgments: int) -> dict[str, Any]:
    answer = ", ".join(f"{code}={value}" for code, value in judgments.items())
    return {"content": f"<snapshot>s</snapshot><think>t</think><answer>{answer}</answer>"}


TIES = {"TA": 0, "VQ": 0, "MQ": 0, "OA": 0}
ENDINGS = {
    "pair 0": says(**TIES),
    "pair 1": says(**{**TIES, "MQ": 1}),
    "pair 2": {"content": None, "refusal": "I cannot judge that."},
    "pair 3": {"content": "I would rather not say."},
    "pair 4": says(**{**TIES, "TA": 2}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    make_world(folder, PRESETS["easy"], pairs=N_PAIRS, seed=8, workers=1)
    return folder


@pytest.fixture(scope="module")
def pairs(world: Path) -> Path:
    """Pairs in which everything is a tie, but for pair 4, of which only the overall label is known."""
    path = world / "asked.jsonl"
    rows = [json.loads(line) for line in (world / PAIRS_FILE).read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"prompt": f"pair {number}", "labels": {"OA": 0} if number == 4 else TIES}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    with serving(Teacher(ENDINGS)) as server:
        yield server


def asked_of(teacher: Teacher, pairs: Path, out: Path, *more: object) -> tuple[object, ...]:
    given = ("train", "traces", "--pairs", pairs, "--out", out, "--endpoint", teacher.url, "--model", "t")
    return (*given, "--like", "nano", *more)


def asked(teacher: Teacher, pairs: Path, out: Path, *more: object) -> Done:
    return vrthinker(*asked_of(teacher, pairs, out, "--batch-size", 2, *more))


def test_a_teachers_traces_are_filtered_counted_and_paid_for(
    teacher: Teacher, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "traces"
    done = asked(teacher, pairs, out, "--price-input", 2, "--price-output", 10)
    assert done.code == 0, done.err
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0] == f"kept 2 of 5 episodes in {out / 'traces.jsonl'}"
    assert set(lines[2:5]) == {
        "wrong in MQ 1",
        "without a verdict (refused) 1",
        "without a verdict (unparseable) 1",
    }
    assert lines[5] == "judgments without a label, which were not checked: 3"
    assert lines[6] == "answered: 10 requests, 1000 prompt tokens and 100 written tokens, cost 0.003"
    kept = list(load_trajectories(out / "traces.jsonl"))
    assert [trace.prompt for trace in kept] == ["pair 0", "pair 4"]
    assert all(trace.settings.guided is False for trace in kept)
    selection = json.loads((out / "selection.json").read_text())
    assert selection["account"]["cost"] == pytest.approx(0.003)
    orders = {trial["id"]: trial["swapped"] for trial in selection["trials"]}
    assert set(orders.values()) == {True, False}
    by_id = {pair.id: pair for pair in load_pairs(pairs)}
    judged = {pair.id: pair for pair in load_pairs(out / "pairs.jsonl")}
    for trial in selection["trials"]:
        source, trace = by_id[trial["pair"]], judged[trial["id"]]
        first = source.video_2 if trial["swapped"] else source.video_1
        assert trace.video_1 == first
    for trace in kept:
        assert trace.videos[0].path == str(judged[trace.id].video_1)
        (row,) = [trial for trial in selection["trials"] if trial["id"] == trace.id]
        assert (row["reason"], row["seed"]) == (None, trace.seed)

    again = asked(teacher, pairs, out, "--json")
    assert (again.code, json.loads(again.out)["kept"]) == (0, 2)
    assert len(teacher.asked) == 10, "nothing is asked again"
    # What was kept is what a cold start keeps, with the trials as its pairs.
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(json.dumps(row | {"labels": TIES | {"TA": 0}}) + "\n" for row in rows))
    assert len(read_traces(FileTraces(path=out / "traces.jsonl")).traces) == 2
    assert len(read_traces(FileTraces(path=out / "episodes.jsonl", pairs=whole)).traces) == 1

    other = asked(teacher, pairs, out, "--temperature", 0.5)
    assert other.code == 2
    assert "temperature" in other.last_line


def test_a_server_that_stops_answering_ends_the_run_and_loses_nothing(
    teacher: Teacher, pairs: Path, tmp_path: Path
) -> None:
    straight, out = tmp_path / "straight", tmp_path / "traces"
    assert asked(teacher, pairs, straight, "--samples", 3).code == 0
    wanted = teacher.asked[:]
    teacher.asked.clear()
    teacher.broken_after = 7
    failed = asked(teacher, pairs, out, "--samples", 3)
    assert failed.code == 1
    assert "8 episodes in a row failed: " in failed.last_line
    assert "HTTP 401: the key has expired" in failed.last_line
    assert not (out / "selection.json").exists()
    teacher.broken_after = None
    assert asked(teacher, pairs, out, "--samples", 3).code == 0
    assert sorted(teacher.asked) == sorted(wanted), "each request once"
    texts = [(folder / "traces.jsonl", folder / "selection.json") for folder in (straight, out)]
    kept = [[(t.id, t.seed, [r.text for r in t.rounds]) for t in load_trajectories(t)] for t, _ in texts]
    assert kept[0] == kept[1] != []
    assert json.loads(texts[0][1].read_text()) == json.loads(texts[1][1].read_text())


@pytest.mark.multi_process
def test_killed_in_the_middle_nothing_is_asked_twice(
    teacher: Teacher, pairs: Path, tmp_path: Path, commands: Outcomes
) -> None:
    """Killed while replies, episodes and verdicts are written, in the middle of an episode too."""
    assert asked(teacher, pairs, tmp_path / "straight").code == 0
    wanted = sorted(teacher.asked)
    teacher.asked.clear()
    out = tmp_path / "traces"
    keep = "vrthinker.train.replies:StoredReplies.keep"
    moments = [
        at(keep, 1, "SIGKILL", after=True),
        at("vrthinker.judge_file:append_trajectory", 1, "SIGKILL", after=True),
        at("vrthinker.records.verdict_log:VerdictLog.append", 2, "SIGKILL"),
        at(keep, 2, "SIGKILL", after=True),
        at("vrthinker.train.teacher:write_selection", 1, "SIGKILL"),
    ]
    given = asked_of(teacher, pairs, out, "--batch-size", 1)
    *killed, last = commands([*(command(*given, moments=[moment]) for moment in moments), command(*given)])
    assert [outcome["code"] for outcome in killed] == [-9] * len(moments), killed
    assert last["result"] == 0, last
    assert sorted(teacher.asked) == wanted
    found = [json.loads((tmp_path / name / "selection.json").read_text()) for name in ("straight", "traces")]
    assert found[0] == found[1]


def test_the_oracle_and_a_checkpoint_teach(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "oracle"
    given = ("train", "traces", "--oracle", world, "--out", out, "--like", "nano", "--samples", 2, "--json")
    done = vrthinker(*given)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["asked"], found["kept"], found["account"]) == (2 * N_PAIRS, 2 * N_PAIRS, None)
    selection = read_traces(FileTraces(path=out / "traces.jsonl", pairs=out / "pairs.jsonl"))
    assert (len(selection.traces), selection.checked) == (2 * N_PAIRS, "form and labels")
    positions = {trace.outcome.judgments.OA for trace in selection.traces if trace.outcome.judgments}
    assert len(positions) > 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "--pairs: missing"),
        (["--pairs", "PAIRS"], "--model: missing"),
        (["--oracle", "WORLD"], "--like: missing"),
        (["--oracle", "WORLD", "--like", "nano", "--model", "x"], "--model: goes without --oracle"),
        (["--oracle", "WORLD", "--endpoint", "http://h"], "give one teacher"),
        (["--pairs", "PAIRS", "--model", "nano", "--like", "nano"], "--like: goes with --endpoint"),
        (["--pairs", "PAIRS", "--model", "nano", "--endpoint-extra", "{}"], "goes with --endpoint"),
        (["--pairs", "PAIRS", "--model", "m", "--endpoint", "http://h", "--endpoint-extra", "{"], "not JSON"),
        (["--pairs", "PAIRS", "--model", "m", "--endpoint", "http://h", "--endpoint-extra", "3"], "got int"),
        (
            ["--pairs", "PAIRS", "--model", "nano", "--price-input", "1"],
            "--price-input: goes with --endpoint",
        ),
        (
            ["--pairs", "PAIRS", "--model", "m", "--endpoint", "http://h", "--price-output", "inf"],
            "--price-output: got inf, allowed: at least 0, finite",
        ),
        (["--pairs", "PAIRS", "--model", "nano", "--samples", "0"], "--samples: got 0"),
        (
            ["--pairs", "PAIRS", "--model", "nano", "--samples", "2", "--temperature", "0"],
            "--samples: got 2 with temperature 0",
        ),
        (["--pairs", "BAD", "--model", "nano"], "labels.OA: got 3, allowed: 0 (tie)"),
        (["--pairs", "GONE", "--model", "nano"], "clips that are not there: "),
        (["--pairs", "EMPTY", "--model", "nano"], "got no pairs"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_one_line(
    given: list[str], words: str, world: Path, tmp_path: Path
) -> None:
    row = json.loads((world / PAIRS_FILE).read_text().splitlines()[0])
    (tmp_path / "bad.jsonl").write_text(json.dumps(row | {"labels": {"OA": 3}}))
    (tmp_path / "gone.jsonl").write_text(json.dumps(row))
    (tmp_path / "empty.jsonl").touch()
    places = {
        "PAIRS": world / PAIRS_FILE,
        "WORLD": world,
        **{name: tmp_path / f"{name.lower()}.jsonl" for name in ("BAD", "GONE", "EMPTY")},
    }
    done = vrthinker("train", "traces", "--out", tmp_path / "out", *[places.get(arg, arg) for arg in given])
    assert (done.code, done.out) == (2, "")
    assert words in done.line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [["--pairs", "PAIRS", "--model", "nano"], ["--oracle", "WORLD"]])
def test_the_pairs_that_are_judged_are_never_replaced(given: list[str], world: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(world, own)
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    places = {"PAIRS": own / PAIRS_FILE, "WORLD": own}
    like = ["--like", "nano"] if "--oracle" in given else []
    done = vrthinker("train", "traces", "--out", own, *[places.get(arg, arg) for arg in given], *like)
    assert (done.code, done.out) == (2, "")
    assert f"would replace {own / PAIRS_FILE}; choose another folder" in done.last_line
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before
    done = vrthinker("train", "traces", "--oracle", world, "--out", own, "--like", "nano")
    assert done.code == 2
    assert f"{own}: holds {PAIRS_FILE}, which was not written there" in done.last_line
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


def test_stored_replies_that_were_damaged_are_said_and_a_cut_line_is_written_anew(tmp_path: Path) -> None:
    path, keys = tmp_path / "replies.jsonl", [character * 64 for character in "abc"]
    kept = StoredReplies(path)
    for key in keys:
        kept.keep(key, Reply("text", FinishReason.STOP, prompt_tokens=3, completion_tokens=2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    again = StoredReplies(path)
    assert [again.find(key) is not None for key in keys] == [True, True, False]
    again.keep(keys[2], Reply("text", FinishReason.STOP, prompt_tokens=3, completion_tokens=2))
    assert path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    for number, damaged in (
        (2, [lines[0], lines[1][:-20] + b"\n", lines[2]]),
        (1, [lines[0].rstrip(), *lines[1:]]),
        (3, [*lines[:2], lines[2].replace(b'"prompt_tokens":3', b'"prompt_tokens":-3')]),
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(InputError, match=f"replies.jsonl: line {number} is no reply") as caught:
            StoredReplies(path)
        assert "\n" not in str(caught.value)
