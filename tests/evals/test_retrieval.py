"""What a call is answered with, when others pick the frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.grammar import ToolCall
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolOutcome
from vrthinker.episode.trajectory import Trajectory
from vrthinker.evals.retrieval import Retrieval, tools_for
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace

TEMPLATES = PromptTemplates.load()
OTHERS = (Retrieval.RANDOM, Retrieval.UNIFORM)


def ask(retrieval: Retrieval, asked: Sequence[int], **context: Any) -> ToolOutcome:
    given_ = {"n_frames": 64, "max_frames": 8, "n_frames_1": 32, **context}
    call = ToolCall("select_frames", {"target_frames": list(asked)})
    return tools_for(retrieval).execute(call, ToolContext(**given_))


def shown(retrieval: Retrieval, asked: Sequence[int], **context: Any) -> tuple[int, ...]:
    outcome = ask(retrieval, asked, **context)
    assert isinstance(outcome, FramesShown), outcome
    return outcome.frame_numbers


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[int], dict[str, Any]]:
    """A valid call about clips of any length, in an episode that has seen any frames."""
    first, second = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    numbers = st.integers(1, first + second)
    asked = draw(st.lists(numbers, min_size=1, max_size=12, unique=True))
    context = {
        "n_frames": first + second,
        "n_frames_1": first,
        "max_frames": 12,
        "shown": frozenset(draw(st.lists(numbers, max_size=first + second))),
        "seed": draw(st.integers(-(1 << 63), 1 << 63)),
        "call_number": draw(st.integers(1, 64)),
    }
    return asked, context


@given(calls(), st.sampled_from(OTHERS))
def test_as_many_distinct_frames_as_were_asked_for_half_of_each_video(
    call: tuple[list[int], dict[str, Any]], retrieval: Retrieval
) -> None:
    asked, context = call
    found = shown(retrieval, asked, **context)
    assert found == shown(retrieval, asked, **context), "a pure function"
    assert list(found) == sorted(set(found))
    assert len(found) == len(asked)
    assert set(found) <= set(range(1, context["n_frames"] + 1))
    assert all(type(number) is int for number in found)
    first = context["n_frames_1"]
    lengths = (first, context["n_frames"] - first)
    halves = (len(asked) - len(asked) // 2, len(asked) // 2)
    seen = context["shown"] if retrieval is Retrieval.RANDOM else frozenset()
    new = (
        sum(n not in seen for n in range(1, first + 1)),
        sum(n not in seen for n in range(first + 1, context["n_frames"] + 1)),
    )
    counts = (sum(number <= first for number in found), sum(number > first for number in found))
    if all(half <= left for half, left in zip(halves, new, strict=True)):
        assert counts == halves
    assert all(count <= length for count, length in zip(counts, lengths, strict=True))
    repeated = [number for number in found if number in seen]
    assert len(repeated) == max(0, len(asked) - sum(new)), (
        "what was shown comes again only when nothing else is left"
    )


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 1 << 40))
def test_random_calls_go_through_all_frames_before_one_comes_again(
    first: int, second: int, budget: int, seed: int
) -> None:
    total = first + second
    budget = min(budget, total)
    seen: set[int] = set()
    for number in range(1, 2 + total // budget):
        context = {"n_frames": total, "n_frames_1": first, "seed": seed, "call_number": number}
        found = shown(Retrieval.RANDOM, range(1, budget + 1), shown=frozenset(seen), **context)
        new = set(found) - seen
        assert len(new) == min(budget, total - len(seen))
        seen |= new
    assert len(seen) == total


def test_random_frames_are_spread_and_differ_by_seed_call_and_video() -> None:
    counts = dict.fromkeys(range(1, 65), 0)
    for seed in range(400):
        for number in shown(Retrieval.RANDOM, range(1, 9), seed=seed):
            counts[number] += 1
    # 3,200 draws over 64 frames: 50 each, with a standard deviation below 7.
    assert min(counts.values()) > 22
    assert max(counts.values()) < 80
    picks = {shown(Retrieval.RANDOM, range(1, 9), seed=s, call_number=c) for s in range(5) for c in (1, 2, 3)}
    assert len(picks) == 15
    found = shown(Retrieval.RANDOM, range(1, 9), seed=1)
    assert [n - 32 for n in found[4:]] != list(found[:4]), "the videos' picks are not each other's"


def test_uniform_grids_get_finer() -> None:
    first = shown(Retrieval.UNIFORM, range(1, 9))
    assert first == (5, 13, 21, 29, 37, 45, 53, 61)
    second = shown(Retrieval.UNIFORM, range(1, 9), call_number=2)
    third = shown(Retrieval.UNIFORM, range(1, 9), call_number=3)
    assert second == (3, 11, 19, 27, 35, 43, 51, 59)
    assert third == (7, 15, 23, 31, 39, 47, 55, 63)
    # With the first frames (1, 9, 17, 25, ...) they cover every second frame.
    first_frames = {1 + 8 * i for i in range(8)}
    assert set(first) | set(second) | set(third) | first_frames == set(range(1, 65, 2))
    assert shown(Retrieval.UNIFORM, [1]) == (17,)
    assert shown(Retrieval.UNIFORM, [1, 2, 3]) == (9, 25, 49), "the odd one is video 1's"


def test_own_shows_what_was_asked_for() -> None:
    assert shown(Retrieval.OWN, [9, 3, 3]) == (3, 9)
    assert shown(Retrieval.NONE, [9, 3]) == (3, 9)


@pytest.mark.parametrize("retrieval", OTHERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"target_frames": []},
        {"target_frames": [65]},
        {"target_frames": "all"},
        {"target_frames": [1.5]},
        {"frames": [1]},
        {},
    ],
)
def test_bad_calls_fail_as_they_always_do(retrieval: Retrieval, arguments: dict[str, Any]) -> None:
    context = ToolContext(64, 8, 32)
    for name in ("select_frames", "zoom"):
        call = ToolCall(name, arguments)
        wanted = tools_for(Retrieval.OWN).execute(call, context)
        assert not isinstance(wanted, FramesShown)
        assert tools_for(retrieval).execute(call, context) == wanted


def test_every_way_sees_the_same_schema() -> None:
    schemas = [tools_for(way).schemas() for way in Retrieval]
    assert all(schema == schemas[0] for schema in schemas)
    assert [tool["function"]["name"] for tool in schemas[0]] == ["select_frames"]


# In episodes


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return make_clip(folder / "a.mp4", 10, size=(56, 56)), make_clip(folder / "b.mp4", 3, size=(56, 56))


def round_text(asked: Sequence[int] | None) -> str:
    if asked is None:
        return "<snapshot>a</snapshot><think>b</think><answer>TA=1, VQ=0, MQ=2, OA=1</answer>"
    call = f'{{"name": "select_frames", "arguments": {{"target_frames": {list(asked)}}}}}'
    recommended = "<recommend answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</recommend answer>"
    return f"<snapshot>a</snapshot><think>b</think>{recommended}<tool_call>{call}</tool_call>"


def episode(
    clips: tuple[Path, Path], retrieval: Retrieval, script: Sequence[Sequence[int] | None], seed: int = 1
) -> Trajectory:
    reader, cache = open_reader(), FrameCache(8 << 20)

    def open_it() -> Workspace:
        return Workspace.open(*clips, reader=reader, resize=ResizeSettings(), cache=cache)

    runner = EpisodeRunner(
        ScriptedEngine([[round_text(asked) for asked in script]]),
        EpisodeSettings(initial_frames=4, window=1),
        templates=TEMPLATES,
        tools=tools_for(retrieval),
    )
    return runner.run_one(EpisodeItem("e", "a dog", open_it, seed=seed))


def test_an_episode_with_random_frames(clips: tuple[Path, Path]) -> None:
    """Clips of 10 and 3 frames, of which 2 and 2 are shown at first; 4, 3 and 6 are asked for."""
    script = [[1, 2, 3, 4], [1, 2], [99], [5, 6, 7], None]
    found = episode(clips, Retrieval.RANDOM, script)
    assert found == episode(clips, Retrieval.RANDOM, script).model_copy(
        update={"latency_seconds": found.latency_seconds}
    )
    tools = [record.tool for record in found.rounds if record.tool is not None]
    assert [len(tool.frame_numbers) for tool in tools] == [4, 2, 0, 3]
    assert [tool.error_kind is None for tool in tools] == [True, True, False, True]
    first = {shown.frame_number for shown in found.rounds[0].live}
    assert len(first) == 4
    picked = [number for tool in tools for number in tool.frame_numbers]
    assert len(picked) == len(set(picked)) == 9, "9 were left, in both clips"
    assert not first & set(picked)
    for record, after in zip(found.rounds, found.rounds[1:], strict=False):
        live = {frame.frame_number for frame in after.live if frame.outcome == record.round_number}
        assert record.tool is not None
        assert live == set(record.tool.frame_numbers), "the memory is that of what was shown"
    others = {
        str([r.tool and r.tool.frame_numbers for r in episode(clips, Retrieval.RANDOM, script, seed).rounds])
        for seed in range(6)
    }
    assert len(others) > 3


def test_an_episode_with_uniform_frames(clips: tuple[Path, Path]) -> None:
    found = episode(clips, Retrieval.UNIFORM, [[1, 2, 3, 4], [1], list(range(1, 9)), None])
    tools = [record.tool.frame_numbers for record in found.rounds if record.tool is not None]
    assert tools == [(3, 8, 11, 13), (3,), (2, 4, 6, 8, 10, 11, 12, 13)]
