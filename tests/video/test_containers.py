"""Whole files pass, and files that end too early do not, whatever byte they end at."""

from __future__ import annotations

from pathlib import Path

import pytest
from clips import make_clip

from vrthinker.video.pyav.containers import missing_part
from vrthinker.video.pyav.packets import damage, shows_frame

FORMATS = {
    "mp4": ("mov,mp4,m4a,3gp,3g2,mj2", {}),
    "mkv": ("matroska,webm", {}),
    "avi": ("avi", {}),
    "ts": ("mpegts", {}),
    "gif": ("gif", {"codec": "gif"}),
}


@pytest.mark.parametrize("ending", FORMATS)
def test_every_cut_is_seen(tmp_path: Path, ending: str) -> None:
    name, options = FORMATS[ending]
    data = make_clip(tmp_path / f"a.{ending}", 4, **options).read_bytes()  # type: ignore[arg-type]
    path = tmp_path / "b"
    path.write_bytes(data)
    assert missing_part(str(path), name) is None
    unseen = []
    for length in range(len(data) - 1, 400, -97 if ending == "gif" else -7):
        path.write_bytes(data[:length])
        missing = missing_part(str(path), name)
        if missing is None:
            unseen.append(length)
        else:
            assert missing.reason.startswith("the file is cut short (")
    # A transport stream has no end mark. An MP4 may end after any outermost box, and zeros may follow it.
    moov = data.find(b"moov") - 4
    allowed = {"ts": range(0, len(data), 188), "mp4": range(moov, moov + 3)}.get(ending, range(0))
    assert set(unseen) <= set(allowed)


def test_what_follows_the_end_is_no_matter(tmp_path: Path) -> None:
    for ending, (name, options) in FORMATS.items():
        if ending == "ts":
            continue
        clip = make_clip(tmp_path / f"a.{ending}", 4, **options)  # type: ignore[arg-type]
        clip.write_bytes(clip.read_bytes() + bytes(50))
        assert missing_part(str(clip), name) is None, ending


def test_what_is_not_known_passes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data in (b"", b"x", b"RIFF", b"\x1aE\xdf\xa3", b"\0" * 9, bytes(range(256)) * 4):
        path.write_bytes(data)
        for name in ("mov", "matroska,webm", "avi", "mpegts", "ogg"):
            missing = missing_part(str(path), name)
            assert missing is None or "cut short" in missing.reason


def test_a_gif_says_how_many_pictures_are_whole(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.gif", 6, codec="gif")
    data = clip.read_bytes()
    counts = []
    for length in range(20, len(data), 50):
        clip.write_bytes(data[:length])
        missing = missing_part(str(clip), "gif")
        assert missing is not None
        counts.append(missing.whole_frames)
    assert set(counts) == set(range(6)) | ({6} if 6 in counts else set())
    assert counts == sorted(counts)  # type: ignore[type-var]
    position = data.index(b"\x21\xf9", 1000)
    clip.write_bytes(data[:position] + b"\x77" + data[position + 1 :])
    missing = missing_part(str(clip), "gif")
    assert missing is not None
    assert missing.reason == f"the file is damaged at byte {position}"


def test_packets_that_show_nothing() -> None:
    assert shows_frame("h264", memoryview(b"\0"))
    assert shows_frame("vp8", memoryview(b"\x10"))
    assert not shows_frame("vp8", memoryview(b"\x01"))
    # VP9: frame marker 10, profile 00, show_existing_frame, frame_type, show_frame, error_resilient.
    assert shows_frame("vp9", memoryview(bytes([0b10000010, 0])))
    assert shows_frame("vp9", memoryview(bytes([0b10001000, 0])))
    assert not shows_frame("vp9", memoryview(bytes([0b10000100, 0])))
    # Profile 3 has one more bit in front of them.
    assert shows_frame("vp9", memoryview(bytes([0b10110001, 0])))
    assert not shows_frame("vp9", memoryview(bytes([0b10110010, 0])))
    hidden, shown = bytes([0b10000100, 1, 1]), bytes([0b10000110, 2])
    index = bytes([0b11000001, len(hidden), len(shown), 0b11000001])
    assert shows_frame("vp9", memoryview(hidden + shown + index))
    index = bytes([0b11000001, len(hidden), len(hidden), 0b11000001])
    assert not shows_frame("vp9", memoryview(hidden + hidden + index))


def test_packets_that_no_encoder_writes() -> None:
    assert damage("h264", memoryview(bytes(40))) == "frame data is zeroed out"
    assert damage("h264", memoryview(b"\1" * 40 + bytes(8))) == "frame data is partly zeroed out"
    assert damage("h264", memoryview(b"\1" * 40 + bytes(7))) is None
    assert damage("vp9", memoryview(b"\1" * 40 + bytes(30))) is None, "a flat picture may end so"
    assert damage("gif", memoryview(bytes(40))) is None
