"""The grammar of a round: parses a text into typed elements with spans, and reasons for failures.

A round is, in this order (method section 2)::

    <snapshot>…</snapshot> <think>…</think>
    <recommend answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</recommend answer> <tool_call>{json}</tool_call>
    or
    <snapshot>…</snapshot> <think>…</think> <answer>TA=1, VQ=1, MQ=0, OA=1</answer>

Tags are read without regard to case and inner spaces. `<final answer>` is read as `<answer>`.

Invariants: parsing never raises, whatever the text. Every departure from the form is a `ParseFailure` with a
reason and the span where it was found. A parse has a `FinalAnswer` only if the round has exactly one complete
answer element, outside every other element, and no tool call beside it, so that nothing ambiguous becomes a
verdict. A round may call tools several times; each call is read by itself. If only the ending is in the right
form (for instance because the snapshot is missing), the ending is kept and the failures are listed: use
`well_formed` for the format reward and the filters. An answer or a call that is not in the right form, but
has only one possible meaning, is read and counted as a repair (`repairs.py`). docs/rounds.md shows what is
well formed, what is repaired, and what stays unread.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vrthinker.episode.dimensions import Confidence, Dimension, Judgments, Preference
from vrthinker.episode.repairs import RepairKind, loose_json, loose_pairs

MAX_TOOL_CALL_CHARS = 16_384
"""The most characters of a tool call. A longer call is refused before it reaches the JSON parser."""


class Span(NamedTuple):
    """A range of characters in the round's text; the end is exclusive."""

    start: int
    end: int


class FailureReason(enum.StrEnum):
    """The reasons why a round departs from the form."""

    MISSING_SNAPSHOT = "missing_snapshot"
    MISSING_THINK = "missing_think"
    MISSING_RECOMMENDATION = "missing_recommendation"
    """There is a tool call without a recommended answer before it."""
    MISSING_CONFIDENCE = "missing_confidence"
    """There is a recommended answer without CF."""
    NO_ENDING = "no_ending"
    """There is neither an answer nor a tool call."""
    TWO_ENDINGS = "two_endings"
    """There is more than one answer, or an answer beside a tool call: it cannot be decided which is meant."""
    UNCLOSED_TAG = "unclosed_tag"
    STRAY_CLOSING_TAG = "stray_closing_tag"
    NESTED_TAG = "nested_tag"
    DUPLICATE_TAG = "duplicate_tag"
    WRONG_ORDER = "wrong_order"
    TEXT_OUTSIDE_TAGS = "text_outside_tags"
    ANSWER_SYNTAX = "answer_syntax"
    TOOL_SYNTAX = "tool_syntax"


@dataclass(frozen=True)
class ParseFailure:
    """One departure from the form.

    Attributes:
        reason: The kind of departure.
        span: The place, in characters of the round's text.
        message: A description in one line.
    """

    reason: FailureReason
    span: Span
    message: str


@dataclass(frozen=True)
class Repair:
    """Something that was not in the right form and was read in the only possible way.

    Attributes:
        kind: The kind of departure.
        span: The element that it is in, in characters of the round's text.
    """

    kind: RepairKind
    span: Span


@dataclass(frozen=True)
class Element:
    """One pair of tags. `span` includes the tags, `content` is what is between them."""

    tag: str
    span: Span
    content: Span


@dataclass(frozen=True)
class Answer:
    """A recommended or final answer's judgments, and its confidence, if it has one.

    `places` has, by code, the index of the character at which each judgment stands in the round's text. It is
    empty if the answer was repaired.
    """

    judgments: Judgments
    confidence: Confidence | None
    span: Span
    places: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FinalAnswer:
    """The ending of a round that ends the episode."""

    answer: Answer


@dataclass(frozen=True)
class ToolCall:
    """A call with correct syntax: a name and a JSON object of arguments.

    The name is None if only arguments were written. The registry runs such a call if exactly one tool takes
    them.
    """

    name: str | None
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ToolRequest:
    """The ending of a round that calls tools. A call with incorrect syntax is a failure.

    Attributes:
        calls: The calls, in the order in which they are written; there is at least one.
        spans: The span of each call's element.
        recommendation: The recommended answer, if it can be read.
    """

    calls: tuple[ToolCall | ParseFailure, ...]
    spans: tuple[Span, ...]
    recommendation: Answer | None


@dataclass(frozen=True)
class ParsedRound:
    """The parse of a round's text.

    Attributes:
        snapshot: The snapshot element, if there is exactly one.
        think: The think element, if there is exactly one.
        ending: What the round ends with, or the reason why that cannot be decided.
        failures: The departures from the form, in order of position; empty in a well-formed round.
        repairs: The parts that were read although they were not in the right form; empty in a well-formed
            round.
    """

    snapshot: Element | None
    think: Element | None
    ending: FinalAnswer | ToolRequest | ParseFailure
    failures: tuple[ParseFailure, ...]
    repairs: tuple[Repair, ...] = ()

    @property
    def well_formed(self) -> bool:
        """Whether tags, order, answer syntax and tool syntax are all in the right form."""
        return not self.failures and not self.repairs


_TAG_NAMES = {
    "snapshot": "snapshot",
    "think": "think",
    "recommendanswer": "recommend",
    "answer": "answer",
    "finalanswer": "answer",
    "tool_call": "tool_call",
}
_TAG = re.compile(
    # The quantifiers are possessive (a `+` after them), so that long runs of blanks are not tried in every
    # split.
    r"<\s*+(?P<close>/?+)\s*+"
    # Only ASCII letters match: without (?a:...), ignoring case would accept the long s and the Kelvin sign.
    r"(?P<name>(?a:snapshot|think|answer|tool_call)|(?a:recommend)\s*+(?a:answer)|(?a:final)\s*+(?a:answer))"
    r"\s*+>",
    re.IGNORECASE,
)
_ORDER = {"snapshot": 0, "think": 1, "recommend": 2, "tool_call": 3, "answer": 3}
_PAIR = re.compile(r"\s*+([A-Za-z]{2})\s*+=\s*+([0-9])\s*+")


def _scan(text: str) -> tuple[list[Element], list[ParseFailure]]:
    """Splits a text into non-nested elements. Everything else is a failure."""
    elements: list[Element] = []
    failures: list[ParseFailure] = []
    opened: tuple[str, Span] | None = None
    inside: list[tuple[str, bool, Span]] = []
    outside_from = 0

    def outside(until: int) -> None:
        chunk = text[outside_from:until]
        if chunk.strip():
            start = outside_from + len(chunk) - len(chunk.lstrip())
            span = Span(start, outside_from + len(chunk.rstrip()))
            failures.append(ParseFailure(FailureReason.TEXT_OUTSIDE_TAGS, span, "text outside every tag"))

    for match in _TAG.finditer(text):
        name = _TAG_NAMES[re.sub(r"\s+", "", match["name"].lower())]
        here = Span(match.start(), match.end())
        if opened is None:
            outside(here.start)
            outside_from = here.end
            if match["close"]:
                message = f"</{name}> closes nothing"
                failures.append(ParseFailure(FailureReason.STRAY_CLOSING_TAG, here, message))
            else:
                opened = (name, here)
        elif match["close"] and name == opened[0]:
            elements.append(Element(name, Span(opened[1].start, here.end), Span(opened[1].end, here.start)))
            failures += _hidden_inside(opened[0], inside)
            opened, outside_from, inside = None, here.end, []
        else:
            inside.append((name, bool(match["close"]), here))
    if opened is not None:
        failures += [_nested(opened[0], *tag) for tag in inside]
        span = Span(opened[1].start, len(text))
        failures.append(ParseFailure(FailureReason.UNCLOSED_TAG, span, f"<{opened[0]}> is never closed"))
    else:
        outside(len(text))
    return elements, failures


def _nested(outer: str, name: str, closes: bool, span: Span) -> ParseFailure:
    message = f"<{'/' if closes else ''}{name}> inside <{outer}>"
    return ParseFailure(FailureReason.NESTED_TAG, span, message)


def _hidden_inside(outer: str, tags: list[tuple[str, bool, Span]]) -> list[ParseFailure]:
    """The failures for tags inside a closed element, except mere mentions of a tag.

    A thought may mention a tag ("I shall write <answer> soon"): in a closed snapshot or thought, a tag
    without its counterpart is text. A whole element in there could be an answer that was meant, and is a
    failure.
    """
    if outer in ("snapshot", "think"):
        opened: set[str] = set()
        whole: set[str] = set()
        for name, closes, _ in tags:
            if not closes:
                opened.add(name)
            elif name in opened:
                whole.add(name)
        tags = [tag for tag in tags if tag[0] in whole]
    return [_nested(outer, *tag) for tag in tags]


def _syntax(span: Span, message: str) -> ParseFailure:
    return ParseFailure(FailureReason.ANSWER_SYNTAX, span, message)


def parse_answer(
    text: str, content: Span, span: Span, repairs: list[Repair] | None = None
) -> Answer | ParseFailure:
    """Reads `TA=1, VQ=0, MQ=2, OA=1[, CF=2]`, in any order and spacing, each code exactly once.

    Args:
        text: The round's text.
        content: The span of the text between the answer's tags.
        span: The span of the whole element.
        repairs: A list that repairs are added to (see `repairs.py`).
    """
    inside = text[content.start : content.end]
    pairs: list[tuple[str, int]] = []
    places: dict[str, int] = {}
    start = content.start
    for part in inside.split(","):
        match = _PAIR.fullmatch(part)
        if match is None:
            loose = loose_pairs(inside)
            if loose is None:
                return _syntax(span, f"got {part.strip()[:40]!r}, wanted CODE=NUMBER")
            pairs, places = loose[0], {}
            if repairs is not None:
                repairs += [Repair(kind, span) for kind in sorted(loose[1])]
            break
        pairs.append((match[1].upper(), int(match[2])))
        places[match[1].upper()] = start + match.start(2)
        start += len(part) + 1
    values: dict[str, int] = {}
    for code, value in pairs:
        allowed = (1, 2, 3) if code == "CF" else (0, 1, 2)
        if code != "CF" and code not in Dimension.__members__:
            return _syntax(span, f"got code {code}, allowed: TA, VQ, MQ, OA, CF")
        if code in values:
            return _syntax(span, f"{code} is given twice")
        if value not in allowed:
            return _syntax(span, f"{code}: got {value}, allowed: {', '.join(map(str, allowed))}")
        values[code] = value
    missing = [d.value for d in Dimension if d.value not in values]
    if missing:
        return _syntax(span, f"missing {', '.join(missing)}")
    confidence = Confidence(values["CF"]) if "CF" in values else None
    judgments = Judgments(**{d.value: Preference(values[d.value]) for d in Dimension})
    return Answer(judgments, confidence, span, places)


def parse_tool_call(raw: str, span: Span, repairs: list[Repair] | None = None) -> ToolCall | ParseFailure:
    """Reads `{"name": …, "arguments": {…}}`. Hostile JSON is returned as a failure and never raises.

    Args:
        raw: The text between the call's tags.
        span: The span of the whole element.
        repairs: A list that repairs are added to (see `repairs.py`).
    """
    if len(raw) > MAX_TOOL_CALL_CHARS:
        return _bad_call(span, f"got {len(raw)} characters, allowed: up to {MAX_TOOL_CALL_CHARS}")
    try:
        data, needed = loose_json(raw)
        kinds = set(needed)
        name, arguments = _name_and_arguments(data)
        if isinstance(arguments, str):
            arguments = loose_json(arguments)[0]
            kinds.add(RepairKind.ARGUMENTS_AS_TEXT)
    except RecursionError:
        return _bad_call(span, "nested too deeply")
    except ValueError as error:
        return _bad_call(span, f"not JSON ({str(error)[:80]})")
    if not isinstance(data, dict):
        return _bad_call(span, 'not a JSON object with "name" and "arguments"')
    if not isinstance(arguments, dict) or (name is not None and not isinstance(name, str)):
        return _bad_call(span, 'wanted exactly "name" (a string) and "arguments" (an object)')
    if name is None:
        kinds.add(RepairKind.BARE_ARGUMENTS)
    if repairs is not None:
        repairs += [Repair(kind, span) for kind in sorted(kinds)]
    return ToolCall(name, arguments)


def _bad_call(span: Span, problem: str) -> ParseFailure:
    return ParseFailure(FailureReason.TOOL_SYNTAX, span, f"tool call: {problem}")


def _name_and_arguments(data: object) -> tuple[object, object]:
    """A call's name and arguments: None as the name if it has only arguments; (0, None) for no call."""
    if not isinstance(data, dict) or not data:
        return 0, None
    if "name" in data:
        return (data["name"], data["arguments"]) if set(data) == {"name", "arguments"} else (0, None)
    return None, data["arguments"] if set(data) == {"arguments"} else data


def _ending(
    text: str, found: dict[str, list[Element]], failures: list[ParseFailure], repairs: list[Repair]
) -> FinalAnswer | ToolRequest | ParseFailure:
    """Decides what the round ends with, and adds the failures and repairs that are found on the way."""
    recommendation: Answer | None = None
    if found["recommend"]:
        element = found["recommend"][0]
        read = parse_answer(text, element.content, element.span, repairs)
        if isinstance(read, ParseFailure):
            failures.append(read)
        else:
            recommendation = read if len(found["recommend"]) == 1 else None
            if read.confidence is None:
                message = "the recommended answer has no CF"
                failures.append(ParseFailure(FailureReason.MISSING_CONFIDENCE, element.span, message))
    endings = found["answer"] + found["tool_call"]
    if not endings:
        failure = ParseFailure(
            FailureReason.NO_ENDING, Span(len(text), len(text)), "neither an answer nor a tool call"
        )
    elif found["answer"] and len(endings) > 1:
        span = Span(min(e.span.start for e in endings), max(e.span.end for e in endings))
        message = "more than one answer, or an answer beside a tool call"
        failure = ParseFailure(FailureReason.TWO_ENDINGS, span, message)
    elif found["answer"]:
        element = endings[0]
        if found["recommend"]:
            message = "a recommended answer goes with a tool call, not with an answer"
            failures.append(ParseFailure(FailureReason.WRONG_ORDER, found["recommend"][0].span, message))
        answer = parse_answer(text, element.content, element.span, repairs)
        if isinstance(answer, Answer):
            return FinalAnswer(answer)
        failure = answer
    else:
        if not found["recommend"]:
            message = "a tool call wants a recommended answer before it"
            failures.append(ParseFailure(FailureReason.MISSING_RECOMMENDATION, endings[0].span, message))
        repairs += [Repair(RepairKind.SEVERAL_CALLS, element.span) for element in endings[1:]]
        calls = tuple(
            parse_tool_call(text[element.content.start : element.content.end], element.span, repairs)
            for element in endings
        )
        failures += [call for call in calls if isinstance(call, ParseFailure)]
        return ToolRequest(calls, tuple(element.span for element in endings), recommendation)
    failures.append(failure)
    return failure


def parse_round(text: str) -> ParsedRound:
    """Parses one round's text. It never raises; the module's docstring states the invariants."""
    elements, failures = _scan(text)
    by_tag: dict[str, list[Element]] = {name: [] for name in _ORDER}
    for element in elements:
        by_tag[element.tag].append(element)
    for tag in ("snapshot", "think", "recommend"):
        for element in by_tag[tag][1:]:
            failures.append(ParseFailure(FailureReason.DUPLICATE_TAG, element.span, f"a second <{tag}>"))
    start = Span(0, 0)
    if not by_tag["snapshot"]:
        failures.append(ParseFailure(FailureReason.MISSING_SNAPSHOT, start, "no <snapshot>"))
    if not by_tag["think"]:
        failures.append(ParseFailure(FailureReason.MISSING_THINK, start, "no <think>"))
    ranks = [_ORDER[element.tag] for element in elements]
    for element, before, rank in zip(elements[1:], ranks, ranks[1:], strict=False):
        if rank < before:
            message = f"<{element.tag}> comes too late"
            failures.append(ParseFailure(FailureReason.WRONG_ORDER, element.span, message))
    # A nested or unclosed tag can hide a second answer, so that no ending is certain.
    hidden = [f for f in failures if f.reason in (FailureReason.NESTED_TAG, FailureReason.UNCLOSED_TAG)]
    repairs: list[Repair] = []
    ending = _ending(text, by_tag, failures, repairs)
    if hidden and isinstance(ending, FinalAnswer):
        ending = hidden[0]
    failures.sort(key=lambda failure: (failure.span, failure.reason))
    return ParsedRound(
        snapshot=by_tag["snapshot"][0] if len(by_tag["snapshot"]) == 1 else None,
        think=by_tag["think"][0] if len(by_tag["think"]) == 1 else None,
        ending=ending,
        failures=tuple(failures),
        repairs=tuple(sorted(repairs, key=lambda repair: (repair.span, repair.kind))),
    )
