"""Numbers that tell clips apart without understanding them: sharpness, flicker, and how much moves.

They are taken from pairs of neighbouring frames, spread evenly over the clip, at one common height, so that
clips of different sizes can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image

from vrthinker.evals.baselines import Baseline
from vrthinker.video.reader import VideoPath, VideoReader

MOMENTS = 8
"""The number of pairs of neighbouring frames that are looked at."""
HEIGHT = 240
"""The height in pixels at which frames are compared."""
Luma = npt.NDArray[np.float64]


def clip_scores(path: VideoPath, reader: VideoReader) -> dict[str, float]:
    """The numbers of a clip by the name of their baseline. The higher one is preferred.

    Args:
        path: The clip.
        reader: The reader that decodes it.

    Raises:
        VideoError: The clip cannot be read.
    """
    n_frames = reader.probe(path).n_frames
    firsts = sorted({index * max(1, n_frames - 1) // MOMENTS for index in range(MOMENTS)})
    wanted = [index for first in firsts for index in (first, min(first + 1, n_frames - 1))]
    luma = [_luma(picture) for picture in reader.frames_at(path, wanted).numpy()]
    moments = list(zip(luma[::2], luma[1::2], strict=True))
    return {name.value: float(np.mean([of(a, b) for a, b in moments])) for name, of in _STATISTICS.items()}


def _sharpness(first: Luma, second: Luma) -> float:
    """The variance of the Laplacian of the first frame."""
    inner = first[1:-1, 1:-1]
    sides = first[:-2, 1:-1] + first[2:, 1:-1] + first[1:-1, :-2] + first[1:-1, 2:]
    return float(np.var(sides - 4 * inner))


def _steadiness(first: Luma, second: Luma) -> float:
    """The change of the mean brightness, as a negative number."""
    return -abs(float(second.mean() - first.mean()))


def _motion(first: Luma, second: Luma) -> float:
    """The mean change of a pixel, apart from a change of the mean brightness."""
    change = second - first
    return float(np.abs(change - change.mean()).mean())


_STATISTICS: Mapping[Baseline, Callable[[Luma, Luma], float]] = {
    Baseline.SHARPNESS: _sharpness,
    Baseline.STEADINESS: _steadiness,
    Baseline.MOTION: _motion,
}


def _luma(picture: npt.NDArray[np.uint8]) -> Luma:
    """The brightness of a picture, 0 to 1, at the common height."""
    image = Image.fromarray(picture).convert("L")
    width = max(3, round(image.width * HEIGHT / image.height))
    return np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR), dtype=np.float64) / 255
