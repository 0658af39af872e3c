"""The measurement of this machine's readers: made, kept for `--reader auto`, and shown."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vrthinker.errors import InputError, one_line, unwritable
from vrthinker.records.files import replace_file
from vrthinker.records.locks import locked, open_lock_file
from vrthinker.video.dali.support import NOT_INSTALLED, has_gpu, installed_version
from vrthinker.video.reader_times import FILE_VARIABLE, Rate, ReaderTimes, times_file

if TYPE_CHECKING:
    from rich.table import Table


def measure(announce: Callable[[str], None]) -> ReaderTimes:
    """Measures DALI beside the CPU reader, on a GPU if there is one.

    Args:
        announce: Is told what is measured next.

    Raises:
        InputError: DALI is not installed.
        VRThinkerError: The readers' frames differ on a CPU, or DALI decoded no clip.
    """
    from vrthinker.episode.runner import decode_threads
    from vrthinker.video.measured_readers import measure_readers

    announce("encoding clips and reading them with both readers; this takes some minutes")
    device: Literal["cpu", "gpu"] = "gpu" if has_gpu() else "cpu"
    with tempfile.TemporaryDirectory(prefix="vrthinker-readers-") as folder:
        return measure_readers(device, Path(folder), threads=decode_threads(), announce=announce)


@contextlib.contextmanager
def kept() -> Iterator[Callable[[ReaderTimes], None]]:
    """Makes sure that a result can be kept, before minutes are spent on it; gives what keeps it.

    Raises:
        InputError: DALI is not installed; or the file cannot be written, is a folder, a pipe or a device, or
            is being measured already.
    """
    if installed_version() is None:
        raise InputError(NOT_INSTALLED)
    path = times_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: got a folder, a pipe or a device, allowed: a file")
        lock = path.with_name(path.name + ".lock")
        descriptor = open_lock_file(lock)
    except OSError as error:
        raise unwritable(str(path), error, f"name another file by {FILE_VARIABLE}") from None
    try:
        with locked(descriptor, lock, wait=False):
            yield lambda times: replace_file(path, (times.model_dump_json(indent=1) + "\n").encode())
    except BlockingIOError:
        raise InputError(f"{path}: another process measures already; wait for it") from None
    finally:
        os.close(descriptor)


def render(times: ReaderTimes) -> Table:
    """The measurement as a table: a line per clip, with who decodes such clips."""
    from rich.table import Table

    names = (
        "codec",
        "size",
        "frames",
        "pyav, frames/s",
        "dali, frames/s",
        "ratio",
        "differ by",
        "auto takes",
    )
    table = Table(*names, show_edge=False, pad_edge=False, box=None)
    for clip in times.clips:
        largest, mean = clip.largest_difference, clip.mean_difference
        difference = "" if largest is None else f"{largest} levels, {mean} on average"
        table.add_row(
            clip.codec,
            f"{clip.width}x{clip.height}",
            str(clip.n_frames),
            _rate(clip.pyav),
            _rate(clip.dali) if clip.dali else one_line(clip.why_not or ""),
            f"{clip.ratio:.2f}" if clip.dali else "",
            difference,
            clip.faster,
        )
    return table


def _rate(rate: Rate) -> str:
    return f"{rate.median:.1f} ({rate.min:.1f} to {rate.max:.1f})"
