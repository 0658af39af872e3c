"""Folders of images as clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clips import draw_number, read_number
from PIL import Image

from vrthinker.errors import InputError, VideoError
from vrthinker.video import open_reader


def write(folder: Path, names: list[str], size: tuple[int, int] = (64, 96)) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(draw_number(number, size)).save(folder / name)
    return folder


def test_images_come_in_natural_order(tmp_path: Path) -> None:
    names = ["f1.png", "F2.PNG", "f9.png", "f10.png", "f010b.png", "f100.png", "f\u0661.png"]
    folder = write(tmp_path / "clip", names)
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_text("not an image")
    (folder / "sub.png").mkdir()
    reader = open_reader()
    info = reader.probe(folder)
    assert (info.codec, info.n_frames, info.fps, info.width, info.height) == ("images", 7, 8.0, 96, 64)
    assert info.pts_seconds == tuple(i / 8 for i in range(7))
    assert info.duration_seconds == 7 / 8
    frames = reader.frames_at(folder, [6, 0, 3, 3])
    assert [read_number(frame) for frame in frames.numpy()] == [6, 0, 3, 3]
    assert frames.pts_seconds == (0.75, 0.0, 0.375, 0.375)
    assert open_reader(image_fps=2).probe(folder).fps == 2
    with pytest.raises(InputError, match="image_fps: got 0"):
        open_reader(image_fps=0)


def test_every_kind_of_image(tmp_path: Path) -> None:
    folder = write(tmp_path / "clip", ["0.png", "1.jpg", "2.jpeg", "3.webp", "4.bmp"])
    picture = Image.fromarray(draw_number(5, (64, 96)))
    picture.convert("RGBA").save(folder / "5.png")
    Image.fromarray(draw_number(6, (64, 96))).quantize(16).save(folder / "6.png")
    Image.fromarray(draw_number(7, (64, 96))).convert("L").save(folder / "7.png")
    grey = np.asarray(Image.fromarray(draw_number(8, (64, 96))).convert("L")).astype(np.uint16) << 8
    Image.fromarray(grey).save(folder / "8.png")
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(draw_number(9, (64, 96)))))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(folder / "9.jpg", exif=exif)
    frames = open_reader().frames_at(folder, range(10)).numpy()
    assert [read_number(frame) for frame in frames] == list(range(10))
    assert np.array_equal(frames[0], draw_number(0, (64, 96)))


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_reader()
    folder = write(tmp_path / "clip", ["1.png", "2.png", "3.png"])
    with pytest.raises(VideoError, match=r"clip: frame_index: got 3, allowed: 0 to 2$"):
        reader.frames_at(folder, [3])
    Image.fromarray(draw_number(0, (96, 64))).save(folder / "10.png")
    message = r"10\.png is 64x96, 1\.png is 96x64; all images of a clip must have one size"
    for ask in (lambda: reader.probe(folder), lambda: reader.frames_at(folder, [0])):
        with pytest.raises(VideoError, match=message):
            ask()
    monkeypatch.setenv("VRTHINKER_MAX_SIDE_PIXELS", "80")
    with pytest.raises(
        VideoError, match=r"1\.png is 96x64 pixels, allowed: up to 80x80; set VRTHINKER_MAX_SI"
    ):
        reader.probe(folder)
    monkeypatch.setenv("VRTHINKER_MAX_FRAMES", "3")
    with pytest.raises(
        VideoError, match="over 3 frames, allowed: up to 3; set VRTHINKER_MAX_FRAMES to allow more"
    ):
        reader.probe(folder)


def test_a_damaged_image_is_a_break(tmp_path: Path) -> None:
    reader = open_reader()
    folder = write(tmp_path / "clip", [f"{i}.png" for i in range(6)])
    data = (folder / "4.png").read_bytes()
    for damaged, at_probe in ((data[: len(data) // 2], False), (b"no image", True)):
        (folder / "4.png").write_bytes(damaged)
        # A header that reads is believed until the picture is asked for.
        asked = [0] if at_probe else [0, 4]
        message = r"breaks after frame 4: 4\.png is .*; --tolerate-truncation judges the 4 frames before"
        with pytest.raises(VideoError, match=message):
            reader.frames_at(folder, asked)
        info = reader.probe(folder, tolerate_truncation=True)
        assert info.n_frames == 4
        assert info.truncated == "4.png is not a readable image"
        frames = reader.frames_at(folder, [3], tolerate_truncation=True)
        assert read_number(frames.numpy()[0]) == 3
    for i in range(6):
        (folder / f"{i}.png").write_bytes(b"no image")
    for tolerate in (False, True):
        with pytest.raises(VideoError, match=r"clip: no frame decodes: 0\.png is not a readable image$"):
            reader.probe(folder, tolerate_truncation=tolerate)


def test_a_picture_of_another_kind_under_an_image_name_is_refused(tmp_path: Path) -> None:
    """Pillow would read an EPS by starting another program on it."""
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "1.eps")
    (tmp_path / "1.eps").rename(tmp_path / "1.png")
    with pytest.raises(VideoError):
        open_reader().frames_at(tmp_path, [0, 1])


def test_a_folder_of_videos_says_what_to_do(tmp_path: Path) -> None:
    for name in ("10.mp4", "9.mp4", "x.webm"):
        (tmp_path / name).write_bytes(b"not looked at")
    message = (
        r"a folder of videos \(9\.mp4, 10\.mp4, \.\.\.\), where one clip is wanted: give one of its file"
    )
    with pytest.raises(VideoError, match=message + "s, or list pairs of them in a file for --pairs$"):
        open_reader().probe(tmp_path)
    (tmp_path / "x.webm").unlink()
    with pytest.raises(VideoError, match=r"a folder of videos \(9\.mp4, 10\.mp4\), where"):
        open_reader().probe(tmp_path)


def test_the_pixels_of_a_folder_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "clip", [f"{i}.png" for i in range(6)])
    monkeypatch.setenv("VRTHINKER_MAX_CLIP_PIXELS", str(5 * 64 * 96))
    with pytest.raises(
        VideoError, match=r"at least 6 frames of 96x64 pixels, allowed: 30720 pixels in all; set "
    ):
        open_reader().probe(folder)


def test_nothing_of_pillow_reaches_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """A picture of a suspicious size, and transparency that Pillow would rather have in another form."""
    folder = write(tmp_path / "clip", ["0.png"])
    Image.fromarray(draw_number(1, (64, 96))).quantize(16).save(
        folder / "1.png", transparency=bytes([0, 128, 255])
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 90)
    with pytest.warns(Image.DecompressionBombWarning), Image.open(folder / "0.png"):
        pass
    assert open_reader().probe(folder, tolerate_truncation=True).n_frames == 2
    open_reader().frames_at(folder, [0, 1])
    assert list(recwarn) == []
