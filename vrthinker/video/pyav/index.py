"""The index of a clip: its frames, the time at which each is shown, and the places where decoding may start.

Invariant: entry i of an index is the i-th picture that the decoder outputs if it decodes the file from the
start. There are two ways to make an index:

- *by listing* (`listing.py`): the sorted timestamps of the packets, with only the first frame decoded. This
  is for containers and codecs in which one packet shows one picture. Reading checks every frame against it.
- *by decoding*: the whole file is decoded once, and frames are counted and dropped. This is for all other
  files, for files whose listing is inconsistent, and for files that break half-way: the index ends at the
  first damage.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from vrthinker.errors import VideoError
from vrthinker.video import transparency
from vrthinker.video.pyav.clip import BreakError, OpenClip, Orientation, is_transparent, open_clip
from vrthinker.video.pyav.containers import MissingPart, missing_part
from vrthinker.video.pyav.listing import LISTABLE, UNSPECIFIED, Listing, list_clip
from vrthinker.video.pyav.packets import starts_afresh
from vrthinker.video.pyav.sample_table import first_bytes
from vrthinker.video.pyav.sequence import frames_in_order
from vrthinker.video.reader import VideoInfo, broken_error

_NEVER_REORDERED = frozenset({"vp8", "vp9", "mjpeg"})
"""Codecs whose frames are shown in the order of their packets: an earlier time after a later one is wrong."""


@dataclass(frozen=True, slots=True)
class Keyframe:
    """A place where decoding may start.

    Attributes:
        frame_index: The index of the first frame that is certain to be decoded correctly.
        pts: The packet's presentation time in the stream's ticks; None is the start of the file, to which
            nothing seeks.
        dts: The packet's decoding time, by which some containers seek.
        place: The offset and the size of the packet in the file, if it has not been read yet.
    """

    frame_index: int
    pts: int | None = None
    dts: int | None = None
    place: tuple[int, int] | None = None


_START = Keyframe(0)


@dataclass(frozen=True)
class ClipIndex:
    """What is needed to read a clip's frames.

    Attributes:
        info: The result of `probe`.
        orientation: How stored pictures are displayed.
        stored_size: The (height, width) of the stored pictures.
        ticks: The presentation time of each frame, strictly increasing; None if the file's times are
            unusable, and frames are found by counting.
        keyframes: The places where decoding may start, ascending. The first is the start of the file, or
            the keyframe there, if a table says that nothing comes before it.
        has_open_groups: Whether pictures after a keyframe may name pictures before it, as far as the
            keyframes were read (`begins_openly` reads the others).
        extradata: The codec's header from the container.
        end_byte: The offset in the file from which a part is missing; None if the file is whole.
        n_packets: The number of packets of the stream, with those that show no picture.
        pixel_format: FFmpeg's name of the decoded pictures' format, such as yuv420p.
        matrix: FFmpeg's number of the first picture's colour matrix; 2 if the stream does not state one.
        range: FFmpeg's number of its range of values: 1 limited, 2 full, 0 if it is not stated.
        has_edits: Whether an edit list may hide pictures.
    """

    info: VideoInfo
    orientation: Orientation
    stored_size: tuple[int, int]
    ticks: tuple[int, ...] | None = None
    keyframes: tuple[Keyframe, ...] = (_START,)
    has_open_groups: bool = False
    extradata: bytes = b""
    end_byte: int | None = None
    n_packets: int = 0
    pixel_format: str = ""
    has_edits: bool = False
    matrix: int = UNSPECIFIED
    range: int = 0

    def begins_openly(self, path: str, keyframe: Keyframe) -> bool:
        """Whether pictures after a keyframe may name pictures before it."""
        if self.has_open_groups or keyframe.place is None or self.info.codec != "h264":
            return self.has_open_groups
        head = memoryview(first_bytes(path, *keyframe.place))
        return not starts_afresh(self.info.codec, head, self.extradata)

    def position(self, pts: int | None) -> int | None:
        """The index of the frame shown at `pts`; None if there is none."""
        if pts is None or self.ticks is None:
            return None
        i = bisect.bisect_left(self.ticks, pts)
        return i if i < len(self.ticks) and self.ticks[i] == pts else None

    def keyframe_before(self, frame_index: int) -> Keyframe:
        """The last place at or before a frame where decoding may start."""
        i = bisect.bisect_right(self.keyframes, frame_index, key=lambda keyframe: keyframe.frame_index)
        return self.keyframes[i - 1]


KeepClip = Callable[[ClipIndex, OpenClip, contextlib.ExitStack], None]
"""A function that takes over a clip that was opened to index it, and what closes it."""


def build_index(path: str, *, tolerate_truncation: bool, keep: KeepClip | None = None) -> ClipIndex:
    """Makes the index of a file that `check_file` accepted.

    Args:
        path: The file.
        tolerate_truncation: Whether to decode the whole file and to index what comes before the first damage.
        keep: The function that takes over the clip, if it can be read on from; None closes it.

    Raises:
        VideoError: The file has no usable video, or it is damaged and that is not tolerated.
    """
    with contextlib.ExitStack() as stack:
        listing = list_clip(path, None if keep is None else stack)
        index = _index_of(path, listing, tolerate_truncation=tolerate_truncation)
        if keep is not None and listing.clip is not None and index.end_byte is None:
            keep(index, listing.clip, stack.pop_all())
        return index


def _index_of(path: str, listing: Listing, *, tolerate_truncation: bool) -> ClipIndex:
    missing = missing_part(path, listing.format_name, listing.stream_id, listing.positions)
    known_damage = listing.damage if missing is None else missing.reason
    expected = _expected_ticks(listing)
    if expected is not None and known_damage is None and not tolerate_truncation:
        return _finish(path, listing, expected, broken=None)
    ticks, broken = _count_by_decoding(path, listing, expected, missing)
    broken = known_damage if broken is None or missing is not None else broken
    if not ticks:
        raise VideoError(path, "has no frames") if broken is None else broken_error(path, broken, 0)
    if broken is not None and not tolerate_truncation:
        raise broken_error(path, broken, len(ticks))
    return _finish(path, listing, ticks, broken, None if missing is None else missing.at_byte)


def _expected_ticks(listing: Listing) -> list[int] | None:
    """The frames' ticks by listing; None if the packets do not determine them."""
    if not listing.is_seekable or listing.codec not in LISTABLE or listing.first_pts is None:
        return None
    ticks = sorted(tick for tick in listing.ticks if tick is not None)
    if len(ticks) < len(listing.ticks) or len(set(ticks)) < len(ticks):
        return None
    # A clip that was cut out of a longer one may begin with packets that depend on frames before the cut.
    # They come before the first keyframe in presentation, and no decoder shows them.
    if (
        listing.codec not in _NEVER_REORDERED
        and listing.keyframes
        and listing.first_pts == listing.keyframes[0].pts
    ):
        ticks = [tick for tick in ticks if tick >= listing.first_pts]
    return ticks if ticks and ticks[0] == listing.first_pts else None


def _count_by_decoding(
    path: str, listing: Listing, expected: Sequence[int] | None, missing: MissingPart | None
) -> tuple[list[int | None], str | None]:
    """Decodes the file up to what is missing. Returns the frames' ticks, and why the file breaks.

    What the frames tell about the clip is noted in the listing.
    """
    ticks: list[int | None] = []
    try:
        end_byte = None if missing is None else missing.at_byte
        with open_clip(path, end_byte=end_byte) as clip:
            for frame in frames_in_order(clip, expected, None, flush=missing is None):
                if missing is not None and len(ticks) == missing.whole_frames:
                    break
                ticks.append(frame.pts)
                listing.stored_size = (frame.height, frame.width)
                listing.has_alpha = listing.has_alpha or is_transparent(frame)
    except BreakError as error:
        return ticks, str(error)
    return ticks, None


def _finish(
    path: str,
    listing: Listing,
    ticks: Sequence[int | None],
    broken: str | None,
    end_byte: int | None = None,
) -> ClipIndex:
    known = [tick for tick in ticks if tick is not None]
    steps = [later - earlier for earlier, later in itertools.pairwise(known)]
    least, most = min(steps, default=1), max(steps, default=1)
    ordered = len(known) == len(ticks) and least >= 0
    increasing = ordered and least > 0
    if ordered:
        seconds = _Seconds(listing.time_base)
        times = [tick - known[0] for tick in known]
        # Containers round every time to a tick, so gaps may differ by one tick.
        mean = sum(steps) / max(1, len(steps))
        variable = bool(steps) and max(mean - least, most - mean) > 1
    else:
        seconds = _Seconds(1 / listing.nominal_fps)
        times = list(range(len(ticks)))
        variable = False
    last = _last_duration(listing, known[-1] if ordered else None, seconds.exact(times[-1]), len(times))
    duration = seconds.exact(times[-1]) + last
    height, width = listing.stored_size
    if listing.orientation.rotation_degrees in (90, 270):
        height, width = width, height
    info = VideoInfo(
        path=path,
        codec=listing.codec,
        width=width,
        height=height,
        n_frames=len(ticks),
        fps=float(len(ticks) / duration),
        duration_seconds=float(duration),
        is_variable_frame_rate=variable,
        rotation_degrees=listing.orientation.rotation_degrees,
        pts_seconds=tuple(seconds.rounded(times)),
        truncated=broken,
        notes=(
            *listing.notes,
            *_note_of_start(listing),
            *((transparency.NOTE,) if listing.has_alpha else ()),
        ),
        comment=listing.comment,
    )
    return ClipIndex(
        info,
        listing.orientation,
        listing.stored_size,
        tuple(known) if increasing else None,
        tuple(_keyframes(listing, known)) if increasing and listing.is_seekable else (_START,),
        listing.has_open_groups,
        listing.extradata,
        end_byte,
        listing.n_packets,
        listing.pixel_format,
        listing.has_edits,
        listing.matrix,
        listing.range,
    )


def _note_of_start(listing: Listing) -> tuple[str, ...]:
    """A note if the file begins inside a group of pictures. Without any keyframe, all packets are tried."""
    if not listing.n_before_start or not listing.keyframes:
        return ()
    return (f"its first {listing.n_before_start} frames refer to frames before it and cannot be shown",)


def _keyframes(listing: Listing, ticks: Sequence[int]) -> Iterator[Keyframe]:
    listed = sorted(listing.keyframes, key=lambda keyframe: (keyframe.pts, keyframe.dts))
    first = listed[0] if listed else None
    if first is not None and first.place is not None and first.pts == ticks[0] and not listing.n_before_start:
        yield Keyframe(0, first.pts, first.dts, first.place)
    else:
        yield _START
    for found in listed:
        position = bisect.bisect_left(ticks, found.pts)
        if 0 < position < len(ticks) and ticks[position] == found.pts:
            yield Keyframe(position, found.pts, found.dts, found.place)


def _last_duration(listing: Listing, last_tick: int | None, last_time: Fraction, n_frames: int) -> Fraction:
    """The duration of the last frame: as stated, else the mean of the others'. It is above 0."""
    stated = 0 if last_tick is None else listing.durations.get(last_tick, 0)
    if stated > 0:
        return stated * listing.time_base
    if last_time > 0:
        return last_time / (n_frames - 1)
    return 1 / listing.nominal_fps


@dataclass(frozen=True)
class _Seconds:
    """Converts whole numbers of a unit to seconds."""

    unit: Fraction

    def exact(self, count: int) -> Fraction:
        return count * self.unit

    def rounded(self, counts: Sequence[int]) -> list[float]:
        """What `float` gives of the exact values, without making a fraction of each."""
        numerator, denominator = self.unit.numerator, self.unit.denominator
        return [count * numerator / denominator for count in counts]
