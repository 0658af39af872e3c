"""Who decodes under `auto`: what was measured on this machine; and the measurement, with the real DALI."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import make_clip

from vrthinker.errors import InputError, VRThinkerError
from vrthinker.video import reader_times
from vrthinker.video.dali import reader as dali_module
from vrthinker.video.dali import support
from vrthinker.video.dali.reader import DaliReader
from vrthinker.video.dali.support import installed_version
from vrthinker.video.measured_readers import ENCODERS, encode_tiles, measure_readers
from vrthinker.video.open import auto_choice, open_reader
from vrthinker.video.pyav.reader import PyAVReader
from vrthinker.video.reader import VideoInfo
from vrthinker.video.reader_times import ClipTimes, ReaderTimes, machine, times_file

needs_dali = pytest.mark.skipif(installed_version() is None, reason="NVIDIA DALI is not installed")


def clip_times(codec: str, size: tuple[int, int], n_frames: int, ratio: float | None) -> dict[str, Any]:
    """A measured clip, with DALI `ratio` times as fast; None where DALI did not decode it."""
    rate = {"median": 100.0, "min": 90.0, "max": 110.0}
    return {
        "codec": codec,
        "height": size[0],
        "width": size[1],
        "n_frames": n_frames,
        "frames_a_read": 8,
        "threads": 2,
        "pyav": rate,
        "dali": ratio and {name: round(value * ratio, 2) for name, value in rate.items()},
        "why_not": None if ratio else "DALI failed",
        "largest_difference": 0 if ratio else None,
        "mean_difference": 0.0 if ratio else None,
    }


MEASURED = [
    clip_times("vp9", (480, 832), 96, 0.5),
    clip_times("vp9", (720, 1280), 96, 2.0),
    clip_times("vp9", (720, 1280), 480, 1.05),
    clip_times("mjpeg", (720, 1280), 96, None),
]


def write(clips: list[dict[str, Any]], **changed: Any) -> None:
    """Writes the file of measurements, as of this machine."""
    content = {"date": "2026-12-01T10:00:00+00:00", "device": "cpu", "machine": machine(), "clips": clips}
    times_file().write_text(json.dumps({**content, **changed}), "utf-8")


@pytest.fixture(autouse=True)
def _own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(reader_times.FILE_VARIABLE, str(tmp_path / "reader_times.json"))


@pytest.fixture
def with_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI counts as installed; what it would decode is decoded by PyAV."""
    for module in (support, dali_module, reader_times):
        monkeypatch.setattr(module, "installed_version", lambda: "2.4")
    cpu = PyAVReader()

    def decode(encoded: np.ndarray[Any, Any], frames: list[int], _: str) -> tuple[Any, str]:
        copy = Path(times_file()).with_name("copy.webm")
        copy.write_bytes(encoded.tobytes())
        return cpu.frames_at(copy, frames).numpy(), "cpu"

    monkeypatch.setattr(dali_module, "_decode", decode)


@pytest.mark.parametrize(
    ("codec", "size", "n_frames", "reader", "reason"),
    [
        ("vp9", (360, 640), 50, "pyav", "measured with vp9 of 832x480 and 96 frames, DALI is 0.50 times"),
        ("vp9", (1080, 1920), 50, "dali", None),
        ("vp9", (720, 1280), 2000, "pyav", "1.05 times as fast"),
        ("mjpeg", (720, 1280), 96, "pyav", "DALI did not decode it: DALI failed"),
        ("vp8", (720, 1280), 96, "pyav", r"vp8 was not measured \(vrthinker doctor --readers\)"),
    ],
)
def test_the_clip_most_alike_decides(
    codec: str, size: tuple[int, int], n_frames: int, reader: str, reason: str | None
) -> None:
    write(MEASURED)
    times = ReaderTimes.model_validate_json(times_file().read_text("utf-8"))
    info = VideoInfo("a", codec, size[1], size[0], n_frames, 24.0, n_frames / 24, False, 0, (0.0,) * n_frames)
    why = times.why_not_dali(info)
    assert (why is None) == (reader == "dali")
    if reason is not None:
        with pytest.raises(InputError, match=reason):
            raise InputError(str(why))


@pytest.mark.usefixtures("with_dali")
def test_auto_decides_for_each_clip_and_says_so(tmp_path: Path) -> None:
    write(MEASURED)
    name, why, _ = auto_choice()
    assert name == "dali"
    assert why == "measured on 2026-12-01 to be faster with clips in vp9; pyav decodes mjpeg"
    small = make_clip(tmp_path / "small.webm", 6, (64, 96), "vp9")
    assert encode_tiles(tmp_path / "large.webm", "vp9", (720, 1280), 3)
    reader = open_reader("auto")
    assert isinstance(reader, DaliReader)
    assert reader.reader_of(small) == "pyav"
    assert reader.reader_of(tmp_path / "large.webm") == "dali"
    assert np.array_equal(
        reader.frames_at(tmp_path / "large.webm", [2, 0]).numpy(),
        PyAVReader().frames_at(tmp_path / "large.webm", [2, 0]).numpy(),
    )
    assert reader.decoded_frames == 2
    assert reader.frames_at(small, [5]).frame_indices == (5,)
    assert reader.decoded_frames == 2, "the small clip was not DALI's"
    named = open_reader("dali")
    assert isinstance(named, DaliReader)
    assert named.reader_of(small) == "dali", "a reader that was named decodes whatever it can"


@pytest.mark.usefixtures("with_dali")
def test_where_dali_is_never_faster_auto_is_the_cpu_reader() -> None:
    write([MEASURED[0], MEASURED[2]])
    name, why, _ = auto_choice()
    assert (name, why) == ("pyav", "it was measured to be the faster one on 2026-12-01")
    assert isinstance(open_reader("auto"), PyAVReader)


@pytest.mark.usefixtures("with_dali")
@pytest.mark.parametrize(("levels", "name"), [(2.0, "dali"), (2.1, "pyav"), (None, "pyav")])
def test_other_colours_are_never_faster(levels: float | None, name: str) -> None:
    write([{**MEASURED[1], "mean_difference": levels}])
    assert auto_choice().name == name
    times = ReaderTimes.load()
    assert times is not None
    said = "its colours differ by 2.1 levels on average" in times.clips[0].summary
    assert said == (levels == 2.1)


@pytest.mark.usefixtures("with_dali")
def test_where_dali_decoded_nothing_that_is_said() -> None:
    write([MEASURED[3]])
    name, why, _ = auto_choice()
    assert name == "pyav"
    assert why.endswith("DALI did not decode it: DALI failed")


@pytest.mark.usefixtures("with_dali")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x" * 100_000 + "\n\x1b": 1}, "Extra inputs are not permitted"),
        ({"date": "a\nb\x1b[31m"}, "date: "),
        ({"device": "tpu"}, "device: "),
        ({"device": "gpu"}, "measured on another machine"),
        ({"clips": []}, "clips: "),
        ({"machine": {"cores": 1000}}, "measured on another machine, or with other versions"),
        ({"clips": [{**MEASURED[0], "pyav": {"median": 0, "min": 1, "max": 1}}]}, "greater than 0"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_a_file_that_does_not_fit_decides_nothing(changed: dict[str, Any], said: str) -> None:
    write(**{"clips": MEASURED, **changed})
    name, why, times = auto_choice()
    assert (name, times) == ("pyav", None)
    assert said in why
    assert "vrthinker doctor --readers measures again" in why
    assert len(why) < 1000
    assert why.isprintable()
    assert isinstance(open_reader("auto"), PyAVReader)


def test_a_broken_file_decides_nothing() -> None:
    for content in (b"", b"{", b"[1]", b"\xff" * 9):
        times_file().write_bytes(content)
        assert auto_choice().name == "pyav"
        assert isinstance(open_reader("auto"), PyAVReader)


def test_without_dali_nothing_is_taken_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (support, reader_times):
        monkeypatch.setattr(module, "installed_version", lambda: None)
    write(MEASURED)
    name, why, _ = auto_choice()
    assert name == "pyav"
    assert "pip install 'vrthinker[dali]'" in why


def test_a_place_that_cannot_be_looked_at_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for named in (str(tmp_path), "x" * 5000, os.devnull, str(tmp_path / "a" / "b")):
        monkeypatch.setenv(reader_times.FILE_VARIABLE, named)
        assert auto_choice().name == "pyav"
    monkeypatch.delenv(reader_times.FILE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    name, why, _ = auto_choice()
    assert name == "pyav"
    assert why.startswith("this user has no home; VRTHINKER_READER_TIMES names")


def test_what_reads_records_again_sees_the_same_pixels_everywhere() -> None:
    write(MEASURED)
    assert isinstance(open_reader(), PyAVReader), "the default of the library; auto is that of the commands"


def test_the_file_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(reader_times.FILE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert times_file() == tmp_path / "vrthinker" / "reader_times.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert times_file() == tmp_path / "home" / ".cache" / "vrthinker" / "reader_times.json"


def test_the_names_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, text in (("0000:01:00.0", "Model: \t\t NVIDIA H200\nIRQ: 4\n"), ("0000:02:00.0", "IRQ: 5\n")):
        (tmp_path / number).mkdir()
        (tmp_path / number / "information").write_text(text)
    monkeypatch.setattr(support, "_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert support.gpu_names() == ["NVIDIA H200", "unknown"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert support.gpu_names() == []


@pytest.mark.parametrize("codec", sorted(ENCODERS))
def test_the_clips_of_the_measurement_are_ones_that_dali_gets(tmp_path: Path, codec: str) -> None:
    path = tmp_path / f"a.{ENCODERS[codec][1]}"
    assert encode_tiles(path, codec, (96, 160), 5)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "SVT-AV1 makes its caller a real-time thread"
    cpu = PyAVReader()
    assert dataclasses.replace(cpu.probe(path), pts_seconds=()).n_frames == 5
    index = cpu.index_of(str(path))
    assert support.why_handed_over(index, "gpu") is None
    assert (support.why_handed_over(index, "cpu") is None) == (codec in support.CPU_CODECS)


@needs_dali
@pytest.mark.dali
def test_both_readers_are_measured_side_by_side(tmp_path: Path) -> None:
    said: list[str] = []
    times = measure_readers(
        "cpu",
        tmp_path,
        threads=2,
        codecs=["h264", "vp9"],
        sizes=[(64, 96)],
        lengths=[12],
        repeats=2,
        announce=said.append,
    )
    h264, vp9 = times.clips
    assert said == ["h264, 96x64, 12 frames", "vp9, 96x64, 12 frames"]
    assert isinstance(vp9, ClipTimes)
    assert vp9.dali is not None
    assert (vp9.largest_difference, vp9.mean_difference) == (0, 0)
    assert (vp9.frames_a_read, vp9.threads) == (8, 2)
    assert vp9.dali.min <= vp9.dali.median <= vp9.dali.max
    assert (h264.dali, h264.faster) == (None, "pyav")
    assert "on a CPU, DALI decodes" in str(h264.why_not)
    assert list(tmp_path.iterdir()) == [], "the clips are removed"
    times_file().write_text(times.model_dump_json(), "utf-8")
    assert ReaderTimes.load() == times


def broken_decode(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Any], Any]) -> None:
    """DALI that gives what PyAV gives, changed; `change` is told how many reads there were."""
    decode, lock, count = dali_module._decode, threading.Lock(), 0

    def broken(*given: Any) -> tuple[Any, str]:
        nonlocal count
        with lock:
            count += 1
            number = count
        return change(number, decode(*given)[0]), "cpu"

    monkeypatch.setattr(dali_module, "_decode", broken)


SMALL: dict[str, Any] = {
    "threads": 1,
    "codecs": ["vp9"],
    "sizes": [(64, 96)],
    "lengths": [12],
    "repeats": 2,
}


def failing(number: int, pixels: Any) -> Any:
    """A reader that runs out of memory after its first read."""
    if number > 1:
        raise RuntimeError("out of memory")
    return pixels


@pytest.mark.usefixtures("with_dali")
def test_wrong_pixels_are_refused_on_a_cpu_and_not_taken_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_decode(monkeypatch, lambda _, pixels: 255 - pixels)
    with pytest.raises(VRThinkerError, match=r"differ by \d+ levels, allowed: 0 on a CPU"):
        measure_readers("cpu", tmp_path, **SMALL)
    for left in tmp_path.iterdir():
        left.unlink()
    (clip,) = measure_readers("gpu", tmp_path, **SMALL).clips
    assert clip.mean_difference is not None
    assert clip.mean_difference > 20
    assert clip.faster == "pyav"


@pytest.mark.usefixtures("with_dali")
def test_a_reader_that_fails_while_it_is_timed_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_decode(monkeypatch, failing)
    with pytest.raises(VRThinkerError, match=r"it decoded none of 1 clips \(DALI failed\)"):
        measure_readers("cpu", tmp_path, **SMALL)
