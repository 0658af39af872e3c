"""Both videos under one numbering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from clips import cut, make_clip, read_number
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.errors import InputError, VideoError
from vrthinker.video import FrameCache, ResizeSettings, VideoInfo, Workspace, WorkspaceFrame
from vrthinker.video.frame_cache import file_state
from vrthinker.video.pyav.reader import PyAVReader
from vrthinker.video.workspace import _Clip


def open_workspace(video_1: Path, video_2: Path, **options: Any) -> Workspace:
    return Workspace.open(
        video_1, video_2, reader=PyAVReader(), resize=ResizeSettings(), cache=FrameCache(10**8), **options
    )


def lengths(n_1: int, n_2: int) -> Workspace:
    """A workspace of clips that need not exist: numbering reads no pixels."""

    def clip(n: int) -> _Clip:
        info = VideoInfo("x.mp4", "h264", 96, 64, n, 8.0, n / 8, False, 0, tuple(i / 8 for i in range(n)))
        return _Clip(info, range(n), (56, 84), (0, 0), PyAVReader())

    return Workspace(
        (clip(n_1), clip(n_2)),
        cache=FrameCache(0),
        resize=ResizeSettings(),
        tolerate_truncation=False,
    )


def test_two_different_clips(tmp_path: Path) -> None:
    first = make_clip(tmp_path / "a.mp4", 20, size=(64, 96), fps=24)
    second = make_clip(tmp_path / "b.webm", 13, size=(200, 120), codec="vp9", fps=10, first_number=500)
    workspace = open_workspace(first, second)
    assert (workspace.n_frames, workspace.n_frames_1) == (33, 20)
    assert [info.n_frames for info in workspace.infos] == [20, 13]
    assert workspace.notes == ()
    states = file_state(str(first)), file_state(str(second))
    assert workspace.frame(20) == WorkspaceFrame(20, 1, str(first), 19, 19 / 24, (56, 84), states[0])
    assert workspace.frame(21) == WorkspaceFrame(21, 2, str(second), 0, 0.0, (196, 112), states[1])
    assert workspace.frame(33).pts_seconds == pytest.approx(1.2)
    asked = [33, 1, 21, 20, 1]
    pixels = workspace.pixels(asked)
    assert [read_number(frame) for frame in pixels] == [512, 0, 500, 19, 0]
    assert [frame.shape[:2] for frame in pixels] == [workspace.frame(number).size for number in asked]
    for number in (0, -1, 34):
        with pytest.raises(InputError, match=rf"frame_number: got {number}, allowed: 1 to 33$"):
            workspace.frame(number)
        with pytest.raises(InputError, match="frame_number"):
            workspace.pixels([1, number])


def test_one_decoding_pass_per_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_clip(tmp_path / "a.mp4", 20), make_clip(tmp_path / "b.mp4", 20, first_number=50)
    reader, cache = PyAVReader(), FrameCache(10**8)
    workspace = Workspace.open(first, second, reader=reader, resize=ResizeSettings(), cache=cache)
    asked: list[tuple[str, list[int]]] = []
    original = reader.frames_at

    def frames_at(path: Any, indices: Any, **options: Any) -> Any:
        asked.append((Path(path).name, list(indices)))
        return original(path, indices, **options)

    monkeypatch.setattr(reader, "frames_at", frames_at)
    workspace.prefetch([25, 3, 40, 7])
    assert asked == [("a.mp4", [2, 6]), ("b.mp4", [4, 19])]
    assert [read_number(frame) for frame in workspace.pixels([40, 3, 25, 7])] == [69, 2, 54, 6]
    assert len(asked) == 2
    assert (cache.hits, cache.misses) == (4, 4)


def test_the_paper_example_of_first_frames() -> None:
    assert lengths(32, 32).initial_frames(8) == (1, 9, 17, 25, 33, 41, 49, 57)
    assert lengths(32, 32).initial_frames(7) == (1, 9, 17, 25, 33, 43, 54)
    assert lengths(2, 32).initial_frames(8) == (1, 2, 3, 11, 19, 27)
    assert lengths(1, 1).initial_frames(8) == (1, 2)
    assert lengths(5, 3).initial_frames(2) == (1, 6)
    with pytest.raises(InputError, match="initial frames: got 1, allowed: at least 2"):
        lengths(5, 3).initial_frames(1)


@given(n_1=st.integers(1, 200), n_2=st.integers(1, 200), n=st.integers(2, 64))
def test_first_frames_are_distinct_and_start_both_videos(n_1: int, n_2: int, n: int) -> None:
    numbers = lengths(n_1, n_2).initial_frames(n)
    assert list(numbers) == sorted(set(numbers))
    in_first = [number for number in numbers if number <= n_1]
    assert (len(in_first), len(numbers) - len(in_first)) == (min(n_1, n - n // 2), min(n_2, n // 2))
    assert numbers[0] == 1
    assert numbers[len(in_first)] == n_1 + 1
    assert numbers[-1] <= n_1 + n_2


def test_an_fps_cap_counts_the_kept_frames(tmp_path: Path) -> None:
    first = make_clip(tmp_path / "a.mp4", 24, fps=24)
    times_ms = [0, 10, 20, 100, 150, 210, 500, 505, 510, 900]
    second = make_clip(tmp_path / "b.mkv", 10, pts=times_ms, first_number=100)
    workspace = open_workspace(first, second, max_fps=8)
    assert [workspace.frame(i + 1).frame_index for i in range(8)] == [0, 3, 6, 9, 12, 15, 18, 21]
    kept = [workspace.frame(i + 1).frame_index for i in range(8, workspace.n_frames)]
    assert [times_ms[i] for i in kept] == [0, 150, 500, 900]
    assert [read_number(frame) for frame in workspace.pixels([2, 10])] == [3, 104]
    assert workspace.initial_frames(8) == (1, 3, 5, 7, 9, 10, 11, 12)
    assert workspace.infos[0].n_frames == 24
    everything = open_workspace(first, second, max_fps=1000)
    assert everything.n_frames == 34
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="max_fps: got"):
            open_workspace(first, second, max_fps=bad)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_cap_at_a_clips_own_rate_keeps_every_frame(tmp_path: Path, ending: str) -> None:
    """Matroska rounds 1/24 s to 41 or 42 ms; that must not look like a rate above 24."""
    clip = make_clip(tmp_path / f"a.{ending}", 40, fps=24)
    assert open_workspace(clip, clip, max_fps=24).n_frames == 80
    assert open_workspace(clip, clip, max_fps=12).n_frames == 40


def test_a_broken_file_is_judged_only_when_told(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "a.mkv", 20)
    broken = cut(make_clip(tmp_path / "b.mkv", 40, (144, 192), first_number=100), tmp_path / "c.mkv", 0.7)
    with pytest.raises(VideoError, match=r"c\.mkv: breaks after frame \d+: .*--tolerate-truncation"):
        open_workspace(whole, broken)
    workspace = open_workspace(whole, broken, tolerate_truncation=True)
    n_left = workspace.infos[1].n_frames
    assert 0 < n_left < 40
    (note,) = workspace.notes
    assert note.startswith(
        f"video 2 breaks after frame {n_left}: only the frames before are judged (the file"
    )
    last = workspace.n_frames
    assert last == 20 + n_left
    assert read_number(workspace.pixels([last])[0]) == 100 + n_left - 1


def test_a_strip_that_no_model_takes_is_refused(tmp_path: Path) -> None:
    strip = make_clip(tmp_path / "a.mkv", 2, size=(32, 6600), codec="mjpeg")
    with pytest.raises(
        VideoError, match=r"a\.mkv: frame size: got 6600x32, allowed: an aspect ratio up to 200"
    ):
        open_workspace(strip, strip)


def test_one_file_may_be_both_videos(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", 5)
    workspace = open_workspace(clip, clip)
    assert [read_number(frame) for frame in workspace.pixels([1, 6, 10])] == [0, 0, 4]
