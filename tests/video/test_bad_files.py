"""Files that cannot be judged: each gives one clear line, and nothing hangs, crashes or prints.

What hangs is seen by pytest's timeout: no test here looks at a clock.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import cut, make_clip, read_number, stream_copy
from PIL import Image

from vrthinker import limits
from vrthinker.errors import MachineError, VideoError
from vrthinker.video.pyav import clip as clip_module
from vrthinker.video.pyav.reader import PyAVReader
from vrthinker.video.reader import VideoInfo

N_FRAMES = 20


@pytest.fixture
def reader() -> PyAVReader:
    return PyAVReader()


@pytest.fixture(autouse=True)
def nothing_is_printed_or_left_open(reader: PyAVReader, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """But for good clips, which stay open for their first read.

    FFmpeg writes to the process's stderr by itself; so do encoders, which is why they run before.
    """
    files_open = len(os.listdir("/proc/self/fd"))
    yield
    reader.close_idle()
    assert len(os.listdir("/proc/self/fd")) <= files_open
    out, err = capfd.readouterr()
    assert out == ""
    assert [line for line in err.splitlines() if not line.startswith("Svt[")] == []


def the_line(reader: PyAVReader, path: Path, **options: Any) -> str:
    """The one line that a bad file gives, without its name."""
    with pytest.raises(VideoError) as caught:
        reader.probe(path, **options)
    assert caught.value.exit_code == 2
    line = str(caught.value)
    assert "\n" not in line
    assert line.endswith(f": {caught.value.reason}")
    assert line.isprintable()
    return caught.value.reason


def write_audio(path: Path, codec: str, *, cover: bool = False) -> None:
    with av.open(str(path), "w") as container:
        sound: Any = container.add_stream(codec, rate=8000)
        picture: Any = container.add_stream("mjpeg", rate=1) if cover else None
        if cover:
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame(64, 64, "yuvj420p")) + picture.encode(None))
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, i * 1024
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


def write_without_frames(path: Path) -> None:
    with av.open(str(path), "w") as container:
        sound: Any = container.add_stream("aac", rate=8000)
        video: Any = container.add_stream("libx264", rate=24)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, i * 1024
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing.mp4": (lambda path: None, "no such file"),
    "empty.mp4": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text.mp4": (lambda path: path.write_text("hello\n" * 100), "not a video in a known format"),
    "random.mp4": (
        lambda path: path.write_bytes(random.Random(0).randbytes(50_000)),
        "not a video in a known format",
    ),
    "zeros.mp4": (lambda path: path.write_bytes(bytes(50_000)), "not a video in a known format"),
    "art.nfo": (lambda path: path.write_text("\x1b[31m art"), "not a video in a known format"),
    "list.ffconcat": (
        lambda path: path.write_text("ffconcat version 1.0\nfile whole.mp4\n"),
        "not a video in a known format",
    ),
    "list.m3u8": (
        lambda path: path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nwhole.mp4\n"),
        "not a video in a known format",
    ),
    "picture.png": (lambda path: Image.new("RGB", (64, 64)).save(path), "an image, not a video; put the"),
    "picture.jpg": (lambda path: Image.new("RGB", (64, 64)).save(path), "an image, not a video; put the"),
    "sound.m4a": (lambda path: write_audio(path, "aac"), "has no video, only audio"),
    "sound.mp3": (lambda path: write_audio(path, "libmp3lame"), "has no video, only audio"),
    "song.mp3": (
        lambda path: write_audio(path, "libmp3lame", cover=True),
        "has no video, only audio and a cover picture",
    ),
    "noframes.mkv": (write_without_frames, "has no frames"),
    "dangling.mp4": (lambda path: path.symlink_to("gone.mp4"), "a link to a file that does not exist"),
    "pipe.mp4": (os.mkfifo, "not a regular file (a pipe or a device?)"),
    "nothing_in_it": (Path.mkdir, "a folder without images (allowed: .png, "),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_video_says_why(reader: PyAVReader, tmp_path: Path, name: str) -> None:
    make_clip(tmp_path / "whole.mp4", 5)
    write, reason = BAD[name]
    write(tmp_path / name)
    for tolerate in (False, True):
        assert the_line(reader, tmp_path / name, tolerate_truncation=tolerate).startswith(reason)
    with pytest.raises(VideoError):
        reader.frames_at(tmp_path / name, [0])


def test_a_device_is_refused(reader: PyAVReader) -> None:
    assert the_line(reader, Path("/dev/zero")) == "not a regular file (a pipe or a device?)"


def test_a_file_that_may_not_be_read(
    reader: PyAVReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_clip(tmp_path / "a.mp4", 5)
    path.chmod(0)
    if os.geteuid() == 0:
        # The superuser may read everything, so the refusal has to be played.
        def refuse(name: Any, *arguments: Any, **options: Any) -> Any:
            raise PermissionError(13, "Permission denied", str(name))

        monkeypatch.setattr(clip_module, "open", refuse, raising=False)
    assert the_line(reader, path) == "may not be read (permission denied)"


def test_a_name_that_cannot_exist(reader: PyAVReader) -> None:
    assert the_line(reader, Path("a\0b.mp4")).startswith("cannot be read (")
    assert the_line(reader, Path("x" * 5000)).startswith("cannot be read (")


def test_absurd_sizes_are_refused_before_any_work(
    reader: PyAVReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(tmp_path / "a.mp4", 12)
    decoded: list[Any] = []
    monkeypatch.setattr(clip_module.OpenClip, "decode", lambda self, packet: decoded.append(packet) or [])
    monkeypatch.setenv("VRTHINKER_MAX_SIDE_PIXELS", "80")
    line = "pictures of 96x64 pixels, allowed: up to 80x80; set VRTHINKER_MAX_SIDE_PIXELS to allow more"
    assert the_line(reader, clip) == line
    assert decoded == []
    monkeypatch.undo()
    monkeypatch.setenv("VRTHINKER_MAX_FRAMES", "11")
    line = "over 11 frames, allowed: up to 11; set VRTHINKER_MAX_FRAMES to allow more"
    assert the_line(reader, clip) == line


FASTSTART = {"movflags": "faststart"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
CUT = {
    "h264 mp4": ("h264", "mp4", {"container_options": FASTSTART}),
    "h264 mp4 B-frames": ("h264", "mp4", {"container_options": FASTSTART, "b_frames": 2}),
    "h264 mp4 fragments": ("h264", "mp4", {"container_options": FRAGMENTS}),
    "h264 mkv": ("h264", "mkv", {"b_frames": 2}),
    "hevc mkv": ("hevc", "mkv", {"b_frames": 2}),
    "vp9 webm": ("vp9", "webm", {}),
    "av1 webm": ("av1", "webm", {}),
    "av1 mp4": ("av1", "mp4", {"container_options": FASTSTART}),
    "mpeg4 avi": ("mpeg4", "avi", {}),
    "mjpeg mkv": ("mjpeg", "mkv", {}),
    "gif": ("gif", "gif", {}),
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_was_cut(reader: PyAVReader, tmp_path: Path, name: str) -> None:
    codec, ending, options = CUT[name]
    whole = make_clip(tmp_path / f"whole.{ending}", N_FRAMES, (144, 192), codec, gop=50, **options)
    counts = []
    for keep in (0.95, 0.88, 0.8):
        path = cut(whole, tmp_path / f"cut_{keep}.{ending}", keep)
        line = the_line(reader, path)
        info = check_tolerated(reader, path)
        assert line.startswith(f"breaks after frame {info.n_frames}: the file ")
        frames = "1 frame" if info.n_frames == 1 else f"{info.n_frames} frames"
        assert line.endswith(f"--tolerate-truncation judges the {frames} before the break")
        counts.append(info.n_frames)
    assert counts == sorted(counts, reverse=True)
    assert N_FRAMES > counts[0] > counts[-1] > 0


def check_tolerated(reader: PyAVReader, path: Path) -> VideoInfo:
    """What is left of a broken file are its first frames, in order, and all of them can be read."""
    info = reader.probe(path, tolerate_truncation=True)
    assert info.truncated
    assert len(info.pts_seconds) == info.n_frames
    frames = reader.frames_at(path, range(info.n_frames), tolerate_truncation=True)
    assert [read_number(frame) for frame in frames.numpy()] == list(range(info.n_frames))
    last = reader.frames_at(path, [info.n_frames - 1], tolerate_truncation=True)
    assert read_number(last.numpy()[0]) == info.n_frames - 1
    with pytest.raises(VideoError, match="frame_index"):
        reader.frames_at(path, [info.n_frames], tolerate_truncation=True)
    return info


def test_a_file_cut_between_two_packets(reader: PyAVReader, tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "a.mp4", N_FRAMES, gop=50, container_options=FASTSTART)
    with av.open(str(whole)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    path = tmp_path / "b.mp4"
    path.write_bytes(whole.read_bytes()[: ends[11]])
    assert the_line(reader, path).startswith("breaks after frame 12: the file is cut short (")
    assert check_tolerated(reader, path).n_frames == 12


def test_an_mp4_whose_index_is_missing(reader: PyAVReader, tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "a.mp4", N_FRAMES)
    for keep in (0.9, 0.5, 0.01):
        path = cut(whole, tmp_path / "b.mp4", keep)
        for tolerate in (False, True):
            line = the_line(reader, path, tolerate_truncation=tolerate)
            assert line == "the file is cut short or damaged: its index (moov) is missing or unreadable"


def packet_ranges(path: Path) -> list[tuple[int, int]]:
    """Where the packets lie in the file, in presentation order."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        packets.sort(key=lambda packet: packet.pts)
        return [(packet.pos, packet.pos + packet.size) for packet in packets]


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg"])
def test_zeroed_bytes_at_the_end(reader: PyAVReader, tmp_path: Path, codec: str) -> None:
    path = make_clip(tmp_path / "a.mp4", N_FRAMES, (144, 192), codec, gop=50, container_options=FASTSTART)
    start, _ = packet_ranges(path)[12]
    data = path.read_bytes()
    path.write_bytes(data[:start] + bytes(len(data) - start))
    assert the_line(reader, path).startswith("breaks after frame 12: ")
    assert check_tolerated(reader, path).n_frames == 12


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "mpeg4", "mjpeg"])
def test_a_damaged_packet_is_met_when_its_frame_is_read(
    reader: PyAVReader, tmp_path: Path, codec: str
) -> None:
    # Slices: between them, JPEG's decoder notices that something is missing; within one it does not.
    options = {"slices": "4"} if codec == "mjpeg" else {}
    path = make_clip(
        tmp_path / "a.mp4",
        N_FRAMES,
        (144, 192),
        codec,
        gop=50,
        options=options,
        container_options=FASTSTART,
    )
    start, end = packet_ranges(path)[12]
    data = bytearray(path.read_bytes())
    # The packet's first bytes stay as they are, so that only decoding can tell. HEVC's decoder cannot
    # tell then either: there the first bytes, the length of what follows, are what is damaged.
    # JPEG's decoder fills up a picture that ends in zeros, unless it is told not to.
    keep = {"hevc": 0, "mjpeg": (end - start) * 3 // 4}.get(codec, min(16, (end - start) // 2))
    data[start + keep : end] = (b"\0" if codec == "mjpeg" else b"\xa5") * (end - start - keep)
    path.write_bytes(data)
    if codec == "mpeg4":
        # MPEG-4 is indexed by decoding, so the probe knows already.
        assert the_line(reader, path).startswith("breaks after frame 12: ")
    else:
        assert reader.probe(path).n_frames == N_FRAMES
        assert [read_number(f) for f in reader.frames_at(path, [3, 11]).numpy()] == [3, 11]
        with pytest.raises(VideoError, match=r"breaks after frame 12: .*; --tolerate-truncation judges the"):
            reader.frames_at(path, [0, 12])
    assert check_tolerated(reader, path).n_frames == 12


def test_damage_is_met_in_a_cut_whose_first_references_are_gone(reader: PyAVReader, tmp_path: Path) -> None:
    """Missing references at the start are forgiven, damage behind it is not."""
    options = {"x264-params": "open-gop=1:b-pyramid=2:b-adapt=0:min-keyint=12"}
    whole = make_clip(tmp_path / "a.mp4", 72, (144, 192), gop=12, b_frames=3, options=options)
    clip = stream_copy(whole, tmp_path / "b.mkv", 1.2)
    assert reader.probe(clip).n_frames == 48
    with av.open(str(clip)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    whole_bytes, noticed = clip.read_bytes(), []
    for packet in packets[20:36]:
        data = bytearray(whole_bytes)
        data[packet.pos + 40 : packet.pos + packet.size] = b"\xa5" * (packet.size - 40)
        clip.write_bytes(data)
        broken = reader.probe(clip, tolerate_truncation=True)
        if broken.truncated is None:
            continue  # these bytes decode to something: nobody can notice
        noticed.append(packet.pts)
        # Pictures that come before the damaged one and depend on it are not shown either.
        frames = reader.frames_at(clip, range(broken.n_frames), tolerate_truncation=True).numpy()
        assert [read_number(frame) for frame in frames] == list(range(24, 24 + broken.n_frames))
        assert 12 <= broken.n_frames < 40
        for frame_indices in (range(48), [broken.n_frames]):
            with pytest.raises(VideoError, match=r"breaks after frame \d+: a frame d"):
                reader.frames_at(clip, frame_indices)
    assert len(noticed) > 6


def test_frames_that_decode_with_errors_are_not_shown(reader: PyAVReader, tmp_path: Path) -> None:
    """H.264's decoder hides some errors behind made-up pixels, and only marks the frame."""
    slices = {"x264-params": "slices=4"}  # a picture of which one slice is missing is what is marked
    whole = make_clip(tmp_path / "a.mp4", N_FRAMES, (144, 192), gop=7, b_frames=2, options=slices)
    ranges, data = packet_ranges(whole), whole.read_bytes()
    rng = random.Random(2)
    marked = 0
    for i in range(60):
        path = tmp_path / f"{i}.mp4"
        spoiled = bytearray(data)
        start, end = ranges[rng.randrange(N_FRAMES)]
        for _ in range(3):
            spoiled[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        path.write_bytes(spoiled)
        first = first_marked_frame(path)
        if first is not None:
            marked += 1
            with pytest.raises(VideoError):
                reader.frames_at(path, [first])
            with pytest.raises(VideoError):
                reader.frames_at(path, range(N_FRAMES))
    assert marked > 3


def first_marked_frame(path: Path) -> int | None:
    """The first frame that a plain decode marks as damaged, without raising before."""
    count = 0
    try:
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.options = {"err_detect": "explode"}
            container.streams.video[0].thread_count = 1
            for frame in container.decode(video=0):
                if frame.is_corrupt:
                    return count
                count += 1
    except (av.FFmpegError, ValueError):
        pass
    return None


def test_a_file_that_ends_inside_a_packet(reader: PyAVReader, tmp_path: Path) -> None:
    """FLV does not say how long it is; its demuxer marks a packet that is not all there."""
    whole = make_clip(tmp_path / "a.flv", N_FRAMES, codec="h264", gop=50)
    start, end = packet_ranges(whole)[12]
    path = tmp_path / "b.flv"
    path.write_bytes(whole.read_bytes()[: (start + end) // 2])
    assert the_line(reader, path).startswith("breaks after frame 12: the file ends inside a frame")
    assert check_tolerated(reader, path).n_frames == 12


def test_colours_that_nothing_converts(reader: PyAVReader, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", 5, options={"x264-params": "colormatrix=ICtCp"})
    for tolerate in (False, True):
        line = the_line(reader, path, tolerate_truncation=tolerate)
        assert line.startswith("no frame decodes: a frame's colours cannot be converted to RGB (")


def test_a_whole_file_is_the_same_with_tolerance(reader: PyAVReader, tmp_path: Path) -> None:
    for name, codec in (("a.mp4", "h264"), ("a.webm", "vp9"), ("a.gif", "gif"), ("a.mkv", "av1")):
        path = make_clip(tmp_path / name, N_FRAMES, codec=codec)
        assert reader.probe(path, tolerate_truncation=True) == reader.probe(path)


SOURCES = [
    ("h264", "mp4", {"b_frames": 2}),
    ("h264", "mkv", {"b_frames": 2}),
    ("h264", "ts", {}),
    ("h264", "h264", {}),
    ("h264", "flv", {}),
    ("hevc", "mp4", {"b_frames": 2}),
    ("vp8", "webm", {}),
    ("vp9", "webm", {}),
    ("av1", "mp4", {}),
    ("av1", "webm", {}),
    ("mpeg4", "avi", {}),
    ("mpeg4", "mp4", {}),
    ("mjpeg", "mkv", {}),
    ("mjpeg", "avi", {}),
    ("gif", "gif", {}),
]


def spoil(rng: random.Random, data: bytes) -> bytes:
    """Flips bits, overwrites, cuts out or cuts off; often near the start, where the structure is."""
    spoiled = bytearray(data)
    kind = rng.choice(["flip", "header", "overwrite", "zero", "drop", "cut"])
    position = rng.randrange(len(data))
    length = rng.choice([1, 8, 100, 2000])
    if kind == "flip":
        for _ in range(rng.choice([1, 3, 20])):
            spoiled[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "header":
        spoiled[rng.randrange(min(1200, len(data)))] = rng.choice([0, 127, 128, 255, rng.randrange(256)])
    elif kind == "overwrite":
        spoiled[position : position + length] = rng.randbytes(min(length, len(data) - position))
    elif kind == "zero":
        spoiled[position : position + length] = bytes(min(length, len(data) - position))
    elif kind == "drop":
        del spoiled[position : position + length]
    else:
        del spoiled[position:]
    return bytes(spoiled)


def check_spoiled(reader: PyAVReader, path: Path, tolerate: bool) -> bool:
    """Reads a spoiled file; whether it gave frames. Anything but frames or a `VideoError` fails."""
    failure: VideoError | None = None
    try:
        info = reader.probe(path, tolerate_truncation=tolerate)
        asked = [0, info.n_frames - 1, info.n_frames // 2]
        frames = reader.frames_at(path, asked, tolerate_truncation=tolerate)
        assert frames.data.shape == (3, info.height, info.width, 3)
        assert info.fps > 0
        assert list(info.pts_seconds) == sorted(info.pts_seconds)
    except VideoError as error:
        failure = error
    if failure is not None:
        assert "\n" not in str(failure)
        # What a tolerant probe lists must be there.
        assert not (tolerate and "breaks after" in failure.reason)
    return failure is None


def fuzz(reader: PyAVReader, folder: Path, seed: int, rounds: int) -> None:
    print(f"seed {seed}")  # noqa: T201
    rng = random.Random(seed)
    for number, (codec, ending, options) in enumerate(SOURCES):
        data = make_clip(folder / f"source.{ending}", 16, codec=codec, gop=7, **options).read_bytes()
        outcomes = set()
        for i in range(rounds):
            path = folder / f"{number}_{i}.{ending}"
            path.write_bytes(spoil(rng, data))
            for tolerate in (False, True):
                outcomes.add(check_spoiled(reader, path, tolerate))
            path.unlink()
        assert outcomes == {False, True}, f"{codec} {ending}: the damage is too mild or too heavy to tell"


def test_hostile_bytes_give_frames_or_one_line(
    reader: PyAVReader, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fuzz(reader, tmp_path, seed=20261121, rounds=12)
    assert capfd.readouterr().out == "seed 20261121\n"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_hostile_bytes_for_longer(
    reader: PyAVReader, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fuzz(reader, tmp_path, seed=7, rounds=150)
    assert capfd.readouterr().out == "seed 7\n"


def test_a_clip_of_too_many_pixels_is_refused_before_it_is_decoded(
    reader: PyAVReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small GIF may hold very many large pictures."""
    line = (
        "at least 9 frames of 96x64 pixels, allowed: 50000 pixels in all; set VRTHINKER_MAX_CLIP_PIXELS to "
    )
    decoded: list[Any] = []
    original = clip_module.OpenClip.decode
    monkeypatch.setattr(
        clip_module.OpenClip, "decode", lambda self, packet: decoded.append(packet) or original(self, packet)
    )
    for name, codec in (("a.gif", "gif"), ("a.avi", "mpeg4"), ("a.mp4", "h264")):
        clip = make_clip(tmp_path / name, 12, codec=codec)
        assert reader.probe(clip).n_frames == 12
        decoded.clear()
        with monkeypatch.context() as patch:
            patch.setenv("VRTHINKER_MAX_CLIP_PIXELS", "50000")
            for tolerate in (False, True):
                assert the_line(PyAVReader(), clip, tolerate_truncation=tolerate).startswith(line)
        assert len(decoded) <= 8, "the packets tell their number before they are decoded"
        monkeypatch.setenv("VRTHINKER_MAX_CLIP_PIXELS", str(12 * 96 * 64))
        assert PyAVReader().probe(clip).n_frames == 12


def test_a_slow_disk_says_nothing_about_the_clip(
    reader: PyAVReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(tmp_path / "a.mkv", 12)

    @dataclass(frozen=True)
    class Impatient:
        value: float
        how_to_raise: str = limits.MAX_READ_SECONDS.how_to_raise

    message = (
        r"a\.mkv: the disk gave no data for .* seconds \(not the clip's fault\); set VRTHINKER_MAX_READ_SEC"
    )
    monkeypatch.setattr(limits, "MAX_READ_SECONDS", Impatient(1e-9))
    with pytest.raises(MachineError, match=message):
        reader.probe(clip)
    # FFmpeg gives up in time, but a demuxer may end as if the file did.
    monkeypatch.setattr(limits, "MAX_READ_SECONDS", Impatient(1e9))
    with clip_module.open_clip(str(clip)) as opened:
        monkeypatch.setattr(limits, "MAX_READ_SECONDS", Impatient(0.0))
        with pytest.raises(MachineError, match=message):
            list(opened.packets())


def test_too_little_memory_is_said_of_the_machine(
    reader: PyAVReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(tmp_path / "a.mp4", 12, gop=4)
    reader.probe(clip)
    reader._pool.close_idle()
    message = r"a\.mp4: decoding it needs more memory than there is; run it again with less beside it$"

    def fail(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    class Failing:
        """What cannot be changed in PyAV's own types, put in its place."""

        is_open = False
        decode = demux = seek = check = convert = fail

        def begin_group(self) -> None:
            """Needs no memory."""

    original = clip_module.OpenClip.__init__
    for part in ("_decoder", "container", "_converter"):

        def replaced(self: Any, *arguments: Any, part: str = part) -> None:
            original(self, *arguments)
            setattr(self, part, Failing())

        with monkeypatch.context() as patch:
            patch.setattr(clip_module.OpenClip, "__init__", replaced)
            for ask in (lambda: PyAVReader().probe(clip), lambda: reader.frames_at(clip, [9])):
                with pytest.raises(MachineError, match=message):
                    ask()
    with monkeypatch.context() as patch:
        patch.setattr(av, "open", fail)
        with pytest.raises(MachineError, match=message):
            PyAVReader().probe(clip)
    assert [read_number(frame) for frame in reader.frames_at(clip, [3]).numpy()] == [3]


def test_memory_that_a_damaged_header_asks_for_is_no_fault_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = av.error.MemoryError(12, "Cannot allocate memory")
    clip_module.raise_if_out_of_memory("a.mp4", error)
    clip_module.raise_if_out_of_memory("a.mp4", ValueError())
    monkeypatch.setattr(clip_module, "_PLENTY_BYTES", 1 << 62)  # more than any machine has
    with pytest.raises(MachineError):
        clip_module.raise_if_out_of_memory("a.mp4", error)
