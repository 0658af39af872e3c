"""Whether NVIDIA DALI gives the frames of the CPU reader, and how many frames a second each way decodes.

For each codec a clip of 1280x720 is encoded, and both readers read the same frames. The largest difference
of a colour is part of the row: on a CPU it has to be 0, or the run stops; on a GPU it is what is found out.
There the frames are resized too, where they are, and have to be those that Pillow makes of them. Then
frames a second of a reader with one decoder and of one with several, read by as many threads, are measured
in turn with the CPU reader's, and with torchcodec's on the CPU and the GPU where it is installed. The first
read of each way warms it up and is not counted.

    python benchmarks/dali_reader.py --device gpu --codecs h264 hevc av1 vp9 --out FILE
    python benchmarks/dali_reader.py --device cpu --codecs vp9 --out FILE
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vrthinker.records.provenance import append_row
from vrthinker.video.dali.reader import DaliReader
from vrthinker.video.dali.support import installed_version
from vrthinker.video.measured_readers import ENCODERS, KEYFRAMES, encode_tiles
from vrthinker.video.pyav.reader import PyAVReader
from vrthinker.video.resize import resize_frame
from vrthinker.video.tensor_resize import resize_tensor

WIDTH, HEIGHT, N_FRAMES = 1280, 720, 240
RESIZED = (476, 840)
Read = Callable[[], Any]


def ways_of(path: Path, device: str, decoders: int, wanted: list[int]) -> dict[str, tuple[Read, int]]:
    """Each way to read the frames, and how many times it reads them in one call."""
    cpu = PyAVReader()
    where: Literal["cpu", "gpu"] = "gpu" if device == "gpu" else "cpu"
    one, several = DaliReader(where, cpu, decoders=1), DaliReader(where, cpu, decoders=decoders)
    threads = ThreadPoolExecutor(decoders)

    def side_by_side() -> None:
        list(threads.map(lambda _: several.frames_at(path, wanted), range(decoders)))

    ways: dict[str, tuple[Read, int]] = {
        "pyav": (lambda: cpu.frames_at(path, wanted), 1),
        "dali, 1 decoder": (lambda: one.frames_at(path, wanted), 1),
        f"dali, {decoders} decoders": (side_by_side, decoders),
    }
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):
        return ways
    for decodes_on in ("cpu", *(["cuda"] if device == "gpu" else [])):

        def read(decodes_on: str = decodes_on) -> Any:
            return VideoDecoder(str(path), device=decodes_on, dimension_order="NHWC").get_frames_at(wanted)

        ways[f"torchcodec, {decodes_on}"] = (read, 1)
    return ways


def compare(path: Path, device: str, wanted: list[int]) -> int:
    """The largest difference of a colour between both readers. Stops if DALI did not decode the clip."""
    dali, cpu = DaliReader("gpu" if device == "gpu" else "cpu"), PyAVReader()
    shown = dali.frames_at(path, wanted)
    ours = shown.numpy()
    if dali.handed_over:
        raise SystemExit(f"{path.name}: DALI did not decode it ({', '.join(dali.handed_over.values())})")
    if device == "gpu":
        resized = resize_tensor(shown.data, RESIZED)
        if not resized.is_cuda:
            raise SystemExit(f"{path.name}: the frames are on {resized.device}, and should be on a GPU")
        for frame, other in zip(ours, resized.cpu().numpy(), strict=True):
            if not np.array_equal(resize_frame(frame, RESIZED), other):
                raise SystemExit(f"{path.name}: resizing on the GPU gives other bits than Pillow")
    largest = int(np.abs(ours.astype(int) - cpu.frames_at(path, wanted).numpy()).max())
    if device == "cpu" and largest:
        raise SystemExit(f"{path.name}: the readers differ by {largest} levels on a CPU, where they may not")
    return largest


def main() -> None:
    """Runs the benchmark; `--out` appends a row per codec."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--codecs", nargs="+", choices=sorted(ENCODERS), default=["h264", "hevc", "av1"])
    parser.add_argument("--decoders", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSONL file to append the rows to")
    options = parser.parse_args()
    wanted = list(range(3, N_FRAMES, N_FRAMES // 16))
    with tempfile.TemporaryDirectory() as folder:
        for codec in options.codecs:
            path = Path(folder, f"{codec}.{ENCODERS[codec][1]}")
            if not encode_tiles(path, codec, (HEIGHT, WIDTH), N_FRAMES):
                raise SystemExit(f"{codec}: FFmpeg has no encoder {ENCODERS[codec][0]} here")
            largest = compare(path, options.device, wanted)
            ways = ways_of(path, options.device, options.decoders, wanted)
            rates: dict[str, list[float]] = {}
            for repeat in range(options.repeats + 1):
                for name, (read, times) in ways.items():
                    begun = time.perf_counter()
                    read()
                    spent = time.perf_counter() - begun
                    if repeat:
                        rates.setdefault(name, []).append(times * len(wanted) / spent)
            medians = {name: round(statistics.median(each), 1) for name, each in rates.items()}
            sys.stdout.write(
                f"{codec}: the readers differ by up to {largest} levels; frames a second: {medians}\n"
            )
            sys.stdout.flush()
            if options.out is not None:
                row = {
                    "benchmark": "dali_reader",
                    "codec": codec,
                    "clip": f"{WIDTH}x{HEIGHT}, {N_FRAMES} frames, a keyframe every {KEYFRAMES}",
                    "device": options.device,
                    "dali": installed_version(),
                    "frames_a_read": len(wanted),
                    "largest_difference_levels": largest,
                    "repeats": options.repeats,
                    "frames_per_second": {
                        name: {
                            "median": medians[name],
                            "min": round(min(each), 1),
                            "max": round(max(each), 1),
                        }
                        for name, each in rates.items()
                    },
                }
                append_row(options.out, row)


if __name__ == "__main__":
    main()
