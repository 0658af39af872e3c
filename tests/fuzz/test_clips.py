"""Damaged clips of every container: right frames, a noted loss, or one line, within time and memory."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from clips import draw_number, make_clip
from forks import Outcomes
from fuzz_counts import record
from PIL import Image

FRAMES = 24
KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {"codec": "h264", "b_frames": 2, "audio": True},
    "hevc.mp4": {"codec": "hevc"},
    "av1.mp4": {"codec": "av1"},
    "mpeg4.mov": {"codec": "mpeg4", "b_frames": 2},
    "h264.mkv": {"codec": "h264"},
    "vp9.webm": {"codec": "vp9"},
    "vp8.webm": {"codec": "vp8"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg"},
    "h264.ts": {"codec": "h264"},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "h264.flv": {"codec": "h264"},
    "h264.h264": {"codec": "h264"},
    "pictures.webp": {},
    "pictures.apng": {},
    "gif.gif": {"codec": "gif", "fps": 10},
}


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """A damaged copy: cut off, zeroed, without a part, with a part twice, with flipped or foreign bytes."""
    data = bytearray(whole)
    start = rng.randrange(len(data)) if rng.random() < 0.8 else rng.randrange(min(256, len(data)))
    end = min(len(data), start + int(2 ** rng.uniform(0, 13)))
    kind = rng.randrange(8)
    if kind == 0:
        del data[start:]
    elif kind == 1:
        data[start:end] = bytes(end - start)
    elif kind == 2:
        del data[start:end]
    elif kind == 3:
        data[end:end] = data[start:end]
    elif kind == 4:
        data[start:start] = rng.randbytes(end - start)
    elif kind == 5:
        data[start:end] = rng.randbytes(end - start)
    elif kind == 6:
        for _ in range(rng.randrange(1, 30)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        number = rng.choice((0, 1, 0x7F, 0x80, 0xFF)).to_bytes(1, "big") * rng.choice((1, 2, 4, 8))
        data[start : start + len(number)] = number
    return bytes(data)


def make(path: Path, **kind: Any) -> Path:
    """An undamaged clip."""
    if kind:
        return make_clip(path, FRAMES, size=(48, 64), **kind)
    first, *others = (Image.fromarray(draw_number(number, (48, 64))) for number in range(FRAMES))
    options: Any = {"lossless": True} if path.suffix == ".webp" else {"format": "PNG"}
    first.save(path, save_all=True, append_images=others, duration=40, loop=0, **options)
    return path


def damage(tmp_path: Path, name: str, count: int, seed: int) -> tuple[list[dict[str, object]], Path]:
    """Jobs for `count` damaged copies of one clip, and the folder that they are in."""
    good = make(tmp_path / f"good{Path(name).suffix}", **KINDS[name])
    whole, rng = good.read_bytes(), random.Random(f"{name}:{seed}")
    jobs = []
    for number in range(count):
        path = tmp_path / f"{number}{good.suffix}"
        path.write_bytes(mutated(whole, rng))
        arguments = {"path": str(path), "good": str(good), "frames": FRAMES}
        jobs.append({"job": "fuzz_worker:read_clip", "arguments": arguments})
    return jobs, tmp_path


def check(
    fuzzed: Outcomes, tmp_path: Path, name: str, count: int, seed: int, *, most_unnoticed: int = 0
) -> Counter[str]:
    """Reads damaged copies.

    A few bits may turn a frame into one that is not meant to be shown, or swallow a frame, and leave a file
    that contradicts nothing. Such losses are counted, and may be rare only.
    """
    unnoticed: list[int] = []
    jobs, folder = damage(tmp_path, name, count, seed)
    kinds: Counter[str] = Counter()
    for number, outcome in enumerate(fuzzed(jobs)):
        assert "result" in outcome, f"{folder}/{number}{Path(name).suffix}: {outcome}"
        kind = outcome["result"]["kind"]
        if kind == "short":
            unnoticed.append(number)
        assert outcome["result"]["events"] == [], f"{number}: {outcome}"
        kinds[kind] += 1
    assert len(unnoticed) <= most_unnoticed, f"{folder}: a part was taken for the whole in {unnoticed}"
    return kinds


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "gif.gif"])
def test_a_few_damaged_clips(fuzzed: Outcomes, tmp_path: Path, name: str) -> None:
    assert sum(check(fuzzed, tmp_path, name, 8, seed=1).values()) == 8


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", KINDS)
def test_a_thousand_damaged_clips(fuzzed: Outcomes, tmp_path: Path, name: str) -> None:
    kinds = check(fuzzed, tmp_path, name, 70, seed=20261129, most_unnoticed=3)
    assert kinds["refused"] + kinds["unreadable"] + kinds["noted"] > 10, "the damage is noticed at all"
    record(f"clips/{name}", dict(kinds))
