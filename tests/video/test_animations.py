"""Animated WebP and PNG files: frames, times, damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import draw_number, read_number
from PIL import Image, ImageSequence

from vrthinker.errors import MachineError, VideoError
from vrthinker.video import open_reader
from vrthinker.video import webp as webp_module
from vrthinker.video.pyav.reader import PyAVReader

SIZE = (64, 96)
DURATIONS_MS = [80, 80, 120, 80, 200, 80, 80, 80, 40, 80, 80, 300]


def animation(path: Path, durations_ms: list[int], **options: Any) -> Path:
    """Numbered pictures; every other row is noise, so that a picture takes some bytes."""
    noise = np.random.default_rng(3).integers(0, 40, (len(durations_ms), SIZE[0] // 2, SIZE[1], 3), np.uint8)
    images = []
    for i in range(len(durations_ms)):
        picture = draw_number(i, SIZE)
        picture[::2] ^= noise[i]
        images.append(Image.fromarray(picture))
    kind = "PNG" if path.suffix in (".apng", ".png") else None
    images[0].save(path, kind, save_all=True, append_images=images[1:], duration=durations_ms, **options)
    return path


@pytest.mark.parametrize("name", ["a.webp", "a.apng", "a.png"])
def test_frames_and_times_of_an_animation(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name == "a.webp" else {}
    path = animation(tmp_path / name, DURATIONS_MS, **options)
    reader = open_reader()
    info = reader.probe(path)
    assert info == reader.probe(path, tolerate_truncation=True)
    assert info.codec == path.suffix[1:].replace("png", "apng").replace("aapng", "apng")
    assert (info.width, info.height, info.n_frames, info.is_variable_frame_rate) == (96, 64, 12, True)
    starts = np.cumsum([0, *DURATIONS_MS]) / 1000
    assert info.pts_seconds == pytest.approx(starts[:-1])
    assert info.duration_seconds == pytest.approx(starts[-1])
    with Image.open(path) as image:
        oracle = [np.asarray(picture.convert("RGB")) for picture in ImageSequence.Iterator(image)]
    for asked in (list(range(12)), [11, 0, 7, 7], [], [5]):
        frames = reader.frames_at(path, asked)
        assert frames.frame_indices == tuple(asked)
        assert frames.pts_seconds == pytest.approx([starts[i] for i in asked])
        for frame, i in zip(frames.numpy(), asked, strict=True):
            assert read_number(frame) == i
            assert np.array_equal(frame, oracle[i])
    with pytest.raises(VideoError, match="frame_index: got 12, allowed: 0 to 11"):
        reader.frames_at(path, [12])
    shown = reader.read_many([(path, [3]), (str(path), [4, 3])])
    assert [read_number(frame) for batch in shown for frame in batch.numpy()] == [3, 4, 3]


def test_constant_and_missing_durations(tmp_path: Path) -> None:
    steady = open_reader().probe(animation(tmp_path / "a.webp", [40] * 6))
    assert (steady.is_variable_frame_rate, steady.fps) == (False, 25)
    # Browsers show frames without a duration for 100 ms.
    undated = open_reader().probe(animation(tmp_path / "b.webp", [0] * 6))
    assert undated.pts_seconds == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert undated.duration_seconds == pytest.approx(0.6)


def test_a_single_picture_is_no_animation(tmp_path: Path) -> None:
    for name in ("a.webp", "a.png"):
        Image.fromarray(draw_number(1, SIZE)).save(tmp_path / name)
        with pytest.raises(VideoError, match="an image, not a video; put the images of one clip into a"):
            open_reader().probe(tmp_path / name)


@pytest.mark.parametrize("ending", ["webp", "apng"])
def test_every_loss_in_an_animation_is_noticed(tmp_path: Path, ending: str) -> None:
    reader = open_reader()
    options = {"lossless": True} if ending == "webp" else {}
    data = animation(tmp_path / f"a.{ending}", DURATIONS_MS, **options).read_bytes()
    path = tmp_path / f"b.{ending}"
    counts = set()
    for start in range(len(data) // 8, len(data) - 300, len(data) // 16):
        spoiled = [data[:start], data[:start] + data[start + 200 :]]
        if ending == "apng":  # PNG has checksums, WebP has none
            spoiled.append(data[:start] + bytes(200) + data[start + 200 :])
        for content in spoiled:
            path.write_bytes(content)
            with pytest.raises(VideoError, match=r"breaks after frame \d+: |no frame decodes: "):
                reader.probe(path)
            info = reader.probe(path, tolerate_truncation=True)
            assert info.truncated
            assert info.n_frames == len(info.pts_seconds) < 12
            counts.add(info.n_frames)
            frames = reader.frames_at(path, range(info.n_frames), tolerate_truncation=True).numpy()
            if content == spoiled[0] or ending == "apng":
                assert [read_number(frame) for frame in frames] == list(range(info.n_frames))
    assert len(counts) > 6


def test_a_webp_whose_chunks_are_damaged(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.webp", DURATIONS_MS)
    data = path.read_bytes()
    frames = [at for at in range(len(data)) if data[at : at + 4] == b"ANMF"]
    path.write_bytes(data[: frames[4]] + b"\0\0\0\0" + data[frames[4] + 4 :])
    with pytest.raises(VideoError, match=rf"breaks after frame 4: the file is damaged at byte {frames[4]} "):
        open_reader().probe(path)
    # One bit turns a frame into a chunk of an unknown kind.
    path.write_bytes(data[: frames[4]] + b"ANLF" + data[frames[4] + 4 :])
    with pytest.raises(VideoError, match=rf"frame 4: .* damaged at byte {frames[4]} \(a frame under another"):
        open_reader().probe(path)
    # Readers have to skip chunks that they do not know; content credentials are one.
    note = b"C2PA" + (4).to_bytes(4, "little") + b"note"
    size = (len(data) - 8 + len(note)).to_bytes(4, "little")
    path.write_bytes(data[:4] + size + data[8 : frames[2]] + note + data[frames[2] :])
    assert open_reader().probe(path).n_frames == len(frames)
    # A picture that does not decode: its own chunk begins behind the frame's header.
    path.write_bytes(data[: frames[4] + 32] + bytes(30) + data[frames[4] + 62 :])
    with pytest.raises(VideoError, match="breaks after frame 4: a frame does not decode"):
        open_reader().probe(path)
    reader = open_reader()
    info = reader.probe(path, tolerate_truncation=True)
    assert (info.n_frames, info.truncated) == (4, "a frame does not decode")
    # A file that is replaced between the probe and the reading of its frames.
    whole = open_reader().probe(animation(tmp_path / "b.webp", DURATIONS_MS))
    path.replace(tmp_path / "b.webp")
    with pytest.raises(VideoError, match="no frame decodes: a frame does not decode"):
        webp_module.frames_at(whole, [0, 5])
    path = tmp_path / "c.webp"
    path.write_bytes(data[: frames[0]])
    with pytest.raises(VideoError, match="no frame decodes: the file is cut short"):
        open_reader().probe(path)


def test_limits_hold_for_a_webp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = animation(tmp_path / "a.webp", [40] * 6)
    for name, value, line in (
        (
            "MAX_SIDE_PIXELS",
            "80",
            "pictures of 96x64 pixels, allowed: up to 80x80; set VRTHINKER_MAX_",
        ),
        ("MAX_FRAMES", "5", "over 5 frames, allowed: up to 5; set VRTHINKER_MAX_FRAMES to allow more"),
        (
            "MAX_CLIP_PIXELS",
            "30000",
            "at least 5 frames of 96x64 pixels, allowed: 30000 pixels in all; ",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(f"VRTHINKER_{name}", value)
            with pytest.raises(VideoError, match=line):
                open_reader().probe(path)


def test_too_little_memory_for_a_picture_is_said_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = animation(tmp_path / "a.webp", [40] * 6)
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.fromarray(draw_number(0, SIZE)).save(folder / "0.png")
    info = open_reader().probe(path)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    for ask in (
        lambda: PyAVReader().probe(path),  # which remembers nothing of the file
        lambda: webp_module.frames_at(info, [2]),
        lambda: open_reader().probe(folder, tolerate_truncation=True),
        lambda: open_reader().frames_at(folder, [0]),
    ):
        with pytest.raises(MachineError, match="decoding it needs more memory than there is"):
            ask()


def test_a_webp_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = animation(tmp_path / "a.webp", [40] * 3)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(webp_module, "open", refuse, raising=False)
    with pytest.raises(VideoError, match=r"cannot be read \(Input/output error\)"):
        webp_module.probe(path, tolerate_truncation=False)
