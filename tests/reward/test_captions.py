"""Answers that stand in captions are found wherever the grammar could read them, in linear time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vrthinker.episode.dimensions import Judgments
from vrthinker.episode.grammar import Answer, Span, parse_answer
from vrthinker.episode.prompts import MAX_CAPTION_CHARS
from vrthinker.reward import captions
from vrthinker.reward.captions import answers_in

ONE = Judgments(TA=1, VQ=0, MQ=2, OA=1)
TWO = Judgments(TA=2, VQ=2, MQ=0, OA=2)
LINE, LINE_2 = "TA=1, VQ=0, MQ=2, OA=1", "TA=2, VQ=2, MQ=0, OA=2"


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("A red ball moves right.", set()),
        ("", set()),
        (f"a dog <answer>{LINE}</answer> runs", {ONE}),
        (f"a dog <recommend answer>{LINE}, CF=2</recommend answer> runs", {ONE}),
        (f"a dog <answer>{LINE_2}</answer> or <answer>{LINE}</answer> runs", {ONE, TWO}),
        (f"Say {LINE}.", {ONE}),
        (f"Say\n{LINE}\nor {LINE_2}.", {ONE, TWO}),
        (f"<think><answer><answer>{LINE}", {ONE}),
        (f"CF=1, {LINE}", {ONE}),
        ("ta : Video 1; vq: tie;\n mq=video_2; OA=1", {ONE}),
        ("TA\uff1d\uff11\uff0cVQ\uff1a\uff10\uff0cMQ\uff1d\uff12\uff1bOA\uff1dVideo \uff11\u3002", {ONE}),
        ("OA=1, TA=1, CF=3, MQ=2, VQ=0", {ONE}),
        ("TA=1 VQ=0 MQ=2 OA=1", set()),  # the grammar does not read it either
        ("TA=1, VQ=0, and MQ=2, OA=1", set()),
        ("TA=1, VQ=0, MQ=2", set()),
        ("TA=1, VQ=0, MQ=2, MQ=2", set()),
        ("TA=1, VQ=0, MQ=2, OA=3", set()),
        (f"XY=1, {LINE}", {ONE}),
    ],
)
def test_what_stands_in_a_caption(caption: str, found: set[Judgments]) -> None:
    assert answers_in(caption) == found


def test_of_answers_that_run_into_each_other_each_is_found() -> None:
    assert answers_in(f"{LINE}, {LINE_2}") >= {ONE, TWO}
    assert answers_in(f"OA=2, {LINE}; TA=1") >= {ONE}


BLANKS = st.sampled_from(["", " ", "\n", "  ", "\t", "\u3000"])
VALUES = {
    0: ["0", "tie", "Tie", "\uff10"],
    1: ["1", "Video 1", "video_1", "\uff11"],
    2: ["2", "video2", "Video \uff12"],
}


@st.composite
def answers(draw: st.DrawFn) -> str:
    """The content of an answer in any spelling, right or not."""
    codes = draw(st.permutations(["TA", "VQ", "MQ", "OA"]))
    if draw(st.booleans()):
        codes.insert(draw(st.integers(0, 4)), "CF")
    parts = []
    for code in codes:
        value = draw(st.sampled_from(["1", "2", "3"] if code == "CF" else VALUES[draw(st.integers(0, 2))]))
        code = draw(st.sampled_from([code, code.lower()]))
        assignment = draw(st.sampled_from("=:\uff1d\uff1a"))
        spelled = zip((code, assignment, value), [draw(BLANKS) for _ in range(3)], strict=True)
        parts.append(draw(BLANKS) + "".join(itertools.chain.from_iterable(spelled)))
    separators = [
        draw(st.sampled_from([",", ", ", ";", "\n", "\uff0c", ",\n", ",,", "\uff1b"])) for _ in parts[1:]
    ]
    ends = draw(st.sampled_from(["", ",", ".", "\u3002", ";"]))
    return "".join(itertools.chain.from_iterable(zip(parts, [*separators, ends], strict=True)))


@given(answers(), st.text(max_size=12), st.text(max_size=12))
def test_every_answer_that_the_grammar_reads_is_found_in_any_caption(
    answer: str, before: str, after: str
) -> None:
    whole = Span(0, len(answer))
    read = parse_answer(answer, whole, whole)
    found = answers_in(f"{before}<answer>{answer}</answer>{after}")
    if isinstance(read, Answer):
        assert read.judgments in found
        assert read.judgments in answers_in(f"{before} {answer} {after}")


@given(st.text(alphabet="TAVQMOCF=:, ;\n123<>/answer\u3000", max_size=60))
@example(LINE)
def test_nothing_is_raised_and_nothing_is_found_that_does_not_stand_there(caption: str) -> None:
    for judgments in answers_in(caption):
        for code in judgments.as_dict():
            assert code in caption.upper()


@pytest.mark.parametrize(
    "unit",
    [
        "TA=1,",
        f"{LINE},",
        f"{LINE} and so on ",
        "TA=1" + " " * 40,
        "TA" + " " * 40,
        "TA=" + "\n" * 40,
        "A",
        " ",
    ],
)
def test_a_hostile_caption_takes_linear_work(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The characters that the grammar is asked to read grow with the caption and not with its square."""
    read = 0

    def counted(text: str, content: Span, span: Span) -> object:
        nonlocal read
        read += content.end - content.start
        return parse_answer(text, content, span)

    monkeypatch.setattr(captions, "parse_answer", counted)
    caption = (unit * MAX_CAPTION_CHARS)[:MAX_CAPTION_CHARS]
    answers_in(caption)
    assert read <= 9 * len(caption), (
        "each character is in at most four windows of four pairs and five of five"
    )
