"""An episode in words: what it thought first, what it asked for, what it found, what it changed to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clips import make_clip

from vrthinker import Judge
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.trajectory import Trajectory
from vrthinker.evals.world_truth import findings_of
from vrthinker.report.names import distinct_names
from vrthinker.report.story import explanation, first_overall, story
from vrthinker.world.groups import GroupOracle, sample_group, write_group
from vrthinker.world.nano import nano_settings, nano_templates
from vrthinker.world.world import PRESETS


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return make_clip(folder / "a.mp4", 9, size=(64, 96)), make_clip(folder / "b.mp4", 7, size=(64, 96))


def asks(overall: int, frames: str, thinking: str = "more", tool: str = "select_frames") -> str:
    answer = f"TA=1, VQ=1, MQ=1, OA={overall}, CF=2"
    return (
        f"<snapshot>s</snapshot><think>{thinking}</think><recommend answer>{answer}</recommend answer>"
        f'<tool_call>{{"name": "{tool}", "arguments": {{"target_frames": [{frames}]}}}}</tool_call>'
    )


def ends(overall: int, thinking: str = "done", motion: int = 1) -> str:
    answer = f"TA=1, VQ=1, MQ={motion}, OA={overall}, CF=1"
    return f"<snapshot>s</snapshot><think>{thinking}</think><answer>{answer}</answer>"


def judged(clips: tuple[Path, Path], *texts: str) -> Trajectory:
    return Judge(ScriptedEngine([list(texts)]))("a dog", *clips).trajectory


def test_what_explains_a_verdict_is_its_record(clips: tuple[Path, Path]) -> None:
    texts = [asks(0, "2, 12"), ends(2, "Frame 12 is blurred badly.")]
    verdict = Judge(ScriptedEngine([texts]))("a dog", *clips)
    told = verdict.explain()
    assert json.loads(json.dumps(told)) == told
    assert told["story"] == verdict.story
    first, second = told["rounds"]
    assert (first["round"], first["shown"], first["judgment"]["OA"]) == (1, [2, 12], 0)
    assert (first["refused"], second["refused"]) == ([], [])
    assert (first["snapshot"], first["thinking"]) == ("s", "more")
    assert (second["shown"], second["judgment"]["OA"]) == ([], 2)
    assert second["thinking"] == "Frame 12 is blurred badly."
    assert {2, 12} <= set(second["frames"])
    assert (explanation(verdict.trajectory, [{}, {12: "blur"}])["rounds"][1]["found"]) == {"12": "blur"}
    unknown = Judge(ScriptedEngine([[asks(0, "99"), ends(0)]]))("a dog", *clips).explain()["rounds"][0]
    assert unknown["shown"] == []
    assert "99" in unknown["refused"][0]
    wordless = Judge(ScriptedEngine([["no form at all"] * 9]))("a dog", *clips).explain()["rounds"][0]
    assert (wordless["snapshot"], wordless["thinking"], wordless["judgment"]) == (None, None, None)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ([ends(2)], "It answered from the first 8 frames: video 2 is better."),
        ([ends(0)], "It answered from the first 8 frames: a tie."),
        (
            [asks(0, "2, 4"), ends(2, "Frame 4 is blurred badly; all others are fine.")],
            "First a tie. It asked for 2 frames, wrote “Frame 4 is blurred badly”, and changed to video 2.",
        ),
        (
            [asks(1, "2"), asks(1, "13", "frame 7 is old news"), ends(1, motion=2)],
            "First video 1. It asked for 1 frame, and stayed with video 1. "
            "Then it asked for 1 frame, and stayed with video 1 but changed MQ.",
        ),
        (
            [asks(1, "2", tool="zoom"), ends(0)],
            "First video 1. It asked for frames and got none, and changed to a tie.",
        ),
        (
            [asks(1, "2"), "nothing of use"],
            "First video 1. It asked for 1 frame. It ended without a verdict: round 2: neither an answer nor",
        ),
    ],
)
def test_the_story_is_told_from_the_record(clips: tuple[Path, Path], texts: list[str], told: str) -> None:
    trajectory = judged(clips, *texts)
    assert story(trajectory).startswith(told[:-1])


def test_findings_say_what_and_where(clips: tuple[Path, Path]) -> None:
    trajectory = judged(clips, asks(0, "2, 14"), ends(2))
    found = [{}, {2: "noise", 14: "wrong color and noise"}]
    assert story(trajectory, found) == (
        "First a tie. It asked for 2 frames, found noise in 2 of video 1 and wrong color and noise in 14 of "
        "video 2, and changed to video 2."
    )
    assert first_overall(trajectory) == 0
    many = [{}, dict.fromkeys((2, 3, 4, 5, 6), "noise")]
    assert "and 2 more, and changed" in story(trajectory, many)


def test_what_the_worlds_judge_found_is_read_from_its_words(tmp_path: Path) -> None:
    group = sample_group(PRESETS["easy"], 7, 0, 6)
    paths = write_group(tmp_path, group)
    judge = Judge(GroupOracle([(group, paths)]), nano_settings(), templates=nano_templates())
    ranking = judge.rank(group.caption, paths)
    found = 0
    for one in ranking.comparisons:
        assert one.trajectory is not None
        pair = group.pair(one.first, one.second)
        for events in findings_of(one.trajectory):
            for number, words in events.items():
                clip, index = pair.locate(number)
                defects = pair.clips[clip].defects_at(index)
                assert len(words.split(" and ")) == len(defects) > 0
                found += 1
        assert story(one.trajectory, findings_of(one.trajectory)).endswith(".")
    assert found > 10


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/1.mp4", "x/2.mp4"], ["1.mp4", "2.mp4"]),
        (["/v/x/1.mp4", "/v/y/1.mp4"], ["x/1.mp4", "y/1.mp4"]),
        (["/v/x/s/1.mp4", "/v/y/s/1.mp4", "/v/y/s/2.mp4"], ["x/s/1.mp4", "y/s/1.mp4", "2.mp4"]),
        (["1.mp4", "x/1.mp4"], ["1.mp4", "x/1.mp4"]),
        (["a/1.mp4", "a/1.mp4"], ["1.mp4", "1.mp4"]),
    ],
)
def test_names_are_the_shortest_ends_that_differ(paths: list[str], names: list[str]) -> None:
    assert distinct_names(paths) == names
