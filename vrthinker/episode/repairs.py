"""Readings of answers and tool calls that are not in the right form, but have only one possible meaning.

Models write answers over several lines, with semicolons or full-width commas, and calls as bare arguments, in
a code fence, or with a trailing comma. If exactly one reading is possible, the round is read that way, and
each departure is counted as a *repair*, which the record and the page show. An episode goes on after a round
with repairs, but such a round is not well formed, so it earns no format reward. Anything ambiguous stays
unread. `docs/rounds.md` has a table of examples, which a test checks.

Invariant: no text causes another error than those that the functions document, and no reading adds anything
that the text does not say.
"""

from __future__ import annotations

import enum
import json
import re
from typing import Any


class RepairKind(enum.StrEnum):
    """The kinds of departures from the form that are read nevertheless."""

    SEPARATOR = "separator"
    """Judgments are separated by semicolons or line ends, or there is a separator at an end."""
    ASSIGNMENT = "assignment"
    """There is a colon instead of the equals sign."""
    WIDE_CHARACTERS = "wide_characters"
    """There are full-width punctuation or digits instead of ASCII ones."""
    WORDED_VALUE = "worded_value"
    """A value is spelled out: `Video 1`, `tie`."""
    TRAILING_PERIOD = "trailing_period"
    """A full stop ends the answer."""
    BARE_ARGUMENTS = "bare_arguments"
    """A call has arguments, but no name. It is read if exactly one tool takes them."""
    ARGUMENTS_AS_TEXT = "arguments_as_text"
    """A call's arguments are a string that holds JSON."""
    CODE_FENCE = "code_fence"
    """A call is inside a Markdown code fence."""
    SINGLE_QUOTES = "single_quotes"
    """A call has single quotes instead of JSON's double quotes."""
    TRAILING_COMMA = "trailing_comma"
    """There is a comma before a closing bracket."""
    SEVERAL_CALLS = "several_calls"
    """There is a further call in the round. All are run, in order."""


_WIDE = str.maketrans(
    {0xFF0C: ",", 0xFF1B: ";", 0xFF1A: ":", 0xFF1D: "=", 0x3002: ".", 0xFF0E: "."}
    | {0xFF10 + digit: str(digit) for digit in range(10)}
)
"""Full-width punctuation, the ideographic full stop and full-width digits."""
_LOOSE_PAIR = re.compile(r"(?a:\s*+([A-Za-z]{2})\s*+([=:])\s*+(?:([0-9])|[Vv]ideo[ _]?+([12])|([Tt]ie))\s*+)")
_FENCE = re.compile(r"```(?:json|JSON)?+\s*+(.*?)\s*+```", re.DOTALL)


def loose_pairs(content: str) -> tuple[list[tuple[str, int]], frozenset[RepairKind]] | None:
    """Reads an answer's judgments, and the repairs that this needs.

    Args:
        content: The text between an answer's tags.

    Returns:
        The (code, value) pairs in order, and the repairs; None if the text cannot be read as judgments.
    """
    repairs = set()
    text = content.translate(_WIDE)
    if text != content:
        repairs.add(RepairKind.WIDE_CHARACTERS)
    text = text.strip()
    if text.endswith("."):
        text = text[:-1]
        repairs.add(RepairKind.TRAILING_PERIOD)
    parts = re.split(r"[,;\n]", text)
    if ";" in text or "\n" in text.replace(",\n", ",") or not all(part.strip() for part in parts):
        repairs.add(RepairKind.SEPARATOR)
    pairs = []
    for part in parts:
        if not part.strip():
            continue
        match = _LOOSE_PAIR.fullmatch(part)
        if match is None:
            return None
        code, assignment, digit, video, _tie = match.groups()
        if assignment == ":":
            repairs.add(RepairKind.ASSIGNMENT)
        if digit is None:
            repairs.add(RepairKind.WORDED_VALUE)
        if code.upper() == "CF" and digit is None:
            return None
        pairs.append((code.upper(), int(digit or video or 0)))
    return pairs, frozenset(repairs)


def loose_json(raw: str) -> tuple[object, frozenset[RepairKind]]:
    """Reads JSON, and the repairs that this needs.

    Args:
        raw: The text between a call's tags, of bounded length.

    Returns:
        The value and the repairs.

    Raises:
        ValueError: The text cannot be read as JSON, or one of its objects has a key twice.
        RecursionError: The text is nested too deeply.
    """
    try:
        return _strict(raw), frozenset()
    except ValueError as error:
        reason = error
    text, repairs = raw.strip(), set()
    if (match := _FENCE.fullmatch(text)) is not None:
        text = match[1]
        repairs.add(RepairKind.CODE_FENCE)
    if "'" in text and '"' not in text and "\\" not in text:
        text = text.replace("'", '"')
        repairs.add(RepairKind.SINGLE_QUOTES)
    without = _without_trailing_commas(text)
    if without != text:
        text = without
        repairs.add(RepairKind.TRAILING_COMMA)
    if not repairs:
        raise reason
    return _strict(text), frozenset(repairs)


def _strict(text: str) -> object:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("an object names a key twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _without_trailing_commas(text: str) -> str:
    """The text without commas just before a closing bracket, outside strings."""
    kept: list[str] = []
    in_string = escaped = False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = not escaped and character == "\\"
        elif character == '"':
            in_string = True
        elif character in "}]":
            blanks = []
            while kept and kept[-1].isspace():
                blanks.append(kept.pop())
            if kept and kept[-1] == ",":
                kept.pop()
            kept += reversed(blanks)
        kept.append(character)
    return "".join(kept)
