"""What a clip's packets tell about its frames: their times and keyframes, and how the first frame looks.

There are two ways to list packets:

- *from the sample table* of an mp4 or mov file, which the file keeps in one place. Only the packets up to the
  first frame and the last few are read, and must be as the table says (`sample_table.py`).
- *by reading them all*, in every other case.

Both give the same listing of a whole file.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from vrthinker.errors import VideoError
from vrthinker.video.pyav.clip import (
    BreakError,
    OpenClip,
    Orientation,
    check_size,
    how_shown,
    open_clip,
    orientation_of,
)
from vrthinker.video.pyav.colours import has_alpha
from vrthinker.video.pyav.packets import damage, shows_frame
from vrthinker.video.pyav.sample_table import SampleTable, has_edits, sample_table
from vrthinker.video.pyav.sequence import refers_to_what_is_gone
from vrthinker.video.reader import check_amount, most_frames

LISTABLE = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mjpeg"})
_ONE_PICTURE_A_SAMPLE = frozenset({"h264", "hevc", "av1", "mjpeg"})
"""Codecs whose samples in an mp4 file show one picture each, so that no packet has to be looked into."""
_FALLBACK_FPS = Fraction(25)
_LAST_SAMPLES = 17
"""How many of the last packets are read: one more than a decoder may hold back to put them into order."""


@dataclass(frozen=True)
class ListedKeyframe:
    """A packet at which decoding may start.

    Attributes:
        pts: The presentation time in the stream's ticks.
        dts: The decoding time.
        place: The offset and the size in the file, if the packet has not been read.
    """

    pts: int
    dts: int
    place: tuple[int, int] | None = None


UNSPECIFIED = 2
"""FFmpeg's number of a colour matrix that is not stated."""


@dataclass
class Listing:
    """What was read from the packets and the first frame."""

    format_name: str
    stream_id: int
    codec: str
    is_seekable: bool
    time_base: Fraction
    nominal_fps: Fraction
    extradata: bytes = b""
    ticks: list[int | None] = field(default_factory=list)  # of the packets that show a frame
    keyframes: list[ListedKeyframe] = field(default_factory=list)
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
    pixel_format: str = ""
    matrix: int = UNSPECIFIED
    range: int = 0
    has_edits: bool = False
    clip: OpenClip | None = field(default=None, compare=False, repr=False)  # if it was left open


def list_clip(path: str, stack: contextlib.ExitStack | None = None) -> Listing:
    """Lists a file's packets, and decodes up to the first frame.

    Args:
        path: The file.
        stack: What keeps the clip open after it was listed from its table (`Listing.clip`), so that nobody
            has to open the file again to read it. None closes it.

    Raises:
        VideoError: The file has no usable video, or is over a limit.
        MachineError: Reading it took too long, or there is too little memory.
    """
    with contextlib.ExitStack() as closing:
        clip = closing.enter_context(open_clip(path))
        is_tabled = clip.format_name.startswith("mov") and clip.codec in _ONE_PICTURE_A_SAMPLE
        table = sample_table(path, clip.stream) if is_tabled else None
        if table is None:
            return _read_all(clip)
        listing = _begin(clip)
        if _fill_from_table(listing, clip, table):
            if stack is not None:
                listing.clip = clip
                stack.push(closing.pop_all())
            return listing
    with open_clip(path) as clip:
        return _read_all(clip)


def _begin(clip: OpenClip) -> Listing:
    stream = clip.stream
    return Listing(
        clip.format_name,
        stream.id,
        clip.codec,
        clip.is_seekable,
        Fraction(stream.time_base or Fraction(1, 1000)),
        Fraction(stream.average_rate or stream.guessed_rate or _FALLBACK_FPS),
        bytes(stream.codec_context.extradata or b""),
        comment=clip.comment,
    )


def _read_all(clip: OpenClip) -> Listing:
    listing = _begin(clip)
    listing.has_edits = clip.format_name.startswith("mov") and has_edits(clip.path, clip.stream.id)
    try:
        _fill(listing, clip)
    except BreakError as error:
        listing.damage = listing.damage or str(error)
    if not listing.n_packets and listing.damage is None:
        raise VideoError(clip.path, "has no frames")
    return listing


def _fill(listing: Listing, clip: OpenClip) -> None:
    opening = _Opening(listing, clip)
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
                dts = packet.pts if packet.dts is None else packet.dts
                listing.keyframes.append(ListedKeyframe(packet.pts, dts))
        opening.take(packet, shown=shown)
    opening.finish()


def _fill_from_table(listing: Listing, clip: OpenClip, table: SampleTable) -> bool:
    """Fills a listing from a sample table. False if the packets that are read are not as the table says."""
    opening = _Opening(listing, clip)
    shift: int | None = None
    try:
        for place, packet in enumerate(clip.packets()):
            shift = _shift(packet, table, place)
            if shift is None or packet.is_discard:
                return False
            opening.take(packet, shown=True)
            if place == 0 and int(table.shown.argmin()) == 0 and not opening.ends_alone(packet):
                return False
            if opening.is_over:
                break
        opening.finish()
        listing.damage = listing.damage or table.first_damage(clip.path, clip.codec)
        if shift is None or not _tail_agrees(listing, clip, table, shift):
            return False
    except BreakError as error:
        if listing.damage is None:
            listing.damage = str(error)
    if shift is None:
        return False
    shown = (table.shown + shift).tolist()
    listing.ticks = shown
    listing.n_packets = len(table)
    listing.durations = {
        **dict(zip(shown, np.diff(table.decoded).tolist(), strict=False)),
        **listing.durations,
    }
    listing.keyframes = [
        ListedKeyframe(
            shown[place], int(table.decoded[place]), (int(table.offset[place]), int(table.size[place]))
        )
        for place in np.flatnonzero(table.is_keyframe).tolist()
    ]
    return True


def _shift(packet: Any, table: SampleTable, place: int) -> int | None:
    """What has to be added to the table's times to give a packet's; None if it is another packet."""
    if place >= len(table) or packet.pts is None or (table.is_keyframe[place] and not packet.is_keyframe):
        return None
    found = (packet.dts, packet.pos, packet.size)
    if found != (table.decoded[place], table.offset[place], table.size[place]):
        return None
    return int(packet.pts - table.shown[place])


def _tail_agrees(listing: Listing, clip: OpenClip, table: SampleTable, shift: int) -> bool:
    """Whether the last packets of the file are as the table says. Their durations are noted."""
    place = max(0, len(table) - _LAST_SAMPLES)
    clip.seek(int(table.shown[place]) + shift, any_frame=True)
    first = True
    for packet in clip.packets():
        if first:
            place, first = int(np.searchsorted(table.decoded, packet.dts or 0)), False
        if packet.is_discard or _shift(packet, table, place) != shift:
            return False
        if packet.is_corrupt and listing.damage is None:
            listing.damage = "the file ends inside a frame"
        if packet.duration:
            listing.durations[packet.pts] = packet.duration
        place += 1
    return place == len(table)


class _Opening:
    """The beginning of a clip, decoded up to its first frame."""

    def __init__(self, listing: Listing, clip: OpenClip) -> None:
        self._listing, self._clip = listing, clip
        self._frames: list[Any] = []
        self._start: Any = None

    @property
    def is_over(self) -> bool:
        """Whether the first frame has come out, or is known not to."""
        return bool(self._frames) or self._listing.damage is not None

    def take(self, packet: Any, *, shown: bool) -> None:
        """Looks at the next packet, and decodes it if the first frame has not come out yet."""
        listing, clip = self._listing, self._clip
        if packet.is_keyframe and not clip.starts_afresh(packet):
            listing.has_open_groups = True
            if self._start is None:
                clip.allow_missing_references()
        if self._start is None and packet.is_keyframe:
            self._start = packet
        listing.n_before_start += shown and self._start is None
        if self._frames or self._start is None or listing.damage is not None:
            return
        if not refers_to_what_is_gone(clip.codec, self._start, packet):
            self._decode(packet)

    def ends_alone(self, packet: Any) -> bool:
        """Makes the decoder put out a clip's first frame, without the packets that it wants to see before.

        Args:
            packet: The clip's first packet, which was taken, and whose picture is shown first.

        Returns:
            False if the frame did not come out, so that the clip has to be opened anew.
        """
        if self.is_over or not packet.is_keyframe or not self._clip.starts_afresh(packet):
            return True
        self._decode(None)
        self._clip.rest()
        return self._listing.damage is not None or [frame.pts for frame in self._frames] == [packet.pts]

    def finish(self) -> None:
        """Notes how the first frame looks, after the last packet that was taken."""
        listing, clip = self._listing, self._clip
        if not self._frames and listing.damage is None:
            self._decode(None)
        if not self._frames:
            return
        first = self._frames[0]
        check_size(clip.path, first.width, first.height)
        clip.check_colours(first)
        listing.first_pts = first.pts
        listing.orientation = orientation_of(first)
        listing.has_alpha = clip.codec in LISTABLE and has_alpha(first)
        listing.notes = how_shown(clip.stream, first)
        listing.stored_size = (first.height, first.width)
        listing.pixel_format = first.format.name
        listing.matrix, listing.range = int(first.colorspace), int(first.color_range)

    def _decode(self, packet: Any) -> None:
        try:
            self._frames = self._clip.decode(packet)
        except BreakError as error:
            self._listing.damage = str(error)
