"""Traces to other trainers and back: what is learned and visible, and that nothing is lost or made up."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import vrthinker
from clips import read_number
from exchange.conftest import ANSWER, CAPTIONS, SCRIPTS, Recorded, look
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vrthinker.episode.trajectory import FrameSegmentRecord, Trajectory, load_trajectories
from vrthinker.exchange.samples import hidden, revealed, samples_of

pq = pytest.importorskip("pyarrow.parquet")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def exported(recorded: Recorded, name: str, out: Path, *options: object) -> Path:
    done = vrthinker("data", "export-traces", name, recorded.path, "--out", out, *options)
    assert done.code == 0, done.err
    return out


# Out


def test_a_sample_of_a_round_shows_what_the_round_saw_and_learns_it_alone(recorded: Recorded) -> None:
    for trace in recorded.traces:
        samples = list(samples_of(trace, "round"))
        assert [sample.round_number for sample in samples] == [r.round_number for r in trace.rounds]
        for sample, record in zip(samples, trace.rounds, strict=True):
            assert sorted(frame.frame_number for frame in sample.frames) == sorted(
                shown.frame_number for shown in record.live
            )
            assert [turn.text for turn in sample.turns if turn.learned] == [hidden(record.text)]
            assert sample.turns[-1].learned
            assert [t.parts[0] for t in sample.turns if t.role == "assistant"] == [
                r.text for r in trace.rounds[: record.round_number]
            ]
        (whole,) = samples_of(trace, "episode")
        assert [turn.role == "assistant" for turn in whole.turns] == [turn.learned for turn in whole.turns]
        ever = {shown for record in trace.rounds for shown in record.live}
        assert len(whole.frames) == len(ever)


def test_sharegpt_keeps_the_rules_of_llama_factory(recorded: Recorded, tmp_path: Path) -> None:
    out = exported(recorded, "sharegpt", tmp_path, "--unfiltered")
    expired = any(record.expired for trace in recorded.traces for record in trace.rounds)
    rows = lines(out / "traces.jsonl")
    assert len(rows) == (sum(map(len, SCRIPTS)) if expired else len(SCRIPTS))
    for row in rows:
        roles = [turn["from"] for turn in row["conversations"]]
        assert roles[0] == "human"
        assert set(roles[::2]) <= {"human", "observation"}
        assert set(roles[1::2]) == {"gpt"}
        assert len(roles) % 2 == 0
        texts = row["system"] + "".join(turn["value"] for turn in row["conversations"])
        assert texts.count("<image>") == len(row["images"])
        assert "<video>" not in texts
        assert "<|im_end|>" not in texts
        assert json.loads(row["tools"])[0]["function"]["name"] == "select_frames"
        assert all((out / image).is_file() for image in row["images"])
        if len(roles) > 2:
            assert "<tool_response>" not in row["conversations"][2]["value"].replace("x</tool", "") or (
                roles[2] == "human"
            )
    info = json.loads((out / "dataset_info.json").read_text())["vrthinker_traces"]
    assert (info["file_name"], info["formatting"]) == ("traces.jsonl", "sharegpt")
    assert set(info["columns"].values()) <= set(rows[0])
    report = json.loads((out / "export.json").read_text())
    assert report["kind"] == ("round" if expired else "episode")
    assert ("mask_history: true" in report["notes"][0]) == expired


def test_the_pictures_are_the_frames_and_each_is_written_once(expiring: Recorded, tmp_path: Path) -> None:
    out = exported(expiring, "sharegpt", tmp_path, "--unfiltered")
    files = list((out / "images").iterdir())
    pixels = [np.asarray(Image.open(file)) for file in files]
    numbers = sorted(read_number(picture) for picture in pixels)
    shown = {s.frame_number for trace in expiring.traces for r in trace.rounds for s in r.live}
    assert numbers == sorted(n - 1 if n <= 12 else 100 + n - 13 for n in shown)
    last = lines(out / "traces.jsonl")[8]
    # The last of six rounds sees the eight first frames, and of all that it asked for, the last frame.
    last_numbers = [read_number(np.asarray(Image.open(out / name))) for name in last["images"]]
    assert last_numbers == [0, 3, 6, 9, 100, 103, 107, 110, 5]
    assert "Frame 20 (video 2" in "".join(turn["value"] for turn in last["conversations"])


def test_ms_swift_has_a_flag_for_each_round(expiring: Recorded, tmp_path: Path) -> None:
    out = exported(expiring, "ms-swift", tmp_path, "--unfiltered")
    for row in lines(out / "traces.jsonl"):
        flags = [message.get("loss") for message in row["messages"]]
        assert [message["role"] for message in row["messages"]][:2] == ["system", "user"]
        assert flags[:2] == [None, None]
        assert flags.count(True) == 1
        assert flags[-1] is True
        assert sum(message["content"].count("<image>") for message in row["messages"]) == len(row["images"])
        assert all(Path(image).is_absolute() and Path(image).is_file() for image in row["images"])
    whole = exported(expiring, "ms-swift", tmp_path / "whole", "--unfiltered", "--samples", "episode")
    assert [m["loss"] for m in lines(whole / "traces.jsonl")[2]["messages"] if m["role"] == "assistant"] == [
        True
    ] * 6
    assert "stay in the samples" in json.loads((whole / "export.json").read_text())["notes"][1]


def test_trl_gets_prompts_and_completions_with_places_of_pictures(expiring: Recorded, tmp_path: Path) -> None:
    out = exported(expiring, "trl", tmp_path, "--unfiltered")
    for row, text in zip(lines(out / "traces.jsonl"), [t for s in SCRIPTS for t in s], strict=True):
        (completion,) = row["completion"]
        assert completion == {"role": "assistant", "content": [{"type": "text", "text": text}]}
        parts = [part for message in row["prompt"] for part in message["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(row["images"])


def test_verl_gets_a_table(expiring: Recorded, tmp_path: Path) -> None:
    out = exported(expiring, "verl", tmp_path, "--unfiltered")
    rows = pq.read_table(out / "traces.parquet").to_pylist()
    assert len(rows) == sum(map(len, SCRIPTS))
    for row in rows:
        assert row["messages"][:-1] == row["prompt"]
        assert row["learned"] == [False] * len(row["prompt"]) + [True]
        assert sum(m["content"].count("<image>") for m in row["messages"]) == len(row["images"])
        assert Path(row["images"][0]["image"]).is_file()
        assert json.loads(row["reward_model"]["ground_truth"]) == {"TA": 1, "VQ": 0, "MQ": 2, "OA": 1}
    assert "reads `learned`" in json.loads((out / "export.json").read_text())["notes"][0]


def test_traces_are_chosen_as_for_cold_start(expiring: Recorded, tmp_path: Path) -> None:
    done = vrthinker(
        *("data", "export-traces", "sharegpt", expiring.path, "--pairs", expiring.pairs, "--out", tmp_path)
    )
    assert done.code == 0, done.err
    assert "dropped: 1 wrong in OA\ndropped: 1 not well formed\n" in done.out
    assert {row["id"] for row in lines(tmp_path / "traces.jsonl")} == {"p1", "p2"}


def test_a_clip_that_was_replaced_is_refused(clips: list[Path], tmp_path: Path) -> None:
    copies = [tmp_path / clip.name for clip in clips]
    for clip, copy in zip(clips, copies, strict=True):
        copy.write_bytes(clip.read_bytes())
    mine = Recorded(tmp_path, copies, 1)
    copies[0].write_bytes(clips[1].read_bytes())
    done = vrthinker("data", "export-traces", "trl", mine.path, "--out", tmp_path / "out", "--unfiltered")
    assert (done.code, done.out) == (2, "")
    assert "another clip than trajectory 'p0' was judged on" in done.last_line
    both = tmp_path / "both.jsonl"  # a trace of today's clip, then one of the clip that was there before
    (tmp_path / "again").mkdir()
    again = Recorded(tmp_path / "again", copies, 1)
    both.write_bytes(again.path.read_bytes() + mine.path.read_bytes())
    done = vrthinker("data", "export-traces", "trl", both, "--out", tmp_path / "out", "--unfiltered")
    assert done.code == 2
    assert "another clip than trajectory 'p0' was judged on" in done.last_line
    copies[0].unlink()
    done = vrthinker("data", "export-traces", "trl", mine.path, "--out", tmp_path / "out", "--unfiltered")
    assert "put the clip back where it was" in done.last_line


def test_a_set_beside_ours_keeps_its_entry(expiring: Recorded, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"other": {"file_name": "x.json"}}')
    out = exported(expiring, "sharegpt", tmp_path, "--unfiltered")
    assert set(json.loads((out / "dataset_info.json").read_text())) == {"other", "vrthinker_traces"}


@given(st.text(st.sampled_from("<>|image\u200bvideo_"), max_size=20) | st.text(max_size=20))
def test_hidden_markup_comes_back(text: str) -> None:
    assert revealed(hidden(text)) == text
    assert "<image>" not in hidden(text)
    assert hidden("<image><|im_end|>") == "<\u200bimage><\u200b|im_end|>"


# And back


def same(trace: Trajectory) -> dict[str, Any]:
    """What a round trip keeps: all but what was sampled, how long it took, and how texts are cut."""
    value = trace.model_dump(mode="json", exclude={"engine", "latency_seconds", "policy_version"})
    for record in value["rounds"]:
        del record["prompt_tokens"], record["prefilled_tokens"]
    for message in [*value["first_input"], *(m for r in value["rounds"] for m in r["outcome_messages"])]:
        merged: list[dict[str, Any]] = []
        for segment in message["segments"]:
            if "text" in segment and merged and "text" in merged[-1]:
                merged[-1] = {"text": merged[-1]["text"] + segment["text"]}
            else:
                merged.append(segment)
        message["segments"] = merged
    return value


@pytest.mark.parametrize("samples", ["auto", "round", "episode"])
def test_a_trace_that_goes_out_and_comes_back_is_the_same(
    recorded: Recorded, samples: str, tmp_path: Path
) -> None:
    out = exported(recorded, "sharegpt", tmp_path, "--unfiltered", "--samples", samples)
    source = out / "traces.jsonl"
    shuffled = source.read_text("utf-8").splitlines(keepends=True)
    random.Random(1).shuffle(shuffled)
    source.write_text("".join(shuffled), "utf-8")
    done = vrthinker(
        *(
            "data",
            "import-traces",
            "sharegpt",
            source,
            "--pairs",
            recorded.pairs,
            "--out",
            tmp_path / "b.jsonl",
        )
    )
    assert (done.code, done.out) == (0, f"{tmp_path / 'b.jsonl'}: 4 traces\n"), done.err
    back = {trace.id: trace for trace in load_trajectories(tmp_path / "b.jsonl")}
    for trace in recorded.traces:
        assert same(back[trace.id]) == same(trace)


def test_training_accepts_what_comes_back(expiring: Recorded, tmp_path: Path) -> None:
    from vrthinker.policy.record_checks import check_record  # it loads torch

    source = exported(expiring, "sharegpt", tmp_path, "--unfiltered") / "traces.jsonl"
    back = tmp_path / "b.jsonl"
    vrthinker("data", "import-traces", "sharegpt", source, "--pairs", expiring.pairs, "--out", back)
    traces = list(load_trajectories(back))
    assert len(traces) == 4
    for trace in traces:
        check_record(trace)


def foreign(*said: tuple[str, str], images: int, **more: Any) -> dict[str, Any]:
    turns = [{"from": speaker, "value": value} for speaker, value in said]
    return {"conversations": turns, "images": [f"{index}.png" for index in range(images)], **more}


TASK = "Caption: a boat\n" + "<image>" * 4
CALL = '<think>t</think>{"name": "select_frames", "arguments": {"target_frames": [2, 13]}}'


def test_a_trace_of_others_is_read_with_its_own_words(expiring: Recorded, tmp_path: Path) -> None:
    row = foreign(
        ("human", TASK),
        ("function_call", CALL),
        ("observation", "<image>, <image>"),
        ("gpt", ANSWER),
        images=6,
    )
    (tmp_path / "t.json").write_text(json.dumps([row]))
    done = vrthinker(
        *("data", "import-traces", "sharegpt", tmp_path / "t.json"),
        *("--pairs", expiring.pairs, "--out", tmp_path / "back.jsonl"),
    )
    assert done.code == 0, done.err
    (trace,) = load_trajectories(tmp_path / "back.jsonl")
    assert trace.id == "p0"
    assert trace.rounds[0].text.startswith("<think>t</think><tool_call>{")
    assert [shown.frame_number for shown in trace.rounds[1].live] == [1, 7, 13, 20, 2, 13]
    assert trace.settings.window is None
    first = trace.first_input[0].segments
    assert first[0].text == "Caption: a boat\n"  # type: ignore[union-attr]
    assert [s.frame_number for s in first if isinstance(s, FrameSegmentRecord)] == [1, 7, 13, 20]
    assert trace.outcome.judgments is not None
    assert trace.outcome.judgments.as_dict() == {"TA": 1, "VQ": 0, "MQ": 2, "OA": 1}


LOOK = ("gpt", look(2, 13))
END = ("gpt", ANSWER)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (foreign(("human", TASK), END, images=3), "images: got 3 pictures, allowed: 4"),
        (
            foreign(("gpt", ANSWER), ("human", TASK), images=4),
            "conversations[0]: got gpt, allowed: human first",
        ),
        (
            foreign(("human", TASK), ("human", "x"), images=4),
            "conversations[1]: got human, allowed: gpt or fun",
        ),
        (foreign(("human", TASK), END, ("human", "x"), images=4), "got 3 turns, allowed: as many answers as"),
        (foreign(("human", TASK), ("gpt", "<image>"), images=5), "since a round shows no frames"),
        (foreign(("human", TASK), ("robot", "x"), images=4), "conversations[1].from: got 'robot'"),
        (foreign(("human", TASK), ("function_call", "look"), images=4), "the JSON of a call"),
        (foreign(("human", TASK), ("gpt", "Video 1 is better"), images=4), "gives no verdict: round 1: "),
        (foreign(("observation", TASK), END, images=4), "got observation, allowed: human first"),
        (foreign(("human", TASK), LOOK, images=4), "its last round (1) asks for frames"),
        (
            foreign(("human", TASK), END, ("human", ""), END, images=4),
            "round 1 gives the final answer, but 2",
        ),
        (
            foreign(("human", TASK), LOOK, ("observation", "<image>"), END, images=5),
            "the outcome of round 1 has 1 pictures, but 2 frames are shown there (2, 13)",
        ),
        (
            foreign(
                ("human", TASK), LOOK, ("observation", "Frame 2: <image> Frame 14: <image>"), END, images=6
            ),
            "labels a picture as frame 14, but frame 13 is shown there",
        ),
        (
            foreign(("human", "<image><image>"), END, images=2),
            "the captions of 0 pairs in its task, wanted one",
        ),
        (foreign(("human", TASK), END, images=4, id="p1"), "its task has another caption than pair 'p1'"),
        (foreign(("human", "Caption: a boat <image>"), END, images=1), "its task shows 1 pictures"),
        (
            foreign(("human", TASK), END, images=4, vrthinker="{}"),
            "vrthinker: got schema_version: Field required",
        ),
        (
            {"conversations": [{"from": "human", "value": 3}] * 2},
            "conversations[0].value: got 3, allowed: a text",
        ),
        ({"conversations": {}}, "conversations: got {}, allowed: a list of 2 to 200 turns"),
    ],
)
def test_a_trace_that_cannot_be_a_trajectory_says_why(
    row: dict[str, Any], words: str, expiring: Recorded, tmp_path: Path
) -> None:
    good = foreign(("human", TASK), END, images=4)
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(good) + "\n")
    command = ("data", "import-traces", "sharegpt", tmp_path / "t.jsonl", "--pairs", expiring.pairs)
    done = vrthinker(*command, "--out", tmp_path / "back.jsonl")
    assert (done.code, done.out) == (2, "")
    assert f"{tmp_path / 't.jsonl'}: line 1" in done.line
    assert words in done.line
    assert not (tmp_path / "back.jsonl").exists()
    done = vrthinker(*command, "--out", tmp_path / "back.jsonl", "--skip-bad")
    assert (done.code, done.out) == (0, f"{tmp_path / 'back.jsonl'}: 1 trace, 1 left out\n")


def test_rounds_that_are_missing_or_changed_are_noticed(expiring: Recorded, tmp_path: Path) -> None:
    out = exported(expiring, "sharegpt", tmp_path, "--unfiltered")
    rows = lines(out / "traces.jsonl")
    rows[8]["conversations"][1]["value"] = rows[8]["conversations"][1]["value"].replace("hm", "changed")
    del rows[1]
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = vrthinker(
        *("data", "import-traces", "sharegpt", tmp_path / "cut.jsonl", "--pairs", expiring.pairs),
        *("--out", tmp_path / "back.jsonl"),
    )
    assert done.code == 2
    assert "2 traces cannot be trajectories" in done.line
    assert "got rounds 2 of trace 'p1', wanted a sample for each of 1 to 2" in done.line
    assert "tells the rounds before it otherwise than the trace's last sample" in done.line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["export-traces", "axolotl", "SRC", "--out", "NEW"],
            "got 'axolotl', allowed: sharegpt, ms-swift, trl",
        ),
        (["export-traces", "trl", "gone", "--out", "NEW"], "gone: cannot be read"),
        (["export-traces", "trl", "SRC", "--out", "SRC"], "got a file, allowed: a folder"),
        (["export-traces", "trl", "PAIRS", "--out", "NEW"], "pairs.jsonl:1: "),
        (
            ["export-traces", "trl", "SRC", "--out", "NEW", "--unfiltered", "--pairs", "PAIRS"],
            "--unfiltered: goes",
        ),
        (["import-traces", "trl", "SRC", "--pairs", "PAIRS", "--out", "NEW"], "got 'trl', allowed: sharegpt"),
        (["import-traces", "sharegpt", "SRC", "--pairs", "PAIRS", "--out", "SRC"], "is there already"),
        (
            ["import-traces", "sharegpt", "SRC", "--pairs", "PAIRS", "--out", "NEW", "--window", "x"],
            "--window: got",
        ),
        (
            ["import-traces", "sharegpt", "SRC", "--pairs", "PAIRS", "--out", "NEW", "--model", "x"],
            "--model: x: has no",
        ),
        (
            ["import-traces", "sharegpt", "SRC", "--pairs", "PAIRS", "--out", "NEW"],
            "conversations: got nothing",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], words: str, expiring: Recorded, tmp_path: Path
) -> None:
    places = {"SRC": expiring.path, "PAIRS": expiring.pairs, "NEW": tmp_path / "new"}
    done = vrthinker("data", *[places.get(argument, argument) for argument in arguments])
    assert (done.code, done.out) == (2, "")
    assert words in done.line
    assert not (tmp_path / "new").exists()


STRANGE = [None, True, 3, 1e300, "", "\ud800", "<image>", [], {}, [[]], [{"from": "human"}], "x" * 50_000]


def test_whatever_stands_in_a_sample_ends_in_one_line(expiring: Recorded, tmp_path: Path) -> None:
    out = exported(expiring, "sharegpt", tmp_path, "--unfiltered")
    good = lines(out / "traces.jsonl")[-1]
    record = json.loads(good["vrthinker"])
    tried = [{**good, field: value} for field in good for value in STRANGE]
    for field in record:
        tried += [{**good, "vrthinker": json.dumps({**record, field: value})} for value in STRANGE]
    for part in ("from", "value"):
        for place in range(3):
            for value in STRANGE:
                turns = [dict(turn) for turn in good["conversations"]]
                turns[place][part] = value
                tried.append({**good, "conversations": turns})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tried))
    done = vrthinker(
        *("data", "import-traces", "sharegpt", tmp_path / "t.jsonl", "--pairs", expiring.pairs),
        *("--out", tmp_path / "back.jsonl"),
    )
    assert (done.code, done.out) == (2, "")
    assert "cannot be trajectories" in done.line


@pytest.mark.multi_process
def test_no_command_loads_torch(expiring: Recorded, tmp_path: Path) -> None:
    out = exported(expiring, "sharegpt", tmp_path, "--unfiltered")
    code = """
import sys
from vrthinker.cli import main
for arguments in {commands!r}:
    try:
        main(arguments)
    except SystemExit as left:
        assert left.code == 0, arguments
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    commands = [
        ["export-traces", "trl", expiring.path, "--pairs", expiring.pairs, "--out", tmp_path / "trl"],
        [
            "import-traces",
            "sharegpt",
            out / "traces.jsonl",
            "--pairs",
            expiring.pairs,
            "--out",
            tmp_path / "b.jsonl",
        ],
        ["export", "videoalign", expiring.pairs, "--out", tmp_path / "p.csv"],
        ["import", "videoalign", tmp_path / "p.csv", "--out", tmp_path / "imported"],
        ["split", expiring.pairs, "--out", tmp_path / "split", "--parts", "all=1"],
    ]
    spelled = [["data", *map(str, command)] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", code.format(commands=spelled)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert CAPTIONS[0] == "a boat"
