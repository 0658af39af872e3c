"""Transparent pixels look the same from every container: on white, with a note."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import draw_number, make_clip
from PIL import Image

from vrthinker.video import FrameCache, ResizeSettings, Workspace, open_reader
from vrthinker.video.transparency import NOTE, on_ground

SIZE = (64, 96)
N_FRAMES = 4


def pictures(opacity: int) -> list[np.ndarray[Any, Any]]:
    """Red pictures whose left half is transparent, with black below; the number is drawn nowhere."""
    shown = np.zeros((*SIZE, 4), np.uint8)
    shown[:, 48:] = (200, 40, 40, 255)
    shown[:, :48, 3] = opacity
    moved = []
    for i in range(N_FRAMES):  # every picture differs, so that no encoder merges two
        picture = shown.copy()
        picture[8 * i : 8 * i + 8, 48:] = (40, 40, 200, 255)
        moved.append(picture)
    return moved


def write_with_pillow(path: Path, frames: list[np.ndarray[Any, Any]]) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    options: dict[str, Any] = {"webp": {"lossless": True, "exact": True}, "gif": {"disposal": 2}}
    images[0].save(
        path,
        "PNG" if path.suffix == ".apng" else None,
        save_all=True,
        append_images=images[1:],
        duration=100,
        **options.get(path.suffix[1:], {}),
    )


def write_folder(path: Path, frames: list[np.ndarray[Any, Any]]) -> None:
    path.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{i}.png")


def write_with_ffmpeg(encoder: str) -> Callable[[Path, list[np.ndarray[Any, Any]]], None]:
    def write(path: Path, frames: list[np.ndarray[Any, Any]]) -> None:
        options = {"auto-alt-ref": "0", "deadline": "realtime", "cpu-used": "8", "crf": "4", "b": "2M"}
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(encoder, rate=10, options=options)
            stream.height, stream.width = SIZE
            stream.pix_fmt = "yuva420p"
            stream.codec_context.gop_size = 2
            for i, frame in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(frame, format="rgba")
                picture.pts = i
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))

    return write


WRITERS: dict[str, Callable[[Path, list[np.ndarray[Any, Any]]], None]] = {
    "a.gif": write_with_pillow,
    "a.apng": write_with_pillow,
    "a.webp": write_with_pillow,
    "folder": write_folder,
    "vp9.webm": write_with_ffmpeg("libvpx-vp9"),
    "vp8.webm": write_with_ffmpeg("libvpx"),
}


CASES = [(name, opacity) for name in WRITERS for opacity in (0, 128) if opacity == 0 or name != "a.gif"]
"""GIF knows only opaque and transparent pixels."""


@pytest.mark.parametrize(("name", "opacity"), CASES)
def test_transparent_pixels_are_shown_on_white(tmp_path: Path, name: str, opacity: int) -> None:
    path = tmp_path / name
    WRITERS[name](path, pictures(opacity))
    reader = open_reader()
    info = reader.probe(path)
    assert (info.n_frames, info.notes) == (N_FRAMES, (NOTE,))
    for frame_indices in ([0, 1, 2, 3], [3]):
        for frame, i in zip(reader.frames_at(path, frame_indices).numpy(), frame_indices, strict=True):
            ground = 255 - opacity
            assert np.abs(frame[:, :44].astype(int) - ground).max() <= 3
            expected = pictures(opacity)[i][:, 52:, :3].astype(int)
            assert np.abs(frame[:, 52:] - expected).mean() < 6


def test_opaque_pictures_have_no_note(tmp_path: Path) -> None:
    """Encoders of animations use transparency to store differences, and PNG files have it for nothing."""
    for name in ("a.gif", "a.apng", "a.webp"):
        write_with_pillow(tmp_path / name, pictures(255))
        assert open_reader().probe(tmp_path / name).notes == ()
    plain = make_clip(tmp_path / "plain.webm", 3, codec="vp9")
    assert open_reader().probe(plain).notes == ()


def test_opaque_pixels_are_not_changed_by_a_bit() -> None:
    picture = draw_number(5, SIZE)
    opaque = np.full(SIZE, 255, np.uint8)
    assert on_ground(picture, opaque) is picture
    opaque[0, 0] = 0
    mixed = on_ground(picture, opaque)
    assert mixed[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(mixed[1:], picture[1:])
    grey = np.array([[[100, 100, 100]]], np.uint8)
    values = [int(on_ground(grey, np.array([[a]], np.uint8))[0, 0, 0]) for a in range(256)]
    assert values == [round((100 * a + 255 * (255 - a)) / 255) for a in range(256)]


def test_the_workspace_says_which_video_is_transparent(tmp_path: Path) -> None:
    write_with_pillow(tmp_path / "a.webp", pictures(0))
    plain = make_clip(tmp_path / "b.mp4", 4)
    workspace = Workspace.open(
        plain,
        tmp_path / "a.webp",
        reader=open_reader(),
        resize=ResizeSettings(),
        cache=FrameCache(0),
    )
    assert workspace.notes == (f"video 2 {NOTE}",)
