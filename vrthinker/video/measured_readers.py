"""Measures the readers of this machine side by side, on clips that are made for it.

Equality comes first: both readers' frames are compared, and on a CPU they have to be equal. What is timed is
what judging does with a clip: a few frames, evenly spaced, decoded and resized to a model's grid, by as many
threads as the runner decodes with, each with a copy of the clip. The readers take turns, so that a slow
moment of the machine affects both. A first read of each warms it up and is not counted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vrthinker.errors import VRThinkerError, one_line
from vrthinker.video.dali.support import CPU_CODECS, GPU_CODECS
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.reader_times import ClipTimes, Rate, ReaderTimes, machine
from vrthinker.video.resize import ResizeSettings

if TYPE_CHECKING:
    from vrthinker.video.dali.reader import DaliReader
    from vrthinker.video.pyav.reader import PyAVReader
    from vrthinker.video.reader import VideoReader

ENCODERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", "mp4", {"preset": "veryfast"}),
    "hevc": ("libx265", "mp4", {"preset": "ultrafast", "x265-params": "log-level=none"}),
    "av1": ("libsvtav1", "mp4", {"preset": "12"}),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8"}),
    "vp8": ("libvpx", "webm", {"deadline": "realtime", "cpu-used": "8"}),
    "mjpeg": ("mjpeg", "avi", {"qscale": "3"}),
    "mpeg4": ("mpeg4", "mp4", {"qscale": "3"}),
}
"""Codec -> the encoder, the ending of the file, and the encoder's options, chosen for speed."""
SIZES = ((480, 832), (720, 1280))
"""Heights and widths of the clips."""
LENGTHS = (96, 288)
"""Frames of the clips: 4 and 12 seconds."""
FPS, KEYFRAMES, FRAMES_A_READ, TILE = 24, 48, 8, 40
REPEATS = 3


def encode_tiles(path: Path, codec: str, size: tuple[int, int], n_frames: int) -> bool:
    """Encodes moving coloured tiles, with a keyframe every two seconds.

    Args:
        path: The file, with the ending that `ENCODERS` names.
        codec: A codec of `ENCODERS`.
        size: The height and the width in pixels.
        n_frames: The number of frames.

    Returns:
        Whether there is such a clip now; false if FFmpeg has no such encoder here.
    """
    import av
    import numpy as np

    encoder, _, options = ENCODERS[codec]
    height, width = size
    rows, columns = -(-height // TILE), -(-width // TILE)
    tiles = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    picture = tiles.repeat(TILE, 0).repeat(TILE, 1)[:height, :width]
    try:
        av.codec.Codec(encoder, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(encoder, rate=FPS, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = KEYFRAMES
        for number in range(n_frames):
            moved = np.roll(picture, (2 * number, 3 * number), (0, 1))
            frame = av.VideoFrame.from_ndarray(moved, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
            if codec == "av1" and number == 0:
                leave_real_time()
        container.mux(stream.encode(None))
    return True


def leave_real_time() -> None:
    """Undoes what SVT-AV1 does when the superuser starts it.

    It makes the calling thread, and its own, real-time threads of the highest priority. They starve every
    other thread of a small machine, for good, and no time that is measured beside them means anything.
    """
    if os.geteuid() == 0:
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(int(task), os.SCHED_OTHER, os.sched_param(0))


def measure_readers(
    device: Literal["cpu", "gpu"],
    folder: Path,
    *,
    threads: int,
    codecs: Sequence[str] | None = None,
    sizes: Sequence[tuple[int, int]] = SIZES,
    lengths: Sequence[int] = LENGTHS,
    repeats: int = REPEATS,
    announce: Callable[[str], None] = lambda _: None,
) -> ReaderTimes:
    """Measures the CPU reader beside DALI.

    Args:
        device: Where DALI decodes.
        folder: An empty folder for the clips.
        threads: How many clips are read at a time.
        codecs: The codecs to measure; None takes all that DALI decodes there.
        sizes: Heights and widths of the clips.
        lengths: Numbers of frames of the clips.
        repeats: Timed reads of each reader and clip.
        announce: Is told what is measured next.

    Raises:
        InputError: DALI is not installed.
        VRThinkerError: On a CPU the readers' frames differ, or DALI decoded no clip.
    """
    from vrthinker.video.dali.reader import DaliReader
    from vrthinker.video.pyav.reader import PyAVReader

    cpu = PyAVReader()
    dali = DaliReader(device, PyAVReader())
    clips: list[ClipTimes] = []
    known = CPU_CODECS if device == "cpu" else GPU_CODECS
    for codec in sorted(known if codecs is None else codecs):
        for size in sizes:
            for n_frames in lengths:
                path = folder / f"{codec}-{size[1]}x{size[0]}-{n_frames}.{ENCODERS[codec][1]}"
                announce(f"{codec}, {size[1]}x{size[0]}, {n_frames} frames")
                if encode_tiles(path, codec, size, n_frames):
                    clips.append(_measured(path, codec, device, (cpu, dali), threads, repeats))
                    path.unlink()
    if all(clip.dali is None for clip in clips):
        reasons = sorted({clip.why_not or "" for clip in clips})
        raise VRThinkerError(f"reader dali: it decoded none of {len(clips)} clips ({'; '.join(reasons)})")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return ReaderTimes(schema_version=1, date=date, device=device, machine=machine(), clips=tuple(clips))


def _measured(
    path: Path, codec: str, device: str, readers: tuple[PyAVReader, DaliReader], threads: int, repeats: int
) -> ClipTimes:
    cpu, dali = readers
    info = cpu.probe(path)
    wanted = [number * info.n_frames // FRAMES_A_READ for number in range(FRAMES_A_READ)]
    ours, theirs = cpu.frames_at(path, wanted).numpy(), dali.frames_at(path, wanted).numpy()
    why_not = dali.handed_over.get(str(path))
    difference = abs(ours.astype(int) - theirs)
    largest, mean = (None, None) if why_not else (int(difference.max()), round(float(difference.mean()), 3))
    if largest and device == "cpu":
        raise VRThinkerError(
            f"{path.name}: the readers' colours differ by {largest} levels, allowed: 0 on a CPU"
        )
    copies = [path.with_stem(f"{path.stem}-{number}") for number in range(threads)]
    for copy in copies:
        _link_or_copy(path, copy)
    size = ResizeSettings().grid_size(info.height, info.width)
    rates: dict[str, list[float]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for repeat in range(repeats + 1):
            for reader in (cpu,) if why_not else (cpu, dali):

                def read(copy: Path, reader: VideoReader = reader) -> None:
                    # A new cache, so that nothing comes out of it.
                    FrameCache(1 << 30).get(copy, wanted, size, reader)

                begun = time.perf_counter()
                list(pool.map(read, copies))
                _wait_for_gpu()
                if repeat:
                    rate = threads * len(wanted) / (time.perf_counter() - begun)
                    rates.setdefault(reader.name, []).append(rate)
    for copy in copies:
        # A failure in the middle of the measurement was timed as the CPU reader's work.
        why_not = why_not or dali.handed_over.get(str(copy))
        copy.unlink()

    def rate_of(name: str) -> Rate:
        each = rates[name]
        return Rate(
            median=round(statistics.median(each), 2), min=round(min(each), 2), max=round(max(each), 2)
        )

    return ClipTimes(
        codec=codec,
        width=info.width,
        height=info.height,
        n_frames=info.n_frames,
        frames_a_read=len(wanted),
        threads=threads,
        pyav=rate_of("pyav"),
        dali=None if why_not else rate_of("dali"),
        why_not=why_not and one_line(why_not)[:300],
        largest_difference=largest,
        mean_difference=mean,
    )


def _link_or_copy(path: Path, copy: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no such names."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)


def _wait_for_gpu() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
