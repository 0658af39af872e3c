"""The curve has each step once, whatever killed its writer."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path

import pytest
from full_disk import full_at
from hypothesis import given, settings
from hypothesis import strategies as st

from vrthinker.errors import InputError, VRThinkerError
from vrthinker.records.metrics_file import MetricsFile, read_metrics


def write(path: Path, steps: int) -> None:
    with MetricsFile(path) as file:
        for step in range(1, steps + 1):
            file.log({"loss/sft": step / 7}, step)


def steps_in(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_a_line_holds_step_time_and_metrics(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.log({"loss/sft": 1.5, "perf/tokens_per_s": 1e4}, 3)
    line = json.loads(path.read_text())
    assert abs(line.pop("time_seconds") - time.time()) < 60
    assert line == {"step": 3, "loss/sft": 1.5, "perf/tokens_per_s": 1e4}


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m") as file:
        file.log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0}, 1)
    line = json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, None, 0.0)
    assert read_metrics(tmp_path / "m") == [line]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, 7)
    before = read_metrics(path)
    with MetricsFile(path) as file:
        file.drop_after(4)
        assert read_metrics(path) == before[:4]
        file.log({"loss/sft": 9.0}, 5)
    assert steps_in(path) == [1, 2, 3, 4, 5]
    assert read_metrics(path)[:4] == before[:4]
    with MetricsFile(path) as file:
        file.drop_after(0)
    assert path.read_bytes() == b""


def test_a_step_is_written_once(tmp_path: Path) -> None:
    write(tmp_path / "m", 3)
    with MetricsFile(tmp_path / "m") as file:
        for step in (3, 2):
            with pytest.raises(ValueError, match=rf"step: got {step}, allowed: above 3"):
                file.log({}, step)
        file.drop_after(2)
        file.log({}, 3)
    assert steps_in(tmp_path / "m") == [1, 2, 3]


@given(cut=st.integers(0, 400), tail=st.binary(max_size=20).filter(lambda tail: b"\n" not in tail))
@settings(deadline=None, max_examples=60)
def test_a_torn_last_line_is_passed_over_and_removed(cut: int, tail: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        write(path, 4)
        whole = path.read_bytes()
        torn = whole[:cut] + tail
        path.write_bytes(torn)
        kept = whole[: cut + 1 if whole[cut : cut + 1] == tail == b"\n" else cut].count(b"\n")
        assert steps_in(path) == list(range(1, kept + 1))
        with MetricsFile(path) as file:
            file.log({"loss/sft": 0.5}, kept + 1)
        assert steps_in(path) == list(range(1, kept + 2))
        assert path.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:kept]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2 has no step"),
        ('{"loss/sft": 1}', "line 2 has no step"),
        ('{"step": true, "time_seconds": 2}', "line 2 has no step"),
        ('{"step": 2}', "line 2 has no time_seconds"),
        ('{"step": 2, "time_seconds": null}', "line 2 has time_seconds: None, wanted: a number"),
        ('{"step": 2, "time_seconds": 2, "loss/sft": "low"}', "line 2 has loss/sft: 'low', wanted: a number"),
        ('{"step": 2, "time_seconds": 2, "loss/sft": [[1]]}', r"line 2 has loss/sft: \[\[1\]\], wanted"),
        ('{"step": 2, "time_seconds": 2, "loss/sft": NaN}', "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON that can be used .more than 64 levels"),
        ('{"step": ' + "9" * 5000 + "}", "line 2: not JSON that can be used .a number of 5000"),
        (" " * (1 << 20) + "{}", ":2: got more than 1048576 bytes"),
        ('{"step": 1, "time_seconds": 2}', "line 2 has step 1 after step 1"),
    ],
)
def test_other_lines_are_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "m"
    before, after = (f'{{"step": {step}, "time_seconds": 1.5}}' for step in (1, 3))
    path.write_text(f"{before}\n{line}\n{after}\n")
    with pytest.raises(InputError, match=said):
        MetricsFile(path)
    assert path.read_text().count("\n") == 3


def test_a_metric_cannot_be_named_like_the_files_own(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m") as file, pytest.raises(ValueError, match="'time_seconds'"):
        file.log({"time_seconds": 1.0}, 1)
    assert (tmp_path / "m").read_bytes() == b""


def test_a_missing_file_and_a_bad_folder_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_metrics(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be opened"):
        MetricsFile(tmp_path / "file" / "m")


def test_a_line_that_finds_no_room_leaves_no_part_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, 2)
    before = path.read_bytes()
    with MetricsFile(path) as file:
        with full_at(len(before) + 20), pytest.raises(VRThinkerError, match="m: cannot be written"):
            file.log({"loss/sft": 1.0}, 3)
        assert path.read_bytes() == before
        file.log({"loss/sft": 1.0}, 3)
    assert steps_in(path) == [1, 2, 3]
