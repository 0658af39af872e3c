"""What it costs to open a long clip and to read a few of its frames, beside torchcodec and plain decoding.

Clips of 10 seconds, 10 minutes and 2 hours of 1280x720 at 24 frames a second, in H.264 with B-frames, with a
keyframe every 10 seconds or every half second. Twenty seconds are encoded, and the long clips repeat their
packets with later times: real H.264 that costs no encoding, whose pictures repeat every 20 seconds. A clip of
2 hours has more frames than the default limits allow, so the limits are raised here.

Equality first: our frames must be those of a sequential decode of the encoded part with the same exact
conversion to RGB, and torchcodec's those of one with FFmpeg's default conversion, bit by bit; both must give
the same times. Then each way is timed in turn on the same frames, which are drawn anew for every repeat. The
file is in the page cache; cold means that nobody has listed it yet. Seconds are CPU seconds of the process,
because the machine may be shared; every way decodes with one thread. The sequential decode is timed once, and
only on clips up to `--sequential-minutes`.

torchcodec is not a dependency: pip install torchcodec==0.13.0, beside FFmpeg's shared libraries.

    python benchmarks/long_clips.py --out benchmarks/results/long_clips_cpu.jsonl
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("VRTHINKER_MAX_FRAMES", "200000")
os.environ.setdefault("VRTHINKER_MAX_CLIP_PIXELS", str(200_000 * 1280 * 720))

import av
import numpy as np
from av.video.reformatter import Interpolation

from vrthinker.records.provenance import append_row
from vrthinker.video.pyav.reader import PyAVReader

WIDTH, HEIGHT, FPS = 1280, 720, 24
ENCODED_SECONDS = 20
LENGTHS = {"10 s": 10, "10 min": 600, "2 h": 7200}
KEYFRAME_SECONDS = (Fraction(10), Fraction(1, 2))
FIRST_FRAMES = GAP_FRAMES = 8
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def encode(path: Path, keyframe_seconds: Fraction) -> None:
    """Encodes moving coloured tiles, no two pictures alike."""
    gop = int(keyframe_seconds * FPS)
    tiles = np.random.default_rng(0).integers(0, 256, (HEIGHT // 40, WIDTH // 40, 3), dtype=np.uint8)
    picture = tiles.repeat(40, 0).repeat(40, 1)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {
            "preset": "veryfast",
            "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=2:b-adapt=0:open-gop=0",
        }
        stream.codec_context.thread_count = 1
        for number in range(ENCODED_SECONDS * FPS):
            moved = np.roll(picture, (2 * number, 3 * number), (0, 1))
            frame = av.VideoFrame.from_ndarray(moved, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def repeat(source: Path, target: Path, seconds: int) -> None:
    """Writes the packets of a clip one time after another until so many seconds are full."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        video = old.streams.video[0]
        copy = new.add_stream_from_template(video)
        packets = [
            (bytes(packet), packet.pts or 0, packet.dts or 0, packet.duration or 0, packet.is_keyframe)
            for packet in old.demux(video)
            if packet.size
        ]
        turn = sum(packet[3] for packet in packets)
        endless = ((number * turn, packet) for number in itertools.count() for packet in packets)
        for shift, (data, pts, dts, duration, is_keyframe) in itertools.islice(endless, seconds * FPS):
            packet = av.Packet(data)
            packet.pts, packet.dts, packet.duration = pts + shift, dts + shift, duration
            packet.time_base, packet.is_keyframe, packet.stream = video.time_base, is_keyframe, copy
            new.mux(packet)


def decode(path: Path, wanted: Sequence[int], **conversion: Any) -> Iterator[np.ndarray[Any, Any]]:
    """The wanted frames (ascending) by decoding the file from its start with one thread."""
    left = list(wanted)
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            while left and number == left[0]:
                left.pop(0)
                yield frame.reformat(format="rgb24", **conversion).to_ndarray()
            if not left:
                return


class Ours:
    """This package's reader on the CPU."""

    def __init__(self, path: Path) -> None:
        self.reader, self.path = PyAVReader(), path
        self.times = self.reader.probe(path).pts_seconds

    def read(self, wanted: Sequence[int]) -> np.ndarray[Any, Any]:
        """The pixels of these frames."""
        return self.reader.frames_at(self.path, wanted).numpy()


class TorchCodec:
    """torchcodec, which lists every packet when it opens a file (its exact mode)."""

    def __init__(self, path: Path) -> None:
        from torchcodec.decoders import VideoDecoder

        self.decoder = VideoDecoder(
            str(path), seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC"
        )

    def read(self, wanted: Sequence[int]) -> np.ndarray[Any, Any]:
        """The pixels of these frames."""
        pixels: np.ndarray[Any, Any] = self.decoder.get_frames_at(list(wanted)).data.numpy()
        return pixels

    def times(self, wanted: Sequence[int]) -> list[float]:
        """When these frames are shown."""
        return list(self.decoder.get_frames_at(list(wanted)).pts_seconds.tolist())


def first_frames(n_frames: int) -> list[int]:
    """The frames that a judge is shown first."""
    return [number * n_frames // FIRST_FRAMES for number in range(FIRST_FRAMES)]


def gap_frames(n_frames: int, rng: random.Random) -> list[int]:
    """Frames between two neighbours among the first ones, evenly spread, as a judge asks for."""
    left = rng.randrange(FIRST_FRAMES)
    begin, end = left * n_frames // FIRST_FRAMES, (left + 1) * n_frames // FIRST_FRAMES
    offset = rng.random()
    return [begin + int((number + offset) * (end - begin) / GAP_FRAMES) for number in range(GAP_FRAMES)]


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """What a piece of work costs, and what it returns."""
    begun = time.process_time()
    result = work()
    return time.process_time() - begun, result


def check(path: Path, encoded: Path, wanted: Sequence[int]) -> None:
    """Stops the run unless all ways give the same frames at the same times."""
    ours, theirs = Ours(path), TorchCodec(path)
    n_encoded = ENCODED_SECONDS * FPS
    places = sorted({index % n_encoded for index in wanted})
    exact = dict(zip(places, decode(encoded, places, interpolation=EXACT), strict=True))
    default = dict(zip(places, decode(encoded, places), strict=True))
    for index, our_frame, their_frame in zip(wanted, ours.read(wanted), theirs.read(wanted), strict=True):
        if not np.array_equal(our_frame, exact[index % n_encoded]):
            raise SystemExit(f"{path.name}: our frame {index} differs from the sequential decode")
        if not np.array_equal(their_frame, default[index % n_encoded]):
            raise SystemExit(f"{path.name}: torchcodec's frame {index} differs from the sequential decode")
    if not np.allclose([ours.times[index] for index in wanted], theirs.times(wanted), atol=1e-6):
        raise SystemExit(f"{path.name}: the times of the frames differ")


def memory_of(path: Path, n_frames: int) -> dict[str, int]:
    """The peak memory of a process of its own that opens a clip and reads 8 frames."""
    wanted = first_frames(n_frames)
    program = (
        "import json, sys\n"
        "from vrthinker.video.pyav.reader import PyAVReader\n"
        "def peak():\n"
        "    text = open('/proc/self/status').read()\n"
        "    return int(text.split('VmHWM:')[1].split()[0]) * 1024\n"
        "path, wanted = sys.argv[1], json.loads(sys.argv[2])\n"
        "before, reader = peak(), PyAVReader()\n"
        "reader.probe(path); opened = peak(); reader.frames_at(path, wanted)\n"
        "print(json.dumps({'imported': before, 'opened': opened, 'read': peak()}))\n"
    )
    command = [sys.executable, "-c", program, str(path), json.dumps(wanted)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, int] = json.loads(done.stdout)
    return result


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """The median, the least and the most."""
    return {
        "median": round(statistics.median(seconds), 4),
        "min": round(min(seconds), 4),
        "max": round(max(seconds), 4),
    }


def measure(path: Path, repeats: int, seed: int, *, sequential: bool) -> dict[str, Any]:
    """Times every way on one clip."""
    rng = random.Random(seed)
    seconds: dict[str, dict[str, list[float]]] = {}
    decoded_a_frame: list[float] = []
    n_frames = len(Ours(path).times)
    for number in range(repeats):
        ways = [("ours", Ours), ("torchcodec", TorchCodec)]
        wanted = {"first": first_frames(n_frames), "gap": gap_frames(n_frames, rng)}
        for name, way in ways if number % 2 else ways[::-1]:
            spent = seconds.setdefault(name, {"open": [], "first": [], "gap": []})
            cost, opened = cpu_seconds(lambda way=way: way(path))
            spent["open"].append(cost)
            for part, frames in wanted.items():
                spent[part].append(cpu_seconds(lambda opened=opened, frames=frames: opened.read(frames))[0])
            if isinstance(opened, Ours):
                decoded_a_frame.append(opened.reader.counts.decoded / opened.reader.counts.shown)
    row: dict[str, Any] = {
        "frames": n_frames,
        "bytes": path.stat().st_size,
        "seconds": {
            name: {part: spread(each) for part, each in parts.items()} for name, parts in seconds.items()
        },
        "ours_to_torchcodec": {
            part: spread(
                [ours / theirs for ours, theirs in zip(spent, seconds["torchcodec"][part], strict=True)]
            )
            for part, spent in seconds["ours"].items()
        },
        "ours_decoded_frames_per_frame_shown": round(statistics.median(decoded_a_frame), 1),
        "sequential_seconds": None,
        "memory_bytes": memory_of(path, n_frames),
    }
    if sequential:
        gap = gap_frames(n_frames, random.Random(seed))
        row["sequential_seconds"] = {
            "first": round(cpu_seconds(lambda: list(decode(path, first_frames(n_frames))))[0], 3),
            "gap": round(cpu_seconds(lambda: list(decode(path, gap)))[0], 3),
        }
    return row


def main() -> None:
    """Runs the benchmark; `--out` appends a row per clip."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSONL file to append the rows to")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sequential-minutes", type=float, default=10)
    parser.add_argument("--keyframe-seconds", type=Fraction, nargs="+", default=list(KEYFRAME_SECONDS))
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for keyframe_seconds in options.keyframe_seconds:
            encoded = Path(folder) / "encoded.mp4"
            encode(encoded, keyframe_seconds)
            for length, seconds in LENGTHS.items():
                path = Path(folder) / "clip.mp4"
                repeat(encoded, path, seconds)
                n_frames = seconds * FPS
                check(
                    path,
                    encoded,
                    [*first_frames(n_frames), *gap_frames(n_frames, random.Random(options.seed))],
                )
                row = {
                    "benchmark": "long_clips",
                    "clip": f"{WIDTH}x{HEIGHT} H.264, {FPS} frames a second, 2 B-frames",
                    "length": length,
                    "seconds_between_keyframes": float(keyframe_seconds),
                    "frames_equal": True,
                    "repeats": options.repeats,
                    "seed": options.seed,
                    "torchcodec": importlib.metadata.version("torchcodec"),
                    **measure(
                        path,
                        options.repeats,
                        options.seed,
                        sequential=seconds <= 60 * options.sequential_minutes,
                    ),
                }
                ratios = ", ".join(
                    f"{part} {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
                    for part, ratio in row["ours_to_torchcodec"].items()
                )
                sys.stdout.write(
                    f"{length}, a keyframe every {float(keyframe_seconds)} s: times torchcodec's: {ratios}\n"
                )
                sys.stdout.flush()
                if options.out is not None:
                    append_row(options.out, row)


if __name__ == "__main__":
    main()
