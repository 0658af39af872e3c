"""A clip of which a part is missing is never judged in silence, whatever its container is."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import av
import pytest
from clips import make_clip, read_number

from vrthinker.errors import VideoError
from vrthinker.video.pyav import containers as containers_module
from vrthinker.video.pyav import matroska
from vrthinker.video.pyav.containers import missing_part
from vrthinker.video.pyav.reader import PyAVReader

N_FRAMES = 40
CASES = Path(__file__).parents[3] / "shared" / "cases"
FRAGMENTS = {"container_options": {"movflags": "frag_keyframe+empty_moov"}}
CLIPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "h264 mkv": ("h264", "mkv", {"b_frames": 2}),
    "mjpeg mkv": ("mjpeg", "mkv", {}),
    "vp9 webm": ("vp9", "webm", {}),
    "live webm": ("vp8", "webm", {"container_options": {"live": "1"}}),
    "h264 ts": ("h264", "ts", {"b_frames": 2}),
    "mpeg2video ts": ("mpeg2video", "ts", {}),
    "h264 flv": ("h264", "flv", {}),
    "mjpeg avi": ("mjpeg", "avi", {}),
    "h264 mp4 fragments": ("h264", "mp4", FRAGMENTS),
    "h264 mp4": ("h264", "mp4", {}),
}


def spoiled(rng: random.Random, data: bytes, kind: str) -> bytes:
    """Zeroes, drops or replaces some bytes behind the header."""
    length = rng.choice([500, 2000, 188 * 8])
    start = rng.randrange(len(data) // 5, len(data) * 9 // 10 - length)
    middle = {"zero": bytes(length), "drop": b"", "replace": rng.randbytes(length)}[kind]
    return data[:start] + middle + data[start + length :]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_never_lost_in_silence(tmp_path: Path, name: str) -> None:
    codec, ending, options = CLIPS[name]
    reader = PyAVReader()
    whole = make_clip(tmp_path / f"a.{ending}", N_FRAMES, (144, 192), codec, gop=8, **options)
    data, path = whole.read_bytes(), tmp_path / f"b.{ending}"
    assert reader.probe(whole) == reader.probe(whole, tolerate_truncation=True)
    rng = random.Random(name)
    refused = 0
    for i in range(18):
        path.write_bytes(spoiled(rng, data, ("zero", "drop", "replace")[i % 3]))
        try:
            assert reader.probe(path).n_frames == N_FRAMES, "a part was lost without a word"
        except VideoError:
            refused += 1
        try:
            info = reader.probe(path, tolerate_truncation=True)
        except VideoError:
            continue
        assert info.truncated is not None or info.n_frames == N_FRAMES
        frames = reader.frames_at(path, range(info.n_frames), tolerate_truncation=True).numpy()
        if codec in ("h264", "mpeg2video"):  # the other codecs notice little within a frame
            assert [read_number(frame) for frame in frames] == list(range(info.n_frames))
    assert refused >= 10


def test_the_verdict_is_told_what_is_missing(tmp_path: Path) -> None:
    """A cluster of zeros in the middle: before, its frames were skipped."""
    whole = make_clip(tmp_path / "a.webm", N_FRAMES, (144, 192), "vp9", gop=8)
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray(whole.read_bytes())
    start = packets[20].pos + 30
    data[start : start + 2000] = bytes(2000)
    path = tmp_path / "b.webm"
    path.write_bytes(data)
    reader = PyAVReader()
    message = (
        r"breaks after frame 20: the file is damaged at byte \d+ \(not an element of a cluster\); --tolerate-"
    )
    with pytest.raises(VideoError, match=message):
        reader.probe(path)
    info = reader.probe(path, tolerate_truncation=True)
    assert info.n_frames == 20
    assert str(info.truncated).startswith("the file is damaged at byte ")
    with pytest.raises(VideoError, match="frame_index: got 20, allowed: 0 to 19"):
        reader.frames_at(path, [20], tolerate_truncation=True)


def test_a_header_that_states_a_later_end(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mkv", 24, codec="mjpeg")
    data = path.read_bytes()
    at = data.index(b"\x44\x89\x88") + 3
    assert struct.unpack(">d", data[at : at + 8]) == (1000.0,)
    for stated, missing in ((1900.0, False), (2100.0, True), (float("nan"), False)):
        path.write_bytes(data[:at] + struct.pack(">d", stated) + data[at + 8 :])
        part = missing_part(str(path), "matroska,webm")
        assert (part is not None) == missing
    path.write_bytes(data[:at] + struct.pack(">d", 2100.0) + data[at + 8 :])
    with pytest.raises(
        VideoError, match=r"its end is missing \(its header states 2\.10 s, the last frame comes at 0"
    ):
        PyAVReader().probe(path)
    assert PyAVReader().probe(path, tolerate_truncation=True).n_frames == 24


def test_a_slow_clip_is_whole(tmp_path: Path) -> None:
    """Long last frames, and long gaps, are no loss."""
    for pts in ([0, 4000, 8000], [0, 40, 80, 9000], [0, 100, 5000, 5100]):
        for ending in ("mkv", "webm", "ts", "flv"):
            codec = "vp8" if ending == "webm" else "h264"
            clip = make_clip(tmp_path / f"a.{ending}", len(pts), codec=codec, pts=pts)
            assert PyAVReader().probe(clip).n_frames == len(pts)
    with_sound = make_clip(tmp_path / "b.mkv", 12, audio=True)
    assert PyAVReader().probe(with_sound).n_frames == 12


def element(kind: str, content: bytes, *, sized: bool = True) -> bytes:
    """A Matroska element; without a size, its end is open."""
    size = (len(content) | 1 << 56).to_bytes(8, "big") if sized else b"\x01" + b"\xff" * 7
    return bytes.fromhex(kind) + size + content


HEADER = element("1a45dfa3", b"")
TRACKS = element("1654ae6b", element("ae", element("d7", b"\1")))
BLOCK = element("a3", b"\x81\0\0\x80data")
GROUP = element("a0", element("a1", b"\x81\0\0\0data") + element("9b", b"\x0b\xb8"))
CLUSTER = element("1f43b675", element("e7", b"\0") + BLOCK)
LIVE = element("1f43b675", element("e7", b"\0") + BLOCK, sized=False)
LATE = element("1549a966", element("2ad7b1", b"\x0f\x42\x40") + element("4489", struct.pack(">f", 3000.0)))
UNTIMED = element(
    "1549a966", element("2ad7b1", b"\0") + element("4489", b"\0\0") + element("4489", b"\x43\xa0\0\0")
)


@pytest.mark.parametrize(
    ("content", "sized", "reason"),
    [
        (TRACKS + CLUSTER, True, None),
        (TRACKS + LIVE + LIVE, False, None),
        (TRACKS + LIVE + CLUSTER + HEADER + b"more", False, None),
        (LATE + TRACKS + element("1f43b675", GROUP), True, None),
        (
            LATE + TRACKS + CLUSTER,
            True,
            "its end is missing (its header states 3.00 s, the last frame comes at 0.00 s)",
        ),
        (UNTIMED + CLUSTER, True, None),
        (element("1549a966", b"\x44\x89\x90cut") + CLUSTER, True, None),
        (CLUSTER + b"\0\0\0", True, "(not an element of a segment)"),
        (CLUSTER + b"\x1f\x43\xb6\x75\x01\0", True, "(not an element of a segment)"),
        (CLUSTER + element("1c53bb6b", b"", sized=False), True, "(an element without a size)"),
        (element("1f43b675", BLOCK + b"\x05"), True, "(not an element of a cluster)"),
        (element("1f43b675", BLOCK + b"\xa3\x90data"), True, "(an element that is larger than its cluster)"),
        (LIVE + b"\xa3\x90data", False, "the file is cut short ("),
        (
            TRACKS + element("1f43b675", element("a3", b"\x82\0\0\0")),
            True,
            "(a block of track 2, which does not exist)",
        ),
        (
            TRACKS + element("1f43b675", element("a0", element("a1", b"\x82\0\0\0"))),
            True,
            "(a block of track 2, ",
        ),
        (
            TRACKS + element("1f43b675", element("a0", b"\xa1\x90")),
            True,
            "(not an element of a group of blocks)",
        ),
        (TRACKS + element("1f43b675", element("a3", b"\x41\0\0\0\0")), True, None),
    ],
)
def test_the_elements_of_a_segment(tmp_path: Path, content: bytes, sized: bool, reason: str | None) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(HEADER + element("ec", b"\0") + element("18538067", content, sized=sized))
    part = missing_part(str(path), "matroska,webm")
    if reason is None:
        assert part is None
    else:
        assert part is not None
        assert reason in part.reason
        assert part.at_byte is not None


def test_a_file_of_endless_elements_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matroska, "_MAX_ELEMENTS", 50)
    path = tmp_path / "a.mkv"
    path.write_bytes(HEADER + element("18538067", element("ec", b"") * 60))
    part = missing_part(str(path), "matroska,webm")
    assert part is not None
    assert part.reason == "over 50 elements, more than a clip can need"


def transport_packet(
    pid: int, count: int, *, flags: int = 0x10, start: bool = False, bad: bool = False
) -> bytes:
    head = bytes([0x47, bad << 7 | start << 6 | pid >> 8, pid & 255, flags | count & 15])
    announced = b"\x01\x80" if flags & 0x20 else b""
    return (head + announced).ljust(188, b"\1")


def test_the_packets_of_a_transport_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    good = [transport_packet(256, i, start=i % 4 == 0) for i in range(40)]
    other = [transport_packet(257, 7)] * 3  # another stream, which counts as it likes
    cases: list[tuple[list[bytes], int | None]] = [
        (good, None),
        (good[:20] + other + good[20:], None),
        ([*good[:20], good[19], *good[20:]], None),  # a packet may come twice
        ([*good[:20], transport_packet(256, 3, flags=0), *good[20:]], None),  # no data, so no count
        ([*good[:20], transport_packet(256, 9, flags=0x30)], None),  # an announced jump
        (good[:20] + good[21:], 16),
        ([*good[:18], transport_packet(256, 18, bad=True), *good[19:]], 16),
        ([*good[:18], bytes(188), *good[19:]], 16),
        (other + good[2:3] + good[9:], 0),
    ]
    for packets, whole in cases:
        path.write_bytes(b"".join(packets))
        part = missing_part(str(path), "mpegts", 256)
        assert (None if part is None else part.at_byte) == (None if whole is None else whole * 188)
    # The count goes on from one part of the file, read at once, to the next.
    long = [transport_packet(256, i) for i in range(1 << 14)]
    path.write_bytes(b"".join([*long, transport_packet(256, 1 << 14)]))
    assert missing_part(str(path), "mpegts", 256) is None
    path.write_bytes(b"".join([*long, transport_packet(256, (1 << 14) + 1)]))
    assert missing_part(str(path), "mpegts", 256) is not None


def test_the_chunks_of_other_containers(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def reason(name: str, data: bytes) -> str | None:
        path.write_bytes(data)
        part = missing_part(str(path), name)
        return None if part is None else part.reason

    movi = b"LIST" + (24).to_bytes(4, "little") + b"movi" + b"00dc" + (3).to_bytes(4, "little") + b"abc\0"
    rest = b"idx1" + bytes(4)
    riff = b"RIFF" + (4 + len(movi + rest)).to_bytes(4, "little") + b"AVI "
    assert reason("avi", riff + movi + rest) is None
    assert reason("avi", riff + movi + rest + b"\xff\xffanything") is None
    assert reason("avi", b"RIFF" + bytes(4) + b"AVI " + movi + rest) is None
    assert reason("avi", riff + movi + b"\0dx1" + bytes(4)) == "the file is damaged at byte 36 (not a chunk)"

    def tag(kind: int, content: bytes, stated: int | None = None) -> bytes:
        size = len(content).to_bytes(3, "big")
        after = 11 + len(content) if stated is None else stated
        return bytes([kind]) + size + bytes(7) + content + after.to_bytes(4, "big")

    flv = b"FLV\1\1\0\0\0\x09" + bytes(4)
    assert reason("flv", flv + tag(18, b"x") + tag(9, b"yz") + tag(9, b"z", 0)) is None
    assert reason("flv", flv + tag(9, b"yz") + tag(7, b"yz")) == "the file is damaged at byte 30 (not a tag)"
    assert reason("flv", flv + tag(9, b"yz", 12)) == "the file is damaged at byte 13 (not a tag)"
    assert reason("flv", flv + tag(9, bytes(30))[:20]) == "the file ends inside a frame"
    assert reason("flv", b"FLW" + bytes(30)) is None

    def box(kind: bytes, content: bytes) -> bytes:
        return (8 + len(content)).to_bytes(4, "big") + kind + content

    moof = box(b"moov", b"x") + box(b"moof", b"y") + box(b"mdat", b"z")
    assert reason("mov", moof + moof) is None
    assert reason("mov", moof + (1).to_bytes(4, "big") + b"mdat" + (20).to_bytes(8, "big") + bytes(4)) is None
    assert reason("mov", moof + bytes(40)) is None
    assert reason("mov", moof + bytes(4) + b"mdatto the end") is None
    assert reason("mov", moof + bytes(20) + moof) == "the file is damaged at byte 27 (not a box)"
    assert reason("mov", box(b"moov", b"x") + box(b"mdat", b"z") + bytes(20) + b"what a camera adds") is None


def test_every_walk_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers_module, "_MAX_BOXES", 5)
    path = tmp_path / "a"
    for name, data in (
        ("mov", (8).to_bytes(4, "big") + b"free"),
        ("avi", b"JUNK" + bytes(4)),
        ("flv", bytes([9]) + bytes(10) + (11).to_bytes(4, "big")),
    ):
        heads = {"avi": b"RIFF" + bytes(4) + b"AVI ", "flv": b"FLV\1\1\0\0\0\x09" + bytes(4)}
        path.write_bytes(heads.get(name, b"") + data * 20)
        assert missing_part(str(path), name) is None


@pytest.mark.parametrize("name", ["0174_zero_vp9.webm", "0557_trunc_theora.ogg"])
def test_clips_that_were_judged_in_part(name: str) -> None:
    if not (CASES / name).exists():
        pytest.skip("../shared/cases is not there")
    with pytest.raises(
        VideoError, match=r"breaks after frame 22: the file is damaged|container ogg, allowed: mp4, "
    ):
        PyAVReader().probe(CASES / name)


@pytest.mark.parametrize(
    ("name", "encoder", "pixels", "line"),
    [
        ("a.mkv", "ffv1", "yuv420p", "codec ffv1, allowed: h264, hevc, vp8, "),
        ("a.avi", "msmpeg4", "yuv420p", "codec msmpeg4v3, allowed: h264, hevc, vp8, "),
        ("a.ogg", "libvpx", "yuv420p", "container ogg, allowed: mp4, mov, mkv, "),
        ("a.y4m", "rawvideo", "yuv420p", "container yuv4mpegpipe, allowed: mp4, mov, mkv, "),
        ("a.nut", "mpeg4", "yuv420p", "container nut, allowed: mp4, mov, mkv, "),
    ],
)
def test_what_is_not_listed_is_refused_with_the_list(
    tmp_path: Path, name: str, encoder: str, pixels: str, line: str
) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        stream: Any = container.add_stream(encoder, rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixels
        for i in range(3):
            frame = av.VideoFrame(64, 64, pixels)
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match=f"{line}.*; encode the clip anew, for example as h264 in mp4$"):
        PyAVReader().probe(tmp_path / name)


def test_a_frame_that_the_file_holds_and_the_demuxer_leaves_out(tmp_path: Path) -> None:
    """One flag of one block makes FFmpeg look for several frames in it, and lose it."""
    path = make_clip(tmp_path / "a.mkv", 24)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        place = [packet.pos for packet in container.demux(video=0)][3]
    data[place + 3] |= 6  # the flags, after the track and the time
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"the frame at byte \d+ cannot be reached"):
        PyAVReader().probe(path)
    info = PyAVReader().probe(path, tolerate_truncation=True)
    assert 0 < info.n_frames < 24
    assert info.truncated is not None


def test_a_chunk_that_the_demuxer_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    chunk = b"00dc" + (3).to_bytes(4, "little") + b"abc\0"
    movi = b"LIST" + (4 + 2 * len(chunk)).to_bytes(4, "little") + b"movi" + chunk + chunk
    path.write_bytes(b"RIFF" + (4 + len(movi)).to_bytes(4, "little") + b"AVI " + movi)
    assert missing_part(str(path), "avi") is None, "nothing is known of the demuxer"
    assert missing_part(str(path), "avi", 0, {24, 36}) is None
    part = missing_part(str(path), "avi", 0, {24})
    assert part is not None
    assert (part.reason, part.at_byte) == ("the frame at byte 36 cannot be reached", 36)


def test_a_transport_stream_that_is_out_of_step_at_its_start(tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    packets = [transport_packet(256, i) for i in range(8)]
    path.write_bytes(packets[0][:45] + b"".join(packets[1:]))
    part = missing_part(str(path), "mpegts", 256)
    assert part is not None
    assert part.at_byte == 0
    for before in (b"\0\0\0\0", bytes(16)):  # other kinds of streams are not understood, and believed
        path.write_bytes(b"".join(packet + before for packet in packets))
        assert missing_part(str(path), "mpegts", 256) is None


def test_a_clip_that_begins_inside_a_group_of_pictures_says_so(tmp_path: Path) -> None:
    """What a recording is that was started at any moment, or a stream that was cut by bytes."""
    path = make_clip(tmp_path / "a.ts", 24, gop=12)
    data = path.read_bytes()
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    ours = [place for place, packet in enumerate(packets) if packet[1] & 0x1F == 1 and packet[2] == 0]
    third = [place for place in ours if packets[place][1] & 0x40][2]
    path.write_bytes(b"".join(p for place, p in enumerate(packets) if place not in ours or place >= third))
    info = PyAVReader().probe(path)
    assert info.n_frames == 12
    assert info.notes == ("its first 10 frames refer to frames before it and cannot be shown",)


def test_a_time_that_goes_back_hides_no_frame(tmp_path: Path) -> None:
    """In codecs that never reorder, what is shown before the first keyframe is not a leading picture."""
    path = make_clip(tmp_path / "a.webm", 24, codec="vp9", gop=12)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        place = next(packet.pos for packet in container.demux(video=0))
    data[place + 1 : place + 3] = (512).to_bytes(2, "big")
    path.write_bytes(data)
    assert PyAVReader().probe(path).n_frames == 24
    frames = PyAVReader().frames_at(path, range(24)).numpy()
    assert [read_number(frame) for frame in frames] == list(range(24))
