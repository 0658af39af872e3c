"""The tables of docs/rounds.md, line by line: what is well formed, what is repaired, what stays unread."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vrthinker.episode.grammar import FinalAnswer, ParsedRound, ParseFailure, ToolRequest, parse_round
from vrthinker.episode.repairs import RepairKind
from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolError, ToolOutcome
from vrthinker.episode.tools.registry import ToolRegistry

PAGE = Path(__file__).parents[2] / "docs" / "rounds.md"
HEAD = "<snapshot>seen</snapshot><think>so</think>"
RECOMMEND = "<recommend answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</recommend answer>"


def rows(about: str) -> list[tuple[str, str, str]]:
    """The rows of the page whose text holds `about`, with the code marks taken off."""
    if not PAGE.exists():
        return []
    found = re.findall(r"^\| (`+)(.+?)\1 \| (.+?) \| (.+?) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [(text.replace("¶", "\n"), read, kind) for _, text, read, kind in found if about in text]


def check_class(parsed: ParsedRound, kind: str) -> None:
    name, _, rest = kind.partition(": ")
    repairs, failures = {repair.kind.value for repair in parsed.repairs}, {f.reason for f in parsed.failures}
    assert parsed.well_formed == (name == "well formed")
    if name == "repair":
        assert repairs == set(rest.split(", "))
        assert not failures
    elif name == "failure":
        assert rest in failures
        assert not repairs
    elif name == "unread":
        assert isinstance(parsed.ending, ParseFailure)
        assert parsed.ending.reason.value == rest


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_the_page_is_read() -> None:
    answers, calls = rows("nswer"), rows("tool_call")
    assert len(answers) > 20
    assert len(calls) > 10
    named = {kind for _, _, kinds in answers + calls for kind in re.findall(r"\w+", kinds.partition(": ")[2])}
    assert {kind.value for kind in RepairKind} <= named, "every repair has an example"


@pytest.mark.parametrize(("text", "read", "kind"), rows("nswer"))
def test_an_answer_is_read_as_the_page_says(text: str, read: str, kind: str) -> None:
    parsed = parse_round(text if "<think>" in text else HEAD + text)
    check_class(parsed, kind)
    if read == "nothing":
        assert not isinstance(parsed.ending, FinalAnswer)
    else:
        assert isinstance(parsed.ending, FinalAnswer)
        judgments = parsed.ending.answer.judgments.as_dict()
        assert " ".join(f"{code}={judgments[code]}" for code in ("TA", "VQ", "MQ", "OA")) == read


@pytest.mark.parametrize(("text", "read", "kind"), rows("tool_call"))
def test_a_call_is_read_as_the_page_says(text: str, read: str, kind: str) -> None:
    parsed = parse_round(HEAD + RECOMMEND + text)
    check_class(parsed, kind)
    if read == "nothing":
        assert isinstance(parsed.ending, ParseFailure)
        return
    assert isinstance(parsed.ending, ToolRequest)
    context = ToolContext(n_frames=54, max_frames=8, n_frames_1=32)
    outcomes = ToolRegistry().execute_all(parsed.ending.calls, context)
    for outcome, words in zip(outcomes, read.split(", then "), strict=True):
        check_outcome(outcome, words)


def check_outcome(outcome: ToolOutcome, read: str) -> None:
    if read.startswith("no frames: "):
        assert isinstance(outcome, ToolError)
        assert outcome.message.startswith(read.removeprefix("no frames: "))
    else:
        assert isinstance(outcome, FramesShown)
        names, _, note = read.removeprefix("frames ").partition(", and a note about ")
        assert outcome.frame_numbers == tuple(map(int, names.split(", ")))
        assert (note in (outcome.note or "")) if note else outcome.note is None
