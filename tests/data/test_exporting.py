"""Exports: importing one gives the same pairs, and what a layout cannot hold is counted."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.data.exporting import EXPORTS, export_pairs
from vrthinker.data.importing import FORMATS, import_pairs
from vrthinker.data.pairs import Pair, dump_pair, load_pairs
from vrthinker.errors import InputError

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=30)
CAPTION = (
    TEXT | st.sampled_from(["a]\n]", "[x]", '"q", z', "Text Caption: [a]", "<video>", "a\r\nb\rc"])
).map(lambda text: "" if text.strip().lower() == "nan" else text.strip())
CLIP = st.sampled_from(["v/a.mp4", "v/b.mp4", "../c d.mp4", "/far/e,\"f\".mp4", "é/漢.mp4"])  # fmt: skip
LABELS = st.dictionaries(st.sampled_from(["TA", "VQ", "MQ", "OA"]), st.integers(0, 2), min_size=1)


@st.composite
def pairs_in(draw: st.DrawFn, folder: Path) -> list[Pair]:
    names = draw(
        st.lists(st.text("abc123 é", min_size=1).map(str.strip), min_size=1, max_size=5, unique=True)
    )
    return [
        Pair(
            id=name,
            prompt=draw(CAPTION),
            video_1=Path(os.path.abspath(folder / draw(CLIP))),
            video_2=Path(os.path.abspath(folder / draw(CLIP))),
            labels=draw(LABELS),
            dataset=draw(
                st.sampled_from([None, "genai-bench", "mj-bench-video", "rapidata", "videogen-reward"])
            ),
        )
        for name in names
        if name
    ]


@pytest.mark.parametrize("name", list(EXPORTS))
@given(data=st.data())
def test_importing_an_export_gives_the_same_pairs(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        _, codes, ending = EXPORTS[name]
        pairs = [
            pair.model_copy(update={"labels": kept})
            for pair in data.draw(pairs_in(folder))
            if (kept := {code: label for code, label in (pair.labels or {}).items() if code in codes})
        ]
        if not pairs:
            return
        file = folder / f"export{ending}"
        exported = export_pairs(name, pairs, file)
        assert (exported.pairs, exported.lost) == (len(pairs), {})
        file.write_bytes(exported.content)
        out = folder / "out"
        out.mkdir()
        (out / "pairs.jsonl").write_bytes(import_pairs(FORMATS[name], file, out).lines)
        assert load_pairs(out / "pairs.jsonl") == pairs


@given(data=st.data())
def test_a_dumped_pair_reads_as_the_same(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        pairs = data.draw(pairs_in(folder))
        pairs += [
            pair.model_copy(update={"id": f"{pair.id}+", "labels": None, "dataset": None}) for pair in pairs
        ]
        if pairs:
            (folder / "p.jsonl").write_text("".join(dump_pair(pair, folder) for pair in pairs), "utf-8")
            assert load_pairs(folder / "p.jsonl") == pairs


def pair(**change: object) -> Pair:
    value = {
        "id": "p",
        "prompt": "c",
        "video_1": Path("/v/a.mp4"),
        "video_2": Path("/w/b.mp4"),
        "labels": {"OA": 1},
    }
    return Pair.model_validate(value | change)


def test_what_a_layout_cannot_hold_is_counted() -> None:
    pairs = [pair(labels={"OA": 2, "TA": 1}), pair(id="q", labels={"TA": 1}), pair(id="r", prompt="c\n")]
    pairs += [pair(id=" s", prompt="NaN")]
    exported = export_pairs("genai-bench", pairs, Path("/v/x.json"))
    assert exported.lost == {
        "pairs without a label for OA": 1,
        "TA labels": 1,
        "blanks or line ends around captions": 1,
        "blanks around ids": 1,
        "captions nan, which an import reads as none": 1,
    }
    first, *_ = json.loads(exported.content)
    assert (first["video_left"], first["video_right"], first["vote_type"]) == (
        "a.mp4",
        "/w/b.mp4",
        "rightvote",
    )


def test_the_csv_has_the_columns_that_others_read() -> None:
    content = export_pairs("videoalign", [pair(labels={"TA": 0, "VQ": 2})], Path("/v/x.csv")).content.decode()
    (row,) = csv.DictReader(content.splitlines())
    assert (row["path_A"], row["path_B"], row["prompt"]) == ("a.mp4", "/w/b.mp4", "c")
    assert (row["TA"], row["VQ"], row["MQ"], row["Overall"]) == ("same", "B", "", "")


@pytest.mark.parametrize(
    ("name", "file", "labels", "words"),
    [
        ("nothing", "x.json", {"OA": 1}, "data export: got 'nothing', allowed: videoalign"),
        ("videoalign", "x.json", {"OA": 1}, "allowed for videoalign: a file that ends in .csv"),
        ("genai-bench", "x.json", {"TA": 1}, "none of which has a label for OA"),
    ],
)
def test_what_cannot_be_exported_is_refused(name: str, file: str, labels: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        export_pairs(name, [pair(labels=labels)], Path("/v") / file)
