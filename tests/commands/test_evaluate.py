"""`vrthinker eval pairs`: a judge against people's labels, from a file to a table."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import heavy  # noqa: F401
import pytest
from cli_run import vrthinker
from loopback import serving

from vrthinker.records.verdicts import read_verdicts
from vrthinker.video import open as open_module
from vrthinker.video.pyav.reader import PyAVReader


@pytest.fixture
def pairs(clips: Path, tmp_path: Path) -> Path:
    """Three labelled pairs, one of them with a clip that is not there, and one without labels."""
    rows = [
        {"id": "all", "labels": {"TA": 1, "VQ": 1, "MQ": 0, "OA": 1}},
        {"id": "some", "labels": {"TA": 2, "OA": None}},
        {"id": "gone", "labels": {"OA": 2}, "video_2": "gone.mp4"},
        {"id": "none"},
    ]
    usual = {"prompt": "a dog runs", "video_1": str(clips / "a.mp4"), "video_2": str(clips / "b.mp4")}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({**usual, **row}) + "\n" for row in rows))
    return path


def test_from_a_file_to_a_table(tiny: Path, pairs: Path, clips: Path, tmp_path: Path) -> None:
    out, row = tmp_path / "run", tmp_path / "rows.jsonl"
    evaluate = ("eval", "pairs", "--pairs", pairs, "--model", tiny, "--out", out)
    done = vrthinker(*evaluate, "--row", row)
    assert done.code == 1, "a clip that is not there is an error"
    assert "loading" in done.err
    for words in (
        "hf:tiny on 3 items of pairs.jsonl",
        "without a verdict: 1 of 3 (33%): 1 failed; they count as wrong",
        "OA: out of 2: 0 ties, 1 video 1, 1 video 2; 1 of them without a verdict, counted as wrong; 1 item "
        "without this label left out",
        "left out: 1 pairs without any label",
        "beside oa/tau: always video 1 0.500, always video 2 0.500, always tie 0.000, commonest 0.500",
        "gone: video_error: ",
    ):
        assert words in done.out, words
    assert {path.name for path in out.iterdir()} >= {
        *("eval.json", "items.jsonl", "verdicts.jsonl", "trajectories.jsonl")
    }
    assert {record.id for record in read_verdicts(out / "verdicts.jsonl")} == {"all", "some", "gone"}
    written = json.loads((out / "eval.json").read_text())
    assert written["judged"]["all"]["oa/tau"]["n"] == 2
    assert written["settings"]["episode"]["temperature"] == 0.0
    assert {"provenance", "pairs_file", "labels"} <= set(written)
    assert written["summary"]["statuses"] == {"judged": 2, "unparsed": 0, "failed": 1, "missing": 0}
    (line,) = row.read_text().splitlines()
    assert json.loads(line)["judged"] == written["judged"]

    again = vrthinker(*evaluate, "--json")
    assert "nothing to judge: 3 of 3 pairs recorded already" in again.err
    assert "loading" not in again.err, "no model is loaded for nothing"
    assert json.loads(again.out)["judged"] == written["judged"]
    shown = vrthinker("eval", "show", out)
    assert (shown.code, shown.out) == (0, done.out)
    assert json.loads(vrthinker("eval", "show", out, "--json").out)["judged"] == written["judged"]
    other = vrthinker(*evaluate, "--limit", 2)
    assert other.code == 2
    assert "judged_pairs=3" in other.last_line

    (pairs.parent / "gone.mp4").write_bytes((clips / "b.mp4").read_bytes())
    retried = vrthinker(*evaluate, "--retry-failed")
    assert retried.code == 0, retried.err
    assert "2 of 3 pairs recorded already" in retried.err
    assert json.loads((out / "eval.json").read_text())["failures"] == []


class _Answers(BaseHTTPRequestHandler):
    """A server of an OpenAI-compatible API that always prefers video 2."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        text = (
            "<snapshot>two clips</snapshot><think>the second one</think>"
            "<answer>TA=2, VQ=2, MQ=2, OA=2, CF=1</answer>"
        )
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        content = json.dumps({"choices": [choice], "usage": {}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_over_an_endpoint(pairs: Path, tmp_path: Path) -> None:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), _Answers)) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        done = vrthinker(
            *(
                "eval",
                "pairs",
                "--pairs",
                pairs,
                "--model",
                "m",
                "--endpoint",
                url,
                "--out",
                tmp_path / "run",
            ),
            "--json",
        )
    assert done.code == 1, done.err
    judged = json.loads(done.out)["judged"]["all"]
    assert (judged["ta/accuracy"]["value"], judged["ta/accuracy"]["n"]) == (0.5, 2)
    assert (judged["oa/tau"]["value"], judged["oa/tau"]["n"]) == (0.0, 2), "the pair that failed is wrong"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--limit", "0"], "--limit: got 0"),
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--device", "gpu"], "--device: got 'gpu'"),
        (["--out", "FILE"], "got a file, allowed: a folder"),
        (["--row", "FOLDER"], "--row: "),
        (["--pairs", "FILE"], "got no pairs"),
        (["--pairs", "UNLABELLED"], "got none with a label"),
        (["--model", "FOLDER"], "config.json"),
        (["--temperature", "-1"], "temperature"),
        (["--votes", "0"], "--votes: got 0"),
        (["--model", "baseline:nobody"], "got 'baseline:nobody', allowed: a model, or baseline:always-1"),
        (["--endpoint", "nowhere"], "got no scheme"),
    ],
)
def test_refused_with_one_line(given: list[str], words: str, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    file, unlabelled = tmp_path / "file", tmp_path / "unlabelled.jsonl"
    file.touch()
    unlabelled.write_text(pairs.read_text().splitlines()[-1] + "\n")
    places = {"FOLDER": tmp_path, "FILE": file, "UNLABELLED": unlabelled}
    options = {"--model": tiny, "--pairs": pairs, "--out": tmp_path / "eval"}
    options |= {given[0]: places.get(given[1], given[1])}
    done = vrthinker("eval", "pairs", *[word for option in options.items() for word in option])
    assert (done.code, done.out) == (2, "")
    assert words in done.line
    assert not (tmp_path / "eval").exists()


def test_the_reader_that_was_named_reads_the_clips(
    tiny: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Named(PyAVReader):
        name = "mine"

    original = open_module.open_reader
    monkeypatch.setattr(
        open_module, "open_reader", lambda name="auto": Named() if name == "pyav" else original(name)
    )
    run = tmp_path / "run"
    evaluate = ("eval", "pairs", "--pairs", pairs, "--model", tiny, "--out", run, "--rounds", 1)
    done = vrthinker(*evaluate, "--reader", "pyav")
    assert done.code == 1, "a clip that is not there is an error"
    readers = {record.id: record.readers for record in read_verdicts(run / "verdicts.jsonl")}
    assert readers["all"] == ["mine", "mine"]


def test_showing_an_evaluation_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "verdicts.jsonl").touch()
    assert "eval.json: not there yet" in vrthinker("eval", "show", tmp_path).line
    for broken in ("[]", "{}", "[" * 100_000):
        (tmp_path / "eval.json").write_text(broken)
        shown = vrthinker("eval", "show", tmp_path)
        assert (shown.code, shown.out) == (2, "")


def test_both_orders_are_judged_once_and_a_pair_counts_once(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    """The run is stopped half-way: one order of one pair is recorded, and the other three are judged."""
    out = tmp_path / "run"
    evaluate = (
        "eval",
        "pairs",
        "--pairs",
        pairs,
        "--model",
        tiny,
        "--out",
        out,
        "--both-orders",
        "--subsets",
    )
    first = vrthinker(*evaluate)
    assert first.code == 1, "a clip of one pair is not there"
    log = out / "verdicts.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    ids = ["all", "all#2,1", "some", "some#2,1", "gone", "gone#2,1"]
    assert sorted(record.id for record in read_verdicts(log)) == sorted(ids)
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert [item["id"] for item in items] == ["all", "some", "gone"]
    assert items[0]["cost"]["episodes"] == 2
    assert items[0]["frames"] == [24, 30]
    assert (items[2]["status"], items[2]["orders"]) == ("failed", [None, None])
    summary = json.loads((out / "eval.json").read_text())["summary"]
    assert summary["orders"]["items"] == summary["items"] == 3
    assert "protocol: both_orders True" in first.out

    whole = (out / "items.jsonl").read_bytes()
    log.write_bytes(b"".join(line for line in lines if b'"id":"all#2,1"' not in line))
    (out / "items.jsonl").unlink()
    again = vrthinker(*evaluate)
    assert "5 of 6 pairs recorded already" in again.err
    judged = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    for before, after in zip(map(json.loads, whole.decode().splitlines()), judged, strict=True):
        for item in (before, after):
            item["cost"].pop("latency_seconds")
        assert before == after, "the same bytes apart from times"
    other = vrthinker(*evaluate[:-2])
    assert other.code == 2
    assert "protocol" in other.last_line


def test_answers_of_first_rounds_and_other_frames(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    evaluate = ("eval", "pairs", "--pairs", pairs, "--model", tiny, "--out", out)
    vrthinker(*evaluate)
    own = json.loads((out / "eval.json").read_text())
    first = vrthinker(*evaluate, "--retrieval", "none", "--json")
    assert "nothing to judge" in first.err, "the first rounds are those of the same episodes"
    shown = json.loads(first.out)
    assert shown["protocol"] == {"retrieval": "none"}
    cost = shown["summary"]["cost"]
    assert cost["rounds"]["mean"] <= own["summary"]["cost"]["rounds"]["mean"]
    assert "tool_calls" not in cost, "no call was needed"
    refused = vrthinker(*evaluate, "--retrieval", "random")
    assert refused.code == 2
    assert "protocol" in refused.last_line
    random = vrthinker(*evaluate[:-1], tmp_path / "random", "--retrieval", "random", "--limit", 2)
    assert random.code in (0, 1), random.err
    recorded = read_verdicts(tmp_path / "random" / "verdicts.jsonl")
    assert len(recorded) == 2


@pytest.mark.slow
def test_controls_of_a_model_go_on_where_they_were_stopped(tiny: Path, clips: Path, tmp_path: Path) -> None:
    rows = [
        {
            "id": f"p{n}",
            "prompt": f"caption {n}",
            "video_1": str(clips / "a.mp4"),
            "video_2": str(clips / "b.mp4"),
            "labels": {"TA": 1, "VQ": 1, "MQ": 0, "OA": 1},
        }
        for n in range(2)
    ]
    data, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = ("eval", "controls", "--model", tiny, "--data", data, "--out", out)
    done = vrthinker(*ask)
    assert done.code == 0, done.err
    log = out / "verdicts.jsonl"
    asked = read_verdicts(log)
    assert {record.stop_reason for record in asked} <= {"answered", "round_limit", "token_limit"}
    noted = [record for record in asked if record.id == "p0#blur, strength 3"]
    assert any("is shown blurred" in note for note in noted[0].notes)
    written = json.loads((out / "controls.json").read_text())
    assert {row["passed"] for row in written["rows"]} == {"undecided"}, "two pairs decide nothing"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-5]))
    again = vrthinker(*ask, "--json")
    assert f"{len(asked) - 5} of {len(asked)} pairs recorded already" in again.err
    assert json.loads(again.out)["rows"] == written["rows"]
