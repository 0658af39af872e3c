"""The grammar: what is read, what is refused and why, and that nothing hostile becomes a verdict."""

from __future__ import annotations

import json
import re
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vrthinker.episode.dimensions import Confidence, Judgments
from vrthinker.episode.grammar import (
    FailureReason,
    FinalAnswer,
    ParsedRound,
    ParseFailure,
    ToolCall,
    ToolRequest,
    parse_round,
)

HEAD = "<snapshot>1 red, 9 blue</snapshot><think>so far</think>"
RECOMMEND = "<recommend answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</recommend answer>"
CALL = '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [12, 16]}}</tool_call>'
ANSWER = "<answer>TA=1, VQ=1, MQ=0, OA=1</answer>"


def reasons(parsed: ParsedRound) -> list[FailureReason]:
    return [failure.reason for failure in parsed.failures]


def test_a_round_that_asks_for_frames() -> None:
    text = f"{HEAD}\n{RECOMMEND}\n{CALL}"
    parsed = parse_round(text)
    assert parsed.well_formed
    assert isinstance(parsed.ending, ToolRequest)
    assert parsed.ending.calls == (ToolCall("select_frames", {"target_frames": [12, 16]}),)
    assert parsed.ending.recommendation is not None
    assert parsed.ending.recommendation.judgments == Judgments(TA=1, VQ=0, MQ=2, OA=1)
    assert parsed.ending.recommendation.confidence is Confidence.MIDDLE
    assert parsed.snapshot is not None
    assert text[parsed.snapshot.content.start : parsed.snapshot.content.end] == "1 red, 9 blue"
    assert [text[span.start : span.end] for span in parsed.ending.spans] == [CALL]


@pytest.mark.parametrize(
    "ending",
    [
        ANSWER,
        "<Answer> ta = 1 ,VQ=1, MQ =0,OA= 1 </ANSWER >",
        "<final answer>TA=1, VQ=1, MQ=0, OA=1</final answer>",
        "< FINAL  ANSWER >OA=1, MQ=0, VQ=1, TA=1< / final answer>",
        "<finalanswer>TA=1, VQ=1, MQ=0, OA=1</finalanswer>",
    ],
)
def test_a_final_answer_without_regard_to_case_and_spaces(ending: str) -> None:
    parsed = parse_round(HEAD + ending)
    assert parsed.well_formed, parsed.failures
    assert isinstance(parsed.ending, FinalAnswer)
    assert parsed.ending.answer.judgments.as_dict() == {"TA": 1, "VQ": 1, "MQ": 0, "OA": 1}
    assert parsed.ending.answer.confidence is None


def test_an_answer_may_carry_a_confidence() -> None:
    parsed = parse_round(HEAD + "<answer>TA=1, VQ=1, MQ=0, OA=1, CF=3</answer>")
    assert isinstance(parsed.ending, FinalAnswer)
    assert parsed.ending.answer.confidence is Confidence.LOW


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", FailureReason.NO_ENDING),
        (HEAD, FailureReason.NO_ENDING),
        (HEAD + RECOMMEND, FailureReason.NO_ENDING),
        (HEAD + ANSWER + ANSWER, FailureReason.TWO_ENDINGS),
        (HEAD + RECOMMEND + CALL + ANSWER, FailureReason.TWO_ENDINGS),
        (HEAD + RECOMMEND + CALL + CALL + ANSWER, FailureReason.TWO_ENDINGS),
        (HEAD + "<answer>TA=1, VQ=1, MQ=0</answer>", FailureReason.ANSWER_SYNTAX),
        (HEAD + "<answer>TA=1, VQ=1, MQ=0, OA=3</answer>", FailureReason.ANSWER_SYNTAX),
        (HEAD + "<answer>TA=1, VQ=1, MQ=0, OA=1, OA=2</answer>", FailureReason.ANSWER_SYNTAX),
        (HEAD + "<answer>TA=1, VQ=1, MQ=0, OA=1, CF=0</answer>", FailureReason.ANSWER_SYNTAX),
        (HEAD + "<answer>TA=1, VQ=1, MQ=0, OA=1, XX=0</answer>", FailureReason.ANSWER_SYNTAX),
        (HEAD + "<answer>TA=1, VQ=1, MQ=0, OA=12</answer>", FailureReason.ANSWER_SYNTAX),
        (HEAD + "<answer>TA=1 VQ=1 MQ=0 OA=1</answer>", FailureReason.ANSWER_SYNTAX),
        (
            HEAD + "<answer>TA=1, VQ=1, MQ=0, OA=\N{ARABIC-INDIC DIGIT ONE}</answer>",
            FailureReason.ANSWER_SYNTAX,
        ),
        (HEAD + "<answer>video 1</answer>", FailureReason.ANSWER_SYNTAX),
        (HEAD + "<answer></answer>", FailureReason.ANSWER_SYNTAX),
        (HEAD + "<answer>TA=1, VQ=1, MQ=0, OA=1", FailureReason.NO_ENDING),
        (f"<think>maybe {ANSWER} or not</think>", FailureReason.NO_ENDING),
        (f"{HEAD}{ANSWER}<think>or {ANSWER}</think>", FailureReason.NESTED_TAG),
        (f"{ANSWER}<snapshot>", FailureReason.UNCLOSED_TAG),
    ],
)
def test_no_verdict_and_why(text: str, reason: FailureReason) -> None:
    parsed = parse_round(text)
    assert isinstance(parsed.ending, ParseFailure)
    assert parsed.ending.reason is reason
    assert parsed.ending in parsed.failures


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ANSWER, FailureReason.MISSING_SNAPSHOT),
        (f"<snapshot>x</snapshot>{ANSWER}", FailureReason.MISSING_THINK),
        (f"<think>y</think><snapshot>x</snapshot>{ANSWER}", FailureReason.WRONG_ORDER),
        (f"{ANSWER}{HEAD}", FailureReason.WRONG_ORDER),
        (f"{HEAD}{RECOMMEND}{ANSWER}", FailureReason.WRONG_ORDER),
        (f"Well, {HEAD}{ANSWER}", FailureReason.TEXT_OUTSIDE_TAGS),
        (f"{HEAD}{ANSWER} Thanks", FailureReason.TEXT_OUTSIDE_TAGS),
        (f"{HEAD}</think>{ANSWER}", FailureReason.STRAY_CLOSING_TAG),
        (f"<snapshot>z</snapshot>{HEAD}{ANSWER}", FailureReason.DUPLICATE_TAG),
    ],
)
def test_a_sound_answer_in_a_bad_form_counts_and_is_flagged(text: str, reason: FailureReason) -> None:
    parsed = parse_round(text)
    assert isinstance(parsed.ending, FinalAnswer)
    assert not parsed.well_formed
    assert reason in reasons(parsed)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HEAD + CALL, FailureReason.MISSING_RECOMMENDATION),
        (HEAD + RECOMMEND.replace(", CF=2", "") + CALL, FailureReason.MISSING_CONFIDENCE),
        (HEAD + RECOMMEND.replace("OA=1", "OA=7") + CALL, FailureReason.ANSWER_SYNTAX),
        (HEAD + RECOMMEND + "<tool_call>12, 16</tool_call>", FailureReason.TOOL_SYNTAX),
        (HEAD + RECOMMEND + "<tool_call>[1]</tool_call>", FailureReason.TOOL_SYNTAX),
        (HEAD + RECOMMEND + '<tool_call>{"name": 1, "arguments": {}}</tool_call>', FailureReason.TOOL_SYNTAX),
        (HEAD + RECOMMEND + '<tool_call>{"name": "a", "args": {}}</tool_call>', FailureReason.TOOL_SYNTAX),
        (HEAD + RECOMMEND + f"<tool_call>{'[' * 9000}</tool_call>", FailureReason.TOOL_SYNTAX),
        (HEAD + RECOMMEND + f"<tool_call>{'9' * 9000}</tool_call>", FailureReason.TOOL_SYNTAX),
        (HEAD + RECOMMEND + f"<tool_call>{'9' * 20000}</tool_call>", FailureReason.TOOL_SYNTAX),
    ],
)
def test_a_flawed_call_is_still_a_call_and_flagged(text: str, reason: FailureReason) -> None:
    parsed = parse_round(text)
    assert isinstance(parsed.ending, ToolRequest)
    assert reason in reasons(parsed)
    if reason is FailureReason.TOOL_SYNTAX:
        assert isinstance(parsed.ending.calls[0], ParseFailure)


PIECES = st.sampled_from(
    (
        *(HEAD, RECOMMEND, CALL, ANSWER, "<snapshot>", "</snapshot>", "<think>", "</think>", "<answer>"),
        *(
            "</answer>",
            "<final answer>",
            "</final answer>",
            "<tool_call>",
            "</tool_call>",
            "<recommend answer>",
        ),
        *(
            "TA=1, VQ=1",
            "TA=1, VQ=0, MQ=2, OA=1",
            "{",
            "}",
            "[",
            "<",
            ">",
            "/",
            " ",
            "\n",
            "\0",
            "\ud800",
            "é",
        ),
        "<|im_end|>",
    )
)
HOSTILE = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=12).map("".join))
ANSWERS = re.compile(r"<\s*(?:final\s*)?answer\s*>", re.IGNORECASE)
ANSWER_ENDS = re.compile(r"<\s*/\s*(?:final\s*)?answer\s*>", re.IGNORECASE)


@settings(max_examples=800, deadline=None)
@given(HOSTILE)
@example("<" * 5000 + " " * 5000)
@example("<answer" + " " * 20000)
@example("<SNAPSHOT><ANSWER></SNAPSHOT><ANSWER>TA=0,VQ=0,MQ=0,OA=0</ANSWER>")
def test_hostile_text_is_parsed_without_a_crash_and_verdicts_are_unambiguous(text: str) -> None:
    parsed = parse_round(text)
    for failure in parsed.failures:
        assert 0 <= failure.span.start <= failure.span.end <= len(text)
        assert failure.message
    if isinstance(parsed.ending, FinalAnswer):
        # A tag that is merely mentioned in a snapshot has no end there.
        assert min(len(ANSWERS.findall(text)), len(ANSWER_ENDS.findall(text))) == 1
        assert not any(f.reason is FailureReason.TWO_ENDINGS for f in parsed.failures)
        span = parsed.ending.answer.span
        content = ANSWERS.sub("", text[span.start : span.end])
        for code, value in parsed.ending.answer.judgments.as_dict().items():
            assert re.search(rf"{code}\s*=\s*{value}", content, re.IGNORECASE)
    if parsed.well_formed:
        assert parsed.snapshot is not None
        assert parsed.think is not None
        assert not isinstance(parsed.ending, ParseFailure)


def test_a_look_alike_of_a_tag_is_text() -> None:
    """Some letters outside ASCII equal ASCII ones when case is ignored: the long s, the Kelvin sign."""
    everything = map(chr, range(128, sys.maxunicode + 1))
    alike = [letter for letter in everything if re.fullmatch("[a-z]", letter, re.IGNORECASE)]
    assert {"\N{LATIN SMALL LETTER LONG S}", "\N{KELVIN SIGN}"} <= set(alike)
    for other in alike:
        (letter,) = (c for c in "abcdefghijklmnopqrstuvwxyz" if re.fullmatch(c, other, re.IGNORECASE))
        for tag in ("snapshot", "think", "answer", "final answer", "recommend answer", "tool_call"):
            if letter in tag:
                forged = tag.replace(letter, other)
                parsed = parse_round(f"{HEAD}<{forged}>TA=1, VQ=1, MQ=0, OA=1</{forged}>")
                assert not isinstance(parsed.ending, FinalAnswer)
                assert reasons(parsed) == [FailureReason.TEXT_OUTSIDE_TAGS, FailureReason.NO_ENDING]


@given(text=st.text(max_size=30), cut=st.integers(0, 30))
def test_no_text_of_all_unicode_makes_parsing_raise(text: str, cut: int) -> None:
    for name in ("snapshot", "answer", "tool_call"):
        parse_round(f"<{name[: cut % 9]}{text}{name[cut % 9 :]}>{text}</{name}>")
        parse_round(f"<{name}>{text}</{text}{name}>".swapcase())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=10,
    )
)
def test_any_json_in_a_tool_call_is_a_call_or_a_reason(value: object) -> None:
    text = f"{HEAD}{RECOMMEND}<tool_call>{json.dumps(value)}</tool_call>"
    parsed = parse_round(text)
    if isinstance(parsed.ending, ToolRequest) and isinstance(parsed.ending.calls[0], ToolCall):
        assert isinstance(value, dict)
        assert parsed.well_formed == (set(value) == {"name", "arguments"} and value["name"] is not None)


@pytest.mark.parametrize("text", ["<" + " " * 300_000, "< / " * 50_000, "<recommend" + "\n" * 300_000 + "x"])
def test_long_runs_of_blanks_are_read_in_linear_time(text: str) -> None:
    # Milliseconds in linear time; in quadratic time it would run into the time limit of a test.
    assert isinstance(parse_round(text).ending, ParseFailure)
