"""A clip for the evidence page: stills of the frames that were shown, and a file that browsers play.

Invariants: a still or a clip is shown only if the file still matches the record (codec, size, frames, times).
In the embedded file, frame i is shown from `times[i]` to `times[i + 1]`, so that a seek to the middle shows
exactly that frame. If this is not certain for the original file, or if browsers cannot play it, an H.264 copy
with the same frames at the same times is embedded instead.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image

from vrthinker.episode.trajectory import FrameRecord, VideoRecord
from vrthinker.errors import VideoError
from vrthinker.video.frame_cache import file_state
from vrthinker.video.open import open_reader
from vrthinker.video.pyav.clip import DECODE_ERRORS, BreakError, Orientation, open_clip, orientation_of
from vrthinker.video.pyav.sequence import decoded
from vrthinker.video.reader import VideoInfo, VideoReader
from vrthinker.visibility import Region

MAX_CLIP_BYTES = 23_000_000
"""The most bytes of an embedded clip. As base64 it is below 32 MB, some browsers' limit for a data URI."""
MAX_STILL_SIDE = 320
MANY_STILLS = 400
"""The number of stills above which they are embedded at half the size."""
PROXY_MAX_SIDE = 640
_JPEG_QUALITY = 85
_CHUNK_BYTES = 128 << 20
_TICKS_PER_SECOND = 90_000
_CLOCK_ROUNDING_SECONDS = 1e-3
_CODECS = {"mp4": ("h264", "vp9", "av1"), "webm": ("vp8", "vp9", "av1")}
_CHANGED = "the file has changed since it was judged ({})"
_ENCODER_OPTIONS = {"preset": "veryfast", "crf": "21", "bf": "0"}


Picture = tuple[int, Region | None]
"""A frame_index, and the region of the frame that is shown (None: the whole frame)."""


@dataclass(frozen=True)
class Media:
    """The file that a browser plays."""

    mime: str
    content: bytes
    is_copy: bool
    width: int
    height: int


@dataclass(frozen=True)
class PageClip:
    """One clip's part of the page.

    Attributes:
        stills: (frame_index, view) -> JPEG; empty if the file can no longer be used.
        media: The file to play; None if only stills are shown.
        times: The time in seconds at which each frame of `media` begins, and the clip's duration at the end.
        problems: What is missing and why, one line each.
    """

    stills: Mapping[Picture, bytes]
    media: Media | None
    times: tuple[float, ...]
    problems: tuple[str, ...]


def load_clip(
    record: VideoRecord,
    frames: Sequence[FrameRecord],
    *,
    reader: VideoReader | None = None,
    tolerate_truncation: bool = False,
    max_clip_bytes: int = MAX_CLIP_BYTES,
) -> PageClip:
    """Reads what the page shows of a clip. A missing or changed file is a problem, never an error.

    Args:
        record: The clip as it was judged.
        frames: The records of the frames that the page shows.
        reader: The video reader; PyAV's on the CPU by default.
        tolerate_truncation: Whether the clip was judged up to a break.
        max_clip_bytes: The most bytes of the embedded clip.
    """
    source = _source(record, reader, tolerate_truncation)
    state = file_state(record.path)
    try:
        info = source.info()
        if (change := _change(record, frames, info)) is not None:
            return _nothing(_CHANGED.format(change))
        stills, problems = _stills(source, frames, info)
        media, why_none = _media(source, info, max_clip_bytes)
    except VideoError as error:
        return _nothing(error.reason)
    if file_state(record.path) != state:
        return _nothing("the file changed while the page was written; write it again")
    times = _times(info) if media is not None else ()
    return PageClip(stills, media, times, (*problems, *why_none))


def load_stills(
    record: VideoRecord,
    frames: Sequence[FrameRecord],
    *,
    reader: VideoReader | None = None,
    tolerate_truncation: bool = False,
) -> tuple[dict[Picture, bytes], tuple[str, ...]]:
    """The frames of a clip as JPEGs, and what is missing and why, one line each.

    The arguments are those of `load_clip`. A missing or changed file is a problem, never an error.
    """
    source = _source(record, reader, tolerate_truncation)
    try:
        info = source.info()
        if (change := _change(record, frames, info)) is not None:
            return {}, (_CHANGED.format(change),)
        return _stills(source, frames, info)
    except VideoError as error:
        return {}, (error.reason,)


def _source(record: VideoRecord, reader: VideoReader | None, tolerate_truncation: bool) -> _Source:
    if reader is None:
        reader = open_reader(image_fps=record.fps) if record.codec == "images" else open_reader()
    return _Source(record.path, reader, tolerate_truncation)


def _nothing(problem: str) -> PageClip:
    return PageClip({}, None, (), (f"neither the clip nor its frames are shown: {problem}",))


@dataclass(frozen=True)
class _Source:
    """A file, and how it is read."""

    path: str
    reader: VideoReader
    tolerate_truncation: bool

    def info(self) -> VideoInfo:
        return self.reader.probe(self.path, tolerate_truncation=self.tolerate_truncation)

    def pictures(self, indices: Sequence[int], info: VideoInfo) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """Yields (frame_index, uint8 `[height, width, 3]`) in bounded memory."""
        step = max(1, _CHUNK_BYTES // (info.width * info.height * 3))
        for start in range(0, len(indices), step):
            some = indices[start : start + step]
            frames = self.reader.frames_at(self.path, some, tolerate_truncation=self.tolerate_truncation)
            yield from zip(some, frames.numpy(), strict=True)


def _change(record: VideoRecord, frames: Sequence[FrameRecord], info: VideoInfo) -> str | None:
    """How the file differs from the one that was judged; None if no difference is found."""
    for name, unit in (
        ("codec", ""),
        ("width", " pixels wide"),
        ("height", " high"),
        ("n_frames", " frames"),
    ):
        before, now = getattr(record, name), getattr(info, name)
        if before != now:
            return f"{before}{unit} then, {now}{unit} now"
    for frame in frames:
        is_there = 0 <= frame.frame_index < info.n_frames
        now = info.pts_seconds[frame.frame_index] if is_there else math.nan
        if not abs(now - frame.pts_seconds) <= _CLOCK_ROUNDING_SECONDS:
            return f"frame {frame.frame_number} was at {frame.pts_seconds:.3f} s, is at {now:.3f} s"
    if abs(record.duration_seconds - info.duration_seconds) > _CLOCK_ROUNDING_SECONDS:
        return f"{record.duration_seconds:.3f} s long then, {info.duration_seconds:.3f} s now"
    return None


def _times(info: VideoInfo) -> tuple[float, ...]:
    return (*info.pts_seconds, max(info.duration_seconds, info.pts_seconds[-1]))


def _stills(
    source: _Source, frames: Sequence[FrameRecord], info: VideoInfo
) -> tuple[dict[Picture, bytes], tuple[str, ...]]:
    """The JPEGs of the frames that decode, and the problems of the others."""
    views: dict[int, set[Region | None]] = {}
    for frame in frames:
        views.setdefault(frame.frame_index, set()).add(frame.view)
    indices = sorted(views)
    side = MAX_STILL_SIDE if len(indices) <= MANY_STILLS else MAX_STILL_SIDE // 2
    stills: dict[Picture, bytes] = {}
    seen: set[int] = set()

    def add(some: Sequence[int]) -> None:
        for index, picture in source.pictures(some, info):
            seen.add(index)
            for view in views[index]:
                shown = picture if view is None else picture[view.top : view.bottom, view.left : view.right]
                if shown.size:
                    stills[index, view] = _jpeg(shown, side)

    try:
        add(indices)
        return stills, ()
    except VideoError as error:
        reason = error.reason
    for index in [index for index in indices if index not in seen]:
        try:
            add([index])
        except VideoError as error:
            reason = error.reason
    missing = len(indices) - len(seen)
    return stills, (f"{missing} of {len(indices)} frames do not decode: {reason}",) if missing else ()


def _jpeg(picture: np.ndarray[Any, Any], max_side: int) -> bytes:
    image = Image.fromarray(picture)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _media(source: _Source, info: VideoInfo, max_bytes: int) -> tuple[Media | None, tuple[str, ...]]:
    """The file itself, or an H.264 copy of it, or None and the reason."""
    if os.path.isfile(source.path) and os.path.getsize(source.path) <= max_bytes:
        mime = playable_as(source.path, info)
        if mime is not None:
            content = Path(source.path).read_bytes()
            return Media(mime, content, False, info.width, info.height), ()
    try:
        media = _copy(source, info, max_bytes)
    except VideoError as error:
        return None, (f"only single frames are shown, the clip does not decode to its end: {error.reason}",)
    except DECODE_ERRORS as error:
        return None, (f"only single frames are shown, no copy for browsers could be made: {error}",)
    if media is None:
        limit = f"{max_bytes / 1e6:g} MB"
        return None, (f"only single frames are shown: the clip is over {limit}, and so is a small copy",)
    return media, ()


def playable_as(path: str, info: VideoInfo) -> str | None:
    """The MIME type under which browsers play the file at the times of `info`; None if that is uncertain.

    In doubt it is None: a copy costs seconds, but a seek to a wrong frame would be false evidence.
    """
    # A browser would show noted clips in its own way: transparent on the page, HDR with tone mapping.
    if info.truncated is not None or info.rotation_degrees or info.notes:
        return None
    try:
        with open_clip(path) as clip:
            kind = _browser_container(path, clip.container)
            context, stream = clip.stream.codec_context, clip.stream
            if (
                clip.codec not in _CODECS.get(kind, ())
                or context.pix_fmt not in ("yuv420p", "yuvj420p")
                or stream.sample_aspect_ratio not in (None, 0, 1)
                or len(clip.container.streams.video) != 1
                or not clip.container.duration
                # Browsers count times from the earliest stream, we count from the first frame.
                or abs(clip.container.start_time or 0) > _CLOCK_ROUNDING_SECONDS * av.time_base
            ):
                return None
            packets = list(clip.packets())
            ticks = sorted(packet.pts for packet in packets if packet.pts is not None)
            if len(ticks) != info.n_frames or len(packets) != info.n_frames:
                return None
            if any(packet.is_discard for packet in packets):
                return None
            shown = [float(tick * stream.time_base) for tick in ticks]
            if any(
                abs(a - b) > _CLOCK_ROUNDING_SECONDS for a, b in zip(shown, info.pts_seconds, strict=True)
            ):
                return None
        with open_clip(path) as clip:
            first = next(decoded(clip, clip.packets()))
            return f"video/{kind}" if orientation_of(first) == Orientation() else None
    except (VideoError, BreakError, StopIteration):
        return None


def _browser_container(path: str, container: Any) -> str:
    name = container.format.name
    if name.startswith("mov"):
        return "" if container.metadata.get("major_brand", "").startswith("qt") else "mp4"
    with open(path, "rb") as file:
        return "webm" if name.startswith("matroska") and b"webm" in file.read(64) else ""


def _copy(source: _Source, info: VideoInfo, max_bytes: int) -> Media | None:
    """A small copy of the clip as H.264 in mp4, with the same times; None if it is over `max_bytes`."""
    width, height = _copy_size(info.width, info.height)
    ticks = _ticks(info)
    lasting = {tick: following - tick for tick, following in itertools.pairwise(ticks)}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        rate = Fraction(min(max(info.fps, 1.0), 1000.0)).limit_denominator(1001)
        stream: Any = container.add_stream("libx264", rate=rate, options=_ENCODER_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, _TICKS_PER_SECOND)
        context.gop_size = 12  # so that every frame is close to a keyframe
        context.thread_count = 1
        context.colorspace, context.color_range = Colorspace.SMPTE170M, ColorRange.MPEG

        def mux(packets: Any) -> None:
            for packet in packets:
                packet.duration = lasting[packet.pts]
                container.mux(packet)

        for index, picture in source.pictures(range(info.n_frames), info):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                width,
                height,
                "yuv420p",
                dst_colorspace=Colorspace.ITU601,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.AREA,
                threads=1,
            )
            frame.pts, frame.time_base = ticks[index], context.time_base
            mux(stream.encode(frame))
            if buffer.tell() > max_bytes:
                return None
        mux(stream.encode(None))
    content = buffer.getvalue()
    return Media("video/mp4", content, True, width, height) if len(content) <= max_bytes else None


def _copy_size(width: int, height: int) -> tuple[int, int]:
    """The size of the copy: at most `PROXY_MAX_SIDE` on either side, and even, as 4:2:0 colour requires."""
    shrink = min(1.0, PROXY_MAX_SIDE / max(width, height))
    even = [max(2, round(side * shrink / 2) * 2) for side in (width, height)]
    return even[0], even[1]


def _ticks(info: VideoInfo) -> list[int]:
    """The frames' times as strictly increasing ticks, with the clip's end last."""
    ticks: list[int] = []
    for seconds in _times(info):
        tick = round(seconds * _TICKS_PER_SECOND)
        ticks.append(max(tick, ticks[-1] + 1) if ticks else tick)
    return ticks
