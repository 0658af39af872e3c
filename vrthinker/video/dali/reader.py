"""A `VideoReader` that decodes with NVIDIA DALI, and hands to the CPU reader what DALI cannot do.

Invariant: a frame that DALI decoded has the pixels that the CPU reader gives (bit by bit in VP8, VP9 and
MJPEG on a CPU, which `tests/video/test_dali.py` compares). Which clips DALI gets is decided from the CPU
reader's index, before anything is decoded: those in which every packet shows one picture, at a constant rate,
upright, with 8 bits a colour in 4:2:0, and with BT.601's colours, stated or not: DALI ignores what a stream
states about its colours. DALI tells no times of frames, so no frame can be checked against the
index; it is told to fill frames outside a file with one colour, and if such a frame comes out, or DALI fails,
the CPU reader reads the clip.

DALI does not say when a packet decodes with damage. What `probe` notices is refused here too; damage inside a
packet is noticed by the CPU reader only.

What runs on a GPU (`device="gpu"`) was written from DALI's documentation, and has never been run on one.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from vrthinker.errors import InputError
from vrthinker.video.dali.support import NOT_INSTALLED, installed_version, why_handed_over
from vrthinker.video.frame_cache import file_state
from vrthinker.video.frames import Frames
from vrthinker.video.pyav.index import ClipIndex
from vrthinker.video.pyav.reader import PyAVReader
from vrthinker.video.reader import ReadCounts, VideoInfo, VideoPath, checked_indices, select_frames
from vrthinker.video.reader_times import ReaderTimes

_logger = logging.getLogger(__name__)

_OUTSIDE = [255, 0, 255]
"""The colour of frames outside a file: a loud one, which a whole real frame hardly has."""
_ENGINES = 7
_REMEMBERED = 1024
"""Clips whose reasons are kept, so that a judge that runs for long does not grow."""
_MOST_DECODERS = 64


class DaliReader:
    """Decodes with DALI, several clips side by side. Folders of images and animations are read too.

    One of DALI's decoders uses one of a GPU's decoding engines, so several have to run to use all. Each
    thread that reads has its own, which it keeps warm; no more than `decoders` of them run at a time, and
    others wait. So the memory that decoders hold grows with the threads that read.

    Args:
        device: Where DALI decodes: "gpu", or "cpu" (VP8, VP9 and MJPEG only).
        fallback: The reader that indexes all clips, and decodes those that DALI cannot.
        decoders: How many clips are decoded at a time, 1 to 64. The default on a GPU is 7, the engines of an
            H100 (with fewer engines they take turns), and on a CPU one per core.
        times: What was measured on this machine: the CPU reader decodes the clips that it is faster with.
            None gives DALI all that it can decode.

    Attributes:
        counts: What the CPU reader decoded, and what was asked of both.
        decoded_frames: The number of frames that DALI returned.
        handed_over: Why DALI did not get a clip, for the last clips that it did not get.

    Raises:
        InputError: DALI is not installed, or `decoders` is out of range.
    """

    name = "dali"

    def __init__(
        self,
        device: Literal["cpu", "gpu"],
        fallback: PyAVReader | None = None,
        *,
        decoders: int | None = None,
        times: ReaderTimes | None = None,
    ) -> None:
        if installed_version() is None:
            raise InputError(NOT_INSTALLED)
        self.device = device
        self._times = times
        self._fallback = PyAVReader() if fallback is None else fallback
        if decoders is None:
            decoders = _ENGINES if device == "gpu" else min(os.cpu_count() or 1, _MOST_DECODERS)
        if not 1 <= decoders <= _MOST_DECODERS:
            raise InputError(f"decoders: got {decoders}, allowed: 1 to {_MOST_DECODERS}")
        self._decoders = threading.BoundedSemaphore(decoders)
        # Threads that read have a current GPU of their own, the first one; this reader's is its maker's.
        self._place = device if device == "cpu" else f"gpu:{_current_gpu()}"
        self._lock = threading.Lock()
        self.counts: ReadCounts = self._fallback.counts
        self.decoded_frames = 0
        self.handed_over: dict[str, str] = {}
        self._failed: dict[tuple[str, object], str] = {}

    def close_idle(self) -> None:
        """Closes the clips that the CPU reader keeps open."""
        self._fallback.close_idle()

    def probe(self, path: VideoPath, *, tolerate_truncation: bool = False) -> VideoInfo:
        """Probes a file with the CPU reader (see `VideoReader.probe`)."""
        return self._fallback.probe(path, tolerate_truncation=tolerate_truncation)

    def reader_of(self, path: VideoPath, *, tolerate_truncation: bool = False) -> str:
        """The name of the reader that shows the frames of a clip."""
        name = os.fspath(path)
        if os.path.isdir(name):
            return self._fallback.name
        index = self._fallback.index_of(name, tolerate_truncation=tolerate_truncation)
        return self._fallback.name if self._why_not(name, index) else self.name

    def frames_at(
        self, path: VideoPath, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Returns frames of a file (see `VideoReader.frames_at`)."""
        name = os.fspath(path)
        if not os.path.isdir(name):
            index = self._fallback.index_of(name, tolerate_truncation=tolerate_truncation)
            wanted = checked_indices(name, frame_indices, index.info.n_frames)
            if wanted and self._why_not(name, index) is None:
                pixels = self._decode(name, index, wanted)
                if pixels is not None:
                    return pixels
        return self._fallback.frames_at(name, frame_indices, tolerate_truncation=tolerate_truncation)

    def read_many(
        self, requests: Sequence[tuple[VideoPath, Sequence[int]]], *, tolerate_truncation: bool = False
    ) -> list[Frames]:
        """Returns frames of several files (see `VideoReader.read_many`)."""
        by_file: dict[str, list[int]] = {}
        for path, frame_indices in requests:
            by_file.setdefault(os.fspath(path), []).extend(frame_indices)
        read = {
            name: self.frames_at(name, list(dict.fromkeys(indices)), tolerate_truncation=tolerate_truncation)
            for name, indices in by_file.items()
        }
        return [select_frames(read[os.fspath(path)], frame_indices) for path, frame_indices in requests]

    def _why_not(self, name: str, index: ClipIndex) -> str | None:
        reason = self._failed.get((name, file_state(name))) or why_handed_over(index, self.device)
        if reason is None and self._times is not None:
            reason = self._times.why_not_dali(index.info)
        with self._lock:
            self.handed_over.pop(name, None)
            if reason is not None:
                _remember(self.handed_over, name, reason)
        return reason

    def _fail(self, name: str, reason: str) -> None:
        """Notes that DALI cannot decode a file, as long as the file stays as it is."""
        with self._lock:
            _remember(self._failed, (name, file_state(name)), reason)
            _remember(self.handed_over, name, reason)

    def _decode(self, name: str, index: ClipIndex, wanted: tuple[int, ...]) -> Frames | None:
        """The frames as DALI decodes them; None if it fails, and the CPU reader has to say what is wrong."""
        distinct = sorted(set(wanted))
        slots = [distinct.index(frame_index) for frame_index in wanted]
        try:
            with self._decoders:
                data, device = _decode(np.fromfile(name, dtype=np.uint8), distinct, self._place)
        except Exception as error:  # DALI raises its C++ errors as RuntimeError, and wraps them
            _logger.warning("%s: DALI does not decode it, the CPU reader does (%s)", name, _root(error))
            self._fail(name, "DALI failed")
            return None
        expected = (len(distinct), index.info.height, index.info.width, 3)
        if tuple(data.shape) != expected:
            _logger.warning("%s: DALI gives frames of another shape; the CPU reader decodes it", name)
            self._fail(name, "frames of another shape")
            return None
        with self._lock:
            self.decoded_frames += len(distinct)
        self.counts.add(shown=len(distinct))
        times = tuple(index.info.pts_seconds[frame_index] for frame_index in wanted)
        return Frames(data if slots == list(range(len(slots))) else data[slots], wanted, times, device)


def _decode(encoded: np.ndarray[Any, Any], frames: Sequence[int], device: str) -> tuple[Any, str]:
    """Decodes frames of a file in memory. Returns the pixels `[n, height, width, 3]` and where they are."""
    import nvidia.dali.experimental.dynamic as ndd

    # Outside a file DALI makes frames of one colour without a word. Its `pad_mode` "none", by which it would
    # fail there, is refused in this mode of DALI.
    decoded = ndd.decoders.video(ndd.tensor(encoded), frames=list(frames), device=device, fill_value=_OUTSIDE)
    pixels: Any
    if device == "cpu":
        pixels, where = np.array(decoded), "cpu"
        is_outside = (pixels == np.array(_OUTSIDE, dtype=np.uint8)).all(axis=(1, 2, 3)).any()
    else:
        import torch.utils.dlpack

        pixels = torch.utils.dlpack.from_dlpack(decoded)
        colour = torch.tensor(_OUTSIDE, dtype=torch.uint8, device=pixels.device)
        is_outside = (pixels == colour).flatten(1).all(dim=1).any()
        where = str(pixels.device)
    if bool(is_outside):
        raise ValueError("a frame is outside what DALI finds in the file")
    return pixels, where


def _remember(reasons: dict[Any, str], key: object, reason: str) -> None:
    """Adds a reason, and forgets the oldest if there are too many."""
    reasons.pop(key, None)
    reasons[key] = reason
    if len(reasons) > _REMEMBERED:
        del reasons[next(iter(reasons))]


def _current_gpu() -> int:
    """The number of the GPU that this thread works on: torch's if it is at work, else the first."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.current_device()) if torch is not None and torch.cuda.is_initialized() else 0


def _root(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (str(error) or type(error).__name__).splitlines()[0][:200]
