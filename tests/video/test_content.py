"""A clip is known again by its content: the same in every copy, another for every other clip."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from clips import make_clip

from vrthinker.video import content
from vrthinker.video.content import WHOLE_BYTES, ClipContent, clip_content


def content_of(path: Path) -> ClipContent:
    found = clip_content(path)
    assert found is not None
    return found


def test_a_copy_has_the_same_content_and_another_clip_has_not(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", 4)
    data = clip.read_bytes()
    assert content_of(clip) == (len(data), hashlib.sha256(data).hexdigest()), "what sha256sum prints"
    copy = tmp_path / "b.mp4"
    shutil.copyfile(clip, copy)
    os.utime(copy, ns=(1, 1))
    assert content_of(copy) == content_of(clip)
    copy.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert content_of(copy) != content_of(clip)
    assert content_of(copy).size_bytes == len(data)


def test_a_large_file_is_read_in_parts_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.mp4"
    with path.open("wb") as stream:
        stream.truncate(10 * WHOLE_BYTES)
    read = 0
    pread = os.pread

    def counting(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal read
        read += count
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", counting)
    whole = content_of(path)
    assert whole.size_bytes == 10 * WHOLE_BYTES
    assert read == WHOLE_BYTES
    for place in (0, 10 * WHOLE_BYTES - 1):
        with path.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        assert content_of(path).sha256 != whole.sha256
        whole = content_of(path)


def test_the_files_of_a_folder_count_with_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(name.encode() * 10)
    before = content_of(folder)
    assert before.size_bytes == 100
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / ".hidden").write_bytes(b"x")
    assert content_of(tmp_path / "copy") == before
    (folder / "2.png").rename(folder / "0.png")
    assert content_of(folder) != before


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    reads = []
    read = content._file_content
    monkeypatch.setattr(content, "_file_content", lambda *a: reads.append(a) or read(*a))
    one = content_of(path)
    assert (content_of(path), len(reads)) == (one, 1)
    path.write_bytes(b"other")
    assert (content_of(path) == one, len(reads)) == (False, 2)


@pytest.mark.parametrize("what", ["missing", "pipe", "nul", "device"])
def test_what_cannot_be_read_has_no_content(what: str, tmp_path: Path) -> None:
    path = {"nul": "a\0b", "device": "/dev/zero"}.get(what, str(tmp_path / what))
    if what == "pipe":
        os.mkfifo(path)
    assert clip_content(path) is None
    if what == "missing":
        Path(path).write_bytes(b"there")
        assert clip_content(path) is not None, "an error is not remembered"
