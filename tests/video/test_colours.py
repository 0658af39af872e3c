"""Decoded frames to RGB: FFmpeg's bits for every kind of frame, whichever of the two ways converts it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
import pytest
from av.video.reformatter import Interpolation, VideoReformatter
from clips import make_clip

from vrthinker.errors import InputError
from vrthinker.kernels.yuv_to_rgb import op
from vrthinker.kernels.yuv_to_rgb.colours import YuvColours
from vrthinker.video.pyav.colours import RgbConverter
from vrthinker.video.pyav.reader import PyAVReader

EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# H.264's `chroma_sample_loc_type`, as places in a block of 2 x 2 pixels.
LOCATIONS = {0: (0, 1), 1: (1, 1), 2: (0, 0), 3: (1, 0), 4: (0, 2), 5: (1, 2)}


def first_frame(path: Path) -> Any:
    with av.open(str(path)) as container:
        return next(container.decode(video=0))


def by_ffmpeg(frame: Any) -> np.ndarray[Any, Any]:
    shown = VideoReformatter().reformat(frame, format="rgb24", interpolation=EXACT, threads=1)
    return shown.to_ndarray()


def made(height: int, width: int, pixel_format: str, matrix: int = 1) -> Any:
    """A random frame with luma below the colours for which FFmpeg's sums overflow."""
    frame: Any = av.VideoFrame(width, height, pixel_format)
    random = np.random.default_rng(height * width)
    for plane in frame.planes:
        plane.update(random.integers(0, 200, plane.buffer_size, dtype=np.uint8).tobytes())
    frame.colorspace = matrix
    return frame


def found(converter: RgbConverter, frame: Any) -> YuvColours | None:
    converter.check(frame)
    converter.convert(frame)
    (colours,) = converter._colours.values()
    return colours


@pytest.mark.parametrize("location", LOCATIONS)
def test_the_place_of_the_chroma_samples_is_found_out(tmp_path: Path, location: int) -> None:
    options = {"x264-params": f"chromaloc={location}:colormatrix=bt709"}
    frame = first_frame(make_clip(tmp_path / "a.mp4", 2, options=options))
    converter = RgbConverter()
    colours = found(converter, frame)
    assert colours is not None
    assert (colours.right, colours.down) == LOCATIONS[location]
    assert np.array_equal(converter.convert(frame), by_ffmpeg(frame))


def test_the_place_of_the_chroma_samples_may_change_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        make_clip(tmp_path / f"{n}.h264", 6, gop=6, options={"x264-params": f"chromaloc={location}"})
        for n, location in enumerate((0, 2, 0))
    ]
    clip = tmp_path / "all.h264"
    clip.write_bytes(b"".join(part.read_bytes() for part in parts))
    wanted = range(PyAVReader().probe(clip).n_frames)
    by_op = [PyAVReader().frames_at(clip, indices).numpy() for indices in (wanted, [14, 8, 2])]
    monkeypatch.setattr(op, "runs_natively", lambda: False)
    by_ffmpeg = PyAVReader().frames_at(clip, wanted).numpy()
    assert len(by_ffmpeg) == 18
    assert np.array_equal(by_op[0], by_ffmpeg)
    assert np.array_equal(by_op[1], by_ffmpeg[[14, 8, 2]])


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg"])
def test_the_op_converts_the_frames_of_every_codec(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(tmp_path / "a.mkv", 3, codec=codec)
    colours = found(RgbConverter(), first_frame(clip))
    assert colours is not None
    assert colours.black == (0 if codec == "mjpeg" else 16)
    by_op = PyAVReader().frames_at(clip, [2, 0]).numpy()
    monkeypatch.setattr(op, "runs_natively", lambda: False)
    assert np.array_equal(PyAVReader().frames_at(clip, [2, 0]).numpy(), by_op)


@pytest.mark.parametrize(
    ("height", "width", "pixel_format"),
    [
        (64, 95, "yuv420p"),
        (63, 96, "yuv420p"),
        (14, 96, "yuv420p"),
        (64, 12, "yuv420p"),
        (64, 96, "yuv444p"),
        (64, 96, "yuv422p"),
        (64, 96, "yuvj444p"),
        (64, 96, "yuv420p10le"),
        (64, 96, "gray"),
        (64, 96, "rgb24"),
    ],
)
def test_other_frames_are_converted_by_ffmpeg(height: int, width: int, pixel_format: str) -> None:
    frame, converter = made(height, width, pixel_format), RgbConverter()
    assert found(converter, frame) is None
    assert np.array_equal(converter.convert(frame), by_ffmpeg(frame))


def test_a_matrix_that_ffmpeg_does_not_convert() -> None:
    frame, converter = made(64, 96, "yuv420p", matrix=10), RgbConverter()
    with pytest.raises(av.FFmpegError):
        by_ffmpeg(frame)
    with pytest.raises(av.FFmpegError):
        converter.check(frame)
    with pytest.raises(av.FFmpegError):
        converter.convert(frame)


def test_what_differs_on_the_picture_that_is_tried_out_is_left_to_ffmpeg(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame = made(64, 96, "yuv420p")
    original = op.yuv_to_rgb

    def wrong(*arguments: Any) -> Any:
        pixels = original(*arguments)
        pixels[-1, -1, -1] ^= 1
        return pixels

    monkeypatch.setattr(op, "yuv_to_rgb", wrong)
    converter = RgbConverter()
    assert found(converter, frame) is None
    assert np.array_equal(converter.convert(frame), by_ffmpeg(frame))


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_a_frame_of_the_size_that_is_tried_out_keeps_its_pixels(size: tuple[int, int]) -> None:
    frame = made(*size, "yuv420p")
    before = [bytes(plane) for plane in frame.planes]
    assert found(RgbConverter(), frame) is not None
    assert [bytes(plane) for plane in frame.planes] == before


def test_a_converter_tells_kinds_of_frames_apart() -> None:
    converter = RgbConverter()
    for frame in (made(64, 96, "yuv420p", 1), made(64, 96, "yuv420p", 5), made(64, 80, "yuvj420p", 1)):
        assert np.array_equal(converter.convert(frame), by_ffmpeg(frame))
    assert len(converter._colours) == 3
    assert len(set(converter._colours.values())) == 3


def test_planes_that_run_upwards_are_left_to_ffmpeg() -> None:
    graph = av.filter.Graph()
    frame = made(64, 96, "yuv420p")
    graph.link_nodes(
        graph.add_buffer(width=96, height=64, format=frame.format, time_base=Fraction(1, 24)),
        graph.add("vflip"),
        graph.add("buffersink"),
    ).configure()
    graph.push(frame)
    flipped, converter = graph.pull(), RgbConverter()
    assert flipped.planes[0].line_size < 0
    assert np.array_equal(converter.convert(flipped), by_ffmpeg(flipped))
    assert converter._colours == {}


def test_a_name_that_is_no_version_is_not_blamed_on_the_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(tmp_path / "a.mp4", 3)
    monkeypatch.setenv("VRTHINKER_KERNELS", "fast")
    with pytest.raises(InputError, match=r"^VRTHINKER_KERNELS: got 'fast', allowed: auto, reference"):
        PyAVReader().frames_at(clip, [0])


@pytest.mark.parametrize("version", ["reference", "cuda"])
def test_another_version_of_the_kernels_leaves_it_to_ffmpeg(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = made(64, 96, "yuv420p")
    expected = by_ffmpeg(frame)
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    assert np.array_equal(RgbConverter().convert(frame), expected)
