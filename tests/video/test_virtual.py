"""Virtual clips: the right frames in the right order, the same pixels every time, refused by others."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from clips import make_clip
from full_disk import full_at

from vrthinker.errors import VideoError
from vrthinker.video.open import open_reader
from vrthinker.video.reader import VideoReader
from vrthinker.video.reencode import write_reencoded
from vrthinker.video.virtual import (
    ENDING,
    Blank,
    Blur,
    Dropped,
    Frozen,
    Noise,
    Redundant,
    Reversed,
    VirtualReader,
    source_places,
    virtual_clip,
)

N_FRAMES = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("source") / "clip.mp4", N_FRAMES, size=(48, 80), fps=12)


@pytest.fixture
def reader() -> VirtualReader:
    return VirtualReader(open_reader())


def virtual(folder: Path, source: Path, edit: object, name: str = "v") -> Path:
    path = folder / f"{name}{ENDING}"
    path.write_bytes(virtual_clip(source, edit))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("edit", "places"),
    [
        (Reversed(), list(range(N_FRAMES))[::-1]),
        (Frozen(share=0.5), [*range(6), *[6] * 12, *range(18, N_FRAMES)]),
        (Frozen(share=1.0), [0] * N_FRAMES),
    ],
)
def test_frames_are_those_of_the_source_at_the_places_of_the_edit(
    edit: object, places: list[int], source: Path, reader: VirtualReader, tmp_path: Path
) -> None:
    path = virtual(tmp_path, source, edit)
    info = reader.probe(path)
    assert (info.n_frames, info.path, len(info.notes)) == (N_FRAMES, str(path), 1)
    own, wanted = open_reader().probe(source), open_reader().frames_at(source, places).numpy()
    assert info.pts_seconds == own.pts_seconds
    found = reader.frames_at(path, range(N_FRAMES))
    assert np.array_equal(found.numpy(), wanted)
    assert (found.frame_indices, found.pts_seconds) == (tuple(range(N_FRAMES)), info.pts_seconds)


def test_a_redundant_clip_has_every_frame_and_is_twice_as_long(
    source: Path, reader: VirtualReader, tmp_path: Path
) -> None:
    places = Redundant(seed=3).places(N_FRAMES)
    assert len(places) == 2 * N_FRAMES
    assert set(places) == set(range(N_FRAMES))
    assert places == sorted(places)
    assert places != Redundant(seed=4).places(N_FRAMES)
    path = virtual(tmp_path, source, Redundant(seed=3))
    info, own = reader.probe(path), open_reader().probe(source)
    assert (info.n_frames, info.fps, info.comment) == (2 * N_FRAMES, own.fps, own.comment)
    assert info.duration_seconds == pytest.approx(2 * own.duration_seconds)
    assert list(info.pts_seconds) == sorted(info.pts_seconds)
    shown = reader.frames_at(path, [5, 47]).numpy()
    assert np.array_equal(shown, open_reader().frames_at(source, [places[5], places[47]]).numpy())


def test_dropped_frames_leave_the_ends_and_the_share_that_was_asked_for() -> None:
    for share in (0.1, 0.3, 0.6):
        places = Dropped(share=share).places(120)
        assert places[0] == 0
        assert places[-1] == 119
        assert 120 - len(places) == pytest.approx(share * 120, abs=6)
        assert places == sorted(set(places))
    assert Dropped(share=0.5).places(2) == [0, 1]
    assert Dropped(share=0.5).places(1) == [0]


def test_pixels_change_more_with_the_strength_and_are_the_same_every_time(
    source: Path, reader: VirtualReader, tmp_path: Path
) -> None:
    own = open_reader().frames_at(source, [4, 9]).numpy().astype(float)
    for edits in (
        [Blur(radius=radius) for radius in (0.01, 0.05, 0.2)],
        [Noise(amount=amount) for amount in (0.02, 0.1, 0.3)],
    ):
        distances = []
        for number, edit in enumerate(edits):
            path = virtual(tmp_path, source, edit, f"{edit.kind}-{number}")
            both = reader.frames_at(path, [4, 9]).numpy()
            assert np.array_equal(reader.frames_at(path, [9]).numpy()[0], both[1])
            distances.append(float(np.abs(both - own).mean()))
        assert distances == sorted(distances)
        assert distances[0] > 0
    grey = reader.frames_at(virtual(tmp_path, source, Blank(), "grey"), [0]).numpy()
    assert set(grey.ravel().tolist()) == {128}
    noise = reader.frames_at(virtual(tmp_path, source, Blank(shown="noise"), "noise"), [0, 1]).numpy()
    assert not np.array_equal(noise[0], noise[1])
    assert abs(np.corrcoef(noise[0].ravel(), own[0].ravel())[0, 1]) < 0.05, "nothing of the clip is left"


def test_other_clips_are_read_as_ever_and_requests_keep_their_order(
    source: Path, reader: VirtualReader, tmp_path: Path
) -> None:
    assert isinstance(reader, VideoReader)
    assert reader.probe(source) == open_reader().probe(source)
    path = virtual(tmp_path, source, Reversed())
    first, second, third = reader.read_many([(path, [0]), (source, [0]), (path, [23, 0])])
    own = open_reader().frames_at(source, [0, 23]).numpy()
    assert np.array_equal(first.numpy()[0], own[1])
    assert np.array_equal(second.numpy()[0], own[0])
    assert np.array_equal(third.numpy(), own)
    assert len(reader.frames_at(path, [])) == 0


def test_what_is_no_virtual_clip_is_refused(source: Path, reader: VirtualReader, tmp_path: Path) -> None:
    path = virtual(tmp_path, source, Reversed())
    with pytest.raises(VideoError):
        open_reader().probe(path)
    with pytest.raises(VideoError, match="frame_index: got 24"):
        reader.frames_at(path, [24])
    nested = virtual(tmp_path, path, Reversed(), "nested")
    with pytest.raises(VideoError, match="a virtual clip, allowed: a real clip"):
        reader.probe(nested)
    for content in (b"", b"{}", b"[" * 1000, b'{"vrthinker_clip": 1, "source": "x", "edit": {"kind": "no"}}'):
        broken = tmp_path / f"broken{ENDING}"
        broken.write_bytes(content)
        with pytest.raises(VideoError, match="is no virtual clip"):
            reader.probe(broken)
    gone = virtual(tmp_path, tmp_path / "gone.mp4", Reversed(), "gone")
    with pytest.raises(VideoError):
        reader.probe(gone)


def test_a_source_that_changed_is_refused(tmp_path: Path, reader: VirtualReader) -> None:
    source = make_clip(tmp_path / "clip.mp4", 6, size=(48, 80))
    path = virtual(tmp_path, source, Reversed())
    assert reader.probe(path).n_frames == 6
    before = source.read_bytes()
    make_clip(source, 6, size=(48, 80), first_number=100)
    for read in (
        reader.probe,
        lambda clip: reader.frames_at(clip, [0]),
        lambda clip: source_places(clip, reader),
    ):
        with pytest.raises(VideoError, match=r"v\.clip\.json: its source changed: .*clip\.mp4 .*put it back"):
            read(path)
    source.write_bytes(before)  # a new time, and the same content
    assert len(reader.frames_at(path, [0])) == 1
    source.write_bytes(before[:-1] + b"?")
    with pytest.raises(VideoError, match="its source changed"):
        reader.probe(path)
    virtual(tmp_path, make_clip(source, 4, size=(48, 80)), Reversed())
    assert reader.probe(path).n_frames == 4


def test_a_file_without_its_sources_content_is_read_unchecked(source: Path, tmp_path: Path) -> None:
    """Older files have none."""
    value = json.loads(virtual_clip(source, Reversed()))
    del value["source_bytes"], value["source_sha256"]
    path = tmp_path / f"old{ENDING}"
    path.write_text(json.dumps(value))
    assert VirtualReader(open_reader()).probe(path).n_frames == N_FRAMES


def test_a_copy_that_does_not_fit_on_the_disk_is_no_fault_of_the_clip(source: Path, tmp_path: Path) -> None:
    with full_at(1000), pytest.raises(OSError, match=r"File too large|No space left") as caught:
        write_reencoded(source, tmp_path / "copy.mp4", open_reader())
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert list(tmp_path.iterdir()) == []
