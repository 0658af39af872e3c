"""Reads hostile clips and checkpoints under guard, in a forked process: jobs for `forks.py`."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from clips import read_number
from transformers import AutoModelForImageTextToText

from vrthinker.engine.hf.engine import HFEngine
from vrthinker.errors import InputError, VideoError
from vrthinker.judge import Judge
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace

_FORBIDDEN = (
    *("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.forkpty", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "pickle.find_class"),
)


def prepare() -> None:
    """Loads what every child needs: what importing these modules leaves for the first use."""
    torch.set_num_threads(1)
    assert AutoModelForImageTextToText
    assert HFEngine


def _guard(seconds: int, gibibytes: float) -> list[str]:
    """Bounds CPU seconds, time and memory. Returns the list that forbidden events are added to."""
    events: list[str] = []

    def watch(event: str, _: Any) -> None:
        if event in _FORBIDDEN:
            events.append(event)

    sys.addaudithook(watch)
    # What computes is bounded in CPU seconds, what waits in time: a busy machine may take longer.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    signal.alarm(20 * seconds)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gibibytes * 2**30),) * 2)
    return events


def read_clip(path: str, good: str, frames: int) -> dict[str, Any]:
    """Numbers a clip's frames beside a good clip, and reads the numbers drawn into them.

    Returns:
        The `kind`: `refused`, `noted` (a part is judged, and a note says so), `unreadable` (a frame is
        refused when it is read), `whole`, `altered` (as many frames, but not the pictures), `longer` (a part
        is there twice), or `short`, a loss that nobody noticed.
    """
    events = _guard(20, 1.0)
    kind = _read_clip(path, good, frames)
    return {"kind": kind, "events": events}


def _read_clip(path: str, good: str, frames: int) -> str:
    options: Any = {"reader": open_reader(), "resize": ResizeSettings(), "cache": FrameCache(1 << 28)}
    try:
        workspace = Workspace.open(path, good, **options)
    except InputError as error:
        _check_line(str(error))
        try:
            workspace = Workspace.open(path, good, tolerate_truncation=True, **options)
        except InputError:
            return "refused"
        return "noted" if workspace.notes else "short"
    try:
        pictures = workspace.pixels(range(1, workspace.n_frames_1 + 1))
    except VideoError as error:
        _check_line(str(error))
        return "unreadable"
    if workspace.n_frames_1 > frames:
        return "longer"
    if workspace.n_frames_1 < frames:
        return "noted" if workspace.notes else "short"
    return "whole" if [_number(picture) for picture in pictures] == list(range(frames)) else "altered"


def _number(picture: Any) -> int:
    try:
        return read_number(picture)
    except ValueError:
        return -1


def _check_line(text: str) -> None:
    assert text.isprintable(), text
    assert len(text) < 1000, text


def load_checkpoint(folder: str, first: str, second: str) -> dict[str, Any]:
    """Loads a checkpoint and judges one pair with it. Returns the `kind`: `refused`, or how it ended."""
    events = _guard(60, 3.0)
    try:
        limits = {"max_rounds": 2, "max_round_tokens": 24, "initial_frames": 2}
        with Judge.from_pretrained(folder, device="cpu", dtype="float32", batch_size=1, **limits) as judge:
            verdict = judge("a dog", first, second)
            if verdict.reason is not None:
                _check_line(verdict.reason)
            kind = str(verdict.stop_reason)
    except InputError as error:
        _check_line(str(error))
        kind = "refused"
    return {"kind": kind, "events": events}
