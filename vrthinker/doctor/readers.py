"""The measurement of this machine's readers: made, kept for `--reader auto`, and shown."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vrthinker.errors import VRThinkerError
from vrthinker.records.files import replace_file
from vrthinker.video.dali.support import has_gpu, installed_version
from vrthinker.video.reader_times import Rate, ReaderTimes, times_file

if TYPE_CHECKING:
    from rich.table import Table


def measure(announce: Callable[[str], None]) -> ReaderTimes:
    """Measures DALI beside the CPU reader, on a GPU if there is one, and keeps the result for `auto`.

    Args:
        announce: Is told what is measured next.

    Raises:
        InputError: DALI is not installed.
        VRThinkerError: The readers' frames differ on a CPU, or the result cannot be written.
    """
    from vrthinker.episode.runner import decode_threads
    from vrthinker.video.measured_readers import measure_readers

    if installed_version() is not None:
        announce("encoding clips and reading them with both readers; this takes some minutes")
    path = times_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VRThinkerError(f"{path.parent}: cannot be made ({error.strerror})") from None
    with tempfile.TemporaryDirectory(prefix="vrthinker-readers-") as folder:
        device: Literal["cpu", "gpu"] = "gpu" if has_gpu() else "cpu"
        times = measure_readers(device, Path(folder), threads=decode_threads(), announce=announce)
    replace_file(path, (times.model_dump_json(indent=1) + "\n").encode())
    return times


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
        difference = "" if clip.largest_difference is None else f"{clip.largest_difference} levels"
        table.add_row(
            clip.codec,
            f"{clip.width}x{clip.height}",
            str(clip.n_frames),
            _rate(clip.pyav),
            _rate(clip.dali) if clip.dali else clip.why_not,
            f"{clip.ratio:.2f}" if clip.dali else "",
            difference,
            clip.faster,
        )
    return table


def _rate(rate: Rate) -> str:
    return f"{rate.median:.1f} ({rate.min:.1f} to {rate.max:.1f})"
