"""Clips in memory: bytes, open files, arrays, tensors and frames are shown as the same pixels as a file's."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import make_clip, read_number
from PIL import Image

from vrthinker.errors import InputError, VideoError
from vrthinker.video.clips import Clip, as_clip, is_same_clip
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace

RESIZE = ResizeSettings(patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=112 * 168)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "a.mp4", 9, size=(56, 84), fps=8)


@pytest.fixture(scope="module")
def pixels(path: Path) -> np.ndarray[Any, Any]:
    """All frames of the file, uint8 `[9, 56, 84, 3]`."""
    return open_reader().frames_at(path, range(9)).numpy()


def opened(first: Any, second: Any, cache: FrameCache | None = None) -> Workspace:
    cache = FrameCache(1 << 24) if cache is None else cache  # an empty one is false
    return Workspace.open(first, second, reader=open_reader(), resize=RESIZE, cache=cache)


def as_tensor(pixels: np.ndarray[Any, Any], dtype: str) -> Any:
    import torch

    return torch.from_numpy(pixels).to(getattr(torch, dtype))


CLIPS: dict[str, Callable[[np.ndarray[Any, Any]], Clip]] = {
    "uint8 array": lambda x: Clip.from_array(x, fps=8),
    "strided array": lambda x: Clip.from_array(np.repeat(x, 2, axis=2)[:, :, ::2], fps=8),
    "channels first": lambda x: Clip.from_array(x.transpose(0, 3, 1, 2), fps=8),
    "channels before time": lambda x: Clip.from_array(x.transpose(3, 0, 1, 2), fps=8, layout="CTHW"),
    "0..1": lambda x: Clip.from_array(x.astype(np.float32) / 255, fps=8, values="0..1"),
    "-1..1": lambda x: Clip.from_array(x.astype(np.float64) / 127.5 - 1, fps=8, values="-1..1"),
    "tensor": lambda x: Clip.from_array(as_tensor(x, "uint8"), fps=8),
    "tensor 0..1": lambda x: Clip.from_array(
        as_tensor(x, "float32").permute(0, 3, 1, 2) / 255, fps=8, values="0..1"
    ),
    "tensor that learns": lambda x: Clip.from_array(
        (as_tensor(x, "float32") / 255).requires_grad_(), fps=8, values="0..1"
    ),
    "frames": lambda x: Clip.from_frames((frame for frame in x), fps=8),
    "pictures": lambda x: Clip.from_frames([Image.fromarray(frame) for frame in x], fps=8),
    "float frames": lambda x: Clip.from_frames(x.astype(np.float32) / 255, fps=8, values="0..1"),
}


@pytest.mark.parametrize("kind", CLIPS)
def test_frames_in_memory_are_shown_as_those_of_a_file(
    path: Path, pixels: np.ndarray[Any, Any], kind: str
) -> None:
    clip = CLIPS[kind](pixels)
    workspace, wanted = opened(clip, path), opened(path, path)
    assert (workspace.n_frames, workspace.n_frames_1) == (18, 9)
    info = workspace.infos[0]
    assert (info.fps, info.width, info.height, info.duration_seconds) == (8.0, 84, 56, 9 / 8)
    assert workspace.frame(3).pts_seconds == wanted.frame(3).pts_seconds
    for number in (9, 1, 5):
        (shown,), (expected,) = workspace.pixels([number]), wanted.pixels([number])
        assert read_number(shown) == number - 1
        assert np.array_equal(shown, expected)


def test_half_precision_is_as_near_as_it_can_be(pixels: np.ndarray[Any, Any]) -> None:
    clip = Clip.from_array(as_tensor(pixels, "bfloat16") / 255, fps=8, values="0..1")
    shown = opened(clip, clip).pixels([4])[0].astype(int)
    assert np.abs(shown - pixels[3].astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["bytes", "file", "buffer"])
def test_a_file_in_memory_is_the_file(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "file":
        with path.open("rb") as stream:
            clip = Clip.from_bytes(stream)
    else:
        clip = Clip.from_bytes(data if kind == "bytes" else io.BytesIO(data))
    workspace, wanted = opened(clip, path), opened(path, path)
    assert workspace.infos[0].codec == wanted.infos[0].codec
    assert workspace.contents[0] == wanted.contents[0]
    assert workspace.infos[0].path == f"memory:sha256:{wanted.contents[0].sha256}"  # type: ignore[union-attr]
    assert all(map(np.array_equal, workspace.pixels([1, 9]), wanted.pixels([1, 9])))


def test_equal_content_is_one_clip_and_is_read_once(pixels: np.ndarray[Any, Any]) -> None:
    first, again = Clip.from_array(pixels, fps=8), Clip.from_array(pixels.copy(), fps=8)
    other = pixels.copy()
    other[4, 0, 0, 0] ^= 1
    assert first.name == again.name
    assert is_same_clip(first, again)
    assert len({first.name, Clip.from_array(other, fps=8).name, Clip.from_array(pixels, fps=9).name}) == 3
    cache = FrameCache(1 << 24)
    opened(first, Clip.from_array(other, fps=8), cache).pixels([1, 2])
    opened(again, again, cache).pixels([1, 2])
    assert (cache.hits, cache.misses) == (2, 2)


def test_an_array_is_not_copied(pixels: np.ndarray[Any, Any]) -> None:
    clip = Clip.from_array(pixels, fps=8)
    assert np.shares_memory(clip._array, pixels)  # type: ignore[attr-defined]
    tensor = as_tensor(pixels, "uint8")
    assert Clip.from_array(tensor, fps=8)._array.data_ptr() == tensor.data_ptr()  # type: ignore[attr-defined]


def test_many_files_in_memory_follow_each_other(path: Path, tmp_path: Path) -> None:
    """Their numbers of open files are used again, their contents are never mixed up."""
    reader, cache = open_reader(), FrameCache(1 << 24)
    files = [f.read_bytes() for f in (path, make_clip(tmp_path / "b.mp4", 5, size=(56, 84), fps=8))]
    size = max(map(len, files)) + 8
    for turn in range(6):
        # A box of nothing at its end gives both files one size, so that only their content differs.
        room = size - len(files[turn % 2])
        clip = Clip.from_bytes(files[turn % 2] + room.to_bytes(4, "big") + b"free" + bytes(room - 8))
        workspace = Workspace.open(clip, clip, reader=reader, resize=RESIZE, cache=cache)
        assert workspace.n_frames_1 == (9, 5)[turn % 2]
        assert read_number(workspace.pixels([workspace.n_frames_1])[0]) == (8, 4)[turn % 2]
        del clip, workspace


VIDEO = np.zeros((4, 28, 28, 3), np.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip.from_array(VIDEO, fps=0), "fps: got 0"),
        (lambda: Clip.from_array(VIDEO[0], fps=8), r"got shape \[28, 28, 3\]"),
        (lambda: Clip.from_array(VIDEO[:0], fps=8), r"got shape \[0, 28, 28, 3\]"),
        (lambda: Clip.from_array(VIDEO[..., :2], fps=8), "allowed: .frames, height, width, 3"),
        (lambda: Clip.from_array(VIDEO[:, :3], fps=8), "fits THWC and TCHW: say layout"),
        (lambda: Clip.from_array(VIDEO[:3].transpose(0, 3, 1, 2)[:, :1], fps=8), 'layout="CTHW"'),
        (lambda: Clip.from_array(VIDEO, fps=8, layout="HWCT"), "layout: got 'HWCT'"),
        (lambda: Clip.from_array(VIDEO.astype(np.float32), fps=8), "say values='0..1' or values='-1..1'"),
        (lambda: Clip.from_array(VIDEO, fps=8, values="0..1"), "values: got '0..1' for uint8"),
        (lambda: Clip.from_array(VIDEO.astype(np.int64), fps=8), "got dtype int64"),
        (lambda: Clip.from_array("a.mp4", fps=8), "got str, allowed: an array or a tensor"),
        (lambda: Clip.from_array(np.zeros((1, 1, 9000, 3), np.uint8), fps=8), "9000x1 pixels, allowed"),
        (lambda: Clip.from_frames([], fps=8), "got no frames"),
        (lambda: Clip.from_frames([VIDEO[0], VIDEO[0, :14]], fps=8), r"frame 1: got \[14, 28, 3\]"),
        (lambda: Clip.from_frames(VIDEO[..., 0], fps=8), r"frame 0: got shape \[28, 28\]"),
        (lambda: Clip.from_bytes(b""), "got no bytes"),
        (lambda: Clip.from_bytes(io.StringIO("x")), "allowed: one opened as 'rb'"),  # type: ignore[arg-type]
        (
            lambda: as_clip(VIDEO, "video 2"),
            r"video 2: got ndarray, allowed: .*Clip.from_array\(array, fps=8",
        ),
    ],
)
def test_what_is_no_clip_is_refused_with_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1


def test_limits_hold_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRTHINKER_MAX_MEMORY_BYTES", str(28 * 28 * 3 * 2))
    drawn = []

    def endless() -> Any:
        while True:
            drawn.append(1)
            yield VIDEO[0]

    with pytest.raises(InputError, match="VRTHINKER_MAX_MEMORY_BYTES"):
        Clip.from_frames(endless(), fps=8)
    assert len(drawn) == 3
    with pytest.raises(InputError, match="VRTHINKER_MAX_MEMORY_BYTES"):
        Clip.from_bytes(bytes(28 * 28 * 3 * 2 + 1))


def test_bad_pixels_and_bad_files_are_errors_of_the_clip() -> None:
    floats = VIDEO.astype(np.float32)
    floats[2, 0, 0, 0] = np.nan
    clip = Clip.from_array(floats, fps=8, values="0..1")
    with pytest.raises(VideoError, match=r"memory:sha256:\w+: frame 2: has values that are not finite"):
        opened(clip, clip).pixels([3])
    broken = Clip.from_bytes(b"no video at all")
    with pytest.raises(VideoError, match=f"^{broken.name}: ") as caught:
        opened(broken, broken)
    assert "/proc/" not in str(caught.value)


def test_arrays_need_no_torch() -> None:
    code = (
        "import sys, numpy as np; from vrthinker import Clip; "
        "clip = Clip.from_array(np.zeros((2, 28, 28, 3), 'u1'), fps=8); "
        "clip.name, clip.pixels([1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_a_tensor_on_a_gpu_stays_there(pixels: np.ndarray[Any, Any]) -> None:
    import torch

    tensor = as_tensor(pixels, "uint8").cuda()
    clip = Clip.from_array(tensor, fps=8)
    before = torch.cuda.memory_allocated()
    workspace = opened(clip, clip)
    assert workspace.contents == (None, None)
    assert np.array_equal(
        workspace.pixels([3])[0], opened(Clip.from_array(pixels, fps=8), clip).pixels([3])[0]
    )
    assert torch.cuda.memory_allocated() == before
