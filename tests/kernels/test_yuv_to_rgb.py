"""`yuv_to_rgb`: FFmpeg's exact conversion bit by bit, the specification, colours beyond white, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation, VideoReformatter

from vrthinker import _core
from vrthinker.errors import InputError
from vrthinker.kernels.yuv_to_rgb.bench import CASES, compare
from vrthinker.kernels.yuv_to_rgb.colours import LUMA_WEIGHTS, YuvColours, YuvPlanes, yuv_colours
from vrthinker.kernels.yuv_to_rgb.op import yuv_to_rgb
from vrthinker.kernels.yuv_to_rgb.reference import yuv_to_rgb_reference

EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
FULL_RANGE = 2
# FFmpeg's sum overflows for colours above twice the range; no luma up to here gets there.
BRIGHTEST = 200


def random_planes(height: int, width: int, seed: int, brightest: int = 255) -> YuvPlanes:
    random = np.random.default_rng(seed)
    luma = random.integers(0, brightest + 1, (height, width), dtype=np.uint8)
    u, v = (random.integers(0, 256, (height // 2, width // 2), dtype=np.uint8) for _ in range(2))
    return luma, u, v


def by_ffmpeg(planes: YuvPlanes, matrix: int, full_range: bool) -> np.ndarray[Any, Any]:
    """FFmpeg's conversion. A frame that PyAV makes has its chroma samples in the middle of their blocks."""
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane, pixels in zip(frame.planes, planes, strict=True):
        padded = np.zeros((plane.height, plane.line_size), dtype=np.uint8)
        padded[:, : plane.width] = pixels
        plane.update(padded.tobytes())
    frame.colorspace, frame.color_range = matrix, FULL_RANGE if full_range else 1
    shown = VideoReformatter().reformat(frame, format="rgb24", interpolation=EXACT, threads=1)
    return shown.to_ndarray()


def changed(planes: YuvPlanes, change: Callable[[Any], Any]) -> YuvPlanes:
    y, u, v = map(change, planes)
    return y, u, v


@pytest.mark.parametrize("matrix", sorted(LUMA_WEIGHTS))
@pytest.mark.parametrize("full_range", [False, True])
def test_the_bits_are_those_of_ffmpeg(matrix: int, full_range: bool) -> None:
    colours = yuv_colours(matrix, full_range=full_range, right=1, down=1)
    for seed, (height, width) in enumerate([(16, 16), (48, 130), (18, 64), (34, 200)]):
        planes = random_planes(height, width, seed, BRIGHTEST)
        expected = by_ffmpeg(planes, matrix, full_range)
        assert np.array_equal(yuv_to_rgb(planes, colours), expected)
        assert np.array_equal(yuv_to_rgb_reference(planes, colours), expected)


@pytest.mark.parametrize(("right", "down"), list(itertools.product((0, 1), (0, 1, 2))))
def test_the_native_version_is_the_specification(right: int, down: int) -> None:
    colours = yuv_colours(1, full_range=False, right=right, down=down)
    for seed, (height, width) in enumerate([(2, 2), (2, 66), (4, 6), (64, 64), (30, 190), (26, 128)]):
        planes = random_planes(height, width, seed)
        assert np.array_equal(yuv_to_rgb(planes, colours), yuv_to_rgb_reference(planes, colours))


def test_the_specification_is_linear_interpolation_between_the_samples_places() -> None:
    """In doubles, a pixel at a time, for samples on the left edge of their blocks, halfway down."""
    colours = yuv_colours(5, full_range=True, right=0, down=1)
    planes = random_planes(8, 10, 3)
    luma, u, v = (plane.astype(float) for plane in planes)

    def chroma(plane: np.ndarray[Any, Any], row: int, column: int) -> float:
        rows, columns = plane.shape
        y, x = min(max(row / 2 - 0.25, 0), rows - 1), min(max(column / 2, 0), columns - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
        above = plane[top, left] * (1 - x + left) + plane[top, right] * (x - left)
        below = plane[bottom, left] * (1 - x + left) + plane[bottom, right] * (x - left)
        return float(above * (1 - y + top) + below * (y - top)) - 128

    shown = yuv_to_rgb_reference(planes, colours)
    for row, column in itertools.product(range(8), range(10)):
        grey, blue, red = luma[row, column], chroma(u, row, column), chroma(v, row, column)
        exact = [grey + 1.402 * red, grey - 0.344136 * blue - 0.714136 * red, grey + 1.772 * blue]
        assert np.abs(np.clip(exact, 0, 255) - shown[row, column]).max() < 0.55


def test_colours_beyond_white_are_white_where_ffmpeg_overflows() -> None:
    planes = (
        np.full((16, 16), 255, np.uint8),
        np.full((8, 8), 255, np.uint8),
        np.full((8, 8), 128, np.uint8),
    )
    colours = yuv_colours(5, full_range=False, right=1, down=1)
    assert yuv_to_rgb(planes, colours)[0, 0].tolist() == [255, 229, 255]
    assert by_ffmpeg(planes, 5, False)[0, 0, 2] == 0  # once it is 255, BRIGHTEST can go


def test_padded_rows_other_strides_and_a_given_output() -> None:
    planes = random_planes(34, 70, 0)
    colours = yuv_colours(9, full_range=False, right=0, down=2)
    expected = yuv_to_rgb_reference(planes, colours)
    padded = changed(planes, lambda plane: np.pad(plane, ((0, 3), (0, 29)))[: len(plane), : plane.shape[1]])
    transposed = changed(planes, np.asfortranarray)
    turned = changed(planes, lambda plane: plane[::-1, ::-1])
    assert np.array_equal(yuv_to_rgb(padded, colours), expected)
    assert np.array_equal(yuv_to_rgb(transposed, colours), expected)
    assert np.array_equal(yuv_to_rgb(turned, colours), yuv_to_rgb_reference(turned, colours))
    stack = np.zeros((3, 34, 70, 3), dtype=np.uint8)
    assert yuv_to_rgb(planes, colours, stack[1]) is not None
    assert np.array_equal(stack[1], expected)
    assert not stack[0].any()
    assert not stack[2].any()


def test_the_version_is_the_one_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    planes, colours = random_planes(16, 16, 0), yuv_colours(1, full_range=False, right=1, down=1)
    expected = yuv_to_rgb(planes, colours)
    monkeypatch.setattr(_core, "yuv_to_rgb_cpu", None)
    with pytest.raises(TypeError):
        yuv_to_rgb(planes, colours)
    monkeypatch.setenv("VRTHINKER_KERNELS", "reference")
    assert np.array_equal(yuv_to_rgb(planes, colours), expected)
    monkeypatch.setenv("VRTHINKER_KERNELS", "cuda")
    with pytest.raises(
        InputError, match="yuv_to_rgb: VRTHINKER_KERNELS=cuda, but the op has no such version"
    ):
        yuv_to_rgb(planes, colours)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": np.zeros((16, 15), np.uint8)}, "y: got height 16 and width 15, wanted even numbers above 0"),
        ({"y": np.zeros((0, 16), np.uint8)}, "y: got height 0 and width 16, wanted even"),
        ({"y": np.zeros((16, 16), np.int8)}, r"y: got int8 \[16, 16\], wanted uint8 \[height, width\]"),
        ({"u": [1, 2]}, "u: got list, wanted uint8"),
        ({"v": np.zeros((8, 9), np.uint8)}, r"v: got shape \[8, 9\], wanted \[8, 8\]"),
        (
            {"colours": YuvColours(16, (1, 1, 1, 1, 1), 2, 0)},
            "colours: got right 2 and down 0, wanted 0 or 1",
        ),
        ({"out": np.zeros((16, 16), np.uint8)}, r"out: got uint8 \[16, 16\], wanted uint8 \[16, 16, 3\]"),
        ({"out": [0]}, "out: got list, wanted uint8"),
        ({"out": np.zeros((16, 32, 3), np.uint8)[:, ::2]}, "out: got .*contiguous"),
        ({"colours": YuvColours(300, (1, 1, 1, 1, 1), 1, 0)}, "black: got 300, wanted 0 to 255"),
        ({"colours": YuvColours(16, (1 << 15, 1, 1, 1, 1), 1, 0)}, "factors: got 32768"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    y, u, v = random_planes(16, 16, 0)
    colours = yuv_colours(1, full_range=False, right=1, down=1)
    given: dict[str, Any] = {"y": y, "u": u, "v": v, "colours": colours, "out": None, **changed}
    with pytest.raises(InputError, match=f"^yuv_to_rgb: {message}"):
        yuv_to_rgb((given["y"], given["u"], given["v"]), given["colours"], given["out"])


def test_a_matrix_that_is_not_known() -> None:
    with pytest.raises(InputError, match=r"yuv_to_rgb: matrix: got 14, wanted one of \[1, 2, 4"):
        yuv_colours(14, full_range=False, right=0, down=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": np.zeros((16, 15), np.uint8)}, "y: got shape .*, wanted even sides of 2 to 65536"),
        ({"u": np.zeros((8, 16), np.uint8)[:, ::2]}, "u: got a stride of 2 between pixels, wanted 1"),
        ({"v": np.zeros((9, 8), np.uint8)}, "v: got shape"),
        ({"out": np.zeros((16, 32, 3), np.uint8)[:, ::2]}, "out: got .*contiguous"),
        ({"out": np.zeros((16, 16, 4), np.uint8)}, "out: got shape"),
        ({"factors": [1 << 15, 0, 0, 0, 0]}, "factors: got 32768, wanted sizes below 32768"),
        ({"black": 256}, "black: got 256, wanted 0 to 255"),
        ({"right": 2}, "right and down: got 2 and 1, wanted 0 or 1, and 0 to 2"),
        ({"down": -1}, "right and down: got 1 and -1, wanted 0 or 1, and 0 to 2"),
    ],
)
def test_the_native_function_refuses_what_would_leave_its_memory(
    changed: dict[str, Any], message: str
) -> None:
    y, u, v = random_planes(16, 16, 0)
    given: dict[str, Any] = {"y": y, "u": u, "v": v, "out": np.zeros((16, 16, 3), np.uint8), "black": 16}
    given |= {"factors": [9539, 13075, -3209, -6660, 16525], "right": 1, "down": 1}
    with pytest.raises(ValueError, match=f"yuv_to_rgb: {message}"):
        _core.yuv_to_rgb_cpu(**{**given, **changed})


def test_the_benchmark_compares_equal_results() -> None:
    comparison = compare(CASES[-1], seed=5)
    comparison.check()
    assert {"reference", "cpp", "ffmpeg, exact", "ffmpeg, default"} <= set(comparison.competitors)
