"""`vrthinker doctor --readers`: refusals, the file that it keeps, and the table that it prints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli_run import vrthinker

from vrthinker.doctor import readers
from vrthinker.video import measured_readers
from vrthinker.video.dali.support import installed_version
from vrthinker.video.reader_times import FILE_VARIABLE, ReaderTimes

FEW: dict[str, Any] = {"codecs": ["h264", "vp9"], "sizes": [(64, 96)], "lengths": [12], "repeats": 2}


@pytest.fixture(autouse=True)
def _own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "cache" / "reader_times.json"))


@pytest.mark.skipif(installed_version() is not None, reason="NVIDIA DALI is installed")
def test_without_dali_it_says_what_to_install(tmp_path: Path) -> None:
    done = vrthinker("doctor", "--readers")
    assert done.code == 2
    assert "NVIDIA DALI is not installed; pip install 'vrthinker[dali]'" in done.line
    assert list(tmp_path.iterdir()) == [], "nothing was made for a result that will not be there"


def test_one_measurement_at_a_time() -> None:
    done = vrthinker("doctor", "--readers", "--numerics", "nano")
    assert done.code == 2
    assert "--readers: got --numerics too" in done.line


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "installed_version", lambda: "2.4")
    monkeypatch.setattr(readers, "measure", lambda _: pytest.fail("it was measured"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for named, said in (
        ("folder", "got a folder, a pipe or a device, allowed: a file"),
        ("pipe", "got a folder, a pipe or a device, allowed: a file"),
        ("file/times.json", "cannot be written"),
    ):
        monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / named))
        done = vrthinker("doctor", "--readers")
        assert done.code == 2
        assert said in done.line
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "times.json"))
    with readers.kept():
        assert "another process measures already" in vrthinker("doctor", "--readers").line


@pytest.mark.dali
@pytest.mark.skipif(installed_version() is None, reason="NVIDIA DALI is not installed")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_result_is_kept_and_shown(monkeypatch: pytest.MonkeyPatch, form: list[str]) -> None:
    measure = measured_readers.measure_readers
    monkeypatch.setattr(
        measured_readers, "measure_readers", lambda *given, **options: measure(*given, **options, **FEW)
    )
    done = vrthinker("doctor", "--readers", *form)
    assert done.code == 0, done.err
    kept = ReaderTimes.load()
    assert kept is not None
    assert [clip.codec for clip in kept.clips] == ["h264", "vp9"]
    if form:
        assert ReaderTimes.model_validate(json.loads(done.out)) == kept
    else:
        table = [
            [cell.plain if hasattr(cell, "plain") else cell for cell in column.cells]
            for column in readers.render(kept).columns
        ]
        assert table[0] == ["h264", "vp9"]
        assert table[-1] == [clip.faster for clip in kept.clips]
        assert "96x64" in done.out
