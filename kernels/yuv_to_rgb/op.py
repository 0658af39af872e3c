"""The op `yuv_to_rgb`, on numpy arrays: readers of videos use it, and they load no tensor library.

FFmpeg converts exactly only in plain C, which takes longer than decoding the picture. The C++ version gives
the same bits several times as fast. There is no CUDA version: a decoder on a GPU makes RGB itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vrthinker.errors import InputError
from vrthinker.kernels import Version, choose_version, requested_version
from vrthinker.kernels.yuv_to_rgb.colours import YuvColours, YuvPlanes
from vrthinker.kernels.yuv_to_rgb.reference import yuv_to_rgb_reference


def yuv_to_rgb(
    planes: YuvPlanes, colours: YuvColours, out: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, Any]:
    """Converts a picture in 4:2:0 with 8 bits to RGB.

    Every value is that of exact arithmetic with the factors given, rounded once. It equals what FFmpeg's
    scaler gives with `bilinear+accurate_rnd+full_chroma_int`, bit by bit, except for colours so far outside
    RGB (above twice its range) that FFmpeg's sum overflows and gives 0; this gives 255.

    Args:
        planes: Luma, uint8 `[height, width]`, both even, and two chroma planes, uint8
            `[height / 2, width / 2]`. Rows may be padded.
        colours: How numbers become colours.
        out: The array to fill, contiguous uint8 `[height, width, 3]`; a new one if None.

    Returns:
        The picture, uint8 `[height, width, 3]`.

    Raises:
        InputError: An argument is not as described, or `VRTHINKER_KERNELS` names a version that cannot run.
    """
    if len(planes) != 3:
        raise InputError(f"yuv_to_rgb: planes: got {len(planes)}, wanted 3")
    named = dict(zip(("y", "u", "v"), planes, strict=True))
    for name, plane in named.items():
        if not isinstance(plane, np.ndarray) or plane.dtype != np.uint8 or plane.ndim != 2:
            raise InputError(f"yuv_to_rgb: {name}: got {_form(plane)}, wanted uint8 [height, width]")
    height, width = planes[0].shape
    if height % 2 or width % 2 or not height or not width:
        raise InputError(f"yuv_to_rgb: y: got height {height} and width {width}, wanted even numbers above 0")
    for name, plane in named.items():
        if name != "y" and plane.shape != (height // 2, width // 2):
            raise InputError(
                f"yuv_to_rgb: {name}: got shape {list(plane.shape)}, wanted {[height // 2, width // 2]}"
            )
    if colours.right not in (0, 1) or colours.down not in (0, 1, 2):
        raise InputError(
            f"yuv_to_rgb: colours: got right {colours.right} and down {colours.down}, "
            "wanted 0 or 1, and 0 to 2"
        )
    if out is None:
        out = np.empty((height, width, 3), dtype=np.uint8)
    elif not isinstance(out, np.ndarray) or out.shape != (height, width, 3) or out.dtype != np.uint8:
        raise InputError(f"yuv_to_rgb: out: got {_form(out)}, wanted uint8 {[height, width, 3]}")
    if choose_version("yuv_to_rgb", _obstacles()) == "reference":
        out[...] = yuv_to_rgb_reference(planes, colours)
    else:
        import vrthinker._core as _core

        y, u, v = (plane if plane.strides[1] == 1 else np.ascontiguousarray(plane) for plane in planes)
        try:
            _core.yuv_to_rgb_cpu(
                y, u, v, out, colours.black, list(colours.factors), colours.right, colours.down
            )
        except ValueError as error:  # what the checks above leave to it; it names the op and the argument
            raise InputError(str(error)) from error
    return out


def runs_natively() -> bool:
    """Whether a call would run the C++ version. If not, readers let FFmpeg convert, whatever is asked for.

    Raises:
        InputError: `VRTHINKER_KERNELS` names no version of any op.
    """
    return requested_version() in (None, "cpu") and _obstacles()["cpu"] is None


def _obstacles() -> dict[Version, str | None]:
    try:
        import vrthinker._core  # noqa: F401 - is it there?
    except ImportError as error:
        missing = f"the native module vrthinker._core cannot be imported ({error}); reinstall the package"
        return {"reference": None, "cpu": missing}
    return {"reference": None, "cpu": None}


def _form(value: Any) -> str:
    if not isinstance(value, np.ndarray):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)}"
