"""Reads the world's words (`words.py`) back from what a judge wrote.

The text is a model's and not to be trusted. Invariants: reading never raises and takes time in proportion to
the text; whatever is not in the world's words is left out and listed as unread; and what the oracle wrote is
read as what it meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vrthinker.episode.grammar import Element, parse_round
from vrthinker.world.words import DEFECT_WORDS, HINT_WORDS, Found
from vrthinker.world.world import COLORS, Defect, Hint

Tally = tuple[int, int, int]
"""The number of events with each kind of defect, in the order of `DEFECTS`."""


@dataclass(frozen=True)
class ReadFrame:
    """What a snapshot says about a frame.

    Attributes:
        video: The number of the video that it is listed under.
        name: The number that it is named by: its 1-based place among the frames that were shown with it, if
            it is named rightly.
        colors: The colours of its objects, as words.
        defects: The defects that are named, each once.
        place: The letter of the place where the objects are; None if none is named.
        hints: The hints that are named, each once, with the name of the gap that it marks; None where no gap
            is named.
        come: How many places the objects have come since the frame before; None if it is not said.
    """

    video: int
    name: int
    colors: tuple[str, ...] = ()
    defects: tuple[Defect, ...] = ()
    place: str | None = None
    hints: tuple[tuple[Hint, int | None], ...] = ()
    come: int | None = None


@dataclass(frozen=True)
class ReadFindings:
    """What the thinking says about one video; None for each part that cannot be read.

    Attributes:
        before: The tally that it begins with.
        events: The events that are added to it, by the names of their frames in the snapshot.
        after: The tally that it ends with.
        total: The sum of that tally.
    """

    before: Tally | None = None
    events: tuple[Found, ...] | None = None
    after: Tally | None = None
    total: int | None = None


@dataclass(frozen=True)
class ReadDecision:
    """The end of the thinking.

    Attributes:
        checked: The gaps to look into now, by their names (`words.gap_name`).
        left: The gaps that are left for later; None if it does not say.
        looks_around: Whether it is to look at other frames than those of gaps.
    """

    checked: tuple[int, ...] = ()
    left: tuple[int, ...] | None = None
    looks_around: bool = False


@dataclass(frozen=True)
class ReadRound:
    """All that a round says in the world's words.

    Attributes:
        frames: The frames of the snapshot, in the order in which they are listed.
        findings: What the thinking says about each of the two videos.
        sums: The two sums of its last comparison; None if they cannot be read.
        decision: Its end; None if it cannot be read.
        unread: The parts of snapshot and thinking that are not in the world's words, and the names of
            the parts that are missing.
    """

    frames: tuple[ReadFrame, ...]
    findings: tuple[ReadFindings, ReadFindings]
    sums: tuple[int, int] | None
    decision: ReadDecision | None
    unread: tuple[str, ...]


_T = TypeVar("_T")
# Nine digits are more than any name or tally has, and Python does not convert numbers of any length.
_NUMBER = "[0-9]{1,9}"
_VIDEO = re.compile(r"video ([12]): ")
_ENTRY = re.compile(f"({_NUMBER})(?= |$)")
_TALLY = re.compile(f"TA ({_NUMBER}) VQ ({_NUMBER}) MQ ({_NUMBER})")
_AFTER = re.compile(f"({_TALLY.pattern}) sum ({_NUMBER})")
_SUMS = re.compile(f"sums ({_NUMBER}) to ({_NUMBER})")
_LIST = f"{_NUMBER}(?: and {_NUMBER})*+"
_CHECK = re.compile(f"check ({_LIST})(?: left (nothing|{_LIST}))?")
_DEFECTS = {word: defect for defect, word in DEFECT_WORDS.items()}
_HINTS = {word: hint for hint, word in HINT_WORDS.items()}
_WORDS = re.compile(
    "(?:"
    + "|".join([*_DEFECTS, *(f" {color}" for color in COLORS), " at [A-Za-z]", rf" \+{_NUMBER}"])
    + f"|(?:{'|'.join(_HINTS)})(?: {_NUMBER})?)(?= |$)"
)
_HINT = re.compile(f"({'|'.join(_HINTS)})(?: ({_NUMBER}))?")
_OTHER_WORD = re.compile(" ?[^ ]*")


def read_round(text: str) -> ReadRound:
    """Reads a round's text, whatever it is."""
    parsed = parse_round(text)
    unread: list[str] = []
    frames = read_snapshot(_content(text, parsed.snapshot, "snapshot", unread), unread)
    findings = [ReadFindings(), ReadFindings()]
    sums: tuple[int, int] | None = None
    decision: ReadDecision | None = None
    for line in _content(text, parsed.think, "thinking", unread).split("\n"):
        if match := _VIDEO.match(line):
            findings[int(match[1]) - 1] = _findings(line[match.end() :])
        elif match := _SUMS.fullmatch(line):
            sums = (int(match[1]), int(match[2]))
        elif (ending := read_decision(line)) is not None:
            decision = ending
        elif line:
            unread.append(line)
    for number, read in enumerate(findings, start=1):
        unread += [f"video {number}: its {part}" for part, value in vars(read).items() if value is None]
    unread += ["the sums"] * (sums is None) + ["what to do next"] * (decision is None)
    return ReadRound(frames, (findings[0], findings[1]), sums, decision, tuple(unread))


def read_snapshot(content: str, unread: list[str] | None = None) -> tuple[ReadFrame, ...]:
    """Reads what is between the tags of a snapshot.

    Args:
        content: The text.
        unread: A list that the parts which cannot be read are added to.
    """
    frames: list[ReadFrame] = []
    left_out: list[str] = [] if unread is None else unread
    for line in content.split("\n"):
        match = _VIDEO.match(line)
        if match is None:
            if line and line != "nothing new":
                left_out.append(line)
            continue
        for entry in line[match.end() :].split("; "):
            name = _ENTRY.match(entry)
            if name is None:
                left_out.append(entry)
                continue
            words, others = _split(entry[name.end() :])
            left_out += others
            places = [word[-1] for word in words if word.startswith(" at ")]
            frames.append(
                ReadFrame(
                    video=int(match[1]),
                    name=int(name[1]),
                    colors=tuple(word[1:] for word in words if word[1:] in COLORS),
                    defects=_distinct(words, _DEFECTS.get),
                    place=places[0] if places else None,
                    come=next((int(word[2:]) for word in words if word.startswith(" +")), None),
                    hints=_distinct(words, _hint),
                )
            )
    return tuple(frames)


def read_decision(line: str) -> ReadDecision | None:
    """Reads the line that ends the thinking; None for any other line."""
    if line == "done":
        return ReadDecision()
    if line == "look around":
        return ReadDecision(looks_around=True)
    match = _CHECK.fullmatch(line)
    if match is None:
        return None
    checked, left = (
        None if part is None else tuple(map(int, re.findall(_NUMBER, part))) for part in match.groups()
    )
    return ReadDecision(checked or (), left)


def _content(text: str, element: Element | None, name: str, unread: list[str]) -> str:
    if element is None:
        unread.append(f"the {name}")
        return ""
    return text[element.content.start : element.content.end]


def _findings(text: str) -> ReadFindings:
    """Reads a line such as `TA 0 VQ 1 MQ 0 + 3 off lane = TA 0 VQ 1 MQ 1 sum 2`."""
    start, _, end = text.partition(" = ")
    earlier, _, listed = start.partition(" + ")
    before, after = _TALLY.fullmatch(earlier), _AFTER.fullmatch(end)
    return ReadFindings(
        before=None if before is None else _tally(before.groups()),
        events=_events(listed),
        after=None if after is None else _tally(after.groups()[1:4]),
        total=None if after is None else int(after[5]),
    )


def _tally(numbers: Sequence[str]) -> Tally:
    a, b, c = map(int, numbers)
    return a, b, c


def _events(listed: str) -> tuple[Found, ...] | None:
    if listed == "nothing":
        return ()
    events: list[Found] = []
    for entry in listed.split("; "):
        name = _ENTRY.match(entry)
        if name is None:
            return None
        words, others = _split(entry[name.end() :])
        defects = _distinct(words, _DEFECTS.get)
        if others or len(defects) < len(words):
            return None
        events.append((int(name[1]), defects))
    return tuple(events)


def _split(text: str) -> tuple[list[str], list[str]]:
    """The world's words in a text, each with its blank, and the other words."""
    known: list[str] = []
    others: list[str] = []
    position = 0
    while position < len(text):
        match = _WORDS.match(text, position)
        if match is not None:
            known.append(match[0])
        else:
            match = _OTHER_WORD.match(text, position)
            assert match is not None
            others.append(match[0])
        position = max(match.end(), position + 1)
    return known, others


def _hint(word: str) -> tuple[Hint, int | None] | None:
    match = _HINT.fullmatch(word)
    return None if match is None else (_HINTS[match[1]], None if match[2] is None else int(match[2]))


def _distinct(words: Sequence[str], meaning: Callable[[str], _T | None]) -> tuple[_T, ...]:
    """The meanings of those words that have one, each once, in the order in which they are written."""
    found = (meaning(word) for word in words)
    return tuple(dict.fromkeys(value for value in found if value is not None))
