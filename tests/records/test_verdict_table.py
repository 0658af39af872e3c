"""Tables of verdicts: what other tools read is what the results file says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from vrthinker.errors import InputError
from vrthinker.records.verdict_table import COLUMNS, check_verdict_table, write_verdict_table
from vrthinker.records.verdicts import VerdictRecord

JUDGED = VerdictRecord(
    id="a",
    judgment={"TA": 1, "VQ": 0, "MQ": 2, "OA": 1},
    confidence=2,
    rounds=2,
    tool_calls=1,
    frames_seen=[1, 9],
    stop_reason="answered",
    reason=None,
    notes=['a "note", with a comma'],
    well_formed=True,
    latency_seconds=1.5,
    prompt_tokens=10,
    sampled_tokens=None,
    seed=2**62,
    model="m",
)
FAILED = JUDGED.model_copy(
    update={"id": "b\nc", "judgment": None, "reason": "no\nvideo", "stop_reason": "video_error", "notes": []}
)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_verdict_table(path, [JUDGED, FAILED])
    with path.open(newline="") as lines:
        first, second = csv.DictReader(lines)
    assert tuple(first) == COLUMNS
    assert (first["TA"], first["VQ"], first["well_formed"], first["frames_seen"]) == (
        "1",
        "0",
        "true",
        "[1, 9]",
    )
    assert first["notes"] == '["a \\"note\\", with a comma"]'
    assert (second["id"], second["OA"], second["reason"]) == ("b\nc", "", "no\nvideo")
    check_verdict_table("--table", path)


@pytest.mark.parametrize("records", [[JUDGED, FAILED], [FAILED], []])
def test_parquet(tmp_path: Path, records: list[VerdictRecord]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    write_verdict_table(path, records)
    table = parquet.read_table(path)
    assert tuple(table.column_names) == COLUMNS
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [record.id for record in records]
    for row, record in zip(rows, records, strict=True):
        assert {code: row[code] for code in ("TA", "VQ", "MQ", "OA")} == (
            record.judgment or dict.fromkeys(("TA", "VQ", "MQ", "OA"))
        )
        for name in ("frames_seen", "notes", "seed", "well_formed", "reason", "latency_seconds"):
            assert row[name] == getattr(record, name)
    check_verdict_table("--table", path)


def test_parquet_without_pyarrow_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vrthinker.data.tables.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--table: t\.parquet: Parquet needs pyarrow"):
        check_verdict_table("--table", tmp_path / "t.parquet")
    check_verdict_table("--table", tmp_path / "t.csv")


def test_a_file_that_is_no_csv_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('"a"b\n')
    with pytest.raises(InputError, match="holds something else than verdicts"):
        check_verdict_table("--table", path)
