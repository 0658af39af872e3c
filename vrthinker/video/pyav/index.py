"""The index of a clip: its frames, the time at which each is shown, and the places where decoding may start.

Invariant: entry i of an index is the i-th picture that the decoder outputs if it decodes the file from the
start. There are two ways to make an index:

- *by listing*: the sorted timestamps of the packets, with only the first frame decoded. This is for
  containers and codecs in which one packet shows one picture. Reading checks every frame against the index.
- *by decoding*: the whole file is decoded once, and frames are counted and dropped. This is for all other
  files, for files whose listing is inconsistent, and for files that break half-way: the index ends at the
  first damage.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from vrthinker.errors import VideoError
from vrthinker.video import transparency
from vrthinker.video.pyav.clip import (
    BreakError,
    OpenClip,
    Orientation,
    check_size,
    has_alpha,
    how_shown,
    is_transparent,
    open_clip,
    orientation_of,
)
from vrthinker.video.pyav.containers import MissingPart, missing_part
from vrthinker.video.pyav.packets import damage, shows_frame
from vrthinker.video.reader import VideoInfo, broken_error, check_amount, most_frames

_LISTABLE = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mjpeg"})
_NEVER_REORDERED = frozenset({"vp8", "vp9", "mjpeg"})
"""Codecs whose frames are shown in the order of their packets: an earlier time after a later one is wrong."""
_FALLBACK_FPS = Fraction(25)
_MAX_REORDERED = 16
"""The most pictures that H.264 may hold back to put them into order."""


@dataclass(frozen=True)
class Keyframe:
    """A place where decoding may start.

    Attributes:
        frame_index: The index of the first frame that is certain to be decoded correctly.
        pts: The packet's presentation time in the stream's ticks; None is the start of the file.
        dts: The packet's decoding time, by which some containers seek.
    """

    frame_index: int
    pts: int | None = None
    dts: int | None = None


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
        keyframes: The places where decoding may start, ascending. The first is the start of the file.
        has_open_groups: Whether pictures after a keyframe may name pictures before it.
        end_byte: The offset in the file from which a part is missing; None if the file is whole.
    """

    info: VideoInfo
    orientation: Orientation
    stored_size: tuple[int, int]
    ticks: tuple[int, ...] | None = None
    keyframes: tuple[Keyframe, ...] = (_START,)
    has_open_groups: bool = False
    end_byte: int | None = None

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


@dataclass
class _Listing:
    """What was read from the packets and the first frame."""

    format_name: str
    stream_id: int
    codec: str
    is_seekable: bool
    time_base: Fraction
    nominal_fps: Fraction
    ticks: list[int | None] = field(default_factory=list)  # of the packets that show a frame
    keyframes: list[tuple[int, int]] = field(default_factory=list)  # (pts, dts)
    durations: dict[int, int] = field(default_factory=dict)  # pts -> ticks, where stated
    has_open_groups: bool = False
    n_packets: int = 0
    n_before_start: int = 0  # the frames that come before the first keyframe
    positions: set[int] = field(default_factory=set)  # the packets' offsets in the file
    damage: str | None = None
    first_pts: int | None = None
    orientation: Orientation = field(default_factory=Orientation)
    comment: str = ""
    has_alpha: bool = False
    notes: tuple[str, ...] = ()
    stored_size: tuple[int, int] = (0, 0)


def build_index(path: str, *, tolerate_truncation: bool) -> ClipIndex:
    """Makes the index of a file that `check_file` accepted.

    Args:
        path: The file.
        tolerate_truncation: Whether to decode the whole file and to index what comes before the first damage.

    Raises:
        VideoError: The file has no usable video, or it is damaged and that is not tolerated.
    """
    listing = _list_packets(path)
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


def frames_in_order(
    clip: OpenClip,
    expected: Sequence[int] | None,
    stored_size: tuple[int, int] | None,
    *,
    flush: bool = True,
) -> Iterator[Any]:
    """Decodes a clip from its start and yields every frame, in presentation order.

    Args:
        clip: The clip, just opened with one thread, so that damage is noticed at its place.
        expected: The ticks of the frames that have to come, if they are known.
        stored_size: The (height, width) that every frame must have; None takes the first frame's.
        flush: Whether to yield the frames that are still inside the decoder at the end. If a part of the file
            is missing there, they may come after lost ones.

    Raises:
        BreakError: A packet is damaged, or an expected frame is missing.
        VideoError: The picture size changes on the way, or there are too many frames.
    """
    count = 0
    looks: set[tuple[object, ...]] = set()
    for frame in decoded(clip, clip.packets(), flush=flush):
        check_size(clip.path, frame.width, frame.height)
        size = (frame.height, frame.width)
        if stored_size is not None and size != stored_size:
            raise VideoError(
                clip.path,
                f"frame {count} is {size[1]}x{size[0]}, the first is {stored_size[1]}x{stored_size[0]}; "
                "all frames of a clip must have one size",
            )
        stored_size = size
        if expected is not None and (count >= len(expected) or frame.pts != expected[count]):
            raise BreakError(f"frame_index {count} is listed and does not decode")
        look = (frame.format.name, frame.colorspace, frame.color_range, frame.color_trc)
        if look not in looks:  # a damaged header may state a colour format that cannot be converted
            looks.add(look)
            clip.to_rgb(frame, Orientation())
        count += 1
        check_amount(clip.path, frame.width, frame.height, count)
        yield frame
    if flush and expected is not None and count < len(expected):
        raise BreakError(f"frame_index {count} is listed and does not decode")


def decoded(clip: OpenClip, packets: Iterable[Any], *, flush: bool = True) -> Iterator[Any]:
    """Decodes packets from the first keyframe on, because earlier ones cannot be decoded.

    If no packet is marked as a keyframe, all are tried.

    Raises:
        BreakError: A packet or an output frame is damaged.
    """
    usable = _from_first_keyframe(clip, packets)
    if clip.marks_damage_late:
        yield from _decoded_and_settled(clip, usable, flush=flush)
        return
    for packet in usable:
        yield from clip.decode(packet)
    if flush:
        yield from clip.decode(None)


def _from_first_keyframe(clip: OpenClip, packets: Iterable[Any]) -> Iterator[Any]:
    """The packets to decode. The clip is told first if pictures before the start may be missing."""
    packets, early = iter(packets), []
    for packet in packets:
        if packet.is_keyframe:
            break
        early.append(packet)
    else:
        # Where a part is missing, the keyframe was there; what is left would decode to made-up pictures.
        return iter(() if clip.is_cut else early)
    start = packet
    if not clip.starts_afresh(start):
        clip.allow_missing_references()
    rest = (packet for packet in packets if not _refers_to_what_is_gone(clip.codec, start, packet))
    return itertools.chain([start], rest)


def _decoded_and_settled(clip: OpenClip, packets: Iterable[Any], *, flush: bool) -> Iterator[Any]:
    """Decodes packets, and yields a frame when everything that it may depend on has come out undamaged.

    A frame can depend on any packet that was fed before it came out. Frames come out in the order of their
    times, so it is settled when a frame as late as the latest of those packets has come out.
    """
    waiting: deque[tuple[Any, int]] = deque()  # (frame, the latest time that was fed before it came out)
    latest = 0
    for packet in packets:
        latest = max(latest, packet.pts or 0)
        for frame in clip.decode(packet):
            waiting.append((frame, latest))
            while waiting and _is_settled(waiting, frame.pts):
                yield waiting.popleft()[0]
    if flush:
        frames = clip.decode(None)
        yield from (frame for frame, _ in waiting)
        yield from frames


def _is_settled(waiting: deque[tuple[Any, int]], reached: int | None) -> bool:
    """Whether the first of the waiting frames may be shown. Without times, it waits as long as can matter."""
    return len(waiting) > _MAX_REORDERED or (reached is not None and waiting[0][1] <= reached)


def _refers_to_what_is_gone(codec: str, start: Any, packet: Any) -> bool:
    """Whether a picture follows the first keyframe in the file, but precedes it on the screen.

    A clip that was cut out of a longer one may begin like this. HEVC's decoder skips such pictures by itself
    (except those that can be decoded). H.264's decoder would invent them.
    """
    return codec == "h264" and None not in (packet.pts, start.pts) and packet.pts < start.pts


def _list_packets(path: str) -> _Listing:
    """Reads every packet, and decodes up to the first frame."""
    with open_clip(path) as clip:
        stream = clip.stream
        listing = _Listing(
            clip.format_name,
            stream.id,
            clip.codec,
            clip.is_seekable,
            Fraction(stream.time_base or Fraction(1, 1000)),
            Fraction(stream.average_rate or stream.guessed_rate or _FALLBACK_FPS),
            comment=clip.comment,
        )
        try:
            _fill(listing, clip)
        except BreakError as error:
            listing.damage = listing.damage or str(error)
    if not listing.n_packets and listing.damage is None:
        raise VideoError(path, "has no frames")
    return listing


def _fill(listing: _Listing, clip: OpenClip) -> None:
    first: list[Any] = []
    start: Any = None
    most = most_frames(clip.stream.width, clip.stream.height)
    for packet in clip.packets():
        listing.n_packets += 1
        if packet.pos is not None:
            listing.positions.add(packet.pos)
        if listing.n_packets > most:
            check_amount(clip.path, clip.stream.width, clip.stream.height, listing.n_packets)
        view = memoryview(packet)
        if listing.damage is None:
            listing.damage = "the file ends inside a frame" if packet.is_corrupt else damage(clip.codec, view)
        shown = not packet.is_discard and shows_frame(clip.codec, view)
        if shown:
            listing.ticks.append(packet.pts)
            if packet.pts is not None and packet.duration:
                listing.durations[packet.pts] = packet.duration
            if packet.is_keyframe and packet.pts is not None:
                listing.keyframes.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        if packet.is_keyframe and not clip.starts_afresh(packet):
            listing.has_open_groups = True
            if start is None:
                clip.allow_missing_references()
        start = packet if start is None and packet.is_keyframe else start
        listing.n_before_start += shown and start is None
        if first or start is None or listing.damage is not None:
            continue
        if not _refers_to_what_is_gone(clip.codec, start, packet):
            first = _try_decode(listing, clip, packet)
    if not first and listing.damage is None:
        first = _try_decode(listing, clip, None)
    if first:
        check_size(clip.path, first[0].width, first[0].height)
        clip.to_rgb(first[0], Orientation())  # raises if the colours cannot be converted
        listing.first_pts = first[0].pts
        listing.orientation = orientation_of(first[0])
        listing.has_alpha = clip.codec in _LISTABLE and has_alpha(first[0])
        listing.notes = how_shown(clip.stream, first[0])
        listing.stored_size = (first[0].height, first[0].width)


def _try_decode(listing: _Listing, clip: OpenClip, packet: Any) -> list[Any]:
    try:
        return clip.decode(packet)
    except BreakError as error:
        listing.damage = str(error)
        return []


def _expected_ticks(listing: _Listing) -> list[int] | None:
    """The frames' ticks by listing; None if the packets do not determine them."""
    if not listing.is_seekable or listing.codec not in _LISTABLE or listing.first_pts is None:
        return None
    ticks = sorted(tick for tick in listing.ticks if tick is not None)
    if len(ticks) < len(listing.ticks) or len(set(ticks)) < len(ticks):
        return None
    # A clip that was cut out of a longer one may begin with packets that depend on frames before the cut.
    # They come before the first keyframe in presentation, and no decoder shows them.
    if (
        listing.codec not in _NEVER_REORDERED
        and listing.keyframes
        and listing.first_pts == listing.keyframes[0][0]
    ):
        ticks = [tick for tick in ticks if tick >= listing.first_pts]
    return ticks if ticks and ticks[0] == listing.first_pts else None


def _count_by_decoding(
    path: str, listing: _Listing, expected: Sequence[int] | None, missing: MissingPart | None
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
    listing: _Listing,
    ticks: Sequence[int | None],
    broken: str | None,
    end_byte: int | None = None,
) -> ClipIndex:
    known = [tick for tick in ticks if tick is not None]
    steps = [later - earlier for earlier, later in itertools.pairwise(known)]
    ordered = len(known) == len(ticks) and all(step >= 0 for step in steps)
    increasing = ordered and all(step > 0 for step in steps)
    if ordered:
        seconds = _Seconds(listing.time_base)
        times = [tick - known[0] for tick in known]
        # Containers round every time to a tick, so gaps may differ by one tick.
        mean = sum(steps) / len(steps) if steps else 0
        variable = any(abs(step - mean) > 1 for step in (min(steps, default=0), max(steps, default=0)))
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
        pts_seconds=tuple(map(seconds.rounded, times)),
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
        end_byte,
    )


def _note_of_start(listing: _Listing) -> tuple[str, ...]:
    """A note if the file begins inside a group of pictures. Without any keyframe, all packets are tried."""
    if not listing.n_before_start or not listing.keyframes:
        return ()
    return (f"its first {listing.n_before_start} frames refer to frames before it and cannot be shown",)


def _keyframes(listing: _Listing, ticks: Sequence[int]) -> Iterator[Keyframe]:
    yield _START
    for pts, dts in sorted(listing.keyframes):
        position = bisect.bisect_left(ticks, pts)
        if 0 < position < len(ticks) and ticks[position] == pts:
            yield Keyframe(position, pts, dts)


def _last_duration(listing: _Listing, last_tick: int | None, last_time: Fraction, n_frames: int) -> Fraction:
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

    def rounded(self, count: int) -> float:
        """What `float` gives of the exact value, for the times of many frames: a fraction each is slow."""
        return count * self.unit.numerator / self.unit.denominator
