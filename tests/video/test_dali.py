"""The reader that uses DALI, with the real DALI on a CPU: equal frames, bounds, and what it hands over."""

from __future__ import annotations

import os
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import cut, make_clip, read_number

from vrthinker.errors import InputError, VideoError
from vrthinker.video import FrameCache, ResizeSettings, Workspace
from vrthinker.video.dali import reader as dali_module
from vrthinker.video.dali import support
from vrthinker.video.dali.reader import DaliReader
from vrthinker.video.dali.support import installed_version, why_handed_over
from vrthinker.video.open import auto_choice, open_reader
from vrthinker.video.pyav.index import build_index
from vrthinker.video.pyav.reader import PyAVReader
from vrthinker.video.resize import resize_frame

needs_dali = pytest.mark.skipif(installed_version() is None, reason="NVIDIA DALI is not installed")
TOLERANCE = 0
"""The largest difference of a frame's colours between the two readers on a CPU, in levels: none."""
N_FRAMES = 24
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "vp9": ("a.webm", {"codec": "vp9"}),
    "vp9 in mp4": ("a.mp4", {"codec": "vp9"}),
    "vp9 of an odd size": ("a.webm", {"codec": "vp9", "size": (65, 97)}),
    "vp8": ("a.webm", {"codec": "vp8"}),
    "vp9 that states BT.601": ("a.webm", {"codec": "vp9", "options": {"colorspace": "smpte170m"}}),
    "vp9 that states its range": ("a.webm", {"codec": "vp9", "options": {"color_range": "tv"}}),
    "mjpeg": ("a.avi", {"codec": "mjpeg"}),
    "mjpeg in mp4": ("a.mp4", {"codec": "mjpeg"}),
}
VARIABLE_MS = [0, 40, 80, 200, 240, 300, 310, 400, 480, 500, 700, 730, 740, 900, 940, 1000, 1040, 1080]
HANDED_OVER: dict[str, tuple[str, dict[str, Any], str]] = {
    "h264": ("a.mp4", {}, r"h264 \(on a CPU, DALI decodes mjpeg, vp8, vp9\)"),
    "variable": ("a.webm", {"codec": "vp9", "n_frames": 18, "pts": VARIABLE_MS}, "a variable frame rate"),
    "turned": ("a.mp4", {"codec": "vp9", "rotation": 180}, "pictures that have to be turned"),
    "BT.709": (
        "a.webm",
        {"codec": "vp9", "options": {"colorspace": "bt709"}},
        r"a colour matrix other than BT\.601's \(FFmpeg's number 1\)",
    ),
    "BT.2020": (
        "a.webm",
        {"codec": "vp9", "options": {"colorspace": "bt2020nc"}},
        r"a colour matrix other than BT\.601's \(FFmpeg's number 9\)",
    ),
    "full range": (
        "a.webm",
        {"codec": "vp9", "options": {"color_range": "pc"}},
        "a range of values other than the codec's usual one",
    ),
    "hidden by an edit list": (
        "a.mp4",
        {"codec": "mjpeg", "pts": [40 * (i - 5) for i in range(N_FRAMES)]},
        "pictures that an edit list hides",
    ),
}


@needs_dali
@pytest.mark.dali
@pytest.mark.parametrize("name", SAME)
def test_dali_gives_the_frames_of_the_cpu_reader(tmp_path: Path, name: str) -> None:
    ending, options = SAME[name]
    path = make_clip(tmp_path / ending, N_FRAMES, gop=7, **options)
    dali, cpu = DaliReader("cpu"), PyAVReader()
    assert dali.probe(path) == cpu.probe(path)
    rng = random.Random(name)
    for wanted in ([N_FRAMES - 1, 0, 3, 3], [rng.randrange(N_FRAMES) for _ in range(9)], [5]):
        ours, theirs = dali.frames_at(path, wanted), cpu.frames_at(path, wanted)
        assert (ours.frame_indices, ours.pts_seconds, ours.device) == (
            theirs.frame_indices,
            theirs.pts_seconds,
            "cpu",
        )
        assert [read_number(frame) for frame in ours.numpy()] == wanted
        difference = np.abs(ours.numpy().astype(int) - theirs.numpy()).max()
        assert difference <= TOLERANCE
        for frame, other in zip(ours.numpy(), theirs.numpy(), strict=True):
            assert np.array_equal(resize_frame(frame, (56, 84)), resize_frame(other, (56, 84)))
    assert dali.decoded_frames > 0
    assert dali.handed_over == {}
    assert dali.reader_of(path) == "dali"


@needs_dali
@pytest.mark.dali
def test_clips_of_other_sizes_follow_each_other(tmp_path: Path) -> None:
    """Decoders that keep the last clip's crop were seen elsewhere."""
    dali, cpu = DaliReader("cpu"), PyAVReader()
    paths = [
        make_clip(tmp_path / f"{height}.webm", 6, (height, 96), "vp9") for height in (130, 132, 136, 130, 64)
    ]
    for path in [*paths, *paths[::-1]]:
        assert np.array_equal(dali.frames_at(path, [4, 1]).numpy(), cpu.frames_at(path, [4, 1]).numpy())
    read = dali.read_many([(paths[0], [2, 0]), (paths[4], [5]), (paths[0], [2, 2])])
    assert [frames.frame_indices for frames in read] == [(2, 0), (5,), (2, 2)]
    assert [read_number(frame) for frames in read for frame in frames.numpy()] == [2, 0, 5, 2, 2]
    assert dali.handed_over == {}


@needs_dali
@pytest.mark.dali
def test_an_index_outside_the_file_is_refused(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.webm", 12, codec="vp9")
    dali = DaliReader("cpu")
    for index in (-1, 12):
        with pytest.raises(VideoError, match=f"frame_index: got {index}, allowed: 0 to 11"):
            dali.frames_at(path, [3, index])
    assert len(dali.frames_at(path, [])) == 0
    # And if an index says more frames than DALI finds, none is shown.
    with pytest.raises(ValueError, match="outside what DALI finds"):
        dali_module._decode(np.fromfile(path, dtype=np.uint8), [3, 12], "cpu")


@needs_dali
@pytest.mark.dali
def test_a_clip_on_which_dali_fails_is_read_by_the_cpu_reader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_clip(tmp_path / "a.mp4", 12)  # H.264, which DALI refuses on a CPU
    monkeypatch.setattr(dali_module, "why_handed_over", lambda index, device: None)
    dali = DaliReader("cpu")
    assert [read_number(frame) for frame in dali.frames_at(path, [9, 2]).numpy()] == [9, 2]
    assert "DALI does not decode it, the CPU reader does" in caplog.text
    assert dali.reader_of(path) == "pyav"
    broken = cut(make_clip(tmp_path / "b.webm", 12, codec="vp9"), tmp_path / "c.webm", 0.6)
    with pytest.raises(VideoError, match="breaks after frame"):
        dali.probe(broken)


@pytest.mark.parametrize("name", HANDED_OVER)
def test_what_dali_cannot_do_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """This needs no DALI: whether a clip is handed over is decided from the index."""
    monkeypatch.setattr(dali_module, "installed_version", lambda: "2.4")
    monkeypatch.setattr(dali_module, "_decode", lambda *arguments: pytest.fail("DALI was asked"))
    ending, options, reason = HANDED_OVER[name]
    path = make_clip(tmp_path / ending, **{"n_frames": N_FRAMES, "gop": 7, **options})
    dali, cpu = DaliReader("cpu"), PyAVReader()
    n_frames = cpu.probe(path).n_frames
    assert dali.reader_of(path) == "pyav"
    assert np.array_equal(
        dali.frames_at(path, [n_frames - 1, 0]).numpy(), cpu.frames_at(path, [n_frames - 1, 0]).numpy()
    )
    (why,) = dali.handed_over.values()
    assert re.search(f"{reason}$", why)


def test_a_failure_holds_as_long_as_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This needs no DALI: a clip that another one replaced is judged by itself, and reasons are bounded."""
    path = make_clip(tmp_path / "a.webm", 6, codec="vp9")
    pixels = PyAVReader().frames_at(path, [4]).numpy()
    fails = True

    def decode(*_: object) -> tuple[Any, str]:
        if fails:
            raise RuntimeError("no memory")
        return pixels, "cpu"

    monkeypatch.setattr(dali_module, "installed_version", lambda: "2.4")
    monkeypatch.setattr(dali_module, "_decode", decode)
    monkeypatch.setattr(dali_module, "_REMEMBERED", 2)
    dali = DaliReader("cpu")
    dali.frames_at(path, [4])
    assert dali.handed_over == {str(path): "DALI failed"}
    assert dali.reader_of(path) == "pyav"
    fails = False
    os.utime(path, ns=(1, 1))
    assert dali.reader_of(path) == "dali"
    assert dali.handed_over == {}
    assert dali.frames_at(path, [4]).data is pixels
    for number in range(3):
        dali.reader_of(make_clip(tmp_path / f"{number}.mp4", 6))
    assert list(dali.handed_over) == [str(tmp_path / "1.mp4"), str(tmp_path / "2.mp4")]


@needs_dali
@pytest.mark.dali
def test_threads_read_side_by_side(tmp_path: Path) -> None:
    paths = [make_clip(tmp_path / f"{n}.webm", 12, (64 + 2 * n, 96), "vp9", first_number=n) for n in range(6)]
    dali, cpu = DaliReader("cpu", decoders=2), PyAVReader()
    expected = [cpu.frames_at(path, [11, 3, 7]).numpy() for path in paths]
    with ThreadPoolExecutor(6) as threads:
        for _ in range(3):
            shown = list(threads.map(lambda path: dali.frames_at(path, [11, 3, 7]).numpy(), paths))
            assert all(map(np.array_equal, shown, expected))
    assert dali.decoded_frames == 3 * 6 * 3
    assert dali.handed_over == {}


def test_no_more_clips_are_decoded_at_a_time_than_there_are_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This needs no DALI: what it would do is done by another function."""
    path = make_clip(tmp_path / "a.webm", 6, codec="vp9")
    pixels = PyAVReader().frames_at(path, [4]).numpy()
    at_work, most = 0, 0
    lock, full = threading.Lock(), threading.Event()

    def decode(*_: object) -> tuple[Any, str]:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        if at_work == 3:
            full.set()
        full.wait(60)
        with lock:
            at_work -= 1
        return pixels, "cpu"

    monkeypatch.setattr(dali_module, "installed_version", lambda: "2.4")
    monkeypatch.setattr(dali_module, "_decode", decode)
    dali = DaliReader("cpu", decoders=3)
    with ThreadPoolExecutor(8) as threads:
        shown = list(threads.map(lambda _: dali.frames_at(path, [4]).numpy(), range(24)))
    assert all(np.array_equal(frames, pixels) for frames in shown)
    assert most == 3
    for number in (0, 65):
        with pytest.raises(InputError, match=f"decoders: got {number}, allowed: 1 to 64"):
            DaliReader("cpu", decoders=number)


def test_a_gpu_gets_what_its_decoder_can_do(tmp_path: Path) -> None:
    for name, options, reason in (
        ("a.mp4", {}, None),
        ("b.mp4", {"size": (65, 97)}, "pixels in yuv444p, not in 4:2:0 with 8 bits"),
        ("c.webm", {"codec": "vp9", "size": (65, 97)}, "an odd size"),
    ):
        path = make_clip(tmp_path / name, 6, **options)  # type: ignore[arg-type]
        assert why_handed_over(build_index(str(path), tolerate_truncation=False), "gpu") == reason


def test_without_dali_the_reader_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_module, "installed_version", lambda: None)
    with pytest.raises(InputError, match=r"not installed; pip install 'vrthinker\[dali\]', or --reader pyav"):
        DaliReader("cpu")


def test_a_hidden_gpu_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(support, "_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert support.has_gpu()
    for hidden in ("", "-1", "NoDevFiles", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not support.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,-1")
    assert support.has_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(support, "_DRIVER", tmp_path / "nothing")
    assert not support.has_gpu()


def test_without_a_measurement_auto_takes_the_cpu_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, version, reason in (
        (False, None, "no NVIDIA GPU to decode on$"),
        (True, None, r"not installed \(pip install 'vrthinker\[dali\]'\)"),
        (True, "2.4", "nothing has been measured here; vrthinker doctor --readers"),
        (False, "2.4", "nothing has been measured here; vrthinker doctor --readers"),
    ):
        monkeypatch.setattr(support, "has_gpu", lambda gpu=gpu: gpu)
        monkeypatch.setattr(support, "installed_version", lambda version=version: version)
        name, why, times = auto_choice()
        assert (name, times) == ("pyav", None)
        assert re.search(reason, why)
    assert isinstance(open_reader("auto"), PyAVReader)
    with pytest.raises(InputError, match="reader: got 'cuda', allowed: auto, pyav, dali"):
        open_reader("cuda")  # type: ignore[arg-type]


def test_a_workspace_knows_the_reader_of_each_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_module, "installed_version", lambda: "2.4")
    first = make_clip(tmp_path / "a.mp4", 6, (56, 84))
    second = make_clip(tmp_path / "b.webm", 6, (56, 84), "vp9")
    workspace = Workspace.open(
        first, second, reader=DaliReader("cpu"), resize=ResizeSettings(), cache=FrameCache(1 << 20)
    )
    assert workspace.readers == ("pyav", "dali")
    second.unlink()
    assert workspace.readers == ("pyav", None), "a record is written even if a clip is gone"
