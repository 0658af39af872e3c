"""The frames that a reader returns, with their places in the file.

Invariant: `data[i]` is the frame with `frame_indices[i]`, shown `pts_seconds[i]` after the file's
first frame. The pixels may live on a GPU; they always export DLPack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_CHANNELS = 3
Picture = Any
"""The pixels of one frame, uint8 `[height, width, 3]`: a numpy array, or a torch tensor on the GPU that
decoded it. `on_host` makes an array of either."""


@dataclass(frozen=True, eq=False, repr=False)
class Frames:
    """Frames of one file, in the order in which they were requested.

    Attributes:
        data: The pixels, uint8 `[n, height, width, 3]`, RGB: a numpy array from a CPU reader, a device tensor
            from a GPU reader, or anything with `shape`, `dtype`, `__dlpack__` and `__dlpack_device__`.
        frame_indices: The 0-based positions in the file, in presentation order. Repeats are allowed.
        pts_seconds: The time at which each frame is shown, counted from the file's first frame.
        device: The device of `data`: "cpu", "cuda:0", ...

    Raises:
        ValueError: `data` has another shape or dtype, or the three lengths differ.
    """

    data: Any
    frame_indices: tuple[int, ...]
    pts_seconds: tuple[float, ...]
    device: str = "cpu"

    def __post_init__(self) -> None:
        shape = tuple(self.data.shape)
        if len(shape) != 4 or shape[-1] != _CHANNELS:
            raise ValueError(f"frames: got shape {list(shape)}, expected [n, height, width, {_CHANNELS}]")
        if str(self.data.dtype).rpartition(".")[2] != "uint8":
            raise ValueError(f"frames: got dtype {self.data.dtype}, expected uint8")
        if not shape[0] == len(self.frame_indices) == len(self.pts_seconds):
            raise ValueError(
                f"frames: got {shape[0]} pictures, {len(self.frame_indices)} frame_indices and "
                f"{len(self.pts_seconds)} pts_seconds, expected as many of each"
            )
        if any(index < 0 for index in self.frame_indices):
            raise ValueError(f"frames: got frame_indices {self.frame_indices}, allowed: 0 and above")

    def __len__(self) -> int:
        return len(self.frame_indices)

    def __repr__(self) -> str:
        return (
            f"Frames(shape={list(self.data.shape)}, dtype=uint8, device={self.device!r}, "
            f"frame_indices={self.frame_indices}, "
            f"pts_seconds=({', '.join(f'{seconds:.3f}' for seconds in self.pts_seconds)}))"
        )

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) in pixels."""
        return int(self.data.shape[1]), int(self.data.shape[2])

    def __dlpack__(self, **arguments: Any) -> Any:
        """Exports the pixels without a copy. The arguments are those of the array API standard."""
        return self.data.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        """The (device type, device id) in DLPack's numbers."""
        kind, number = self.data.__dlpack_device__()
        return int(kind), int(number)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The pixels on the host, uint8 `[n, height, width, 3]`. They are copied only from a device."""
        return on_host(self.data)


def on_host(pixels: Any) -> np.ndarray[Any, Any]:
    """Pixels in the host's memory. They are copied only from a device."""
    import numpy as np

    if isinstance(pixels, np.ndarray):
        return pixels
    return np.asarray(np.from_dlpack(pixels.cpu() if hasattr(pixels, "cpu") else pixels))
