"""Pairs and verdicts go into lines, CSV and Parquet, and come back the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vrthinker import InputError
from vrthinker.data.pairs import Pair, load_pairs, missing_clips, save_pairs
from vrthinker.data.tables import table_bytes
from vrthinker.episode.dimensions import Dimension
from vrthinker.episode.probabilities import LabelProbabilities, Probabilities
from vrthinker.records.verdict_table import read_verdict_table, write_verdict_table
from vrthinker.records.verdicts import VerdictRecord

ENDINGS = ["csv", "parquet"]
FIRST_COLUMNS = (
    *(
        "id",
        "TA",
        "VQ",
        "MQ",
        "OA",
        "confidence",
        "rounds",
        "tool_calls",
        "frames_seen",
        "stop_reason",
        "reason",
    ),
    *(
        "notes",
        "well_formed",
        "repairs",
        "latency_seconds",
        "prompt_tokens",
        "sampled_tokens",
        "seed",
        "model",
    ),
)
"""The columns of the tables of version 0.1.0."""
ODD = 'a "quoted", caption\nwith lines, = and ünïcode'


@pytest.mark.parametrize("ending", ["jsonl", *ENDINGS])
def test_pairs_come_back(tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "a.mp4").touch()
    pairs = [
        Pair(
            id="1",
            prompt=ODD,
            video_1=tmp_path / "a.mp4",
            video_2=Path("/no/b.mp4"),
            labels={"TA": 0, "OA": 2},
        ),
        Pair(
            id="zwei",
            prompt="x",
            video_1=tmp_path / "a.mp4",
            video_2=tmp_path / "c" / "a.mp4",
            dataset="mj-bench-video",
        ),
    ]
    file = tmp_path / f"pairs.{ending}"
    save_pairs(file, pairs)
    assert load_pairs(file) == pairs
    assert [path.name for path in tmp_path.iterdir() if path.name != "a.mp4"] == [file.name]
    assert missing_clips(pairs) == [Path("/no/b.mp4"), tmp_path / "c" / "a.mp4"]


def record(pair_id: str, *, judged: bool) -> VerdictRecord:
    return VerdictRecord(
        id=pair_id,
        judgment={"TA": 1, "VQ": 0, "MQ": 2, "OA": 1} if judged else None,
        confidence=2 if judged else None,
        rounds=3,
        tool_calls=2,
        frames_seen=[1, 9, 30] if judged else [],
        stop_reason="answered" if judged else "video_error",
        reason=None if judged else "broken, at 3 s",
        notes=["a note, with a comma"] if judged else [],
        well_formed=judged or None,
        repairs=1,
        latency_seconds=0.25,
        prompt_tokens=None,
        sampled_tokens=40,
        seed=7,
        model="hf:m",
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_verdicts_come_back(tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    records = [record("1", judged=True), record("p, 2", judged=False)]
    file = tmp_path / f"verdicts.{ending}"
    write_verdict_table(file, records)
    assert read_verdict_table(file) == records


@pytest.mark.parametrize("ending", ENDINGS)
def test_probabilities_and_readers_come_back(tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    sure = LabelProbabilities(video_1=0.7, tie=0.1, video_2=0.2)
    known = record("1", judged=True).model_copy(
        update={
            "probabilities": Probabilities(TA=sure, VQ=None, MQ=None, OA=sure),
            "probabilities_reason": "VQ, MQ: not watched",
            "readers": ["pyav", "dali"],
        }
    )
    both = [
        {"judgment": {"TA": 1, "VQ": 0, "MQ": 2, "OA": 1}, "probabilities": None},
        {"judgment": {"TA": 1, "VQ": 0, "MQ": 2, "OA": 2}, "probabilities": None},
    ]
    orders = VerdictRecord.model_validate({**record("2", judged=True).model_dump(), "orders": both})
    assert orders.consistent is False
    file = tmp_path / f"verdicts.{ending}"
    write_verdict_table(file, [known, orders, record("3", judged=False)])
    assert read_verdict_table(file) == [
        known,
        orders.model_copy(update={"orders": None}),  # what each order gave is not in the table
        record("3", judged=False),
    ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_tables_of_the_first_version_are_read(tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    records = [record("1", judged=True), record("p, 2", judged=False)]
    file = tmp_path / f"verdicts.{ending}"
    rows = [{**one.model_dump(mode="json"), **(one.judgment or dict.fromkeys(Dimension))} for one in records]
    file.write_bytes(table_bytes(file, rows, FIRST_COLUMNS))
    assert read_verdict_table(file) == records


def test_a_table_that_is_none_of_verdicts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "v.csv"
    write_verdict_table(file, [record("1", judged=True)])
    text = file.read_text()
    for bad, message in (
        ("a,b\n1,2\n", "row 2 is no verdict (got the columns a, b, allowed: id, TA"),
        (text.replace(",0.25,", ",soon,"), "row 2 is no verdict (Expecting value"),
        (text.replace("1,1,0,2,1,2", "1,1,0,,1,2"), "row 2 is no verdict (judgment"),
    ):
        assert bad != text
        file.write_text(bad)
        with pytest.raises(InputError, match=re.escape(message)):
            read_verdict_table(file)
    with pytest.raises(InputError, match=r"allowed: a file that ends in \.csv or \.parquet"):
        read_verdict_table(tmp_path / "v.txt")
