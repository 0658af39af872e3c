"""UnifiedReward's pairs of videos, whose label is a sentence, in both layouts.

For supervised training: `conversations` of `{"from": "human" or "gpt", "value"}`, and `images` or `videos`.
For GRPO: `problem`, `solution`, and `images` or `videos`. The caption stands in the question after
`Text Caption:`, in square brackets. `images` holds the frames of both clips, the first half of them of
video 1.

The label is read from the whole answer, or from the one `<answer>` in it, and only if that says nothing else:
searching a text for "Video 1 is better" would find it in a thought as well. All other answers are dropped
with a reason.
"""

from __future__ import annotations

import re
from typing import Any

from vrthinker.data.datasets.draft import Clip, Draft, Format, ImportOptions, LabelRule, Tally, each
from vrthinker.data.datasets.rows import BadField, Caption, Row, RowDropped, shown
from vrthinker.episode.dimensions import Dimension

MARK = "Text Caption: ["
SENTENCES = {1: "Video 1 is better.", 2: "Video 2 is better.", 0: "Both videos are equally good."}
"""Label -> the sentence that says it."""
_OPENING = re.compile(r"Text Caption:\s*+\[", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<\s*+(/?+)\s*+answer\s*+>", re.IGNORECASE)
_BETTER = re.compile(r"video ([12]) is (?:the )?better(?: video| one)?(?: than video ([12]))?")
_EQUAL = re.compile(
    r"both videos are (?:equally (?:good|bad)|equal|the same)"
    r"|the (?:two )?videos are (?:equally (?:good|bad)|equal|tied)"
)
_MEDIA = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".m4v", ".webp")
_MAX_ANSWER_CHARS = 1 << 20


def label_of(answer: str) -> int:
    """The label that an answer states.

    Raises:
        RowDropped: It states none, or says more than that.
    """
    if len(answer) > _MAX_ANSWER_CHARS:
        raise RowDropped("the answer is too long to be a label")
    stated = answer
    tags = list(_ANSWER_TAG.finditer(answer))
    if tags:
        if [tag[1] for tag in tags] != ["", "/"]:
            raise RowDropped("the answer has not exactly one <answer>")
        stated = answer[tags[0].end() : tags[1].start()]
    sentence = " ".join(stated.split()).strip(" .!'\"").lower()
    if (better := _BETTER.fullmatch(sentence)) and better[1] != better[2]:
        return int(better[1])
    if _EQUAL.fullmatch(sentence):
        return 0
    if "image" in sentence and "better" in sentence:
        raise RowDropped("the answer is about pictures, not videos")
    raise RowDropped("the answer is not one plain sentence about which video is better")


def _question_and_answer(row: Row) -> tuple[str, str]:
    if "problem" in row.values:
        return _text("problem", row.values["problem"]), _text("solution", row.values.get("solution"))
    turns: Any = row.values.get(row.any_of("conversations", "problem"))
    if not isinstance(turns, list) or not turns:
        raise BadField("conversations", shown(turns), "a list of turns")
    said: dict[str, list[str]] = {"human": [], "gpt": []}
    for index, turn in enumerate(turns):
        place = f"conversations[{index}]"
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker == "system":
            continue
        if not isinstance(speaker, str) or speaker not in said:
            raise BadField(f"{place}.from", shown(speaker), "human or gpt")
        said[speaker].append(_text(f"{place}.value", turn.get("value")))
    if len(said["human"]) != 1 or len(said["gpt"]) != 1:
        raise RowDropped("more than one question and one answer")
    return said["human"][0], said["gpt"][0]


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadField(name, shown(value), "a text")
    return value


def _caption(question: str, row: Row) -> Caption:
    found = _OPENING.search(question)
    lines = question[found.end() :].split("\n") if found is not None else []
    # A caption may have brackets and line ends in it, so the last bracket that ends a line closes it.
    while lines and not lines[-1].rstrip().endswith("]"):
        lines.pop()
    if not lines:
        raise RowDropped("the question has no caption in the form Text Caption: [...]")
    text = "\n".join(lines).rstrip()[:-1]
    return Row(row.number, {"caption": text}).caption("caption")


def _clips(row: Row) -> tuple[Clip, Clip]:
    name = row.any_of("videos", "images", "video", "image")
    paths = row.paths(name)
    if len(paths) == 2:
        if all(path.lower().endswith(_MEDIA) for path in paths) or name.startswith("video"):
            return Clip(paths[0]), Clip(paths[1])
        raise RowDropped("two single pictures, no clips")
    if len(paths) % 2 or not paths:
        raise BadField(name, f"{len(paths)} paths", "two clips, or the frames of two clips of equal length")
    half = len(paths) // 2
    return Clip(None, paths[:half]), Clip(None, paths[half:])


def _read_pair(row: Row, options: ImportOptions, tally: Tally) -> Draft:
    question, answer = _question_and_answer(row)
    label = label_of(answer)
    first, second = _clips(row)
    return Draft(
        number=row.number,
        id=row.identity(),
        prompt=_caption(question, row),
        video_1=first,
        video_2=second,
        labels={Dimension.OA.value: label},
        dataset=row.dataset(),
    )


UNIFIEDREWARD = Format(
    name="unifiedreward",
    about="JSON conversations or problem and solution, whose label is a sentence; overall only",
    dataset=None,
    read=each(_read_pair),
    rules={"OA": LabelRule("the answer's one sentence")},
)
