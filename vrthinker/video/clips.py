"""Clips wherever their pixels are: in a file, in bytes, in an array or a tensor, or in an iterator of frames.

A clip in memory has no path. It has a name made of its content (`memory:sha256:…`), which stands in its place
in caches and records. Invariants: equal content in the same layout has the same name; limits are checked
before any work; an array or a tensor is never copied as a whole, only the frames that are shown; torch is not
imported here.

Whoever gives an array or a tensor must not change it until the verdict is there.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal

from vrthinker import limits
from vrthinker.errors import InputError
from vrthinker.video.clip_readers import ArrayReader, NamedReader, ReaderByName
from vrthinker.video.content import ClipContent, clip_content
from vrthinker.video.reader import VideoPath, VideoReader, check_amount, check_side

if TYPE_CHECKING:
    import numpy as np

Layout = Literal["THWC", "TCHW", "CTHW"]
Values = Literal["0..255", "0..1", "-1..1"]
_AXES = {"THWC": (0, 1, 2, 3), "TCHW": (0, 2, 3, 1), "CTHW": (1, 2, 3, 0)}
"""Layout -> its axes of time, height, width and channels."""
_FLOATS = {"0..1": (255.0, 0.0), "-1..1": (127.5, 127.5)}
"""Values -> the factor and the offset that make 0 to 255 of them."""
_CHANNELS = 3
_BLOCK_BYTES = 1 << 20
_device_clips = itertools.count(1)


class Clip(abc.ABC):
    """One clip to judge. Make one with `from_file`, `from_bytes`, `from_array` or `from_frames`."""

    name: str
    """The path of a file, or the name that a clip in memory has in caches and records."""

    @staticmethod
    def from_file(path: VideoPath) -> Clip:
        """A clip in a file, or in a folder of images. Nothing is read yet."""
        return _FileClip(path)

    @staticmethod
    def from_bytes(data: bytes | bytearray | memoryview | IO[bytes]) -> Clip:
        """A clip whose file is in memory: its bytes, or an open binary file, which is read from where it is.

        The bytes are copied once, into memory that the decoder can open like a file.

        Raises:
            InputError: There are no bytes, or more than the limit (`VRTHINKER_MAX_MEMORY_BYTES`).
        """
        return _BytesClip(data)

    @staticmethod
    def from_array(
        array: Any,
        *,
        fps: float,
        values: Values = "0..255",
        layout: Layout | None = None,
    ) -> Clip:
        """A clip whose frames are in an array or a tensor. It is not copied.

        A tensor on a GPU stays there. The frames that the judge shows (8 at first, up to 8 a round) are
        copied to the host, where they are resized as those of a file are. Since hashing it would copy all of
        it, its name is a number of this process: two clips that hold the same tensor are two clips, and
        records have no digest of them.

        Args:
            array: The frames, RGB: uint8, or of a float dtype with `values` saying what they mean. A numpy
                array, a torch tensor, or anything that numpy can view.
            fps: The frames per second.
            values: `0..255` (uint8), or `0..1` or `-1..1` (floats, which are clamped and rounded).
            layout: `THWC` (`[frames, height, width, 3]`), `TCHW`, or `CTHW` (`[3, frames, height, width]`).
                By default THWC or TCHW, whichever the shape fits.

        Raises:
            InputError: Shape, dtype, rate or values are not those of a clip, or it is over a limit.
        """
        return _ArrayClip(array, fps=fps, values=values, layout=layout)

    @staticmethod
    def from_frames(frames: Iterable[Any], *, fps: float, values: Values = "0..255") -> Clip:
        """A clip of single frames: arrays, tensors or Pillow images, `[height, width, 3]` each, of one size.

        They are read to the end here, up to the limit (`VRTHINKER_MAX_MEMORY_BYTES`), and kept as uint8.

        Raises:
            InputError: There is no frame, a frame is no picture or has another size, or they are too many.
        """
        return _ArrayClip(_stacked(frames, values), fps=fps, values="0..255", layout="THWC")

    @abc.abstractmethod
    def content(self) -> ClipContent | None:
        """What the clip contains; None if that is not known."""

    @abc.abstractmethod
    def reader(self, files: VideoReader) -> VideoReader:
        """The reader that reads this clip by its name.

        Args:
            files: The reader of files.
        """

    def __repr__(self) -> str:
        return f"Clip({self.name!r})"


ClipSource = VideoPath | bytes | IO[bytes] | Clip


def as_clip(source: object, what: str) -> Clip:
    """A clip of what a caller gives: a clip, a path, bytes or an open file.

    Args:
        source: What was given.
        what: What it is for, in messages.

    Raises:
        InputError: It is something else.
    """
    if isinstance(source, Clip):
        return source
    if isinstance(source, str | os.PathLike):
        return Clip.from_file(source)
    if isinstance(source, bytes | bytearray | memoryview) or hasattr(source, "read"):
        return Clip.from_bytes(source)  # type: ignore[arg-type]  # a file is known by its `read`
    raise InputError(
        f"{what}: got {type(source).__name__}, allowed: a path, bytes, a binary file, or a vrthinker.Clip "
        "(Clip.from_array(array, fps=8) for arrays and tensors, Clip.from_frames(frames, fps=8) for frames)"
    )


def is_same_clip(first: Clip, second: Clip) -> bool:
    """Whether two clips are one: the same file under whatever names, or the same content in memory."""
    if isinstance(first, _FileClip) and isinstance(second, _FileClip):
        return os.path.samefile(first.name, second.name)
    return first is second or first.name == second.name


def reader_of_clips(sources: Sequence[ClipSource], names: Sequence[str], files: VideoReader) -> VideoReader:
    """A reader of clips in memory by their names in records, and of files.

    Args:
        sources: The clips.
        names: The names that the record has.
        files: The reader of files.

    Raises:
        InputError: A clip in memory has none of these names.
    """
    readers: dict[str, VideoReader] = {}
    for number, source in enumerate(sources, start=1):
        clip = as_clip(source, f"clips: number {number}")
        if isinstance(clip, _FileClip):
            continue  # the record has its path, if it was judged
        if clip.name not in names:
            raise InputError(
                f"clips: number {number}: got {clip.name}, allowed: what was judged, {' or '.join(names)}"
            )
        readers[clip.name] = clip.reader(files)
    return ReaderByName(readers, files)


class _FileClip(Clip):
    def __init__(self, path: VideoPath) -> None:
        self.name = os.fspath(path)

    def content(self) -> ClipContent | None:
        return clip_content(self.name)

    def reader(self, files: VideoReader) -> VideoReader:
        return files


class _BytesClip(Clip):
    """A file in memory, which decoders open by a path of this process."""

    def __init__(self, data: bytes | bytearray | memoryview | IO[bytes]) -> None:
        self._fd = -1
        fd = os.memfd_create("vrthinker-clip", os.MFD_CLOEXEC)
        self._fd = fd
        digest, size = hashlib.sha256(), 0
        limit = limits.MAX_MEMORY_BYTES
        for block in _blocks(data):
            size += len(block)
            if size > limit.value:
                raise InputError(
                    f"clip: over {limit.value} bytes, allowed: up to {limit.value}; {limit.how_to_raise}, or "
                    "give the path of its file"
                )
            digest.update(block)
            left = memoryview(block)
            while left:
                left = left[os.write(fd, left) :]
        if not size:
            raise InputError("clip: got no bytes, allowed: the bytes of a video file (is it read already?)")
        self._content = ClipContent(size, digest.hexdigest())
        self.name = f"memory:sha256:{self._content.sha256}"
        # The modification time is a number made of the content. Numbers of open files are used again, and who
        # remembers a file by its path and time must not take one for another.
        time_ns = int.from_bytes(digest.digest()[:7], "big")
        os.utime(fd, ns=(time_ns, time_ns))

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def content(self) -> ClipContent:
        return self._content

    def reader(self, files: VideoReader) -> VideoReader:
        return NamedReader(self, self.name, f"/proc/self/fd/{self._fd}", files)


def _blocks(data: bytes | bytearray | memoryview | IO[bytes]) -> Iterable[bytes | memoryview]:
    if isinstance(data, bytes | bytearray | memoryview):
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), _BLOCK_BYTES):
            yield whole[start : start + _BLOCK_BYTES]
        return
    while block := data.read(_BLOCK_BYTES):
        if not isinstance(block, bytes):
            raise InputError(f"clip: a file that reads {type(block).__name__}, allowed: one opened as 'rb'")
        yield block


class _ArrayClip(Clip):
    """Frames in an array or a tensor."""

    def __init__(self, array: Any, *, fps: float, values: Values, layout: Layout | None) -> None:
        if not (isinstance(fps, int | float) and 0 < fps < float("inf")):
            raise InputError(f"fps: got {fps}, allowed: above 0")
        self._array = array.detach() if _is_tensor(array) else _numpy_view(array)
        self._layout = _layout_of(tuple(map(int, self._array.shape)), layout)
        dtype = str(self._array.dtype).rpartition(".")[2]
        _check_values(dtype, values)
        self._values, self.fps = values, float(fps)
        time, height, width, _ = _AXES[self._layout]
        self.n_frames, self.size = (
            int(self._array.shape[time]),
            (
                int(self._array.shape[height]),
                int(self._array.shape[width]),
            ),
        )
        check_side("clip in memory", self.size[1], self.size[0], "frames of")
        check_amount("clip in memory", self.size[1], self.size[0], self.n_frames)
        self._content: ClipContent | None = None
        self._on_device = _is_tensor(array) and array.device.type != "cpu"
        self._name = f"memory:{array.device.type}:{next(_device_clips)}" if self._on_device else None

    @property
    def name(self) -> str:  # type: ignore[override]
        """Its name, made of its content unless it is on a device."""
        if self._name is None:
            content = self.content()
            assert content is not None
            self._name = f"memory:sha256:{content.sha256}"
        return self._name

    def __repr__(self) -> str:
        height, width = self.size
        return f"Clip({self.n_frames} frames of {width}x{height} at {self.fps:g} fps, in memory)"

    def content(self) -> ClipContent | None:
        if self._content is None and not self._on_device:
            self._content = self._digest()
        return self._content

    def _digest(self) -> ClipContent:
        """The digest of all frames, as they are in memory, one at a time."""
        import numpy as np

        how = f"{self._array.dtype} {tuple(self._array.shape)} {self._layout} {self._values} {self.fps!r}"
        digest, size_bytes = hashlib.sha256(how.encode()), 0
        for index in range(self.n_frames):
            frame = self._frame(index)
            if _is_tensor(frame):
                # numpy does not know every dtype of torch, but it knows bytes.
                frame = frame.contiguous().view(sys.modules["torch"].uint8).numpy()
            frame = np.ascontiguousarray(frame)
            digest.update(frame.view(np.uint8).data)
            size_bytes += frame.nbytes
        return ClipContent(size_bytes, digest.hexdigest())

    def _frame(self, index: int) -> Any:
        return self._array[:, index] if self._layout == "CTHW" else self._array[index]

    def pixels(self, frame_indices: Sequence[int]) -> np.ndarray[Any, Any]:
        """Frames on the host, uint8 `[n, height, width, 3]`, RGB."""
        import numpy as np

        data = np.empty((len(frame_indices), *self.size, _CHANNELS), dtype=np.uint8)
        for slot, index in enumerate(frame_indices):
            frame = _on_host(self._frame(index))
            if self._layout != "THWC":
                frame = frame.transpose(1, 2, 0)
            data[slot] = _as_bytes(frame, self._values, f"frame {index}")
        return data

    def reader(self, files: VideoReader) -> VideoReader:
        return ArrayReader(self)


def _is_tensor(array: object) -> bool:
    """Whether it is torch's. Whoever has a tensor has imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _numpy_view(array: object) -> np.ndarray[Any, Any]:
    import numpy as np

    if not isinstance(array, np.ndarray) and not hasattr(array, "__array__"):
        raise InputError(f"clip: got {type(array).__name__}, allowed: an array or a tensor of frames")
    return np.asarray(array)


def _on_host(frame: Any) -> np.ndarray[Any, Any]:
    """One frame as a numpy array, float32 if it is of a float dtype."""
    if not _is_tensor(frame):
        viewed: np.ndarray[Any, Any] = frame
        return viewed
    torch = sys.modules["torch"]
    host: np.ndarray[Any, Any] = (frame if frame.dtype == torch.uint8 else frame.float()).cpu().numpy()
    return host


def _as_bytes(frame: np.ndarray[Any, Any], values: Values, what: str) -> np.ndarray[Any, Any]:
    """A frame as uint8.

    Raises:
        InputError: A value is not finite.
    """
    import numpy as np

    if values == "0..255":
        return frame
    if not np.isfinite(frame).all():
        raise InputError(f"{what}: has values that are not finite (NaN or infinite)")
    factor, offset = _FLOATS[values]
    scaled = np.rint(frame.astype(np.float32) * np.float32(factor) + np.float32(offset))
    shown: np.ndarray[Any, Any] = np.clip(scaled, 0, 255).astype(np.uint8)
    return shown


def _check_values(dtype: str, values: str) -> None:
    if values not in ("0..255", *_FLOATS):
        raise InputError(f"values: got {values!r}, allowed: 0..255 (uint8), 0..1 or -1..1 (floats)")
    is_float = dtype in ("float16", "float32", "float64", "bfloat16")
    if not is_float and dtype != "uint8":
        raise InputError(f"clip: got dtype {dtype}, allowed: uint8, float16, bfloat16, float32, float64")
    if is_float and values == "0..255":
        raise InputError(f"clip: got {dtype}, which may mean anything: say values='0..1' or values='-1..1'")
    if not is_float and values != "0..255":
        raise InputError(f"values: got {values!r} for uint8, allowed: 0..255")


def _layout_of(shape: tuple[int, ...], layout: str | None) -> Layout:
    if layout is not None and layout not in _AXES:
        raise InputError(f"layout: got {layout!r}, allowed: {', '.join(_AXES)}")
    fitting = [name for name, axes in _AXES.items() if len(shape) == 4 and shape[axes[3]] == _CHANNELS]
    wanted = [name for name in fitting if (name == layout if layout else name != "CTHW")]
    if not wanted or 0 in shape:
        allowed = (
            f"{layout} with 3 channels"
            if layout
            else "[frames, height, width, 3] or [frames, 3, height, width]"
        )
        more = ' (layout="CTHW" for [3, frames, height, width])' if "CTHW" in fitting and not layout else ""
        raise InputError(f"clip: got shape {list(shape)}, allowed: {allowed}{more}")
    if len(wanted) > 1:
        raise InputError(f"clip: got shape {list(shape)}, which fits {' and '.join(wanted)}: say layout=...")
    return wanted[0]  # type: ignore[return-value]


def _stacked(frames: Iterable[Any], values: Values) -> np.ndarray[Any, Any]:
    """Single frames as one array, uint8 `[n, height, width, 3]`."""
    import numpy as np

    limit = limits.MAX_MEMORY_BYTES
    kept: list[np.ndarray[Any, Any]] = []
    size_bytes = 0
    for number, given in enumerate(frames):
        what = f"frame {number}"
        frame = _on_host(given.detach() if _is_tensor(given) else np.asarray(given))
        if frame.ndim != 3 or frame.shape[2] != _CHANNELS or not frame.size:
            raise InputError(f"{what}: got shape {list(frame.shape)}, allowed: [height, width, 3]")
        if kept and frame.shape != kept[0].shape:
            raise InputError(f"{what}: got {list(frame.shape)}, allowed: {list(kept[0].shape)}, as frame 0")
        _check_values(str(frame.dtype), values)
        check_side("clip in memory", frame.shape[1], frame.shape[0], "frames of")
        check_amount("clip in memory", frame.shape[1], frame.shape[0], number + 1)
        size_bytes += frame.size
        if size_bytes > limit.value:
            raise InputError(
                f"{what}: over {limit.value} bytes of frames, allowed: up to {limit.value}; "
                f"{limit.how_to_raise}"
            )
        # A frame may be a buffer that its producer fills again.
        kept.append(np.array(_as_bytes(frame, values, what)))
    if not kept:
        raise InputError("clip: got no frames, allowed: at least one (is the iterator used up?)")
    return np.stack(kept)
