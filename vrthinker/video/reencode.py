"""A copy of a clip, encoded again: other bytes and nearly the same pixels, for a control of judges."""

from __future__ import annotations

import contextlib
import os
from fractions import Fraction
from pathlib import Path

from vrthinker.errors import VideoError
from vrthinker.video.reader import VideoReader

CRF = 20
"""The quality of H.264, at which a copy can hardly be told from its source."""
_CLOCK = 90_000
_FRAMES_AT_ONCE = 32


def write_reencoded(source: Path, out: Path, reader: VideoReader) -> None:
    """Writes an H.264 mp4 with the frames, the times and the comment of a clip, atomically.

    Args:
        source: The clip.
        out: The file to write.
        reader: The reader that decodes the clip.

    Raises:
        VideoError: The clip cannot be read.
        OSError: The copy cannot be written.
    """
    import av

    info = reader.probe(source)
    spare = out.with_name(f"{out.name}.{os.getpid()}.new")
    try:
        with av.open(str(spare), "w", format="mp4") as container:
            container.metadata["comment"] = info.comment
            stream = container.add_stream("libx264", rate=Fraction(info.fps).limit_denominator(_CLOCK))
            stream.width, stream.height = info.width, info.height
            stream.pix_fmt = "yuv420p" if info.width % 2 == info.height % 2 == 0 else "yuv444p"
            stream.options = {"crf": str(CRF), "preset": "veryfast"}
            stream.codec_context.thread_count = 1
            stream.codec_context.time_base = Fraction(1, _CLOCK)
            for start in range(0, info.n_frames, _FRAMES_AT_ONCE):
                places = range(start, min(start + _FRAMES_AT_ONCE, info.n_frames))
                for picture, place in zip(reader.frames_at(source, places).numpy(), places, strict=True):
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts = round(info.pts_seconds[place] * _CLOCK)
                    frame.time_base = Fraction(1, _CLOCK)
                    container.mux(stream.encode(frame))
            container.mux(stream.encode())
        spare.replace(out)
    except av.FFmpegError as error:
        if isinstance(error, OSError):  # of the copy: the reader turns those of the clip into VideoErrors
            raise
        raise VideoError(source, f"cannot be encoded again ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            spare.unlink()
