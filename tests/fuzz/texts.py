"""Texts of all kinds for the grammar: pieces of rounds, damaged rounds, look-alikes, all of Unicode."""

from __future__ import annotations

import random
import re
import sys

HEAD = "<snapshot>1 red, 9 blue</snapshot><think>so far</think>"
RECOMMEND = "<recommend answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</recommend answer>"
CALL = '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [12, 16]}}</tool_call>'
ANSWER = "<answer>TA=1, VQ=1, MQ=0, OA=1</answer>"
ROUNDS = (
    HEAD + ANSWER,
    HEAD + RECOMMEND + CALL,
    HEAD + ANSWER.replace("answer", "final answer"),
    ANSWER,
    CALL,
)
TAGS = ("snapshot", "think", "answer", "final answer", "recommend answer", "tool_call")
FRAGMENTS = (
    *(f"<{close}{tag}>" for tag in TAGS for close in ("", "/")),
    *(
        "TA=1",
        "VQ=0,",
        "MQ=Video 2;",
        "OA: tie\n",
        "CF=3",
        "TA=1, VQ=0, MQ=2, OA=1",
        "TA=\uff11\uff0c",
        "OA=3",
        "XX=1",
    ),
    *(
        '{"name": "select_frames", "arguments": ',
        '{"target_frames": [1, 2]}',
        "[[[",
        "}}}",
        '"\\u0000"',
        "1e999",
    ),
    *(
        "NaN",
        "'",
        "```json",
        "```",
        ",]",
        "<|im_end|>",
        "\0",
        "\ud800",
        "\u200b",
        "\u202e",
        " ",
        "\n",
        "<",
        ">",
    ),
    *("9" * 400, "[" * 300, '{"a":' * 200),
)


def _look_alikes() -> dict[str, str]:
    """The letters outside ASCII that equal an ASCII letter when case is ignored, by that letter."""
    found: dict[str, str] = {}
    for letter in map(chr, range(128, sys.maxunicode + 1)):
        for form in {letter.lower(), letter.upper(), letter.casefold()}:
            if len(form) == 1 and form.isascii() and form.isalpha():
                found.setdefault(form.lower(), "")
                found[form.lower()] += letter
    return found


LOOK_ALIKES = _look_alikes()


def text(rng: random.Random) -> str:
    """A text that a model might write, or nobody."""
    kind = rng.randrange(6)
    if kind == 0:
        return "".join(chr(rng.randrange(sys.maxunicode + 1)) for _ in range(rng.randrange(120)))
    if kind == 1:
        return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(1, 14)))
    if kind == 2:
        return "".join(rng.choice(ROUNDS + FRAGMENTS) for _ in range(rng.randrange(1, 6)))
    whole = rng.choice(ROUNDS)
    for _ in range(rng.randrange(1, 6)):
        whole = _damaged(whole, rng)
    return whole


def _damaged(whole: str, rng: random.Random) -> str:
    start = rng.randrange(len(whole) + 1)
    end = min(len(whole), start + rng.randrange(1, 12))
    part = whole[start:end]
    kind = rng.randrange(8)
    if kind == 0:
        return whole[:start] + whole[end:]
    if kind == 1:
        return whole[:start] + rng.choice(FRAGMENTS) + whole[start:]
    if kind == 2:
        return whole[:end] + part + whole[end:]
    if kind == 3:
        return whole[:start] + part.swapcase() + whole[end:]
    if kind == 4:
        other = "".join(rng.choice(LOOK_ALIKES.get(c.lower(), c)) for c in part)
        return whole[:start] + other + whole[end:]
    if kind == 5:
        return whole[:start] + chr(rng.randrange(sys.maxunicode + 1)) + whole[end:]
    if kind == 6:
        return whole[:start] + part[::-1] + whole[end:]
    return whole[:start]


_INSIDE = r"(?:(?!</?(?:think|snapshot|recommend\s*answer)\s*>).)*?"
_ELEMENT = re.compile(
    rf"<\s*(?P<name>(?:final\s*)?answer|tool_call)\s*>(?P<content>{_INSIDE})<\s*/\s*(?P<end>(?:final\s*)?answer|tool_call)\s*>",
    re.IGNORECASE | re.DOTALL | re.ASCII,
)


def endings(text: str) -> list[tuple[str, str]]:
    """The complete answers and calls of a text, as (name, content): found without the grammar's code."""
    return [
        (re.sub(r"(?i)final|\s", "", match["name"]).lower(), match["content"])
        for match in _ELEMENT.finditer(text)
        if re.sub(r"(?i)final|\s", "", match["end"]).lower()
        == re.sub(r"(?i)final|\s", "", match["name"]).lower()
    ]
