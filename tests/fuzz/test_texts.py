"""The grammar and the tools on many texts: nothing raises, and no verdict comes from an ambiguous text."""

from __future__ import annotations

import random
import re

import pytest
from fuzz_counts import record
from texts import endings, text

from vrthinker.episode.grammar import FinalAnswer, ToolRequest, parse_round
from vrthinker.episode.prompts import clean
from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolError
from vrthinker.episode.tools.registry import MAX_CALLS, ToolRegistry

CONTEXT = ToolContext(n_frames=64, max_frames=8, n_frames_1=32)
WORDS = {0: "0|\uff10|tie", 1: "1|\uff11|video", 2: "2|\uff12|video"}


def check(written: str, registry: ToolRegistry) -> str:
    """Parses one text and checks what was made of it. Returns the kind of the ending."""
    read = clean(written)
    parsed = parse_round(read)
    for failure in parsed.failures:
        assert 0 <= failure.span.start <= failure.span.end <= len(read)
    if parsed.well_formed:
        assert parsed.snapshot is not None
        assert parsed.think is not None
        assert len(endings(read)) == 1
    if isinstance(parsed.ending, FinalAnswer):
        found = endings(read)
        assert [name for name, _ in found] == ["answer"], "a verdict needs one answer and no call beside it"
        said = found[0][1]
        for code, value in parsed.ending.answer.judgments.as_dict().items():
            assert len(re.findall(code, said, re.IGNORECASE)) == 1
            assert re.search(f"{code}\\s*[=:\uff1a\uff1d]\\s*(?:{WORDS[value]})", said, re.IGNORECASE)
        return "verdict"
    if isinstance(parsed.ending, ToolRequest):
        outcomes = registry.execute_all(parsed.ending.calls, CONTEXT)
        assert len(outcomes) == min(len(parsed.ending.calls), MAX_CALLS + 1)
        shown = [n for outcome in outcomes if isinstance(outcome, FramesShown) for n in outcome.frame_numbers]
        assert len(set(shown)) == len(shown) <= CONTEXT.max_frames
        assert all(1 <= number <= CONTEXT.n_frames for number in shown)
        assert all(len(outcome.message) < 400 for outcome in outcomes if isinstance(outcome, ToolError))
        return "call"
    return str(parsed.ending.reason)


def run(count: int, seed: int) -> dict[str, int]:
    rng, registry = random.Random(seed), ToolRegistry()
    counts: dict[str, int] = {}
    for _ in range(count):
        written = text(rng)
        try:
            kind = check(written, registry)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {written!r}") from error
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def test_a_few_thousand_texts() -> None:
    counts = run(3000, seed=3)
    assert counts["verdict"] > 20
    assert counts["call"] > 20


@pytest.mark.slow
def test_a_hundred_thousand_texts() -> None:
    record("texts", run(100_000, seed=20261129))
