"""The frames shown are the frames asked for: every codec and container, constant and variable rate."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from clips import draw_number, make_clip, read_number, stream_copy

from vrthinker.errors import VideoError
from vrthinker.video import open_reader
from vrthinker.video.pyav import index as index_module
from vrthinker.video.pyav import reader as pyav_module
from vrthinker.video.pyav.clip import Orientation, open_clip
from vrthinker.video.pyav.packets import starts_afresh
from vrthinker.video.pyav.reader import PyAVReader

N_FRAMES = 24
EXACT_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
VARIABLE_MS = [0, 40, 80, 200, 240, 300, 310, 400, 480, 500, 700, 730]
VARIABLE_MS += [740, 900, 940, 1000, 1040, 1080, 1100, 1300, 1310, 1400, 1500, 1520]
REAL_CLIPS = Path(__file__).parents[3] / "shared" / "data" / "videoalign" / "videos"

CONTAINERS = [
    *[(codec, ending) for codec in ("h264", "hevc", "mpeg4", "mjpeg") for ending in ("mp4", "mkv", "mov")],
    *[(codec, ending) for codec in ("vp9", "av1") for ending in ("mp4", "mkv", "webm")],
    ("vp8", "webm"),
    ("h264", "ts"),
    ("h264", "flv"),
    ("mpeg2video", "mkv"),
    ("gif", "gif"),
]
HAVE_B_FRAMES = {"h264", "hevc", "mpeg4", "mpeg2video"}
STATE_THEIR_RATE = {"mpeg2video"}
COMBINATIONS = [
    pytest.param(codec, ending, b_frames, variable, id=f"{codec}-{ending}-b{b_frames}-{rate}")
    for codec, ending in CONTAINERS
    for b_frames in ((0, 2) if codec in HAVE_B_FRAMES else (0,))
    for rate, variable in (("constant", False), ("variable", True))
    if not (variable and codec in STATE_THEIR_RATE)
]
CONSTANT_ONLY = [("mpeg4", "avi"), ("mjpeg", "avi"), ("h264", "avi"), ("h264", "h264"), ("hevc", "hevc")]


@pytest.fixture
def reader() -> PyAVReader:
    return PyAVReader()


def numbers(reader: PyAVReader, path: Path, frame_indices: list[int], **options: Any) -> list[int]:
    frames = reader.frames_at(path, frame_indices, **options)
    assert frames.frame_indices == tuple(frame_indices)
    return [read_number(frame) for frame in frames.numpy()]


def decoded(path: Path) -> Iterator[av.VideoFrame]:
    """The oracle: PyAV's plain sequential decode."""
    with av.open(str(path)) as container:
        yield from container.decode(video=0)


def to_rgb(frame: av.VideoFrame) -> np.ndarray[Any, Any]:
    return frame.reformat(format="rgb24", interpolation=EXACT_RGB).to_ndarray()


def check_every_way(reader: PyAVReader, path: Path, expected: list[int]) -> None:
    info = reader.probe(path)
    assert info.n_frames == len(expected)
    assert len(info.pts_seconds) == info.n_frames
    assert info.pts_seconds[0] == 0.0
    assert numbers(reader, path, list(range(len(expected)))) == expected
    rng = random.Random(5)
    asked = [[0], [len(expected) - 1], list(range(len(expected)))[::-1]]
    asked += [[rng.randrange(len(expected)) for _ in range(rng.randint(1, 6))] for _ in range(6)]
    for frame_indices in asked:
        assert numbers(reader, path, frame_indices) == [expected[i] for i in frame_indices], frame_indices


@pytest.mark.parametrize(("codec", "ending", "b_frames", "variable"), COMBINATIONS)
def test_frames_are_those_asked_for(
    reader: PyAVReader, tmp_path: Path, codec: str, ending: str, b_frames: int, variable: bool
) -> None:
    pts = VARIABLE_MS if variable else None
    clip = make_clip(tmp_path / f"a.{ending}", N_FRAMES, codec=codec, pts=pts, b_frames=b_frames, gop=7)
    check_every_way(reader, clip, list(range(N_FRAMES)))
    info = reader.probe(clip)
    assert info.codec == codec
    assert (info.height, info.width) == (64, 96)
    assert info.is_variable_frame_rate is variable
    times = [ms / 1000 for ms in VARIABLE_MS] if variable else [i / 24 for i in range(N_FRAMES)]
    # Matroska's and FLV's clocks tick in 1 ms, a GIF's in 10 ms.
    tolerance = {"mkv": 1e-3, "webm": 1e-3, "flv": 1e-3, "gif": 1e-2}.get(ending, 1e-4)
    assert info.pts_seconds == pytest.approx(times, abs=tolerance)
    if not variable:
        assert info.fps == pytest.approx(24, rel=0.05 if ending == "gif" else 2e-3)
    assert info.duration_seconds == pytest.approx(info.n_frames / info.fps)


@pytest.mark.parametrize(("codec", "ending"), CONSTANT_ONLY)
def test_containers_without_usable_timestamps_are_counted(
    reader: PyAVReader, tmp_path: Path, codec: str, ending: str
) -> None:
    b_frames = 0 if codec == "mjpeg" else 2
    clip = make_clip(tmp_path / f"a.{ending}", N_FRAMES, codec=codec, b_frames=b_frames, gop=7, fps=25)
    check_every_way(reader, clip, list(range(N_FRAMES)))
    info = reader.probe(clip)
    assert info.fps == pytest.approx(25)
    assert not info.is_variable_frame_rate
    assert info.pts_seconds == pytest.approx([i / 25 for i in range(N_FRAMES)], abs=1e-4)


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg", "gif"])
def test_odd_sizes(reader: PyAVReader, tmp_path: Path, codec: str) -> None:
    ending = "gif" if codec == "gif" else "mkv"
    clip = make_clip(tmp_path / f"a.{ending}", 9, size=(77, 113), codec=codec, gop=4)
    check_every_way(reader, clip, list(range(9)))
    info = reader.probe(clip)
    assert (info.height, info.width) == (77, 113)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("mirror", [False, True], ids=["", "mirrored"])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_pixels_are_turned_for_display(
    reader: PyAVReader, tmp_path: Path, rotation: int, mirror: bool, ending: str
) -> None:
    clip = make_clip(tmp_path / f"a.{ending}", 5, size=(64, 112), rotation=rotation, mirror=mirror)
    info = reader.probe(clip)
    assert info.rotation_degrees == rotation
    assert (info.height, info.width) == ((64, 112) if rotation in (0, 180) else (112, 64))
    shown = np.rot90(draw_number(3, (64, 112)), -rotation // 90)
    shown = shown[:, ::-1] if mirror else shown
    frame = reader.frames_at(clip, [3]).numpy()[0]
    assert np.abs(frame.astype(int) - shown).mean() < 4
    # The drawn picture looks different every other way round.
    others = [np.rot90(turned, k) for k in range(4) for turned in (shown, shown[:, ::-1])][1:]
    alike = [other for other in others if other.shape == frame.shape and np.abs(frame - other).mean() < 4]
    assert alike == []


H264_OPEN = {"x264-params": "open-gop=1:b-pyramid=2:b-adapt=0:ref=3"}
HEVC_OPEN = {"x265-params": "open-gop=1:b-adapt=0"}
INTRA_REFRESH = {"x264-params": "intra-refresh=1"}
ALT_REF = {"deadline": "good", "cpu-used": "4", "auto-alt-ref": "1", "lag-in-frames": "16"}


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("open.mp4", "h264", H264_OPEN),
        ("open.mkv", "h264", H264_OPEN),
        ("open.mp4", "hevc", HEVC_OPEN),
        ("open.mkv", "hevc", HEVC_OPEN),
        ("refresh.mp4", "h264", INTRA_REFRESH),
        ("hidden.webm", "vp8", ALT_REF),
        ("hidden.webm", "vp9", ALT_REF),
        ("hidden.mp4", "vp9", ALT_REF),
        ("fragments.mp4", "h264", {}),
    ],
)
def test_seeking_gives_the_very_pixels_of_a_sequential_decode(
    reader: PyAVReader, tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    fragments = {"movflags": "frag_keyframe+empty_moov"} if name.startswith("fragments") else None
    clip = make_clip(
        tmp_path / name, 60, codec=codec, gop=8, b_frames=3, options=options, container_options=fragments
    )
    oracle = [to_rgb(frame) for frame in decoded(clip)]
    assert len(oracle) == reader.probe(clip).n_frames == 60
    for frame_index in range(60):
        frame = reader.frames_at(clip, [frame_index]).numpy()[0]
        assert np.array_equal(frame, oracle[frame_index]), frame_index


def test_open_groups_of_pictures_are_really_open(tmp_path: Path) -> None:
    """The test above means something: pictures follow their keyframe in the file and precede it on screen."""
    for codec, options in (("h264", H264_OPEN), ("hevc", HEVC_OPEN)):
        clip = make_clip(tmp_path / f"{codec}.mp4", 60, codec=codec, gop=8, b_frames=3, options=options)
        with av.open(str(clip)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        assert any(packets[i + 1].pts < packets[i].pts for i in keyframes[1:-1])


@pytest.fixture
def count_full_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the files that had to be read from the start after a seek did not add up."""
    calls: list[str] = []
    original: Callable[..., None] = pyav_module._read_from_start

    def counting(path: str, *arguments: Any) -> None:
        calls.append(path)
        original(path, *arguments)

    monkeypatch.setattr(pyav_module, "_read_from_start", counting)
    return calls


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("codec", "options"), [("h264", {}), ("h264", H264_OPEN), ("hevc", HEVC_OPEN), ("vp9", {}), ("av1", {})]
)
def test_a_late_frame_costs_one_group_of_pictures(
    reader: PyAVReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count_full_reads: list[str],
    codec: str,
    ending: str,
    options: dict[str, str],
) -> None:
    n_frames, gop = 160, 8
    clip = make_clip(tmp_path / f"a.{ending}", n_frames, codec=codec, gop=gop, b_frames=3, options=options)
    reader.probe(clip)
    decoded: list[int] = []
    original = pyav_module.OpenClip.decode

    def counting(self: pyav_module.OpenClip, packet: Any) -> list[Any]:
        frames = original(self, packet)
        decoded.append(len(frames))
        return frames

    monkeypatch.setattr(pyav_module.OpenClip, "decode", counting)
    assert numbers(reader, clip, [150, 81]) == [150, 81]
    assert sum(decoded) <= 4 * gop, "seeks must skip what lies between"
    assert count_full_reads == []


def test_a_seek_that_lands_wrong_is_noticed(
    reader: PyAVReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count_full_reads: list[str]
) -> None:
    clip = make_clip(tmp_path / "a.mp4", 60, gop=8)
    reader.probe(clip)

    def lands_too_late(self: pyav_module.OpenClip, pts: int, dts: int | None) -> Iterator[Any]:
        self.container.seek(10**9, stream=self.stream)
        return self.packets()

    monkeypatch.setattr(pyav_module.OpenClip, "packets_from", lands_too_late)
    assert numbers(reader, clip, [42]) == [42]
    assert count_full_reads == [str(clip)]


def test_a_frame_that_the_decoder_swallows_is_noticed(
    reader: PyAVReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count_full_reads: list[str]
) -> None:
    clip = make_clip(tmp_path / "a.mp4", 60, gop=20, b_frames=2)
    swallowed = decode_pts(clip)[46]  # later pictures depend on it: I B B P B B P
    reader.probe(clip)
    original, by_seeking = pyav_module.OpenClip.decode, pyav_module._read_by_seeking
    seeking: list[bool] = []

    def noted(*arguments: Any) -> None:
        seeking.append(True)
        try:
            by_seeking(*arguments)
        finally:
            seeking.pop()

    def swallowing(self: pyav_module.OpenClip, packet: Any) -> list[Any]:
        # Only after a seek, so reading from the start helps.
        return [frame for frame in original(self, packet) if frame.pts != swallowed or not seeking]

    monkeypatch.setattr(pyav_module, "_read_by_seeking", noted)
    monkeypatch.setattr(pyav_module.OpenClip, "decode", swallowing)
    assert numbers(reader, clip, [45, 46, 47]) == [45, 46, 47]
    assert count_full_reads == [str(clip)]
    assert numbers(reader, clip, [48]) == [48]
    assert len(count_full_reads) == 2, "what comes after a gap is not trusted"


def decode_pts(path: Path) -> list[int | None]:
    with av.open(str(path)) as container:
        return [frame.pts for frame in container.decode(video=0)]


def test_an_edit_list_hides_frames(reader: PyAVReader, tmp_path: Path) -> None:
    pts = [40 * (i - 5) for i in range(30)]
    clip = make_clip(tmp_path / "a.mp4", 30, pts=pts, gop=12, b_frames=2)
    with av.open(str(clip)) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) == 5
    check_every_way(reader, clip, list(range(5, 30)))


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_a_late_start_counts_from_the_first_frame(reader: PyAVReader, tmp_path: Path, ending: str) -> None:
    clip = make_clip(tmp_path / f"a.{ending}", 30, pts=[3000 + 40 * i for i in range(30)], b_frames=2)
    check_every_way(reader, clip, list(range(30)))
    assert reader.probe(clip).pts_seconds == pytest.approx([i / 25 for i in range(30)])


def remux(source: Path, target: Path, change: Callable[[int, Any], Any]) -> Path:
    """Copies packets; `change` gets (position, packet) and returns the packet, or None to drop it."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for i, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            changed = change(i, packet)
            if changed is not None:
                changed.stream = stream
                new.mux(changed)
    return target


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_a_clip_cut_out_between_keyframes_starts_where_players_start(
    reader: PyAVReader, tmp_path: Path, codec: str
) -> None:
    options = H264_OPEN if codec == "h264" else HEVC_OPEN
    whole = make_clip(tmp_path / "a.mkv", 60, codec=codec, gop=8, b_frames=3, options=options)
    cut_out = remux(whole, tmp_path / "b.mkv", lambda i, packet: packet if i >= 13 else None)
    n_frames = reader.probe(cut_out).n_frames
    expected = list(range(60 - n_frames, 60))
    assert 40 <= n_frames <= 47
    check_every_way(reader, cut_out, expected)


STREAM_COPIES = {
    "h264 all B-frames": ("h264", 3, 0.7, {"x264-params": "open-gop=1:b-pyramid=2:min-keyint=12:b-adapt=0"}),
    "h264 chosen B-frames": (
        "h264",
        3,
        2.2,
        {"x264-params": "open-gop=1:b-pyramid=2:min-keyint=12:b-adapt=1"},
    ),
    "h264 strict pyramid": ("h264", 3, 1.2, {"x264-params": "open-gop=1:b-pyramid=1:min-keyint=12:ref=4"}),
    "hevc": ("hevc", 3, 1.2, {"x265-params": "open-gop=1:b-pyramid=1:b-adapt=0"}),
    "mpeg2video": ("mpeg2video", 2, 1.2, {}),
    "mpeg4": ("mpeg4", 2, 1.2, {}),
}
"""A codec, its B-frames, the time of the cut, and options that open its groups of pictures."""


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("name", STREAM_COPIES)
def test_a_cut_without_encoding_anew_shows_what_plain_decoding_shows(
    reader: PyAVReader, tmp_path: Path, count_full_reads: list[str], name: str, ending: str
) -> None:
    codec, b_frames, start_seconds, options = STREAM_COPIES[name]
    whole = make_clip(tmp_path / "whole.mp4", 72, codec=codec, gop=12, b_frames=b_frames, options=options)
    clip = stream_copy(whole, tmp_path / f"cut.{ending}", start_seconds)
    # The decoder must see the same pictures before and after the cut, whatever it does at the cut itself.
    oracle = [to_rgb(frame) for frame in decoded(clip)]
    uncut = [to_rgb(frame) for frame in decoded(whole)][-len(oracle) :]
    assert all(np.array_equal(a, b) for a, b in zip(oracle, uncut, strict=True))
    n_frames = reader.probe(clip).n_frames
    assert n_frames == len(oracle) >= 18
    assert reader.probe(clip, tolerate_truncation=True).truncated is None
    for frame_indices in (range(n_frames), [n_frames - 1], [n_frames // 2, 3]):
        shown = reader.frames_at(clip, frame_indices).numpy()
        assert all(np.array_equal(a, oracle[i]) for a, i in zip(shown, frame_indices, strict=True))
    assert count_full_reads == [], "seeks must work in such a clip"


def test_units_are_found_whatever_separates_them(tmp_path: Path) -> None:
    """An IDR picture is told from another keyframe with lengths before the units, and with start codes."""
    options = {"x264-params": "open-gop=1:b-pyramid=2:b-adapt=0:min-keyint=8"}
    for ending in ("mp4", "h264"):
        clip = make_clip(tmp_path / f"a.{ending}", 40, gop=8, b_frames=3, options=options)
        with open_clip(str(clip)) as opened:
            afresh = [opened.starts_afresh(packet) for packet in opened.packets() if packet.is_keyframe]
        assert afresh[0]
        assert not any(afresh[1:])
    assert starts_afresh("h264", memoryview(b""), b"")
    assert starts_afresh("vp9", memoryview(b"x"), b"")


def test_hidden_packets_are_no_frames(reader: PyAVReader, tmp_path: Path) -> None:
    """VP8 stores pictures that only serve later ones as packets of their own."""
    whole = make_clip(tmp_path / "a.webm", 30, codec="vp8", gop=30)

    def hide(i: int, packet: Any) -> Any:
        if i not in (4, 5, 17):
            return packet
        data = bytearray(bytes(packet))
        data[0] &= ~0x10  # show_frame
        hidden = av.Packet(bytes(data))
        hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
        return hidden

    clip = remux(whole, tmp_path / "b.webm", hide)
    check_every_way(reader, clip, [i for i in range(30) if i not in (4, 5, 17)])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {"b_frames": 3, "gop": 48}),
        ("a.mkv", {"codec": "hevc", "b_frames": 3, "gop": 48}),
        ("a.webm", {"codec": "vp9", "gop": 48}),
        ("a.mp4", {"codec": "av1", "gop": 48}),
        ("edited.mp4", {"pts": [40 * (i - 5) for i in range(48)], "gop": 48}),
    ],
)
def test_a_probe_decodes_one_frame(
    reader: PyAVReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
) -> None:
    clip = make_clip(tmp_path / name, 48, **options)
    fed: list[Any] = []
    original = pyav_module.OpenClip.decode
    monkeypatch.setattr(
        pyav_module.OpenClip, "decode", lambda self, packet: fed.append(packet) or original(self, packet)
    )
    assert reader.probe(clip).n_frames == (43 if name == "edited.mp4" else 48)
    assert len(fed) <= 10


def test_duplicate_timestamps_are_counted(reader: PyAVReader, tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "a.mkv", 30, codec="mjpeg")
    times_ms: list[int] = []

    def repeat(i: int, packet: Any) -> Any:
        times_ms.append(times_ms[-1] if i % 3 == 2 else packet.pts)
        packet.pts = packet.dts = times_ms[-1]
        return packet

    clip = remux(whole, tmp_path / "b.mkv", repeat)
    check_every_way(reader, clip, list(range(30)))
    assert len(set(times_ms)) < 30
    assert reader.probe(clip).pts_seconds == pytest.approx([ms / 1000 for ms in times_ms])


def test_other_streams_are_ignored(reader: PyAVReader, tmp_path: Path) -> None:
    for ending in ("mp4", "mkv"):
        clip = make_clip(tmp_path / f"a.{ending}", 20, gop=6, audio=True)
        check_every_way(reader, clip, list(range(20)))


def test_the_picture_of_a_cover_is_not_the_video(reader: PyAVReader, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", 10)
    with_cover = tmp_path / "b.mp4"
    with av.open(str(clip)) as old, av.open(str(with_cover), "w") as new:
        cover = new.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 240, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        video = new.add_stream_from_template(old.streams.video[0])
        picture = av.VideoFrame.from_ndarray(draw_number(999, (240, 320)), format="rgb24")
        picture.pts = 0
        new.mux(cover.encode(picture) + cover.encode(None))
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = video
                new.mux(packet)
    with av.open(str(with_cover)) as container:
        assert len(container.streams.video) == 2
    info = reader.probe(with_cover)
    assert (info.width, info.height, info.n_frames) == (96, 64, 10)
    assert numbers(reader, with_cover, [4]) == [4]


def test_one_frame_clips(reader: PyAVReader, tmp_path: Path) -> None:
    for codec, ending in (("h264", "mp4"), ("vp9", "webm"), ("gif", "gif")):
        clip = make_clip(tmp_path / f"one.{ending}", 1, codec=codec)
        info = reader.probe(clip)
        assert (info.n_frames, info.pts_seconds, info.is_variable_frame_rate) == (1, (0.0,), False)
        assert info.duration_seconds > 0
        assert info.fps > 0
        assert numbers(reader, clip, [0, 0]) == [0, 0]


def test_an_index_outside_the_file_is_refused(reader: PyAVReader, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", 10)
    for bad in (10, -1):
        with pytest.raises(VideoError, match=rf"a\.mp4: frame_index: got {bad}, allowed: 0 to 9$"):
            reader.frames_at(clip, [0, bad])
    assert reader.frames_at(clip, []).data.shape == (0, 64, 96, 3)
    assert reader.frames_at(clip, np.array([3, 1])).frame_indices == (3, 1)  # type: ignore[arg-type]


def test_read_many_opens_each_file_once(
    reader: PyAVReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_clip(tmp_path / "a.mp4", 20)
    second = make_clip(tmp_path / "b.mkv", 20, first_number=100)
    for clip in (first, second):
        reader.probe(clip)
    reader._pool.close_idle()
    opened: list[str] = []
    original = pyav_module.open_clip
    monkeypatch.setattr(
        pyav_module, "open_clip", lambda path, **options: opened.append(path) or original(path, **options)
    )
    batches = reader.read_many([(first, [3, 9]), (second, [0]), (first, [9, 9, 1]), (second, [])])
    shown = [[read_number(frame) for frame in batch.numpy()] for batch in batches]
    assert shown == [[3, 9], [100], [9, 9, 1], []]
    assert [batch.frame_indices for batch in batches] == [(3, 9), (0,), (9, 9, 1), ()]
    assert opened == [str(first), str(second)]


def test_a_probe_is_remembered_until_the_file_changes(
    reader: PyAVReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    original = index_module.list_clip
    monkeypatch.setattr(
        index_module, "list_clip", lambda path, *more: listed.append(path) or original(path, *more)
    )
    clip = make_clip(tmp_path / "a.mp4", 10)
    for _ in range(3):
        assert reader.probe(clip).n_frames == 10
    monkeypatch.chdir(tmp_path)
    assert reader.probe("a.mp4").path == "a.mp4"
    assert len(listed) == 1
    shutil.copy(make_clip(tmp_path / "b.mp4", 12, first_number=50), clip)
    assert reader.probe(clip).n_frames == 12
    assert numbers(reader, clip, [11]) == [61]


def test_names_that_ffmpeg_would_read_as_something_else(
    reader: PyAVReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = make_clip(tmp_path / "a.mp4", 5)
    for name in ("concat:a.mp4", "%03d.mp4", "-i.mp4", "http:b.mp4", "\u00fcber \u4e2d.mp4", "pipe:0"):
        shutil.copy(source, name)
        assert numbers(reader, Path(name), [4]) == [4], name
    odd = os.fsdecode(b"\xff\xfe.mp4")
    shutil.copy(source, odd)
    assert numbers(reader, Path(odd), [4]) == [4]


def test_a_picture_size_that_changes_is_refused(reader: PyAVReader, tmp_path: Path) -> None:
    small = make_clip(tmp_path / "a.h264", 10)
    large = make_clip(tmp_path / "b.h264", 10, size=(128, 192))
    both = tmp_path / "c.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(VideoError, match=r"c\.h264: frame 10 is 192x128, the first is 96x64"):
        reader.probe(both)


def test_colours_are_those_of_the_stream(reader: PyAVReader, tmp_path: Path) -> None:
    """Full-range and limited-range clips of one picture come out alike."""
    limited = reader.frames_at(make_clip(tmp_path / "a.mp4", 3), [2]).numpy()[0]
    full = reader.frames_at(make_clip(tmp_path / "b.mkv", 3, codec="mjpeg"), [2]).numpy()[0]
    drawn = draw_number(2, (64, 96)).astype(int)
    assert np.abs(limited - drawn).mean() < 3
    assert np.abs(full - drawn).mean() < 3


def between(samples: np.ndarray[Any, Any], count: int, shift: float) -> np.ndarray[Any, Any]:
    """Samples along the first axis, interpolated linearly to twice as many; the first lies at `shift`."""
    places = ((np.arange(count) - shift) / 2).clip(0, len(samples) - 1)
    first = np.floor(places).astype(int)
    share = (places - first)[:, None]
    return samples[first] * (1 - share) + samples[np.minimum(first + 1, len(samples) - 1)] * share


def test_colours_are_within_one_level_of_exact_arithmetic(reader: PyAVReader, tmp_path: Path) -> None:
    """Other readers use FFmpeg's fast conversion, which is off by several levels."""
    rows, columns = np.mgrid[0:64, 0:96]
    waves = np.stack(
        [np.sin(columns / 9 + rows / 17), np.cos(columns / 13 - rows / 7), np.sin(columns / 5)], -1
    )
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24, options={"qp": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        picture = av.VideoFrame.from_ndarray((128 + 90 * waves).astype(np.uint8), format="rgb24")
        container.mux(stream.encode(picture) + stream.encode(None))
    frame = next(decoded(path))
    luma, *chroma = (
        np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width].astype(float)
        for plane in frame.planes
    )
    blue, red = (between(between(plane - 128, 64, 0.5).T, 96, 0).T * 255 / 224 for plane in chroma)
    luma = (luma - 16) * 255 / 219
    exact = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], -1)

    def difference(shown: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.abs(shown - exact.clip(0, 255))[2:-2, 2:-2]

    assert difference(reader.frames_at(path, [0]).numpy()[0]).max() <= 1
    assert difference(frame.to_ndarray(format="rgb24")).mean() > 1


def test_readers_are_safe_to_share_between_threads(reader: PyAVReader, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    clips = [make_clip(tmp_path / f"{i}.mp4", 40, gop=10, b_frames=2, first_number=i * 50) for i in range(3)]
    jobs = [(clips[i % 3], [(7 * i) % 40, (3 * i) % 40], 50 * (i % 3)) for i in range(30)]
    with ThreadPoolExecutor(6) as pool:
        shown = list(pool.map(lambda job: numbers(reader, job[0], job[1]), jobs))
    assert shown == [[offset + i for i in indices] for _, indices, offset in jobs]


@pytest.mark.parametrize("name", ["example_1_A.mp4", "example_1_B.mp4", "example_2_A.mp4", "example_2_B.mp4"])
def test_real_clips_equal_a_sequential_decode(reader: PyAVReader, name: str) -> None:
    clip = REAL_CLIPS / name
    if not clip.exists():
        pytest.skip("../shared/data/videoalign is not there")
    info = reader.probe(clip)
    frame_indices = random.Random(name).choices(range(info.n_frames), k=12)
    n_frames, oracle = 0, {}
    for frame in decoded(clip):
        if n_frames in frame_indices:  # colours cost more than decoding
            oracle[n_frames] = to_rgb(frame)
        n_frames += 1
    assert info.n_frames == n_frames
    for shown, frame_index in zip(reader.frames_at(clip, frame_indices).numpy(), frame_indices, strict=True):
        assert shown.shape[:2] == (info.height, info.width)
        assert np.array_equal(shown, oracle[frame_index]), frame_index


def test_open_reader_gives_this_one() -> None:
    assert isinstance(open_reader(), PyAVReader)


def test_making_clips_leaves_no_real_time_threads(tmp_path: Path) -> None:
    """An AV1 encoder that the superuser runs would slow down every test after it."""
    make_clip(tmp_path / "a.mp4", 3, codec="av1")
    assert all(os.sched_getscheduler(int(task)) == os.SCHED_OTHER for task in os.listdir("/proc/self/task"))


@pytest.mark.parametrize(
    ("name", "transfer", "aspect", "notes"),
    [
        (
            "a.mp4",
            "smpte2084",
            "1/1",
            ["is HDR (PQ) and is shown without tone mapping: duller than on an HDR screen"],
        ),
        ("a.mkv", "arib-std-b67", "1/1", ["is HDR (HLG) and is shown without tone mapping: duller than on"]),
        (
            "a.mkv",
            "bt709",
            "4/3",
            ["has pixels that are not square (4:3) and is shown without stretching them"],
        ),
        ("a.mp4", "smpte2084", "16/11", ["is HDR (PQ)", "has pixels that are not square (16:11)"]),
        ("a.mp4", "bt709", "1/1", []),
    ],
)
def test_what_is_not_shown_as_it_was_meant_is_noted(
    reader: PyAVReader, tmp_path: Path, name: str, transfer: str, aspect: str, notes: list[str]
) -> None:
    options = {"x264-params": f"transfer={transfer}:colorprim=bt2020:colormatrix=bt2020nc:sar={aspect}"}
    clip = make_clip(tmp_path / name, 6, options=options)
    for tolerate in (False, True):
        info = reader.probe(clip, tolerate_truncation=tolerate)
        assert len(info.notes) == len(notes)
        assert all(note.startswith(start) for note, start in zip(info.notes, notes, strict=True))
        assert (info.width, info.height) == (96, 64)


def test_a_bare_stream_that_begins_at_an_open_group(reader: PyAVReader, tmp_path: Path) -> None:
    """Its frames have no times of their own, by which one could tell which of them are settled."""
    options = {"x264-params": "open-gop=1:b-pyramid=2:b-adapt=0:min-keyint=8"}
    whole = make_clip(tmp_path / "a.h264", 60, gop=8, b_frames=3, options=options)
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        keyframe = [i for i, packet in enumerate(packets) if packet.is_keyframe][2]
        header = container.streams.video[0].codec_context.extradata
    clip = tmp_path / "b.h264"
    clip.write_bytes(bytes(header or b"") + b"".join(bytes(packet) for packet in packets[keyframe:]))
    oracle = [to_rgb(frame) for frame in decoded(clip)]
    assert 40 <= len(oracle) <= 44
    shown = reader.frames_at(clip, range(reader.probe(clip).n_frames)).numpy()
    assert np.array_equal(shown, oracle)


@pytest.mark.parametrize("codec", ["h264", "vp9", "av1"])
def test_a_forked_process_can_free_what_its_parent_decoded(tmp_path: Path, codec: str) -> None:
    # Data loaders fork. Threads of a decoder or a scaler do not exist in the child, so it must wait for none.
    clip = make_clip(tmp_path / "clip.mkv", 6, size=(1080, 1920), codec=codec)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_clip(str(clip)))
        frames = itertools.chain.from_iterable(map(opened.decode, opened.packets()))
        picture = np.empty((1080, 1920, 3), dtype=np.uint8)
        opened.to_rgb(next(frames), Orientation(), picture)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(100)
            stack.close()
            del opened, frames, picture
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
