"""An open clip: FFmpeg's view of one file, with its errors turned into ours.

Invariant: no function here raises an FFmpeg error, and FFmpeg's log is silent. A file that cannot be used is
a `VideoError`. A place from which a file cannot be read on is a `BreakError`, and the caller decides what
follows.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.codec.context import CodecContext
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import Interpolation, VideoReformatter

from vrthinker.errors import VideoError
from vrthinker.video.pyav.containers import missing_end
from vrthinker.video.pyav.packets import damage, starts_afresh
from vrthinker.video.reader import MAX_SIDE_PIXELS

_MAX_COMMENT_CHARS = 200

# Other demuxers (playlists, subtitles, text, image sequences) are excluded; some of them open other files.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,obu,"
    "h264,hevc,m4v,mjpeg,nut,mxf,yuv4mpegpipe,mp3,wav,flac,aac,ac3"
)
_OPEN_TIMEOUT_SECONDS = 60.0
_EXACT_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_IMAGE_HEADS = (b"\x89PNG", b"\xff\xd8\xff", b"BM")
_VIDEO_HEADS = (b"\x1aE\xdf\xa3", b"RIFF", b"GIF8", b"FLV", b"OggS")

# Errors that FFmpeg and PyAV raise on damaged data. PyAV's errors derive from FFmpegError. The others come
# from PyAV's checks of values that a damaged header made absurd.
DECODE_ERRORS = (av.FFmpegError, ValueError, OverflowError, MemoryError, EOFError, OSError)


class BreakError(Exception):
    """The file is damaged at this place. The message says how."""


@dataclass(frozen=True)
class Orientation:
    """How stored pictures are displayed: turned clockwise, then mirrored left to right."""

    rotation_degrees: int = 0
    mirrored: bool = False

    def apply(self, picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Turns one picture `[height, width, 3]` and returns a contiguous array."""
        turned = np.rot90(picture, -(self.rotation_degrees // 90)) if self.rotation_degrees else picture
        return np.ascontiguousarray(turned[:, ::-1] if self.mirrored else turned)


def check_file(path: str) -> os.stat_result:
    """Refuses what cannot be a video before FFmpeg opens it, so that a pipe cannot make it wait for ever.

    Raises:
        VideoError: The file is missing, empty, unreadable, or not a regular file.
    """
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb"):
                pass
    except FileNotFoundError as error:
        dangling = os.path.islink(path)
        reason = "a link to a file that does not exist" if dangling else "no such file"
        raise VideoError(path, reason) from error
    except PermissionError as error:
        raise VideoError(path, "may not be read (permission denied)") from error
    except (OSError, ValueError) as error:
        raise VideoError(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(path, "not a regular file (a pipe or a device?)")
    if status.st_size == 0:
        raise VideoError(path, "the file is empty")
    return status


class OpenClip:
    """The open video stream of one file. Make one with `open_clip`, which closes it."""

    def __init__(self, path: str, container: Any, stream: Any) -> None:
        self.path = path
        self.container = container
        self.stream = stream
        self.format_name: str = container.format.name
        # Matroska writes its keys in capitals.
        comments = (value for key, value in container.metadata.items() if key.lower() == "comment")
        self.comment = str(next(comments, ""))[:_MAX_COMMENT_CHARS]
        self.codec: str = stream.codec_context.codec.canonical_name
        self.marks_damage_late = False
        self._reformatter = VideoReformatter()  # reuses its tables for all frames

    def starts_afresh(self, packet: Any) -> bool:
        """Whether no picture after this keyframe refers to one before it."""
        return starts_afresh(self.codec, memoryview(packet), self.stream.codec_context.extradata or b"")

    def allow_missing_references(self) -> None:
        """Says that decoding starts where pictures before the start may be named. Call it before `decode`.

        H.264's decoder then meets commands to forget pictures that it never had. Under `explode` such a
        command fails the packet, although the picture is whole. Without `explode` the decoder marks damaged
        slices in the frames that it returns, and `decode` raises on those. They may come out after pictures
        that depend on them, so callers have to wait (`marks_damage_late`).
        """
        context = self.stream.codec_context
        if not context.is_open:
            context.options = {**context.options, "err_detect": "crccheck"}
            self.marks_damage_late = True

    @property
    def is_seekable(self) -> bool:
        """Whether seeking is reliable in this container. Other files are decoded from the start."""
        return self.format_name.startswith(("mov", "matroska"))

    def packets(self) -> Iterator[Any]:
        """Yields the stream's packets from the current position on.

        Raises:
            BreakError: The container cannot be read further.
        """
        try:
            for packet in self.container.demux(self.stream):
                # To the decoder, an empty packet would mean the end of the stream.
                if packet.size:
                    yield packet
        except DECODE_ERRORS as error:
            raise BreakError(f"the container is damaged ({_words(error)})") from error

    def packets_from(self, pts: int, dts: int | None) -> Iterator[Any]:
        """Seeks to the keyframe at `pts` and yields the packets from there on.

        Raises:
            BreakError: Seeking ends somewhere else, or the container cannot be read further.
        """
        for target in (pts, dts):
            if target is None:
                continue
            try:
                self.container.seek(target, stream=self.stream)
            except DECODE_ERRORS as error:
                raise BreakError(f"the container cannot be searched ({_words(error)})") from error
            packets = self.packets()
            first = next(packets, None)
            if first is not None and first.is_keyframe and first.pts is not None and first.pts <= pts:
                yield first
                yield from packets
                return
        raise BreakError("a seek did not land on the keyframe before the frame")

    def decode(self, packet: Any) -> list[Any]:
        """Decodes one packet (None at the end) and returns the frames that the decoder outputs.

        Raises:
            BreakError: The packet or an output frame is damaged.
        """
        if packet is not None and packet.is_corrupt:
            raise BreakError("the file ends inside a frame, or the container marks one as damaged")
        if packet is not None and (reason := damage(self.codec, memoryview(packet))) is not None:
            raise BreakError(reason)
        try:
            frames: list[Any] = self.stream.codec_context.decode(packet)
        except DECODE_ERRORS as error:
            raise BreakError(f"a frame does not decode ({_words(error)})") from error
        if any(frame.is_corrupt for frame in frames):
            raise BreakError("a frame decodes with errors")
        return frames

    def to_rgb(self, frame: Any, orientation: Orientation) -> np.ndarray[Any, Any]:
        """Converts a decoded frame to displayed pixels, uint8 `[height, width, 3]`, RGB.

        The flags make the colours equal to those of GPU decoders (bit-exact with DALI). The stream's own
        matrix and range are used.

        Raises:
            BreakError: The frame's colours cannot be converted.
        """
        try:
            rgb = self._reformatter.reformat(frame, format="rgb24", interpolation=_EXACT_RGB)
        except DECODE_ERRORS as error:
            raise BreakError(f"a frame's colours cannot be converted to RGB ({_words(error)})") from error
        return orientation.apply(rgb.to_ndarray())


@contextlib.contextmanager
def open_clip(path: str, *, threads: int = 1) -> Iterator[OpenClip]:
    """Opens a file's video stream, and closes everything at the end.

    Args:
        path: A file that `check_file` accepted.
        threads: The number of decoder threads. With more than one, a decoder may output a damaged picture
            before it marks it as damaged, so all callers use one. Several clips are decoded in parallel
            instead.

    Raises:
        VideoError: The file has no video that can be decoded here.
    """
    container: Any = None
    try:
        container = av.open(
            "file:" + path,
            options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
            metadata_errors="replace",
            timeout=_OPEN_TIMEOUT_SECONDS,
        )
    except DECODE_ERRORS as error:
        raise VideoError(path, _why_unreadable(path, error)) from error
    with container:
        yield OpenClip(path, container, _prepare_stream(path, container, threads))


def orientation_of(frame: Any) -> Orientation:
    """Reads the display matrix of a decoded frame. Turns that are not multiples of 90 degrees are ignored."""
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return Orientation()
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), dtype=np.int32).tolist()
    # A stored point (x, y) is displayed at (a x + c y, b x + d y), apart from a shift.
    upright, sideways = b == 0 == c and a and d, a == 0 == d and b and c
    if upright:
        return Orientation(0 if d > 0 else 180, mirrored=(a > 0) != (d > 0))
    if sideways:
        # Turning by 90 degrees clockwise maps x to y (b > 0) and y to -x (c < 0).
        return Orientation(90 if b > 0 else 270, mirrored=(b > 0) == (c > 0))
    return Orientation()


def check_size(path: str, width: int, height: int) -> None:
    """Refuses pictures of an absurd size.

    Raises:
        VideoError: The size is missing, or a side is over the limit.
    """
    if width < 1 or height < 1:
        raise VideoError(path, "the video stream says no picture size")
    if max(width, height) > MAX_SIDE_PIXELS:
        raise VideoError(
            path, f"pictures of {width}x{height} pixels, allowed: up to {MAX_SIDE_PIXELS}x{MAX_SIDE_PIXELS}"
        )


def _prepare_stream(path: str, container: Any, threads: int) -> Any:
    covers = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    videos = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not videos:
        only = " and ".join(
            name
            for name, there in (
                ("audio", bool(container.streams.audio)),
                ("a cover picture", bool(container.streams.video)),
            )
            if there
        )
        if only:
            raise VideoError(path, f"has no video, only {only}")
        cut = missing_end(path, container.format.name)
        raise VideoError(path, "has no video stream" if cut is None else f"no frame decodes: {cut.reason}")
    stream = max(videos, key=lambda video: bool(video.disposition & av.stream.Disposition.default))
    context: CodecContext | None = stream.codec_context
    if context is None:
        raise VideoError(path, "its codec cannot be decoded here")
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    check_size(path, stream.width, stream.height)
    stream.thread_type = "SLICE" if threads == 1 else "AUTO"
    stream.thread_count = threads
    context.options = {
        # The decoder shall raise errors instead of guessing pixels if it notices damage.
        "err_detect": "crccheck+explode",
        "max_pixels": str(MAX_SIDE_PIXELS**2),
    }
    return stream


def _why_unreadable(path: str, error: BaseException) -> str:
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(_IMAGE_HEADS) or head[8:12] == b"WEBP":
        return "an image, not a video; put the images of one clip into a folder and give the folder"
    if head[4:8] in (b"ftyp", b"mdat", b"moov", b"wide", b"free"):
        return "the file is cut short or damaged: its index (moov) is missing or unreadable"
    if head.startswith(_VIDEO_HEADS):
        return f"the file is cut short or damaged: its beginning cannot be read ({_words(error)})"
    if isinstance(error, (av.error.InvalidDataError, av.error.ArgumentError, av.error.EOFError)):
        return "not a video in a known format"
    return f"cannot be read ({_words(error)})"


def _words(error: BaseException) -> str:
    """FFmpeg's message, without the file's name and the error's number."""
    return str(getattr(error, "strerror", None) or type(error).__name__).splitlines()[0].lower()
