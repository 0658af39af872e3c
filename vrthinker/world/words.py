"""The words in which snapshots and thinking describe the synthetic world.

The oracle writes these words, the nano judge learns them, and its tokenizer has the phrases as single tokens
(`PHRASES`). Numbers are spelled in digits. Places along the way are letters, so that no number means two
things.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vrthinker.episode.dimensions import Judgments
from vrthinker.world.truth_reader import probes
from vrthinker.world.world import (
    COLORS,
    DEFECTS,
    DIRECTIONS,
    SHAPES,
    Defect,
    Hint,
    PairTruth,
)

DEFECT_WORDS = {Defect.COLOR: " wrong color", Defect.NOISE: " noise", Defect.JUMP: " off lane"}
HINT_WORDS = {Hint.BARS: " pale bars", Hint.FADE: " faint noise", Hint.SPEED: " too far"}

PLACES = ("abcdefghijklmnopqrs", "ABCDEFGHIJKLMNOPQRS")
"""The places along the way, each `_PLACE_UNITS` long: from left to right, and from top to bottom."""
_FIRST_PLACE, _PLACE_UNITS = 9.0, 2.0

Found = tuple[int, tuple[Defect, ...]]
"""An event that was seen: the first frame that showed it, by its number or by its name, and its defects."""


def defect_words(defects: Sequence[Defect]) -> str:
    """The words for defects, such as ` wrong color noise`; empty if there are none."""
    return "".join(DEFECT_WORDS[defect] for defect in defects)


def place(pair: PairTruth, frame_number: int) -> str:
    """The letter of the place along the way where the objects are in a frame."""
    clip, index = pair.locate(frame_number)
    return place_letter(pair.centres(pair.clips[clip], index)[-1][pair.vertical], vertical=pair.vertical)


def place_letter(along: float, *, vertical: bool) -> str:
    """The letter of a distance from the left edge, or from the top edge, in units."""
    letters = PLACES[vertical]
    return letters[min(max(int((along - _FIRST_PLACE) / _PLACE_UNITS), 0), len(letters) - 1)]


def frame_words(pair: PairTruth, frame_number: int, name: int) -> str:
    """The words for a frame that a call showed, such as `3 red noise`, or `3 red wrong color blue noise`.

    That a colour is wrong stands right behind that colour: a small model compares two words more reliably if
    the one that it has just written is one of them.

    Args:
        pair: The pair.
        frame_number: The frame.
        name: Its 1-based place among the frames that were shown with it, by which the words name it.
    """
    clip_number, index = pair.locate(frame_number)
    clip = pair.clips[clip_number]
    defects = clip.defects_at(index)
    first, *others = (f" {COLORS[color]}" for color, _ in pair.objects)
    if Defect.COLOR in defects:
        first = f" {COLORS[clip.wrong_color]}{DEFECT_WORDS[Defect.COLOR]}"
    rest = [defect for defect in defects if defect is not Defect.COLOR]
    return f"{name}{first}{''.join(others)}{defect_words(rest)}"


def gap_name(pair: PairTruth, clip_number: int, gap: tuple[int, int], span: float) -> int:
    """The number that a gap is named by: that of the first frame that looks into it.

    Args:
        pair: The pair.
        clip_number: The clip, 0 or 1.
        gap: The gap.
        span: The value of `WorldConfig.span[0]`, which says how densely to look.
    """
    return 1 + clip_number * pair.clips[0].n_frames + probes(gap, span)[0]


def first_frame_words(
    pair: PairTruth, frame_number: int, name: int, shown: Collection[int], span: float | None = None
) -> str:
    """The words for a frame of the first input, such as `3 red noise at k +1 pale bars 26`.

    They also say where the objects are, how many places they have come since the frame of the clip that is
    shown before it, and which hints there are. Each hint names the gap that it marks (`gap_name`), if frames
    can be asked for.

    Args:
        pair: The pair.
        frame_number: The frame.
        name: Its 1-based place in the first input.
        shown: All frames of the first input. That an object has come too far can only be seen beside a frame
            in front of its leap.
        span: The value of `WorldConfig.span[0]`; None if no frames can be asked for. If they can be, a leap
            is said only between the two frames around its gap, because no others tell where it is.
    """
    clip_number, index = pair.locate(frame_number)
    clip = pair.clips[clip_number]
    earlier = [number for number in shown if number < frame_number and pair.locate(number)[0] == clip_number]
    marks, come = [], ""
    if earlier:
        before = max(earlier)
        start = index - (frame_number - before)
        come = f" +{_places_between(place(pair, before), place(pair, frame_number))}"
        leaps = [event for event in clip.events if event.hint is Hint.SPEED]
        marks += [
            event
            for event in leaps
            if start < event.first_index <= index and (span is None or (start, index) == event.gap)
        ]
    marks += [e for e in clip.events if e.hint not in (None, Hint.SPEED) and e.hint_index == index]
    told = []
    for event in marks:
        assert event.hint is not None
        named = "" if span is None else f" {gap_name(pair, clip_number, event.gap, span)}"
        told.append(HINT_WORDS[event.hint] + named)
    return f"{frame_words(pair, frame_number, name)} at {place(pair, frame_number)}{come}{''.join(told)}"


def _places_between(one: str, other: str) -> int:
    letters = next(letters for letters in PLACES if one in letters)
    return abs(letters.index(one) - letters.index(other))


def snapshot(pair: PairTruth, frame_numbers: Sequence[int], *, first: bool, span: float | None = None) -> str:
    """The snapshot of newly shown frames, with a line per video.

    Args:
        pair: The pair.
        frame_numbers: The frames, in the order in which they are shown.
        first: Whether they are the first input.
        span: The value of `WorldConfig.span[0]`; None if no frames can be asked for.
    """
    shown = set(frame_numbers)
    lines = []
    for video in (1, 2):
        texts = [
            first_frame_words(pair, number, name, shown, span) if first else frame_words(pair, number, name)
            for name, number in enumerate(frame_numbers, start=1)
            if pair.locate(number)[0] == video - 1
        ]
        if texts:
            lines.append(f"video {video}: " + "; ".join(texts))
    return "<snapshot>" + ("\n".join(lines) or "nothing new") + "</snapshot>"


def defect_counts(events: Sequence[Found]) -> list[int]:
    """The number of events with each kind of defect, in the order of `DEFECTS`."""
    return [sum(defect in defects for _, defects in events) for defect in DEFECTS]


def findings(before: Sequence[Sequence[Found]], new: Sequence[Sequence[Found]]) -> str:
    """For each video the previous counts, what the new frames add, and the new counts; then both sums.

    New events have the names of their frames in the snapshot.
    An example is `video 1: TA 0 VQ 1 MQ 0 + 3 off lane = TA 0 VQ 1 MQ 1 sum 2`. The end is `sums 2 to 0`,
    because a small model compares two numbers more reliably if they are next to each other.
    """
    lines, sums = [], []
    for video, (earlier, added) in enumerate(zip(before, new, strict=True), start=1):
        listed = "; ".join(f"{number}{defect_words(defects)}" for number, defects in added) or "nothing"
        counts = defect_counts([*earlier, *added])
        sums.append(sum(counts))
        total = f"{_tally(counts)} sum {sums[-1]}"
        lines.append(f"video {video}: {_tally(defect_counts(earlier))} + {listed} = {total}")
    return "\n".join([*lines, "sums " + " to ".join(map(str, sums))])


def _tally(counts: Sequence[int]) -> str:
    return " ".join(f"{code} {n}" for code, n in zip(("TA", "VQ", "MQ"), counts, strict=True))


def decision(checked: Sequence[int], left: Sequence[int]) -> str:
    """The end of the thinking: the marked gaps that are looked into now, and those that are left for later.

    The list is carried from round to round, so that a round needs to look at the one before it only. An
    example is `check 10 and 34 left 42 and 50`.

    Args:
        checked: The names of the gaps to look into (`gap_name`); none to answer.
        left: The marked gaps that remain.
    """
    if not checked:
        return "done"
    return f"check {' and '.join(map(str, checked))} left {' and '.join(map(str, left)) or 'nothing'}"


def answer(judgments: Judgments, confidence: int) -> str:
    """The content of an answer element."""
    return ", ".join(f"{code}={value}" for code, value in judgments.as_dict().items()) + f", CF={confidence}"


def tool_call(frame_numbers: Sequence[int]) -> str:
    """The text of a `select_frames` call."""
    asked = ", ".join(map(str, frame_numbers))
    call = '{"name": "select_frames", "arguments": {"target_frames": [' + asked + "]}}"
    return f"<tool_call>{call}</tool_call>"


PHRASES = (
    "system\n",
    "user\n",
    "assistant\n",
    "<snapshot>video 1: ",
    "<snapshot>video 2: ",
    "\nvideo 2: ",
    "</snapshot>",
    "<think>video 1: ",
    "</think>",
    "<recommend answer>",
    "</recommend answer>",
    "<answer>",
    "</answer>",
    '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [',
    "]}}</tool_call>",
    "<tool_response>\n",
    "</tool_response>",
    "v1 ",
    "v2 ",
    "TA=",
    ", VQ=",
    ", MQ=",
    ", OA=",
    ", CF=",
    "nothing",
    "TA ",
    " + ",
    " = TA ",
    " VQ ",
    " MQ ",
    " sum ",
    "\nsums ",
    "\ncheck ",
    " left ",
    " at ",
    *(f" +{places}" for places in range(10)),
    "\nlook around",
    "\ndone",
    " and ",
    " to ",
    " new",
    "answer now",
    ", ",
    "; ",
    *DEFECT_WORDS.values(),
    *HINT_WORDS.values(),
    *(f" {color}" for color in COLORS),
    *(f" {shape}" for shape in SHAPES),
    "A",
    " and a",
    " moves",
    " move",
    *(f" {direction}" for direction in DIRECTIONS),
)
"""The texts that are single tokens in a tokenizer for this world."""
