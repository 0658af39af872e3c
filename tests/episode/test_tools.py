"""Tools: schema from the type, outcomes for good and bad calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.episode.grammar import FailureReason, ParseFailure, Span, ToolCall
from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolError, ToolErrorKind
from vrthinker.episode.tools.registry import MAX_CALLS, ToolRegistry
from vrthinker.episode.tools.select_frames import SelectFrames, SelectFramesArguments

CONTEXT = ToolContext(n_frames=64, max_frames=8)


def call(**arguments: object) -> ToolCall:
    return ToolCall("select_frames", arguments)


def test_the_schema_is_the_types() -> None:
    (schema,) = ToolRegistry().schemas()
    assert schema["function"]["name"] == "select_frames"
    parameters = schema["function"]["parameters"]
    assert parameters["required"] == ["target_frames"]
    assert parameters["properties"]["target_frames"]["items"] == {"type": "integer"}
    wanted = SelectFramesArguments.model_json_schema()["properties"]["target_frames"]["description"]
    assert parameters["properties"]["target_frames"]["description"] == wanted


def test_duplicates_are_dropped_and_order_is_ascending() -> None:
    outcome = ToolRegistry().execute(call(target_frames=[16, 12, 16, 1]), CONTEXT)
    assert outcome == FramesShown((1, 12, 16))


@pytest.mark.parametrize(
    ("asked", "shown", "note"),
    [
        ([3, 65], (3,), "unknown frame 65: frames are numbered 1 to 64."),
        (list(range(9, 0, -1)), tuple(range(2, 10)), "frame 1 not shown: at most 8 are shown in one round."),
        (
            [0, *range(1, 10)],
            tuple(range(1, 9)),
            "unknown frame 0: frames are numbered 1 to 64. frame 9",
        ),
        (list(range(1, 65)), tuple(range(1, 9)), "frame 9, 10, 11, 12, 13, 14, 15, 16 and 48 more not shown"),
    ],
)
def test_what_can_be_shown_is_shown_and_the_rest_is_told(
    asked: list[int], shown: tuple[int, ...], note: str
) -> None:
    outcome = ToolRegistry().execute(call(target_frames=asked), CONTEXT)
    assert isinstance(outcome, FramesShown)
    assert outcome.frame_numbers == shown
    assert (outcome.note or "").startswith(note)


def test_arguments_without_a_name_are_run_if_one_tool_takes_them() -> None:
    class Other(SelectFrames):
        name = "other"

    bare = ToolCall(None, {"target_frames": [3]})
    assert ToolRegistry().execute(bare, CONTEXT) == FramesShown((3,))
    several = ToolRegistry([SelectFrames(), Other()]).execute(bare, CONTEXT)
    assert isinstance(several, ToolError)
    assert "2 tools take its arguments: there is select_frames, other" in several.message


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        (call(target_frames=[]), ToolErrorKind.NOTHING_ASKED, "empty"),
        (call(target_frames=[0]), ToolErrorKind.UNKNOWN_FRAME, "0.*1 to 64"),
        (call(target_frames=[70, 65]), ToolErrorKind.UNKNOWN_FRAME, "70, 65"),
        (call(target_frames=[10**4000]), ToolErrorKind.UNKNOWN_FRAME, "1 to 64"),
        (call(target_frames="12"), ToolErrorKind.BAD_ARGUMENTS, "target_frames"),
        (call(target_frames=["12"]), ToolErrorKind.BAD_ARGUMENTS, "target_frames"),
        (call(target_frames=[True]), ToolErrorKind.BAD_ARGUMENTS, "target_frames"),
        (call(target_frames=[1.5]), ToolErrorKind.BAD_ARGUMENTS, "target_frames"),
        (call(frames=[1]), ToolErrorKind.BAD_ARGUMENTS, "target_frames"),
        (call(target_frames=[1], more=1), ToolErrorKind.BAD_ARGUMENTS, "more"),
        (ToolCall("crop", {}), ToolErrorKind.UNKNOWN_TOOL, "crop.*select_frames"),
        (ParseFailure(FailureReason.TOOL_SYNTAX, Span(0, 1), "not JSON"), ToolErrorKind.SYNTAX, "not JSON"),
    ],
)
def test_a_bad_call_says_what_was_wrong(
    asked: ToolCall | ParseFailure, kind: ToolErrorKind, words: str
) -> None:
    import re

    outcome = ToolRegistry().execute(asked, CONTEXT)
    assert isinstance(outcome, ToolError)
    assert outcome.kind is kind
    assert re.search(words, outcome.message)
    assert len(outcome.message) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(max_size=30), st.dictionaries(st.sampled_from(["target_frames", "x"]), JSON, max_size=2))
def test_any_call_gets_an_outcome(name: str, arguments: dict[str, object]) -> None:
    for tool in (name, "select_frames"):
        outcome = ToolRegistry().execute(ToolCall(tool, arguments), CONTEXT)
        if isinstance(outcome, FramesShown):
            assert all(1 <= number <= 64 for number in outcome.frame_numbers)
            assert 1 <= len(outcome.frame_numbers) <= 8


def test_calls_of_a_round_share_its_frames_and_show_none_twice() -> None:
    calls = [call(target_frames=[1, 2, 3]), call(target_frames=[3, 4, 70, 5, 6]), call(target_frames=[3])]
    context = replace(CONTEXT, max_frames=5)
    first, second, third = ToolRegistry().execute_all(calls, context)
    assert first == FramesShown((1, 2, 3))
    assert second == FramesShown(
        (4, 5),
        note="unknown frame 70: frames are numbered 1 to 64. frame 3 is shown by a call before this one. "
        "frame 6 not shown: at most 2 are shown after the calls before this one.",
    )
    assert isinstance(third, ToolError)
    assert third.kind is ToolErrorKind.TOO_MANY_FRAMES


def test_a_call_for_frames_that_the_round_already_shows_is_told_so() -> None:
    again = ToolRegistry().execute_all([call(target_frames=[1, 2]), call(target_frames=[2, 1])], CONTEXT)[1]
    assert isinstance(again, ToolError)
    assert again.kind is ToolErrorKind.SHOWN_BEFORE
    assert "frame 2, 1 is shown by a call before" in again.message


def test_a_round_runs_only_so_many_calls() -> None:
    calls = [call(target_frames=[number]) for number in range(1, MAX_CALLS + 4)]
    outcomes = ToolRegistry().execute_all(calls, replace(CONTEXT, max_frames=64))
    assert outcomes[:-1] == tuple(FramesShown((number,)) for number in range(1, MAX_CALLS + 1))
    assert outcomes[-1] == ToolError(
        ToolErrorKind.TOO_MANY_CALLS, f"3 more calls are not run: a round may have {MAX_CALLS}."
    )
    assert len(ToolRegistry().execute_all(calls[:MAX_CALLS], CONTEXT)) == MAX_CALLS
