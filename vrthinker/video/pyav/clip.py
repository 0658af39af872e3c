"""An open clip: FFmpeg's view of one file, with its errors turned into ours.

Invariant: no function here raises an FFmpeg error, and FFmpeg's log is silent. A file that cannot be used is
a `VideoError`. A place from which a file cannot be read on is a `BreakError`, and the caller decides what
follows. If the machine is to blame (too little memory, a disk that does not answer), it is a `MachineError`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.codec.context import CodecContext
from av.sidedata.sidedata import Type as SideDataType

from vrthinker import limits
from vrthinker.errors import InputError, MachineError, VideoError
from vrthinker.video.pyav.colours import RgbConverter, has_alpha, opacity
from vrthinker.video.pyav.containers import missing_part
from vrthinker.video.pyav.packets import damage, is_disposable, starts_afresh
from vrthinker.video.reader import ReadCounts, check_side

_MAX_COMMENT_CHARS = 200
_PLENTY_BYTES = 1 << 30
"""More than any single allocation that a clip within the limits needs."""

CONTAINERS = ("mp4", "mov", "mkv", "webm", "avi", "ts", "flv", "gif", "apng", "webp", "h264", "hevc")
"""The endings of the containers that are read. The last two are streams without a container."""
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "gif", "apng", "webp")
"""FFmpeg's names of the codecs that are read."""
_DEMUXERS = ("mov", "matroska", "avi", "mpegts", "flv", "gif", "apng", "h264", "hevc")
"""What FFmpeg's names of those containers begin with. Animated WebP is not read by FFmpeg."""
# Other demuxers (playlists, subtitles, text, image sequences) are excluded; some of them open other files.
# Those that are not in `_DEMUXERS` are opened only to say what the file is.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,obu,"
    "h264,hevc,m4v,mjpeg,nut,mxf,yuv4mpegpipe,mp3,wav,flac,aac,ac3"
)
_DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_HDR_CURVES = {16: "PQ", 18: "HLG"}
"""Transfer characteristics of ISO/IEC 23091-2 that are meant for HDR screens."""
_IMAGE_HEADS = (b"\x89PNG", b"\xff\xd8\xff", b"BM")
_VIDEO_HEADS = (b"\x1aE\xdf\xa3", b"RIFF", b"GIF8", b"FLV", b"OggS")

# Errors that FFmpeg and PyAV raise on damaged data. PyAV's errors derive from FFmpegError. The others come
# from PyAV's checks of values that a damaged header made absurd.
DECODE_ERRORS = (av.FFmpegError, ValueError, OverflowError, EOFError, OSError)


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

    def __init__(self, path: str, container: Any, stream: Any, end_byte: int | None = None) -> None:
        self.path = path
        self._end_byte = end_byte
        self.container = container
        self.stream = stream
        self.format_name: str = container.format.name
        # Matroska writes its keys in capitals.
        comments = (value for key, value in container.metadata.items() if key.lower() == "comment")
        self.comment = str(next(comments, ""))[:_MAX_COMMENT_CHARS]
        self.codec: str = stream.codec_context.codec.canonical_name
        self.marks_damage_late = False
        self.counts: ReadCounts | None = None
        # FFmpeg's own decoders of VP8 and VP9 ignore the second stream that holds the opacity.
        has_opacity_stream = stream.metadata.get("alpha_mode") == "1"
        name = _DECODERS_WITH_ALPHA.get(self.codec) if has_opacity_stream else None
        self._decoder = stream.codec_context if name is None else _decoder_like(stream.codec_context, name)
        self._converter = RgbConverter()

    def starts_afresh(self, packet: Any) -> bool:
        """Whether no picture after this keyframe refers to one before it."""
        return starts_afresh(self.codec, memoryview(packet), self.stream.codec_context.extradata or b"")

    def is_disposable(self, packet: Any) -> bool:
        """Whether no other picture depends on this packet's."""
        return is_disposable(self.codec, memoryview(packet), self.stream.codec_context.extradata or b"")

    def rest(self) -> None:
        """Lets go of the pictures that the decoder holds, before the clip is kept open for later reads."""
        if self._decoder.is_open:
            self._decoder.flush_buffers()

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
    def is_cut(self) -> bool:
        """Whether packets behind some place in the file are not used."""
        return self._end_byte is not None

    @property
    def is_seekable(self) -> bool:
        """Whether seeking is reliable in this container. Other files are decoded from the start."""
        return self.format_name.startswith(("mov", "matroska"))

    def packets(self) -> Iterator[Any]:
        """Yields the stream's packets from the current position on.

        Raises:
            BreakError: The container cannot be read further.
            MachineError: Reading one packet took too long.
        """
        seconds = limits.MAX_READ_SECONDS.value
        try:
            packets = self.container.demux(self.stream)
            while (packet := _read_next(self.path, packets, seconds)) is not None:
                if self._end_byte is not None and packet.pos is not None and packet.pos >= self._end_byte:
                    return
                # To the decoder, an empty packet would mean the end of the stream.
                if packet.size:
                    yield packet
        except (MemoryError, *DECODE_ERRORS) as error:
            raise_if_out_of_memory(self.path, error)
            raise BreakError(f"the container is damaged ({_words(error)})") from error

    def seek(self, tick: int, *, any_frame: bool = False) -> None:
        """Goes to the packet at or before a time: to a keyframe, or with `any_frame` to any packet.

        Raises:
            BreakError: The container cannot be searched.
        """
        try:
            self.container.seek(tick, stream=self.stream, any_frame=any_frame)
        except (MemoryError, *DECODE_ERRORS) as error:
            raise_if_out_of_memory(self.path, error)
            raise BreakError(f"the container cannot be searched ({_words(error)})") from error

    def packets_from(self, pts: int, dts: int | None) -> Iterator[Any]:
        """Seeks to the keyframe at `pts` and yields the packets from there on.

        Raises:
            BreakError: Seeking ends somewhere else, or the container cannot be read further.
        """
        for target in (pts, dts):
            if target is None:
                continue
            self.seek(target)
            if self._decoder.is_open:
                self._decoder.flush_buffers()
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
            MachineError: There is too little memory.
        """
        if packet is not None and packet.is_corrupt:
            raise BreakError("the file ends inside a frame, or the container marks one as damaged")
        if packet is not None and (reason := damage(self.codec, memoryview(packet))) is not None:
            raise BreakError(reason)
        try:
            frames: list[Any] = self._decoder.decode(packet)
        except (MemoryError, *DECODE_ERRORS) as error:
            raise_if_out_of_memory(self.path, error)
            raise BreakError(f"a frame does not decode ({_words(error)})") from error
        if self.counts is not None:
            self.counts.add(decoded=len(frames))
        if any(frame.is_corrupt for frame in frames):
            raise BreakError("a frame decodes with errors")
        return frames

    def check_colours(self, frame: Any) -> None:
        """Makes sure that a frame's colours can be converted, without converting the whole frame.

        Raises:
            BreakError: They cannot.
            MachineError: There is too little memory.
        """
        with self._colour_errors():
            self._converter.check(frame)

    def to_rgb(self, frame: Any, orientation: Orientation, out: np.ndarray[Any, Any]) -> None:
        """Converts a decoded frame to displayed pixels.

        The colours are those of an exact conversion (bit-equal to DALI's on a CPU), by the stream's own
        matrix and range. Transparent pixels are laid over the common ground.

        Args:
            frame: The decoded frame.
            orientation: How it is displayed.
            out: The array to fill, contiguous uint8 `[height, width, 3]`, RGB.

        Raises:
            BreakError: The frame's colours cannot be converted.
            MachineError: There is too little memory.
        """
        with self._colour_errors():
            upright = orientation == Orientation()
            pixels = self._converter.convert(frame, out if upright else None)
            if pixels is not out:
                out[...] = orientation.apply(pixels)

    def begin_group(self) -> None:
        """Says that the frames that follow belong to another group of pictures."""
        self._converter.begin_group()

    @contextlib.contextmanager
    def _colour_errors(self) -> Iterator[None]:
        try:
            yield
        except InputError:  # what names no version of the kernels
            raise
        except (MemoryError, *DECODE_ERRORS) as error:
            raise_if_out_of_memory(self.path, error)
            raise BreakError(f"a frame's colours cannot be converted to RGB ({_words(error)})") from error


@contextlib.contextmanager
def open_clip(path: str, *, threads: int = 1, end_byte: int | None = None) -> Iterator[OpenClip]:
    """Opens a file's video stream, and closes everything at the end.

    Args:
        path: A file that `check_file` accepted.
        threads: The number of decoder threads. With more than one, a decoder may output a damaged picture
            before it marks it as damaged, so all callers use one. Several clips are decoded in parallel
            instead.
        end_byte: The offset in the file from which packets are not used, because a part is missing there.

    Raises:
        VideoError: The file has no video that can be decoded here.
        MachineError: Opening the file took too long, or there is too little memory.
    """
    container: Any = None
    try:
        container = av.open(
            "file:" + path,
            options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
            metadata_errors="replace",
            timeout=float(limits.MAX_READ_SECONDS.value),
        )
    except av.error.ExitError as error:
        raise _too_slow(path) from error
    except (MemoryError, *DECODE_ERRORS) as error:
        raise_if_out_of_memory(path, error)
        raise VideoError(path, _why_unreadable(path, error)) from error
    with container:
        yield OpenClip(path, container, _prepare_stream(path, container, threads), end_byte)


def is_transparent(frame: Any) -> bool:
    """Whether any pixel of a decoded frame is not opaque."""
    return has_alpha(frame) and bool(opacity(frame).min() < 255)


def how_shown(stream: Any, frame: Any) -> tuple[str, ...]:
    """What a reader of the verdict has to know about how a clip's frames are shown, from one of them.

    Colours of high dynamic range are converted like others, without tone mapping. Pixels are not stretched.
    """
    notes = []
    curve = _HDR_CURVES.get(int(frame.color_trc))
    if curve is not None:
        notes.append(f"is HDR ({curve}) and is shown without tone mapping: duller than on an HDR screen")
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        notes.append(
            f"has pixels that are not square ({aspect.numerator}:{aspect.denominator}) and is shown without "
            "stretching them"
        )
    return tuple(notes)


def _decoder_like(context: Any, name: str) -> Any:
    """Another decoder for the stream of a decoder that is not open yet."""
    decoder = CodecContext.create(name, "r")
    decoder.extradata = context.extradata
    decoder.thread_count = context.thread_count
    decoder.options = context.options
    return decoder


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
    check_side(path, width, height)


def raise_if_out_of_memory(path: str, error: BaseException) -> None:
    """Raises a `MachineError` if an error is one of memory, and not one that a damaged file causes.

    FFmpeg also says that it is out of memory if a damaged header makes it ask for more than it ever
    allocates. That is told apart by asking for memory, which is not touched.
    """
    if not isinstance(error, MemoryError):
        return
    if isinstance(error, av.FFmpegError):
        with contextlib.suppress(MemoryError):
            bytearray(_PLENTY_BYTES)
            return
    raise machine_error(path, "decoding it needs more memory than there is; run it again with less beside it")


def machine_error(path: str, reason: str) -> MachineError:
    """The error for a clip that this machine cannot read now, in the form of a `VideoError`."""
    return MachineError(str(VideoError(path, reason)))


def _read_next(path: str, packets: Iterator[Any], seconds: float) -> Any:
    """The next packet; None at the end.

    FFmpeg stops a read that takes too long. Some demuxers then end without an error, as if the file ended.

    Raises:
        MachineError: The read took too long.
    """
    begin = time.monotonic()
    try:
        return next(packets, None)
    finally:
        if time.monotonic() - begin >= seconds:
            raise _too_slow(path)


def _too_slow(path: str) -> MachineError:
    limit = limits.MAX_READ_SECONDS
    return machine_error(
        path, f"the disk gave no data for {limit.value} seconds (not the clip's fault); {limit.how_to_raise}"
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
        missing = missing_part(path, container.format.name)
        reason = "has no video stream" if missing is None else f"no frame decodes: {missing.reason}"
        raise VideoError(path, reason)
    stream = max(videos, key=lambda video: bool(video.disposition & av.stream.Disposition.default))
    if not container.format.name.startswith(_DEMUXERS):
        raise VideoError(path, _not_listed("container", container.format.name, CONTAINERS))
    context: CodecContext | None = stream.codec_context
    codec = "of an unknown name" if context is None else context.codec.canonical_name
    if context is None or codec not in CODECS:
        raise VideoError(path, _not_listed("codec", codec, CODECS))
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    check_size(path, stream.width, stream.height)
    stream.thread_type = "SLICE" if threads == 1 else "AUTO"
    stream.thread_count = threads
    context.options = {
        # The decoder shall raise errors instead of guessing pixels if it notices damage.
        "err_detect": "crccheck+explode",
        "max_pixels": str(limits.MAX_SIDE_PIXELS.value**2),
    }
    return stream


def _not_listed(what: str, got: str, allowed: tuple[str, ...]) -> str:
    return f"{what} {got}, allowed: {', '.join(allowed)}; encode the clip anew, for example as h264 in mp4"


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
