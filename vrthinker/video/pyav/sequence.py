"""The pictures of a clip in presentation order, decoded so that no damaged one is passed on.

Invariant: a yielded frame, and everything that it may depend on, came out of the decoder undamaged.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vrthinker.errors import VideoError
from vrthinker.video.pyav.clip import BreakError, OpenClip, check_size
from vrthinker.video.reader import check_amount

_MAX_REORDERED = 16
"""The most pictures that H.264 may hold back to put them into order."""


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
            clip.check_colours(frame)
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
    rest = (packet for packet in packets if not refers_to_what_is_gone(clip.codec, start, packet))
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


def refers_to_what_is_gone(codec: str, start: Any, packet: Any) -> bool:
    """Whether a picture follows the first keyframe in the file, but precedes it on the screen.

    A clip that was cut out of a longer one may begin like this. HEVC's decoder skips such pictures by itself
    (except those that can be decoded). H.264's decoder would invent them.
    """
    return codec == "h264" and None not in (packet.pts, start.pts) and packet.pts < start.pts
