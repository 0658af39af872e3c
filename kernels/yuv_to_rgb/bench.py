"""The comparisons of `vrthinker bench yuv_to_rgb`, on random pictures: coloured tiles with some noise.

On pure noise FFmpeg takes twice as long, because many colours are out of range and it branches on that.

Competitors are FFmpeg's exact conversion, which has to give the same bits, and FFmpeg's default one, which is
what other readers show and has other pixels; it is timed only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vrthinker.kernels.measure import Comparison
from vrthinker.kernels.yuv_to_rgb.colours import yuv_colours
from vrthinker.kernels.yuv_to_rgb.op import yuv_to_rgb
from vrthinker.kernels.yuv_to_rgb.reference import yuv_to_rgb_reference

_BT_709, _LIMITED = 1, 1
_TILE = 20


@dataclass(frozen=True)
class Case:
    """One case to measure: the size of the picture."""

    name: str
    height: int
    width: int


CASES = (
    Case("1080p", 1080, 1920),
    Case("720p", 720, 1280),
    Case("one frame of a small clip", 336, 448),
)


def comparisons(device: str, seed: int) -> Iterator[Callable[[], Comparison]]:
    """Yields a function per case, which makes its picture from `seed` when it is called. Only a CPU."""
    if device == "cpu":
        for case in CASES:
            yield partial(compare, case, seed)


def compare(case: Case, seed: int) -> Comparison:
    """A case with its competitors."""
    # Where nothing is measured (on a GPU), PyAV need not be there.
    import av
    from av.video.reformatter import Interpolation, VideoReformatter

    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    random = np.random.default_rng(seed)
    frame: Any = av.VideoFrame(case.width, case.height, "yuv420p")
    frame.colorspace, frame.color_range = _BT_709, _LIMITED
    for plane, (least, most) in zip(frame.planes, ((40, 210), (88, 168), (88, 168)), strict=True):
        rows, columns = plane.height, plane.line_size
        tiles = random.integers(least, most, (rows // _TILE + 1, columns // _TILE + 1))
        flat = tiles.repeat(_TILE, 0).repeat(_TILE, 1)[:rows, :columns]
        plane.update((flat + random.integers(-8, 9, flat.shape)).astype(np.uint8).tobytes())
    y, u, v = (
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        for plane in frame.planes
    )
    planes = (y, u, v)
    colours = yuv_colours(_BT_709, full_range=False, right=1, down=1)
    reformatter = VideoReformatter()

    def by_ffmpeg(flags: Interpolation) -> np.ndarray[Any, Any]:
        shown: Any = reformatter.reformat(frame, format="rgb24", interpolation=flags, threads=1)
        pixels: np.ndarray[Any, Any] = shown.to_ndarray()
        return pixels

    versions: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
        "reference": lambda: yuv_to_rgb_reference(planes, colours),
        "cpp": lambda: yuv_to_rgb(planes, colours),
        "ffmpeg, exact": lambda: by_ffmpeg(exact),
        "ffmpeg, default": lambda: by_ffmpeg(Interpolation.BILINEAR),
    }

    def check() -> None:
        expected = versions["reference"]()
        for name, run in versions.items():
            if name != "ffmpeg, default" and not np.array_equal(run(), expected):
                raise RuntimeError(f"{name} differs from the reference")

    pixels = case.height * case.width
    return Comparison(
        op="yuv_to_rgb",
        case=case.name,
        bytes_moved=pixels * 3 // 2 + pixels * 3,
        competitors=versions,
        check=check,
        facts={"picture": [case.height, case.width]},
    )
