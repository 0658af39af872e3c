"""The words in which snapshots and thinking describe the synthetic world.

The oracle writes these words, the nano judge learns them, and its tokenizer has the phrases as single tokens
(`PHRASES`). Numbers are spelled in digits.
"""

from __future__ import annotations

from collections.abc import Sequence

from vrthinker.episode.dimensions import Judgments
from vrthinker.world.world import COLORS, DEFECTS, DIRECTIONS, SHAPES, Defect, Hint, PairTruth

DEFECT_WORDS = {Defect.COLOR: " wrong color", Defect.NOISE: " noise", Defect.JUMP: " off lane"}
HINT_WORDS = {Hint.BARS: " pale bars", Hint.FADE: " faint noise", Hint.SPEED: " too far"}

Found = tuple[int, tuple[Defect, ...]]
"""An event that was seen: the first frame number that showed it, and its defects."""


def defect_words(defects: Sequence[Defect]) -> str:
    """The words for defects, such as ` wrong color noise`; empty if there are none."""
    return "".join(DEFECT_WORDS[defect] for defect in defects)


def frame_words(pair: PairTruth, frame_number: int) -> str:
    """The words for one frame of a snapshot, such as `41 red noise pale bars`."""
    clip_number, index = pair.locate(frame_number)
    clip = pair.clips[clip_number]
    defects, hint = clip.defects_at(index), clip.hint_at(index)
    colors = [COLORS[color] for color, _ in pair.objects]
    if Defect.COLOR in defects:
        colors[0] = COLORS[clip.wrong_color]
    marks = defect_words(defects) + (HINT_WORDS[hint] if hint is not None else "")
    return f"{frame_number} {' '.join(colors)}{marks}"


def snapshot(pair: PairTruth, frame_numbers: Sequence[int]) -> str:
    """The snapshot of newly shown frames, with a line per video."""
    lines = []
    for video in (1, 2):
        video_frames = [number for number in frame_numbers if pair.locate(number)[0] == video - 1]
        if video_frames:
            lines.append(f"video {video}: " + "; ".join(frame_words(pair, number) for number in video_frames))
    return "<snapshot>" + ("\n".join(lines) or "nothing new") + "</snapshot>"


def defect_counts(events: Sequence[Found]) -> list[int]:
    """The number of events with each kind of defect, in the order of `DEFECTS`."""
    return [sum(defect in defects for _, defects in events) for defect in DEFECTS]


def findings(before: Sequence[Sequence[Found]], new: Sequence[Sequence[Found]]) -> str:
    """For each video the previous counts, what the new frames add, and the new counts; then both sums.

    An example is `video 1: TA 0 VQ 1 MQ 0 + 32 off lane = TA 0 VQ 1 MQ 1 sum 2`. The end is `sums 2 to 0`,
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
