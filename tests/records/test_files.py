"""Appending: a line is there whole or not at all, whoever else appends and whatever a killed writer left."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path
from typing import Literal

import pytest
from full_disk import full_at

from vrthinker.records.files import append_line, write_whole
from vrthinker.records.locks import locked

Fate = Literal["cut", "close"]
LONG = b"\0" * 150_000
FORK = multiprocessing.get_context("fork")


def appending(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


# write_whole


def test_content_goes_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"before ")
    descriptor = appending(path)
    write_whole(descriptor, b"one ", sync=True)
    write_whole(descriptor, b"two")
    write_whole(descriptor, b"")
    os.close(descriptor)
    assert path.read_bytes() == b"before one two"


@pytest.mark.parametrize("room", [0, 1, 9])
def test_content_that_finds_no_room_is_taken_back(tmp_path: Path, room: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"before\n")
    descriptor = appending(path)
    with full_at(7 + room), pytest.raises(OSError, match=r"No space left|File too large") as caught:
        write_whole(descriptor, b"ten bytes\n")
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert path.read_bytes() == b"before\n"
    write_whole(descriptor, b"later\n")
    os.close(descriptor)
    assert path.read_bytes() == b"before\nlater\n"


def test_a_full_device_is_an_error_of_the_system() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY | os.O_APPEND)
    with pytest.raises(OSError, match="No space left"):
        write_whole(descriptor, b"x")
    os.close(descriptor)


@pytest.mark.parametrize("raised", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_content_that_cannot_be_synced_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"before\n")
    descriptor = appending(path)

    def fail(_: int) -> None:
        monkeypatch.undo()
        raise raised

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(raised)):
        write_whole(descriptor, b"x\n", sync=True)
    os.close(descriptor)
    assert path.read_bytes() == b"before\n"


# append_line


@pytest.mark.parametrize("fate", ["cut", "close"])
def test_lines_accumulate(tmp_path: Path, fate: Fate) -> None:
    path = tmp_path / "f"
    for line in ("one\n", "\n", "zwölf \N{SNOWMAN}\n"):
        append_line(path, line, unfinished=fate)
    assert path.read_text("utf-8") == "one\n\nzwölf \N{SNOWMAN}\n"


@pytest.mark.parametrize(
    ("before", "cut", "closed"),
    [
        (b"one\ntwo", b"one\nnew\n", b"one\ntwo\nnew\n"),
        (b"two", b"new\n", b"two\nnew\n"),
        (LONG + b"\n" + LONG, LONG + b"\nnew\n", LONG + b"\n" + LONG + b"\nnew\n"),
        (b"one\n", b"one\nnew\n", b"one\nnew\n"),
    ],
    ids=["after a line", "alone", "longer than some reads", "none"],
)
def test_an_unfinished_last_line_is_cut_off_or_closed(
    tmp_path: Path, before: bytes, cut: bytes, closed: bytes
) -> None:
    path = tmp_path / "f"
    fates: list[tuple[Fate, bytes]] = [("cut", cut), ("close", closed)]
    for fate, wanted in fates:
        path.write_bytes(before)
        append_line(path, "new\n", unfinished=fate)
        assert path.read_bytes() == wanted


def test_a_full_disk_leaves_the_lines_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "f"
    fates: list[tuple[Fate, bytes]] = [("cut", b"one\n"), ("close", b"one\ntwo")]
    for fate, kept in fates:
        path.write_bytes(b"one\ntwo")
        with full_at(12), pytest.raises(OSError, match=r"No space left|File too large"):
            append_line(path, "a longer line\n", unfinished=fate)
        assert path.read_bytes() == kept
    with pytest.raises(OSError, match="No space left"):
        append_line(Path("/dev/full"), "x\n", unfinished="cut")


@pytest.mark.parametrize("line", ["", "x", "x\ny", "x\ny\n", "\n\n"])
def test_what_is_not_one_line_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match="allowed: one line"):
        append_line(tmp_path / "f", line, unfinished="close")
    assert not (tmp_path / "f").exists()


def append_many(path: Path, writer: int, fate: Fate) -> None:
    for n in range(25):
        append_line(path, f"{writer} {n} {'x' * 20_000}\n", unfinished=fate)


@pytest.mark.multi_process
@pytest.mark.parametrize("fate", ["cut", "close"])
def test_lines_of_several_processes_never_mix(tmp_path: Path, fate: Fate) -> None:
    path = tmp_path / "f"
    writers = [FORK.Process(target=append_many, args=(path, writer, fate)) for writer in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    lines = [line.split(" ") for line in path.read_text().splitlines()]
    assert all(line[2] == "x" * 20_000 for line in lines)
    assert sorted((int(line[0]), int(line[1])) for line in lines) == [
        (w, n) for w in range(3) for n in range(25)
    ]


@pytest.mark.multi_process
@pytest.mark.parametrize("fate", ["cut", "close"])
def test_a_line_that_another_process_is_writing_is_waited_for(tmp_path: Path, fate: Fate) -> None:
    path = tmp_path / "f"
    late = FORK.Process(target=append_line, args=(path, "late\n"), kwargs={"unfinished": fate}, daemon=True)
    with path.open("ab", buffering=0) as stream, locked(stream, path):
        stream.write(b"first")
        late.start()
        late.join(timeout=1)
        assert late.is_alive()
        stream.write(b" half\n")
    late.join(timeout=50)
    assert late.exitcode == 0
    assert path.read_bytes() == b"first half\nlate\n"
