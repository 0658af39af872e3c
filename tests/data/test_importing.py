"""Imports of published layouts: their traps, what is dropped and said, and files that are something else."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from published import (
    SHARED,
    feedback_row,
    genai_row,
    mj_row,
    rapidata_row,
    unified_row,
    videoalign_row,
    write_csv,
    write_json,
)

from vrthinker.data.datasets.draft import ImportOptions, majority
from vrthinker.data.datasets.rows import RowDropped
from vrthinker.data.datasets.unifiedreward import label_of
from vrthinker.data.importing import FORMATS, Imported, import_pairs
from vrthinker.data.pairs import Pair, load_pairs
from vrthinker.errors import InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def imported(name: str, source: Path, **options: Any) -> tuple[list[Pair], Imported]:
    """The pairs as a pairs file gives them, and the import."""
    out = source.parent / "out"
    out.mkdir(exist_ok=True)
    done = import_pairs(FORMATS[name], source, out, **options)
    (out / "pairs.jsonl").write_bytes(done.lines)
    return load_pairs(out / "pairs.jsonl"), done


def refusal(name: str, source: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        imported(name, source, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(str(source))
    assert len(message) < 3000
    return message.removeprefix(f"{source}: ")


# VideoAlign and VideoGen-RewardBench


def test_videoalign_spells_paths_counts_and_labels_as_it_does(tmp_path: Path) -> None:
    rows = [
        videoalign_row(),
        videoalign_row(
            path_A="./videos/a.mp4", path_B="videos/c.mp4", VQ="1.0", MQ="SAME", TA="b", prompt="x\n"
        ),
        videoalign_row(path_B="videos/d.mp4", TA="", prompt="nan"),
    ]
    pairs, done = imported("videoalign", write_csv(tmp_path / "pairs.csv", rows))
    assert [pair.labels for pair in pairs] == [
        {"TA": 2, "VQ": 1, "MQ": 0, "OA": 0},
        {"TA": 2, "VQ": 1, "MQ": 0, "OA": 0},
        {"VQ": 1, "MQ": 0},
    ]
    assert pairs[0].video_1 == pairs[1].video_1 == tmp_path / "videos" / "a.mp4"
    assert [pair.prompt for pair in pairs] == ["a boat on a lake", "x", ""]
    assert {pair.dataset for pair in pairs} == {"videogen-reward"}
    overall = done.report["dimensions"]["OA"]
    assert (overall["labels"], overall["derived"]) == (2, 2)
    assert "sign of the sum" in overall["source"]
    assert done.report["notes"]["empty captions"] == 1
    assert done.report["frames_of_a_clip"] == {"least": 126, "most": 152}
    assert done.report["videos"] == {"files": 4, "missing": 4, "absolute_paths": 0}


@pytest.mark.parametrize(
    ("labels", "overall"),
    [((1, 1, 2), 1), ((0, 0, 1), 1), ((1, 2, 0), 0), ((0, 0, 0), 0), ((2, 2, 1), 2), ((1, 1, None), None)],
)
def test_the_overall_label_is_the_sign_of_the_majority(
    labels: tuple[int | None, ...], overall: int | None
) -> None:
    named = dict(zip(("TA", "VQ", "MQ"), labels, strict=True))
    assert majority({code: label for code, label in named.items() if label is not None}) == overall


def test_videogen_rewardbench_has_its_own_overall_label(tmp_path: Path) -> None:
    rows = [videoalign_row(A_model="m", B_model="n", Overall="A"), videoalign_row(path_A="z.mp4", Overall="")]
    pairs, done = imported("videogen-rewardbench", write_csv(tmp_path / "bench.csv", rows[:1]))
    assert pairs[0].labels == {"TA": 2, "VQ": 1, "MQ": 0, "OA": 1}
    assert done.report["dimensions"]["OA"]["derived"] == 0
    pairs, _ = imported("videogen-rewardbench", write_csv(tmp_path / "empty.csv", rows[1:]))
    assert pairs[0].labels == {"TA": 2, "VQ": 1, "MQ": 0}


def test_paths_below_the_folder_are_relative_and_others_absolute(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "out" / "here").mkdir(parents=True)
    (tmp_path / "clips" / "b.mp4").touch()
    rows = [videoalign_row(path_A=str(tmp_path / "out" / "here" / "a.mp4"), path_B="b.mp4")]
    _, done = imported("videoalign", write_csv(tmp_path / "p.csv", rows), videos=tmp_path / "clips")
    line = json.loads(done.lines)
    assert line["video_1"] == "here/a.mp4"
    assert line["video_2"] == str(tmp_path / "clips" / "b.mp4")
    assert done.report["videos"] == {"files": 2, "missing": 1, "absolute_paths": 1}


def test_ids_and_rows_that_come_again(tmp_path: Path) -> None:
    same = genai_row(id=1.0)
    rows = [
        genai_row(id=1),
        same,
        genai_row(id=1, vote_type="tievote"),
        genai_row(id=None),
        genai_row(id="nan"),
    ]
    pairs, done = imported("genai-bench", write_json(tmp_path / "g.json", rows))
    assert [pair.id for pair in pairs] == ["1", "1~2", "genai-bench-000004", "nan"]
    assert done.report["dropped"] == {"the same row again": 1}
    assert done.report["dropped_rows"] == [[2, "the same row again"]]
    assert done.report["notes"]["ids that were there before, made distinct"] == 1
    assert done.report["notes"]["ids made from row numbers"] == 1


def test_missing_files_are_counted_and_dropped_only_if_asked(tmp_path: Path) -> None:
    for name in ("left.mp4", "right.mp4"):
        (tmp_path / name).touch()
    source = write_json(tmp_path / "g.json", [genai_row(), genai_row(id=8, video_left="gone.mp4")])
    pairs, done = imported("genai-bench", source)
    assert (len(pairs), done.report["videos"]["missing"]) == (2, 1)
    pairs, done = imported("genai-bench", source, check_videos=True)
    assert [pair.id for pair in pairs] == ["7"]
    assert list(done.report["dropped"].items()) == [("a video file is missing (--check-videos)", 1)]


def test_swapping_turns_clips_and_labels_and_depends_on_the_seed(tmp_path: Path) -> None:
    rows = [
        {"video1": 2 * index, "video2": 2 * index + 1, "frame_caption": f"c{index}"} for index in range(40)
    ]
    source = write_json(tmp_path / "pair.json", rows)
    plain, _ = imported("videodpo", source)
    assert {pair.labels["OA"] for pair in plain if pair.labels} == {1}
    swapped, done = imported("videodpo", source, swap_seed=3)
    for before, after in zip(plain, swapped, strict=True):
        turned = after.video_1 == before.video_2
        assert after.labels == {"OA": 2 if turned else 1}
        assert {after.video_1, after.video_2} == {before.video_1, before.video_2}
    turned = sum(pair.labels == {"OA": 2} for pair in swapped)
    assert done.report["notes"]["swapped"] == turned
    assert 8 < turned < 32
    assert imported("videodpo", source, swap_seed=3)[0] == swapped
    assert imported("videodpo", source, swap_seed=4)[0] != swapped


# GenAI-Bench, MJ-Bench-Video, Rapidata, VideoDPO


def test_ties_of_two_kinds_are_not_one_row(tmp_path: Path) -> None:
    rows = [genai_row(id=None, vote_type=word) for word in ("A=B=Good", "A=B=Bad", "A=B=Bad")]
    pairs, done = imported("genai-bench", write_json(tmp_path / "g.json", rows))
    assert len(pairs) == 2
    assert done.report["tie_kinds"] == {"both equally good": 1, "both bad": 1}
    assert done.report["dropped_rows"] == [[3, "the same row again"]]


def test_a_path_that_is_no_text_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "caf\udce9"
    place.mkdir()
    source = write_json(place / "g.json", [genai_row()])
    with pytest.raises(InputError, match="bytes that are no UTF-8") as caught:
        import_pairs(FORMATS["genai-bench"], source, tmp_path / "out")
    assert str(caught.value).isprintable()
    done = import_pairs(FORMATS["genai-bench"], source, place)
    assert json.loads(done.lines)["video_1"] == genai_row()["video_left"]


def test_both_layouts_of_genai_bench_and_both_kinds_of_ties(tmp_path: Path) -> None:
    words = ["leftvote", "rightvote", "tievote", "bothbad_vote"]
    pairs, done = imported(
        "genai-bench",
        write_json(tmp_path / "g.json", [genai_row(id=i, vote_type=word) for i, word in enumerate(words)]),
    )
    assert [pair.labels for pair in pairs] == [{"OA": 1}, {"OA": 2}, {"OA": 0}, {"OA": 0}]
    assert pairs[0].prompt == "一只猫在弹钢琴"
    assert done.report["tie_kinds"] == {"both equally good": 1, "both bad": 1}
    assert done.report["tie_ids"]["both bad"] == ["3"]
    hub = [
        {"prompt": "p", "left_video": f"l{i}.mp4", "right_video": "r.mp4", "vote_type": word}
        for i, word in enumerate(["A>B", "B>A", "A=B=Good", "A=B=Bad"])
    ]
    pq.write_table(pa.Table.from_pylist(hub), tmp_path / "hub.parquet")
    pairs, hub_done = imported("genai-bench", tmp_path / "hub.parquet")
    assert [pair.labels for pair in pairs] == [{"OA": 1}, {"OA": 2}, {"OA": 0}, {"OA": 0}]
    assert hub_done.report["tie_kinds"] == done.report["tie_kinds"]


def test_mj_bench_video_reads_odd_words_and_never_its_scores(tmp_path: Path) -> None:
    hard = dict(mj_row()["category_preference"], Alignment="Hard to judge")
    rows = [
        mj_row(),
        mj_row(overall_preference="Hard to judge", video_0_path="2_0.mp4", category_preference=hard),
        mj_row(discard=True, video_0_path="3_0.mp4"),
        mj_row(video_0_total_score=0, video_0_path="4_0.mp4", caption=" " + "é" * 1817),
    ]
    pairs, done = imported("mj-bench-video", write_json(tmp_path / "mj.json", rows))
    assert [pair.labels for pair in pairs] == [
        {"TA": 0, "VQ": 1, "MQ": 2, "OA": 1},
        {"VQ": 1, "MQ": 2},
        {"TA": 0, "VQ": 1, "MQ": 2, "OA": 1},
    ]
    row = mj_row()
    assert str(pairs[0].video_1).endswith(row["video_0_path"]), "their first video is number 0"
    assert str(pairs[0].video_2).endswith(row["video_1_path"])
    assert pairs[0].prompt == 'a "quoted"\ncaption'
    assert done.report["dropped"] == {"its annotators discarded it": 1}
    assert done.report["notes"]["overall preferences that the total scores contradict"] == 1
    assert sum("hard to judge" in note for note in done.report["notes"]) == 1


def test_rapidata_has_ties_by_margin_and_asks_about_pictures(tmp_path: Path) -> None:
    plain = [rapidata_row(), rapidata_row(file_name1="three.mp4", weighted_results1_Alignment=None)]
    plain[1]["weighted_results2_Alignment"] = None
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "t2v.parquet")
    pairs, done = imported("rapidata", tmp_path / "t2v.parquet")
    assert [pair.labels for pair in pairs] == [{"TA": 2, "VQ": 1, "MQ": 0, "OA": 0}, {"VQ": 1, "MQ": 0}]
    assert done.report["options"]["margin"] == 0.1
    assert "no more than 0.1" in done.report["dimensions"]["MQ"]["source"]
    strict, _ = imported("rapidata", tmp_path / "t2v.parquet", options=ImportOptions(margin=0))
    assert strict[0].labels == {"TA": 2, "VQ": 1, "MQ": 1, "OA": 1}

    asset = {"bytes": b"\x89PNG", "path": "x.png"}
    pq.write_table(pa.Table.from_pylist([rapidata_row(prompt_asset=asset)]), tmp_path / "i2v.parquet")
    assert "a picture beside the caption" in refusal("rapidata", tmp_path / "i2v.parquet")
    pairs, _ = imported("rapidata", tmp_path / "i2v.parquet", options=ImportOptions(ignore_assets=True))
    assert pairs[0].labels == {"VQ": 1, "MQ": 0}


@pytest.mark.parametrize(("first", "second"), [(0.55, 0.45), (0.45, 0.55), (0.6, 0.5), (0.3, 0.2)])
def test_shares_that_differ_by_the_margin_are_a_tie_whatever_is_rounded(
    first: float, second: float, tmp_path: Path
) -> None:
    row = rapidata_row(weighted_results1_Preference=first, weighted_results2_Preference=second)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "r.parquet")
    ((pair,), _) = imported("rapidata", tmp_path / "r.parquet")
    assert pair.labels is not None
    assert pair.labels["VQ"] == 0


def test_videodpo_reads_indices(tmp_path: Path) -> None:
    rows = [
        {"video1": 10, "video2": 13, "frame_caption": "a boat"},
        {"video1": "7.0", "video2": 4.0, "frame_caption": "a boat"},
        {"video1": 2, "video2": 4, "frame_caption": "a boat"},
    ]
    pairs, done = imported("videodpo", write_json(tmp_path / "pair.json", rows))
    assert [(pair.video_1.parent.name, pair.video_1.name) for pair in pairs] == [
        ("winvideos", "000005.mp4"),
        ("losevideos", "000003.mp4"),
    ]
    assert [pair.labels for pair in pairs] == [{"OA": 1}, {"OA": 2}]
    assert done.report["dimensions"]["OA"]["derived"] == 2
    assert list(done.report["dropped"].values()) == [1]


# VideoFeedback and UnifiedReward


def make_frames(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_videofeedback_makes_pairs_of_one_prompt_by_score(tmp_path: Path) -> None:
    rows = [feedback_row("a", 1), feedback_row("b", 3), feedback_row("c", 3, **{"text prompt": "another"})]
    make_frames(tmp_path, rows[0]["images"] + rows[1]["images"])
    source = write_json(tmp_path / "vf.json", rows)
    pairs, done = imported("videofeedback", source)
    assert [(pair.id, pair.labels) for pair in pairs] == [("a-vs-b", {"TA": 2, "VQ": 2, "MQ": 0, "OA": 2})]
    assert all(part["derived"] == part["labels"] for part in done.report["dimensions"].values())
    assert done.report["dropped"] == {"the only clip of its prompt": 1}
    # The frames of several clips share a folder, so each clip gets a folder of links.
    first, second = done.folders
    assert [name for name, _ in first.links] == ["000000.jpg", "000001.jpg", "000002.jpg"]
    assert [file for _, file in second.links] == [tmp_path / name for name in rows[1]["images"]]
    assert (pairs[0].video_1, pairs[0].video_2) == (first.path, second.path)
    tied, _ = imported("videofeedback", source, options=ImportOptions(margin=2))
    assert tied[0].labels == {"TA": 0, "VQ": 0, "MQ": 0, "OA": 0}


def test_a_folder_of_one_clips_frames_is_the_clip_and_missing_frames_make_none(tmp_path: Path) -> None:
    own = [f"own/{index}.jpg" for index in range(2)]
    rows = [feedback_row("a", 1, images=own), feedback_row("b", 3)]
    make_frames(tmp_path, own + rows[1]["images"][:2])
    pairs, done = imported("videofeedback", write_json(tmp_path / "vf.json", rows))
    assert pairs[0].video_1 == tmp_path / "own"
    assert done.folders == ()
    assert done.report["videos"]["missing"] == 1


def test_the_number_of_pairs_of_a_prompt_is_bounded(tmp_path: Path) -> None:
    rows = [feedback_row(f"c{index}", index) for index in range(300)]
    _, done = imported(
        "videofeedback", write_json(tmp_path / "vf.json", rows), options=ImportOptions(None, 7)
    )
    assert done.report["pairs"] == 7
    assert done.report["notes"]["possible pairs left out by --pairs-per-prompt"] == 300 * 299 // 2 - 7


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Video 1 is better.", 1),
        (" video 2 is  the better one ", 2),
        ("Video 2 is better than Video 1", 2),
        ("Both videos are equally good.", 0),
        ("<think>Video 1 is better, or not.</think><answer>Video 2 is better</answer>", 2),
    ],
)
def test_a_plain_sentence_is_a_label(answer: str, label: int) -> None:
    assert label_of(answer) == label


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I first thought that Video 1 is better, but no.",
        "Video 1 is better. Video 2 is better.",
        "Video 1 is better than Video 1",
        "Video 3 is better",
        "<answer>Video 1 is better</answer><answer>Video 2 is better</answer>",
        "<answer>Video 1 is better",
        "Image 1 is better",
        "<answer" * 100_000,
        "<" + " " * 500_000,
    ],
)
def test_any_other_answer_is_dropped_with_a_reason(answer: str) -> None:
    with pytest.raises(RowDropped):
        label_of(answer)


def test_both_layouts_of_unifiedreward(tmp_path: Path) -> None:
    question = unified_row()["conversations"][0]["value"]
    rows = [
        unified_row(),
        {"problem": question, "solution": "Video 1 is better", "images": ["a.mp4", "b.mp4"]},
        unified_row("Well, video 1, I think"),
        unified_row(images=["a.png", "b.png"]),
    ]
    pairs, done = imported("unifiedreward", write_json(tmp_path / "u.json", rows))
    assert [pair.labels for pair in pairs] == [{"OA": 2}, {"OA": 1}]
    assert pairs[0].prompt == "a boat [red]\nat sea"
    assert set(done.report["dropped"]) == {
        "the answer is not one plain sentence about which video is better",
        "two single pictures, no clips",
    }
    assert "conversations[0].from: got 'user'" in refusal(
        "unifiedreward",
        write_json(tmp_path / "v.json", [{"conversations": [{"from": "user", "value": "x"}], "images": []}]),
    )


# Files that are not what they say


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vote_type": "left"}, "item 1, vote_type: got 'left', allowed: leftvote, rightvote"),
        ({"vote_type": 7}, "item 1, vote_type: got 7"),
        (
            {"video_left": "https://example.org/a.mp4"},
            "item 1, video_left: got the URL 'https://example.org/a",
        ),
        ({"video_left": "s3://bucket/a.mp4"}, "got the URL"),
        ({"video_left": None}, "item 1, video_left: got None, allowed: the path of a file"),
        ({"video_left": "  "}, "item 1, video_left: got '  '"),
        ({"video_left": "a\0b"}, "item 1, video_left: got"),
        ({"video_left": "x" * 5000}, "item 1, video_left: got"),
        ({"prompt": ["a"]}, "item 1, prompt: got ['a'], allowed: a caption"),
        ({"prompt": "\ud800"}, "item 1, prompt: got"),
        ({"prompt": "x" * 20_001}, "item 1, prompt: got 20001 characters, allowed: up to 20000"),
        ({"id": {"a": 1}}, "item 1, id: got {'a': 1}"),
        ({"id": 1.5}, "item 1, id: got 1.5"),
        ({"vrthinker_dataset": "mine"}, "item 1, vrthinker_dataset: got 'mine', allowed: genai-bench"),
    ],
)
def test_a_bad_field_is_named_with_file_row_and_field(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    message = refusal("genai-bench", write_json(tmp_path / "g.json", [genai_row(**change), genai_row(id=9)]))
    assert words in message
    assert message.endswith("or give --skip-bad")
    pairs, done = imported("genai-bench", tmp_path / "g.json", skip_bad=True)
    assert [pair.id for pair in pairs] == ["9"]
    assert list(done.report["dropped"]) == [f"bad field {next(iter(change))} (--skip-bad)"]


def test_a_missing_field_and_the_first_problems_are_named(tmp_path: Path) -> None:
    rows = [{key: value for key, value in genai_row().items() if key != "prompt"} for _ in range(9)]
    message = refusal("genai-bench", write_json(tmp_path / "g.json", rows))
    assert message.startswith("9 problems: item 1, prompt: got nothing, allowed: a caption; item 2, ")
    assert "and 4 more" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("g.json", b"", "not JSON"),
        ("g.json", b'{"id": 1}\n{"id": 2}\n', "a file of JSON lines has to be named .jsonl"),
        ("g.json", b"{}", "got {}, allowed: a JSON list of objects"),
        ("g.json", b"[1]", "item 1: got 1, allowed: a JSON object"),
        ("g.json", b"[" * 100_000, "more than 64 levels"),
        ("g.json", b"[" + b'{"a":' * 80 + b"1" + b"}" * 80 + b"]", "more than 64 levels"),
        ("g.json", b'[{"id": 1e999}]', "is not finite"),
        ("g.json", b'[{"id": Infinity}]', "is no JSON"),
        ("g.json", b'[{"id": 1, "id": 2}]', "twice"),
        ("g.json", b"[]", "got 0 rows and no pair"),
        ("g.jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
        ("g.jsonl", b'{"a": "' + b"x" * (1 << 20) + b'"}', "more than 1048576 bytes"),
        ("g.csv", b"prompt,prompt\na,b\n", "line 1: got the column 'prompt' twice"),
        ("g.csv", b"prompt\na,b\n", "line 2: got 2 cells"),
        ("g.csv", b"prompt\n" + b"x" * 200_000, "field larger than field limit"),
        ("g.csv", b'prompt\n"' + b"x\n" * 3, "no CSV"),
        ("g.parquet", b"PAR1", "no Parquet"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        imported("genai-bench", tmp_path / name)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_nan_is_a_missing_caption_and_no_label(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(
        '[{"prompt": NaN, "video_left": "a", "video_right": "b", "vote_type": "B>A"}]'
    )
    pairs, done = imported("genai-bench", tmp_path / "g.json")
    assert (pairs[0].prompt, done.report["notes"]["empty captions"]) == ("", 1)
    (tmp_path / "g.json").write_text(
        '[{"prompt": "p", "video_left": "a", "video_right": "b", "vote_type": NaN}]'
    )
    assert "1 no label is left" in refusal("genai-bench", tmp_path / "g.json")


STRANGE = [
    *(None, True, -1, 0.5, 1e300, 10**18, float("nan"), "", " ", "nan", "\ud800", "\0", "A" * 70_000),
    *(
        [],
        [[]],
        {},
        {"a": {"b": []}},
        ["x", 3],
        "https://x/y",
        "../../etc",
        "Video 1 Better",
        "[1, 2",
        '["a"]',
    ),
]
ROWS: dict[str, dict[str, Any]] = {
    "videoalign": videoalign_row(),
    "videogen-rewardbench": videoalign_row(Overall="A"),
    "genai-bench": genai_row(),
    "mj-bench-video": mj_row(),
    "rapidata": rapidata_row(),
    "videodpo": {"video1": 2, "video2": 3, "frame_caption": "c"},
    "videofeedback": feedback_row("a", 2),
    "unifiedreward": unified_row(id=1, vrthinker_dataset=None),
}


@pytest.mark.parametrize("name", list(ROWS))
def test_whatever_stands_in_a_field_ends_in_pairs_or_in_one_line(name: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    assert set(ROWS) == set(FORMATS)
    good = ROWS[name]
    tried = [{**good, field: value} for field in good for value in STRANGE]
    for _ in range(60):
        row = {field: value for field, value in good.items() if draw.random() < 0.9}
        tried.append(row | {draw.choice(list(good)): draw.choice(STRANGE) for _ in range(3)})
    source = tmp_path / "rows.json"
    lines: list[str] = []
    for row in tried:
        source.write_text(json.dumps([row, good]), "utf-8")
        try:
            _, done = imported(name, source)
            assert done.report["rows"] == 2
        except InputError as error:
            lines.append(str(error))
    assert 10 < len(lines) < len(tried) - 10
    assert all(line.isprintable() and len(line) < 2000 for line in lines)
    source.write_text(json.dumps([*tried, good]), "utf-8")
    _, done = imported(name, source, skip_bad=True)
    assert done.report["rows"] == len(tried) + 1


# Real files


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no real annotations in ../shared/data/{'/'.join(parts)}")
    return path


def test_the_real_annotations_of_genai_bench(tmp_path: Path) -> None:
    source = shared("annotations", "genai_bench_video.json")
    votes = Counter(row["vote_type"] for row in json.loads(source.read_text("utf-8")))
    assert votes == {"leftvote": 619, "rightvote": 651, "tievote": 215, "bothbad_vote": 404}
    report = import_pairs(FORMATS["genai-bench"], source, tmp_path).report
    overall = report["dimensions"]["OA"]
    assert (overall["video_1"], overall["video_2"]) == (votes["leftvote"], votes["rightvote"])
    assert overall["ties"] == votes["tievote"] + votes["bothbad_vote"]
    assert report["tie_kinds"] == {
        "both equally good": votes["tievote"],
        "both bad": votes["bothbad_vote"],
    }
    assert (report["rows"], report["pairs"], report["dropped"]) == (1889, 1889, {})


def test_the_real_annotations_of_mj_bench_video(tmp_path: Path) -> None:
    source = shared("annotations", "mj_bench_video_sample.json")
    rows = json.loads(source.read_text("utf-8"))
    words = Counter(row["overall_preference"].lower() for row in rows if not row["discard"])
    overall = import_pairs(FORMATS["mj-bench-video"], source, tmp_path).report["dimensions"]["OA"]
    assert overall["video_1"] == words["video 1 better"]
    assert overall["video_2"] == words["video 2 better"]
    assert overall["ties"] == words["same"]


def test_real_pairs_of_videoalign(tmp_path: Path) -> None:
    source = shared("videoalign", "pairs.csv")
    with source.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    done = import_pairs(FORMATS["videoalign"], source, tmp_path, check_videos=True)
    (tmp_path / "pairs.jsonl").write_bytes(done.lines)
    pairs = load_pairs(tmp_path / "pairs.jsonl")
    assert len(pairs) == len(rows)
    for pair, row in zip(pairs, rows, strict=True):
        assert pair.prompt == row["prompt"]
        assert pair.video_1.samefile(source.parent / row["path_A"])
        assert pair.labels is not None
        for code in ("TA", "VQ", "MQ"):
            assert pair.labels[code] == {"A": 1, "B": 2, "same": 0}[row[code]]
