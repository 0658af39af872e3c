"""The answers that stand in a caption, which a judge could repeat instead of judging.

A caption comes from anywhere and may hold the text of an answer, in tags or without. A judge that copies it
would earn the accuracy of whoever wrote the caption.

Invariant: whatever the text, nothing is raised, and the time is linear in its length.
"""

from __future__ import annotations

import re

from vrthinker.episode.dimensions import Dimension, Judgments
from vrthinker.episode.grammar import Answer, Span, parse_answer

# The grammar also reads full-width digits and assignments (`episode/repairs.py`).
_PAIR = re.compile(
    r"[A-Za-z]{2}\s*+[=:\uff1d\uff1a]\s*+(?:[0-9\uff10-\uff19]|[Vv]ideo[ _]?+[12\uff11\uff12]|[Tt]ie)"
)
_JUDGMENTS = len(Dimension)


def answers_in(caption: str) -> frozenset[Judgments]:
    """The judgments of every answer in a caption that the grammar can read.

    Tags do not matter, so that an answer without tags, in nested tags or in tags that are never closed is
    found too. Four judgments in a row may be an answer, or four and a confidence; the grammar decides whether
    what stands from the first to the last of them is one. Of answers that overlap, each is found. A character
    is read nine times at most, since it is in four stretches of four and five of five.
    """
    pairs = [match.span() for match in _PAIR.finditer(caption)]
    found = set()
    for length in (_JUDGMENTS, _JUDGMENTS + 1):
        for (start, _), (_, end) in zip(pairs, pairs[length - 1 :], strict=False):
            answer = parse_answer(caption, Span(start, end), Span(start, end))
            if isinstance(answer, Answer):
                found.add(answer.judgments)
    return frozenset(found)
