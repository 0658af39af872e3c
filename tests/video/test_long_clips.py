"""Long clips: listed from their container's own table, opened once, read without what nobody asked for."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from clips import make_clip, read_number, stream_copy
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.errors import VideoError
from vrthinker.video import open_reader
from vrthinker.video.pyav import listing as listing_module
from vrthinker.video.pyav import pool as pool_module
from vrthinker.video.pyav import sample_table as table_module
from vrthinker.video.pyav.clip import OpenClip, open_clip
from vrthinker.video.pyav.index import ClipIndex, Keyframe, build_index
from vrthinker.video.pyav.index_cache import IndexCache
from vrthinker.video.pyav.packets import is_disposable
from vrthinker.video.pyav.reader import PyAVReader
from vrthinker.video.pyav.sample_table import SampleTable, sample_table

PYRAMID = {"x264-params": "b-pyramid=2:b-adapt=0:ref=3"}
OPEN = {"x264-params": "open-gop=1:b-pyramid=2:b-adapt=0:ref=3"}
VARIABLE_MS = [0, 40, 80, 200, 240, 300, 310, 400, 480, 500, 700, 730, 740, 900, 940, 1000, 1040, 1080]
TABLED: dict[str, tuple[str, dict[str, Any]]] = {
    "b-frames": ("a.mp4", {"b_frames": 3, "options": PYRAMID}),
    "open groups": ("a.mp4", {"b_frames": 3, "options": OPEN}),
    "variable rate": ("a.mov", {"b_frames": 2, "pts": VARIABLE_MS}),
    "sound": ("a.mp4", {"audio": True, "b_frames": 2}),
    "late start": ("a.mp4", {"pts": [3000 + 40 * i for i in range(18)], "b_frames": 2}),
    "rotated": ("a.mp4", {"rotation": 90}),
    "index first": ("a.mp4", {"container_options": {"movflags": "faststart"}}),
    "hevc": ("a.mp4", {"codec": "hevc", "b_frames": 2}),
    "mjpeg": ("a.mov", {"codec": "mjpeg"}),
}
NOT_TABLED: dict[str, tuple[str, dict[str, Any]]] = {
    "vp9": ("a.mp4", {"codec": "vp9"}),
    "fragments": ("a.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "hidden by an edit list": ("a.mp4", {"pts": [40 * (i - 5) for i in range(18)], "b_frames": 2}),
    "matroska": ("a.mkv", {"b_frames": 2}),
}


def made(folder: Path, case: tuple[str, dict[str, Any]]) -> Path:
    name, options = case
    return make_clip(folder / name, 18, **{"gop": 7, **options})


def repeated(source: Path, target: Path, times: int) -> Path:
    """Copies a clip's packets several times, one after the other: a long clip that costs no encoding."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        video = old.streams.video[0]
        copy = new.add_stream_from_template(video)
        packets = [packet for packet in old.demux(video) if packet.size]
        length = sum(packet.duration or 0 for packet in packets)
        for turn in range(times):
            for packet in packets:
                again = av.Packet(bytes(packet))
                again.pts = (packet.pts or 0) + turn * length
                again.dts = (packet.dts or 0) + turn * length
                again.duration, again.time_base = packet.duration or 0, Fraction(video.time_base or 1)
                again.is_keyframe, again.stream = packet.is_keyframe, copy
                new.mux(again)
    return target


def table_of(path: Path) -> SampleTable | None:
    with open_clip(str(path)) as clip:
        return sample_table(str(path), clip.stream)


def plain(index: ClipIndex) -> ClipIndex:
    """An index without what only a table tells, and without what only the packets tell."""
    later = tuple(replace(keyframe, place=None) for keyframe in index.keyframes[1:])
    return replace(index, keyframes=(Keyframe(0), *later), has_open_groups=False, has_edits=False)


@pytest.mark.parametrize("name", TABLED)
def test_a_table_tells_what_the_packets_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = made(tmp_path, TABLED[name])
    assert table_of(path) is not None
    read: list[Any] = []
    original = listing_module._read_all
    monkeypatch.setattr(listing_module, "_read_all", lambda clip: read.append(clip) or original(clip))
    by_table = build_index(str(path), tolerate_truncation=False)
    assert read == [], "the table was used"
    monkeypatch.setattr(listing_module, "sample_table", lambda path, stream: None)
    by_packets = build_index(str(path), tolerate_truncation=False)
    assert len(read) == 1
    assert plain(by_table) == plain(by_packets)
    assert by_table.info.n_frames == 18
    frames = PyAVReader().frames_at(path, [17, 3, 9]).numpy()
    upright = np.rot90(frames, by_table.info.rotation_degrees // 90, axes=(1, 2))
    assert [read_number(frame) for frame in upright] == [17, 3, 9]


@pytest.mark.parametrize("name", NOT_TABLED)
def test_what_a_table_does_not_tell_is_read(tmp_path: Path, name: str) -> None:
    path = made(tmp_path, NOT_TABLED[name])
    n_hidden = 5 if "edit" in name else 0
    index = build_index(str(path), tolerate_truncation=False)
    assert index.info.n_frames == 18 - n_hidden
    assert all(keyframe.place is None for keyframe in index.keyframes)


def boxes(data: bytearray, kind: bytes) -> int:
    """The offset of the content of the only box of a kind."""
    assert data.count(kind) == 1
    return data.index(kind) + 4


def test_tables_that_do_not_add_up_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(tmp_path, TABLED["b-frames"])
    data = bytearray(whole.read_bytes())
    ctts, stsz = boxes(data, b"ctts"), boxes(data, b"stsz")
    spoiled = {
        "a run of four thousand million samples": (ctts + 8, b"\xff\xff\xff\xff"),
        "more runs than there is room for": (ctts + 4, b"\x00\xff\xff\xff"),
        "another number of samples": (stsz + 8, (17).to_bytes(4, "big")),
        "no such box": (ctts - 4, b"cttz"),
    }
    for what, (at, value) in spoiled.items():
        broken = bytearray(data)
        broken[at : at + 4] = value
        path = tmp_path / "broken.mp4"
        path.write_bytes(broken)
        try:
            by_table = build_index(str(path), tolerate_truncation=False)
        except VideoError:
            continue  # FFmpeg cannot use it either
        with monkeypatch.context() as patch:
            patch.setattr(listing_module, "sample_table", lambda path, stream: None)
            assert by_table == build_index(str(path), tolerate_truncation=False), what


def test_a_table_of_more_samples_than_allowed_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a few kilobytes may claim millions of samples. The limit is met before they are listed."""
    path = make_clip(tmp_path / "a.mp4", 6, codec="mjpeg")
    data, claimed = bytearray(path.read_bytes()), 40_000
    for kind, place, number in (
        (b"stsz", 4, 16),  # every sample has 16 bytes
        (b"stsz", 8, claimed),
        (b"stts", 8, claimed),
        (b"stsc", 12, claimed),
    ):
        at = boxes(data, kind) + place
        data[at : at + 4] = number.to_bytes(4, "big")
    assert data.count(b"edts") == 1
    data = data.replace(b"edts", b"free")  # it would leave out what comes after the stated end
    path.write_bytes(data)
    listed: list[int] = []
    original = table_module.sample_table

    class Counted:
        """The entries of a stream, which note that they were taken."""

        def __init__(self, entries: Any) -> None:
            self._entries = entries

        def __len__(self) -> int:
            return len(self._entries)

        def __iter__(self) -> Any:
            for entry in self._entries:
                listed.append(1)
                yield entry

    def counting(name: str, stream: Any) -> SampleTable | None:
        seen = SimpleNamespace(
            id=stream.id,
            width=stream.width,
            height=stream.height,
            index_entries=Counted(stream.index_entries),
        )
        return original(name, seen)

    monkeypatch.setattr(listing_module, "sample_table", counting)
    monkeypatch.setenv("VRTHINKER_MAX_FRAMES", "100")
    with open_clip(str(path)) as clip:
        assert len(clip.stream.index_entries) == claimed
    with pytest.raises(VideoError, match=r"over 100 frames, allowed: up to 100; .*VRTHINKER_MAX_FRAMES"):
        PyAVReader().probe(path)
    assert listed == []


def test_times_of_a_table_that_are_not_those_of_the_packets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path, TABLED["b-frames"])
    right = build_index(str(path), tolerate_truncation=False)
    for place in (0, 17):

        def wrong(name: str, stream: Any, place: int = place) -> SampleTable:
            table = sample_table(name, stream)
            assert table is not None
            shown = table.shown.copy()
            shown[place] += 10_000
            return replace(table, shown=shown)

        monkeypatch.setattr(listing_module, "sample_table", wrong)
        assert plain(build_index(str(path), tolerate_truncation=False)) == plain(right)


def test_a_long_clip_is_opened_without_reading_it(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (30, 240, 320, 3), dtype=np.uint8)
    short = tmp_path / "short.mp4"
    with av.open(str(short), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.options = {"preset": "ultrafast", "x264-params": "keyint=10:bframes=0:scenecut=0"}
        stream.codec_context.thread_count = 1
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    sizes, read = [], []
    for times in (20, 60):
        path = repeated(short, tmp_path / f"{times}.mp4", times)
        before = bytes_read()
        assert PyAVReader().probe(path).n_frames == 30 * times
        read.append(bytes_read() - before)
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] > 20_000_000
    assert read[1] - read[0] < (sizes[1] - sizes[0]) / 100, "what is read beyond the table does not grow"


def bytes_read() -> int:
    """The bytes that this process has read so far."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("worth_a_read", [0, 8192])
def test_zeros_in_a_long_clip_are_seen_where_they_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth_a_read: int
) -> None:
    monkeypatch.setattr(table_module, "_BYTES_WORTH_A_READ", worth_a_read)
    path = make_clip(tmp_path / "a.mp4", 40, (144, 192), gop=8)
    table = table_of(path)
    assert table is not None
    data = bytearray(path.read_bytes())
    for place in (21, 22):
        data[table.offset[place] : table.offset[place] + table.size[place]] = bytes(table.size[place])
    path.write_bytes(data)
    with pytest.raises(VideoError, match="breaks after frame 21: frame data is zeroed out"):
        PyAVReader().probe(path)
    # With fewer looks than samples, the damage lies between two of them and is met when a frame needs it.
    monkeypatch.setattr(table_module, "_EXAMINED_SAMPLES", 4)
    reader = PyAVReader()
    assert reader.probe(path).n_frames == 40
    assert read_number(reader.frames_at(path, [7]).numpy()[0]) == 7
    with pytest.raises(VideoError, match="breaks after frame 21: frame data is zeroed out"):
        reader.frames_at(path, [23])


@given(
    sizes=st.lists(st.integers(24, 60), min_size=1, max_size=12),
    gaps=st.lists(st.integers(0, 20), min_size=12, max_size=12),
    zeroed=st.sets(st.tuples(st.integers(0, 11), st.booleans()), max_size=6),
    backwards=st.booleans(),
)
def test_one_read_of_all_samples_sees_what_a_read_of_each_sees(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    gaps: list[int],
    zeroed: set[tuple[int, bool]],
    backwards: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "samples"
    offsets, content = [], bytearray()
    for size, gap in zip(sizes, gaps, strict=False):
        content += bytes(gap)
        offsets.append(len(content))
        content += b"\1" * size
    for place, at_head in zeroed:
        if place < len(sizes):
            begin = offsets[place] + (0 if at_head else sizes[place] - 8)
            content[begin : begin + (16 if at_head else 8)] = bytes(16 if at_head else 8)
    path.write_bytes(content)
    order = slice(None, None, -1) if backwards else slice(None)
    places, lengths = np.array(offsets)[order], np.array(sizes)[order]
    with path.open("rb", buffering=0) as file:
        found = table_module._look_empty_in_one_read(file.fileno(), places, lengths)
        ends = [table_module._ends(file.fileno(), *each) for each in zip(places, lengths, strict=True)]
    assert found == [place for place, (head, tail) in enumerate(ends) if not (any(head) and any(tail))]


def test_a_file_that_got_shorter_is_not_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    path.write_bytes(b"\1" * 100)
    with path.open("rb", buffering=0) as file:
        read = table_module._look_empty_in_one_read
        assert read(file.fileno(), np.array([0, 70]), np.array([60, 30])) == []
        assert read(file.fileno(), np.array([0, 70]), np.array([60, 31])) is None
        assert read(file.fileno(), np.array([0, 70]), np.array([60, 5])) is None, "too small for both ends"


def test_pictures_that_no_other_needs_are_left_out(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", 96, gop=48, b_frames=3, options=PYRAMID)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        extradata = stream.codec_context.extradata or b""
        packets = [packet for packet in container.demux(stream) if packet.size]
    disposable = [is_disposable("h264", memoryview(packet), extradata) for packet in packets]
    assert sum(disposable) > len(packets) / 3
    assert not any(packet.is_keyframe and is_one for packet, is_one in zip(packets, disposable, strict=True))
    assert not is_disposable("hevc", memoryview(packets[disposable.index(True)]), extradata)
    with av.open(str(path)) as container:
        oracle = [frame.to_ndarray() for frame in container.decode(video=0)]
    reader = PyAVReader()
    wanted = random.Random(3).sample(range(96), 20)
    for frame_index in wanted:
        frame = reader.frames_at(path, [frame_index]).numpy()[0]
        assert read_number(frame) == frame_index
    assert len(oracle) == 96
    assert reader.counts.shown == 20
    most = sum(1 + index % 48 for index in wanted)
    assert reader.counts.decoded < most * 0.8, "fewer are decoded than lie between keyframe and frame"


def test_pictures_that_were_needed_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that lies about what may be left out is decoded again, with everything."""
    path = make_clip(tmp_path / "a.mp4", 60, gop=20, b_frames=2)
    reader = PyAVReader()
    expected = reader.frames_at(path, [33]).numpy()
    monkeypatch.setattr(OpenClip, "is_disposable", lambda self, packet: not packet.is_keyframe)
    assert np.array_equal(reader.frames_at(path, [33]).numpy(), expected)


def test_an_open_group_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", 60, gop=8, b_frames=3, options=OPEN)
    index = build_index(str(path), tolerate_truncation=False)
    assert [index.begins_openly(str(path), keyframe) for keyframe in index.keyframes[1:]] == [True] * 7
    closed = make_clip(tmp_path / "b.mp4", 60, gop=8, b_frames=3)
    index = build_index(str(closed), tolerate_truncation=False)
    assert not any(index.begins_openly(str(closed), keyframe) for keyframe in index.keyframes)


def test_a_cut_of_an_open_group_is_listed_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_clip(tmp_path / "a.mp4", 60, gop=12, b_frames=3, options=OPEN)
    path = stream_copy(whole, tmp_path / "cut.mp4", 1.2)
    first = build_index(str(path), tolerate_truncation=False)
    monkeypatch.setattr(listing_module, "sample_table", lambda path, stream: None)
    assert plain(first) == plain(build_index(str(path), tolerate_truncation=False))


def test_long_clips_stay_open_between_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "LONG_FRAMES", 30)
    path = make_clip(tmp_path / "a.mp4", 60, gop=8, b_frames=2)
    short = make_clip(tmp_path / "b.mp4", 20, gop=8)
    opened: list[str] = []
    original = av.open
    reader = PyAVReader()
    for clip in (path, short):
        reader.probe(clip)

    def counting(name: str, *mode: str, **options: Any) -> Any:
        if not mode:
            opened.append(name)
        return original(name, *mode, **options)

    monkeypatch.setattr(av, "open", counting)
    wanted = random.Random(4)
    for _ in range(8):
        indices = [wanted.randrange(9, 60) for _ in range(3)]
        assert [read_number(frame) for frame in reader.frames_at(path, indices).numpy()] == indices
    assert [read_number(frame) for frame in reader.frames_at(path, [0, 50]).numpy()] == [0, 50]
    assert opened == [], "the clip that was opened to index it is read, from its first frame on too"
    reader.frames_at(short, [15])
    assert opened == []
    for _ in range(2):
        reader.frames_at(short, [15])
    assert len(opened) == 2, "short clips open in no time and are not kept after a read"
    assert len(reader._pool) == 1
    make_clip(path, 60, gop=8, b_frames=2, first_number=100)
    assert read_number(reader.frames_at(path, [40]).numpy()[0]) == 140, "the file was replaced"


def test_a_forked_process_opens_its_own_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would move the same position in the file."""
    monkeypatch.setattr(pool_module, "LONG_FRAMES", 30)
    path = make_clip(tmp_path / "a.mp4", 60, gop=8, b_frames=2)
    reader = PyAVReader()
    assert read_number(reader.frames_at(path, [40]).numpy()[0]) == 40
    assert len(reader._pool) == 1
    with monkeypatch.context() as patch:
        patch.setattr(pool_module.os, "getpid", lambda: -1)
        kept = next(iter(reader._pool._idle.values()))[0]
        assert read_number(reader.frames_at(path, [41]).numpy()[0]) == 41
        assert next(iter(reader._pool._idle.values()))[0] is not kept


def test_the_pool_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "LONG_FRAMES", 1)
    monkeypatch.setattr(pool_module, "_MAX_IDLE_PIXELS", 3 * 64 * 96)
    reader = PyAVReader()
    for number in range(5):
        path = make_clip(tmp_path / f"{number}.mp4", 10, gop=2)
        assert read_number(reader.frames_at(path, [7]).numpy()[0]) == 7
    assert len(reader._pool) == 3


def test_readers_of_a_process_share_their_indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_clip(tmp_path / "a.mp4", 12)
    listed: list[str] = []
    original = listing_module._begin
    monkeypatch.setattr(listing_module, "_begin", lambda clip: listed.append(clip.path) or original(clip))
    assert open_reader().probe(path) == open_reader().probe(path)
    assert len(listed) == 1
    monkeypatch.setenv("VRTHINKER_MAX_FRAMES", "11")
    with pytest.raises(VideoError, match="over 11 frames"):
        open_reader().probe(path)


def index_of(n_frames: int, tmp_path: Path) -> ClipIndex:
    path = make_clip(tmp_path / f"{n_frames}.mp4", n_frames)
    return build_index(str(path), tolerate_truncation=False)


def test_an_index_is_made_once_and_the_memory_is_bounded(tmp_path: Path) -> None:
    first, second = index_of(10, tmp_path), index_of(20, tmp_path)
    cache = IndexCache(max_indexes=2, max_frames=25)
    made: list[int] = []
    start = threading.Barrier(4)

    def make() -> ClipIndex:
        made.append(1)
        return first

    def ask() -> None:
        start.wait()
        assert cache.get("first", make) is first

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), cache.misses, cache.hits) == (1, 1, 3)
    cache.get("second", lambda: second)
    assert len(cache) == 1, "30 frames are more than 25"
    cache.get("first", make)
    assert len(made) == 2
    with pytest.raises(ZeroDivisionError):
        cache.get("third", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert cache.get("third", lambda: first) is first
    assert first.keyframe_before(0).frame_index == 0


def test_the_memory_of_indexes_counts_keyframes(tmp_path: Path) -> None:
    """An index whose frames are all keyframes takes several times as much."""
    path = make_clip(tmp_path / "a.mp4", 12, codec="mjpeg")
    build_index(str(path), tolerate_truncation=False)
    index = build_index(str(path), tolerate_truncation=False)
    assert len(index.keyframes) == 12
    cache = IndexCache(max_frames=50)
    cache.get("a", lambda: index)
    cache.get("b", lambda: index)
    assert len(cache) == 1, "two times 12 frames, and 12 keyframes that count as 3 frames each"
    sized = [index.ticks, index.info.pts_seconds, index.keyframes]
    each = [n for some in sized if some for n in (*some, *(p for k in index.keyframes for p in flat(k)))]
    held = {id(one): sys.getsizeof(one) for one in each}
    n_bytes = sum(held.values()) + 8 * 3 * 12
    assert n_bytes <= cache._weight(index) * 80
    assert not hasattr(index.keyframes[0], "__dict__")


def flat(keyframe: Keyframe) -> list[object]:
    """What a keyframe holds."""
    return [keyframe.frame_index, keyframe.pts, keyframe.dts, keyframe.place, *(keyframe.place or ())]


@pytest.mark.multi_process
def test_a_forked_process_does_not_wait_for_threads_that_it_has_not() -> None:
    """The thread that makes an index, or holds the lock, is not in the child."""
    cache, made = IndexCache(), SimpleNamespace(info=SimpleNamespace(n_frames=5), keyframes=())
    cache.get("b", lambda: made)  # type: ignore[arg-type,return-value]
    making, done = threading.Event(), threading.Event()

    def slowly() -> Any:
        making.set()
        done.wait()
        return made

    thread = threading.Thread(target=cache.get, args=("a", slowly))
    thread.start()
    making.wait()
    try:
        with cache._lock:
            child = os.fork()
            if child == 0:
                try:
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.alarm(30)  # ends a child that waits for ever
                    found = [cache.get(key, lambda: made) for key in "ab"]  # type: ignore[arg-type,return-value]
                    os._exit(0 if found == [made, made] and cache.misses == 2 else 1)
                finally:
                    os._exit(70)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        done.set()
        thread.join()
    assert cache.misses == 2
