"""The oracle: it is right when it may look, knows only what it was shown, and keeps the engines' protocol."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vrthinker.engine.base import (
    Choice,
    FinishReason,
    FrameSegment,
    Message,
    RoundLimits,
    RoundRequest,
    TextSegment,
    write_rounds,
)
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolError, ToolErrorKind, ToolOutcome
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.tools.select_frames import SelectFrames
from vrthinker.episode.trajectory import StopReason, TextRecord, Trajectory
from vrthinker.errors import EngineError, InputError
from vrthinker.evals.retrieval import Retrieval, tools_for
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace
from vrthinker.visibility import ShownFrame
from vrthinker.world.files import clip_paths, make_world, write_pairs
from vrthinker.world.nano import nano_templates
from vrthinker.world.oracle import Behavior, BehaviorMix, OracleEngine, truths_by_clip
from vrthinker.world.reading import read_round
from vrthinker.world.truth_reader import count, first_seen, hinted_gaps, look_at_hints, probes, seen_indices
from vrthinker.world.words import tool_call
from vrthinker.world.world import DEFECTS, PRESETS, Difficulty, Hint, PairTruth, WorldConfig, sample_pair

PAIRS: dict[Difficulty, int] = {"easy": 24, "medium": 12, "hard": 3}
MIXED = BehaviorMix(oracle=0.4, random_segment=0.2, random_frames=0.2, immediate=0.2)
ONLY = {behavior: BehaviorMix(**{"oracle": 0.0, behavior.value: 1.0}) for behavior in Behavior}
TEMPLATES = PromptTemplates.load()
READER, CACHE = open_reader(), FrameCache(128 << 20)


@dataclass(frozen=True)
class World:
    folder: Path
    config: WorldConfig
    truths: Sequence[PairTruth]

    def engine(self, truths: Sequence[PairTruth] | None = None, **options: Any) -> OracleEngine:
        by_clip = truths_by_clip(self.folder, self.truths if truths is None else truths)
        return OracleEngine(by_clip, **{"span": self.config.span[0], **options})

    def item(self, pair: PairTruth, seed: int = 0, *, swap: bool = False, **more: Any) -> EpisodeItem:
        first, second = clip_paths(self.folder, pair)
        files = (second, first) if swap else (first, second)
        return EpisodeItem(pair.id, pair.caption, lambda: workspace(*files), seed=seed, **more)


def workspace(first: Path, second: Path, **options: Any) -> Workspace:
    return Workspace.open(first, second, reader=READER, resize=ResizeSettings(), cache=CACHE, **options)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Difficulty, World]:
    folder = tmp_path_factory.mktemp("worlds")
    return {
        name: World(
            folder / name, config, make_world(folder / name, config, pairs=PAIRS[name], seed=5, workers=1)
        )
        for name, config in PRESETS.items()
    }


@pytest.fixture(scope="module")
def easy(worlds: Mapping[Difficulty, World]) -> World:
    return worlds["easy"]


def run(engine: OracleEngine, items: Sequence[EpisodeItem], **options: Any) -> dict[str, Trajectory]:
    """Episodes by pair, on the real runner."""
    settings = EpisodeSettings(**{"max_rounds": 9, **options.pop("settings", {})})
    found = {}
    # The oracle looks at no pixel, so none is decoded; prompts are compiled once.
    options = {"templates": TEMPLATES, "decode_ahead": False, **options}
    runner = EpisodeRunner(engine, settings, **options)
    for finished in runner.run(items):
        assert finished.trajectory is not None, finished.error
        found[finished.item.id] = finished.trajectory
    assert len(found) == len(items)
    return found


def texts(trajectory: Trajectory) -> list[str]:
    return [record.text for record in trajectory.rounds]


# Being right


@pytest.mark.parametrize("swap", [False, True], ids=["in order", "swapped"])
@pytest.mark.parametrize("name", list(PRESETS))
def test_with_enough_calls_it_is_always_right(
    name: Difficulty, swap: bool, worlds: Mapping[Difficulty, World]
) -> None:
    world = worlds[name]
    found = run(world.engine(calls=8), [world.item(pair, swap=swap) for pair in world.truths])
    calls = 0
    for pair in world.truths:
        trajectory = found[pair.id]
        wanted = pair.judgments.swapped() if swap else pair.judgments
        assert trajectory.outcome.judgments == wanted, (pair.id, trajectory.outcome)
        assert trajectory.well_formed
        assert all(not record.failures for record in trajectory.rounds)
        assert trajectory.outcome.confidence == 1, "nothing is left to look into"
        assert all(r.tool is None or r.tool.error is None for r in trajectory.rounds)
        marked = sum(len(hinted_gaps(clip)) for clip in pair.clips)
        assert bool(trajectory.tool_calls) == bool(marked)
        assert trajectory.tool_calls <= marked
        calls += trajectory.tool_calls
    assert calls > len(world.truths) / 2


@pytest.mark.parametrize("retrieval", [Retrieval.OWN, Retrieval.RANDOM, Retrieval.UNIFORM])
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_judgment_is_a_count_of_what_was_shown(
    name: Difficulty, retrieval: Retrieval, worlds: Mapping[Difficulty, World]
) -> None:
    world = worlds[name]
    items = [world.item(pair, seed) for seed, pair in enumerate(world.truths)]
    found = run(world.engine(mix=MIXED, calls=3), items, tools=tools_for(retrieval))
    for pair in world.truths:
        trajectory = found[pair.id]
        assert trajectory.outcome.judgments == count(pair, seen_indices(pair, trajectory.frames_seen))
        seen: set[int] = set()
        for record in trajectory.rounds[:-1]:
            seen |= {shown.frame_number for shown in record.live}
            assert record.recommendation is not None
            assert record.recommendation.judgments == count(pair, seen_indices(pair, seen))
        assert trajectory.well_formed


def test_its_looks_are_those_of_the_perfect_reader(worlds: Mapping[Difficulty, World]) -> None:
    for world in worlds.values():
        for calls in (0, 1, 3):
            found = run(world.engine(calls=calls), [world.item(pair) for pair in world.truths])
            for pair in world.truths:
                seen = seen_indices(pair, found[pair.id].frames_seen)
                assert list(seen) == list(look_at_hints(pair, world.config, calls))
                assert found[pair.id].tool_calls <= calls


def test_confidence_falls_with_the_hints_that_are_left(worlds: Mapping[Difficulty, World]) -> None:
    world = worlds["medium"]
    found = run(world.engine(mix=ONLY[Behavior.IMMEDIATE]), [world.item(pair) for pair in world.truths])
    levels = set()
    for pair in world.truths:
        marked = sum(len(hinted_gaps(clip)) for clip in pair.clips)
        assert found[pair.id].outcome.confidence == (1 if not marked else 2 if marked <= 2 else 3)
        levels.add(found[pair.id].outcome.confidence)
    assert len(levels) >= 2


def test_its_words() -> None:
    """A pair with every kind of event, frame by frame, in the words that judges are trained on."""
    pair = PairTruth.model_validate(HANDMADE)
    engine = OracleEngine(handmade_truths(pair), calls=2)
    session = engine.open([shows(pair, FIRST)])
    (first,) = write_rounds(engine, [RoundRequest(session)])
    assert first.text == (
        "<snapshot>video 1: 1 red at b; 2 red at c +1 pale bars 10; 3 red at e +2; "
        "4 blue wrong color off lane at f +1\n"
        "video 2: 5 red at b faint noise 34; 6 red at c +1; 7 red at h +5 too far 42; 8 red at j +2"
        "</snapshot>"
        "<think>video 1: TA 0 VQ 0 MQ 0 + 4 wrong color off lane = TA 1 VQ 0 MQ 1 sum 2\n"
        "video 2: TA 0 VQ 0 MQ 0 + nothing = TA 0 VQ 0 MQ 0 sum 0\n"
        "sums 2 to 0\n"
        "check 10 and 34 left 42</think>"
        "<recommend answer>TA=2, VQ=0, MQ=2, OA=2, CF=3</recommend answer>"
        '<tool_call>{"name": "select_frames", "arguments": '
        '{"target_frames": [10, 12, 14, 16, 34, 36, 38, 40]}}</tool_call>'
    )
    asked = shows(pair, [10, 12, 14, 16, 34, 36, 38, 40], outcome=1)
    (second,) = write_rounds(engine, [RoundRequest(session, (asked,))])
    assert second.text == (
        "<snapshot>video 1: 1 red; 2 red noise; 3 red noise; 4 red\n"
        "video 2: 5 red; 6 red; 7 red; 8 red</snapshot>"
        "<think>video 1: TA 1 VQ 0 MQ 1 + 2 noise = TA 1 VQ 1 MQ 1 sum 3\n"
        "video 2: TA 0 VQ 0 MQ 0 + nothing = TA 0 VQ 0 MQ 0 sum 0\n"
        "sums 3 to 0\n"
        "check 42 left nothing</think>"
        "<recommend answer>TA=2, VQ=2, MQ=2, OA=2, CF=2</recommend answer>"
        '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [42, 44, 46, 48]}}</tool_call>'
    )
    asked = shows(pair, [42, 44, 46, 48], outcome=2)
    (third,) = write_rounds(engine, [RoundRequest(session, (asked,))])
    assert third.text == (
        "<snapshot>video 2: 1 red; 2 red; 3 red off lane; 4 red</snapshot>"
        "<think>video 1: TA 1 VQ 1 MQ 1 + nothing = TA 1 VQ 1 MQ 1 sum 3\n"
        "video 2: TA 0 VQ 0 MQ 0 + 3 off lane = TA 0 VQ 0 MQ 1 sum 1\n"
        "sums 3 to 1\n"
        "done</think>"
        "<answer>TA=2, VQ=2, MQ=0, OA=2, CF=1</answer>"
    )
    assert (third.finish_reason, third.token_ids, third.error) == (FinishReason.STOP, None, None)


# Knowing no more than it was shown


def altered(
    pair: PairTruth, shown: Sequence[frozenset[int]], rng: np.random.Generator
) -> Iterator[PairTruth]:
    """Other truths that agree with a pair on every frame that was shown, hints included."""
    for number, clip in enumerate(pair.clips):
        for place, event in enumerate(clip.events):
            length = event.end_index - event.first_index
            if not event.hidden or (event.defects and any(map(event.covers, shown[number]))):
                continue
            start, end = event.gap
            defects = [defect.value for defect in DEFECTS if rng.random() < 0.5]
            spots = [
                first
                for first in range(start + 1, end - length + 1)
                if not defects or not shown[number] & set(range(first, first + length))
            ]
            if not spots:
                continue
            first = int(rng.choice(spots))
            change = {"first_index": first, "end_index": first + length, "defects": defects}
            events = list(clip.events)
            events[place] = type(event).model_validate({**event.model_dump(), **change})
            clips = list(pair.clips)
            clips[number] = type(clip).model_validate({**clip.model_dump(), "events": events, "seed": 1})
            yield PairTruth.model_validate({**pair.model_dump(), "clips": clips})


def test_a_text_never_depends_on_frames_that_were_not_shown(worlds: Mapping[Difficulty, World]) -> None:
    rng = np.random.default_rng(0)
    same = different = 0
    for world in worlds.values():
        for seed in range(1 if world.config.frames[1] < 100 else 3):
            for pair in world.truths:
                item = world.item(pair, seed)
                (before,) = run(world.engine(mix=MIXED, calls=2), [item]).values()
                shown = seen_indices(pair, before.frames_seen)
                for other in altered(pair, shown, rng):
                    if other.clips == pair.clips:
                        continue
                    (after,) = run(world.engine([other], mix=MIXED, calls=2), [item]).values()
                    assert texts(after) == texts(before), (pair.id, seed)
                    same += 1
                    different += other.judgments != pair.judgments
    assert same > 25
    assert different > 12, "most alterations change the true judgments, which the texts must not know"


def test_a_text_does_depend_on_frames_that_were_shown(easy: World) -> None:
    changed = 0
    for pair in easy.truths:
        (before,) = run(easy.engine(calls=2), [easy.item(pair)]).values()
        for number, clip in enumerate(pair.clips):
            events = tuple(e.model_copy(update={"defects": ()}) for e in clip.events)
            if not any(e.defects for e in clip.events):
                continue
            clips = list(pair.clips)
            clips[number] = clip.model_copy(update={"events": events})
            other = pair.model_copy(update={"clips": tuple(clips)})
            (after,) = run(easy.engine([other], calls=2), [easy.item(pair)]).values()
            assert texts(after) != texts(before)
            changed += 1
    assert changed > 10


def test_prompts_hold_nothing_of_the_truth_but_the_caption(easy: World, tmp_path: Path) -> None:
    """Two pairs of one caption and one form but different events are presented in the same words."""
    pair = easy.truths[1]
    twin = sample_pair(easy.config, 99, 4)
    assert twin.judgments != pair.judgments
    clips = {"clips": twin.clips, "objects": pair.objects, "direction": pair.direction}
    wrong = (pair.objects[0][0] + 1) % 4
    twin = twin.model_copy(
        update={**clips, "clips": tuple(c.model_copy(update={"wrong_color": wrong}) for c in twin.clips)}
    )
    write_pairs(tmp_path / "w", [twin])
    other = World(tmp_path / "w", easy.config, [twin])
    prompts = []
    for world, shown in ((easy, pair), (other, twin)):
        engine = world.engine(mix=ONLY[Behavior.RANDOM_FRAMES], calls=1)
        (trajectory,) = run(engine, [world.item(shown, 3)]).values()
        outcome = [message for record in trajectory.rounds for message in record.outcome_messages]
        prompts.append([*trajectory.first_input, *outcome])
        assert outcome
    assert prompts[0] == prompts[1]


# Seeds and behaviours


def test_equal_seeds_write_equal_texts_whatever_runs_beside(easy: World) -> None:
    items = [easy.item(pair, 1000 + i) for i, pair in enumerate(easy.truths)]
    engine = easy.engine(mix=MIXED)
    together = run(engine, items)
    one_by_one = run(easy.engine(mix=MIXED), items[::-1], concurrency=1)
    again = run(engine, items)
    for pair in easy.truths:
        assert texts(together[pair.id]) == texts(one_by_one[pair.id]) == texts(again[pair.id])
    other = run(engine, [easy.item(pair, 2000 + i) for i, pair in enumerate(easy.truths)])
    assert any(texts(other[pair.id]) != texts(together[pair.id]) for pair in easy.truths)


@pytest.mark.parametrize("seed", [-1, -(2**70), 0, 2**64, 2**200])
def test_any_integer_is_a_seed(seed: int, easy: World) -> None:
    (trajectory,) = run(easy.engine(mix=MIXED), [easy.item(easy.truths[0], seed)]).values()
    assert trajectory.outcome.judgments is not None


def test_behaviours_are_drawn_as_often_as_the_mix_says() -> None:
    pair = PairTruth.model_validate(HANDMADE)
    mix = BehaviorMix(oracle=4, random_segment=3, random_frames=2, immediate=1)
    engine = OracleEngine(handmade_truths(pair), mix, calls=2)
    first = shows(pair, FIRST)
    sessions, found = 2000, Counter[str]()
    for seed in range(sessions):
        session = engine.open([first], seed=seed)
        (result,) = write_rounds(engine, [RoundRequest(session)])
        engine.close(session)
        ending = result.text.split("\n")[-1].split("</think>")[0]
        checked = ending.removeprefix("check ").split(" left ")[0]
        names = checked.split(" and ") if ending.startswith("check") else []
        # A blind look is into one gap of each clip; only now and then these are the marked ones.
        blind = len(names) == 2 and names != ["10", "34"]
        look = "around" if ending == "look around" else "blind" if blind else "marked"
        found["done" if ending == "done" else look] += 1
    hit = 1 / 16  # of blind looks into the very gaps that are marked
    wanted = {"done": 0.1, "around": 0.2, "blind": 0.3 * (1 - hit), "marked": 0.4 + 0.3 * hit}
    squares = 0.0
    for what, share in wanted.items():
        squares += (found[what] - share * sessions) ** 2 / (share * sessions)
    assert squares < 16.27, (found, "chi-square with 3 degrees of freedom, p = 0.001")


def test_a_mix_of_nothing_is_refused(easy: World) -> None:
    engine = easy.engine(mix=BehaviorMix(oracle=0))
    with pytest.raises(EngineError, match="all weights are 0"):
        EpisodeRunner(engine).run_one(easy.item(easy.truths[0]))
    for weight in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="oracle"):
            BehaviorMix(oracle=weight)


def test_answering_at_once_takes_one_round(easy: World) -> None:
    for trajectory in run(
        easy.engine(mix=ONLY[Behavior.IMMEDIATE]), [easy.item(pair) for pair in easy.truths]
    ).values():
        assert len(trajectory.rounds) == 1
        assert texts(trajectory)[0].count("done</think>") == 1


@pytest.mark.parametrize("behavior", list(Behavior))
def test_without_calls_everyone_answers_at_once(behavior: Behavior, easy: World) -> None:
    engine = easy.engine(mix=ONLY[behavior], calls=0)
    for trajectory in run(engine, [easy.item(pair) for pair in easy.truths[:6]]).values():
        assert len(trajectory.rounds) == 1
        assert trajectory.outcome.judgments is not None


def test_random_frames_are_new_and_half_of_each_video(worlds: Mapping[Difficulty, World]) -> None:
    world = worlds["medium"]
    items = [world.item(pair, seed) for seed, pair in enumerate(world.truths)]
    lengths = Counter[int]()
    for trajectory in run(world.engine(mix=ONLY[Behavior.RANDOM_FRAMES], calls=3), items).values():
        seen = {shown.frame_number for shown in trajectory.rounds[0].live}
        for record in trajectory.rounds[:-1]:
            assert record.tool is not None
            numbers = record.tool.frame_numbers
            assert len(numbers) == 8
            assert sum(number <= trajectory.n_frames_1 for number in numbers) == 4
            assert not seen & set(numbers)
            seen |= set(numbers)
        lengths[len(trajectory.rounds)] += 1
    assert set(lengths) <= {2, 3, 4}
    assert len(lengths) > 1, "once, or as often as there are calls"


def test_random_frames_end_when_there_are_none_left(tmp_path: Path) -> None:
    config = WorldConfig(frames=(16, 16))
    pair = sample_pair(config, 0, 0)
    write_pairs(tmp_path, [pair])
    world = World(tmp_path, config, [pair])
    engine = world.engine(mix=ONLY[Behavior.RANDOM_FRAMES], calls=20)
    whole = 0
    for seed in range(24):
        (trajectory,) = run(engine, [world.item(pair, seed)], settings={"max_rounds": 30}).values()
        assert trajectory.outcome.judgments is not None
        assert trajectory.tool_calls <= 3
        assert all("look around" in text for text in texts(trajectory)[:-1])
        assert texts(trajectory)[-1].count("done</think>") == 1
        whole += trajectory.frames_seen == tuple(range(1, 33))
    assert whole > 2


def test_a_random_segment_is_one_gap_of_each_clip_picked_blindly(easy: World) -> None:
    engine = easy.engine(mix=ONLY[Behavior.RANDOM_SEGMENT])
    gaps = Counter[int]()
    items = [easy.item(pair, seed) for seed, pair in enumerate(easy.truths)]
    for trajectory in run(engine, items).values():
        assert trajectory.tool_calls == 1
        tool = trajectory.rounds[0].tool
        assert tool is not None
        quarters = [(number - 1) // 8 for number in tool.frame_numbers]
        assert len(set(quarters)) == 2
        assert sorted(q // 4 for q in set(quarters)) == [0, 1]
        gaps.update(set(quarters))
    assert set(gaps) == set(range(8))


def test_a_random_segment_is_one_gap_where_a_gap_takes_a_whole_call(
    worlds: Mapping[Difficulty, World],
) -> None:
    world, videos = worlds["hard"], set()
    for seed in range(4):
        items = [world.item(pair, seed) for pair in world.truths]
        for trajectory in run(world.engine(mix=ONLY[Behavior.RANDOM_SEGMENT]), items).values():
            assert (len(trajectory.rounds), trajectory.tool_calls) == (2, 1)
            tool = trajectory.rounds[0].tool
            assert tool is not None
            assert len(tool.frame_numbers) == 8
            own = {number <= trajectory.n_frames_1 for number in tool.frame_numbers}
            assert len(own) == 1
            videos |= own
    assert videos == {True, False}


def test_the_oracle_asks_into_marked_gaps_only(worlds: Mapping[Difficulty, World]) -> None:
    for world in worlds.values():
        for trajectory in run(world.engine(calls=8), [world.item(pair) for pair in world.truths]).values():
            pair = next(p for p in world.truths if p.id == trajectory.id)
            marked = {
                number * pair.clips[0].n_frames + 1 + index
                for number, clip in enumerate(pair.clips)
                for gap in hinted_gaps(clip)
                for index in probes(gap, world.config.span[0])
            }
            asked = [n for record in trajectory.rounds if record.tool for n in record.tool.frame_numbers]
            assert len(asked) == len(set(asked)), "it never asks twice"
            assert set(asked) <= marked


@pytest.mark.parametrize("name", list(PRESETS))
def test_it_asks_for_the_frames_that_nanos_prompt_offers(
    name: Difficulty, worlds: Mapping[Difficulty, World]
) -> None:
    """Behind each gap's frame, in the prompt of a real episode: to look into a gap is to copy its frames."""
    world, calls = worlds[name], 0
    items = [world.item(pair) for pair in world.truths]
    for trajectory in run(world.engine(calls=8), items, templates=nano_templates()).values():
        told = "".join(
            s.text if isinstance(s, TextRecord) else "<>" for s in trajectory.first_input[-1].segments
        )
        offers = re.findall(r"v[12] \d+:<>([\d, ]+)", told)
        menu = {int(offered.split(",")[0]): offered for offered in offers}  # a gap's name is its first frame
        assert len(menu) == 8
        left: list[int] | None = None
        for record in trajectory.rounds:
            decision = read_round(record.text).decision
            assert decision is not None
            if record.tool is None:
                assert not left
                continue
            calls += 1
            assert tool_call(list(record.tool.frame_numbers)) in record.text
            assert ", ".join(menu[gap] for gap in decision.checked) == ", ".join(
                map(str, record.tool.frame_numbers)
            )
            assert decision.left is not None
            todo = [*decision.checked, *decision.left]
            assert left is None or todo == left, "the list of the round before, from its beginning"
            assert todo == sorted(todo)
            left = list(decision.left)
    assert calls > len(world.truths) / 2


# Whose clips


def test_a_clip_judged_against_itself_is_refused(easy: World) -> None:
    first, second = clip_paths(easy.folder, easy.truths[0])
    for clip in (first, second):
        item = EpisodeItem("x", "a", lambda clip=clip: workspace(clip, clip))  # type: ignore[misc]
        with pytest.raises(EngineError, match="both clips of one pair"):
            EpisodeRunner(easy.engine()).run_one(item)


def test_clips_of_two_pairs_are_refused(easy: World) -> None:
    first, other = clip_paths(easy.folder, easy.truths[0])[0], clip_paths(easy.folder, easy.truths[1])[1]
    for files in ((first, other), (other, first)):
        item = EpisodeItem("x", "a", lambda files=files: workspace(*files))  # type: ignore[misc]
        with pytest.raises(EngineError, match="both clips of one pair"):
            EpisodeRunner(easy.engine()).run_one(item)


def test_frames_that_are_not_all_numbered_are_refused(easy: World) -> None:
    files = clip_paths(easy.folder, easy.truths[0])
    item = EpisodeItem("x", "a", lambda: workspace(*files, max_fps=4))
    with pytest.raises(EngineError, match="max_fps"):
        EpisodeRunner(easy.engine()).run_one(item)


def test_foreign_clips_are_refused_and_stop_nobody_else(easy: World, tmp_path: Path) -> None:
    stranger = sample_pair(easy.config, 77, 0)
    write_pairs(tmp_path, [stranger])
    strange = EpisodeItem("strange", "a", lambda: workspace(*clip_paths(tmp_path, stranger)))
    items = [easy.item(easy.truths[0]), strange, easy.item(easy.truths[1])]
    found = {finished.item.id: finished for finished in EpisodeRunner(easy.engine()).run(items)}
    assert "is no clip of this world" in str(found["strange"].error)
    assert all(found[easy.truths[i].id].trajectory is not None for i in range(2))


def test_relative_paths_are_those_of_the_same_clips(easy: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(easy.folder / "clips")
    files = [Path(path.name) for path in clip_paths(easy.folder, easy.truths[0])]
    item = EpisodeItem("x", "a", lambda: workspace(*files))
    trajectory = EpisodeRunner(easy.engine()).run_one(item)
    assert trajectory.outcome.judgments == easy.truths[0].judgments


# The protocol


HANDMADE: dict[str, Any] = {
    "id": "handmade-1",
    "size": 112,
    "fps": 8,
    "objects": [[0, 0]],
    "direction": 0,
    "bars": 0.45,
    "noise": 0.3,
    "clips": [
        {
            "n_frames": 32,
            "events": [
                # Frames 12 to 14 of the workspace; a hint on frame 9.
                {"first_index": 11, "end_index": 14, "defects": ["noise"], "gap": [8, 16], "hint": "bars"},
                {
                    "first_index": 24,
                    "end_index": 26,
                    "defects": ["color", "jump"],
                    "gap": [24, 32],
                    "hint": None,
                },
            ],
            "lane": 0.0,
            "start": 0.0,
            "jump": 14.0,
            "wrong_color": 2,
            "seed": 1,
        },
        {
            "n_frames": 32,
            "events": [
                # A hint on frame 33 with nothing behind it.
                {"first_index": 3, "end_index": 6, "defects": [], "gap": [0, 8], "hint": "fade"},
                # Frames 45 and 46; a hint on frame 49.
                {"first_index": 12, "end_index": 14, "defects": ["jump"], "gap": [8, 16], "hint": "speed"},
            ],
            "lane": 0.0,
            "start": 0.0,
            "jump": 14.0,
            "wrong_color": 2,
            "seed": 2,
        },
    ],
}
FOLDER = Path("/world")


def handmade_truths(pair: PairTruth) -> dict[str, PairTruth]:
    return truths_by_clip(FOLDER, [pair])


def no_pixels() -> np.ndarray[Any, Any]:
    raise AssertionError("the oracle looks at no pixel")


def shows(pair: PairTruth, numbers: Sequence[int], outcome: int = 0, folder: Path = FOLDER) -> Message:
    """A message with frames as the runner would show them."""
    frames = []
    for number in numbers:
        clip, index = pair.locate(number)
        key = (str(clip_paths(folder, pair)[clip]), index, 112, 112, 0, 0)
        frames.append(FrameSegment(ShownFrame(outcome, number), key, (112, 112), no_pixels))
    return Message("user", (TextSegment("frames:"), *frames))


FIRST = [1, 9, 17, 25, 33, 41, 49, 57]


@pytest.fixture
def pair() -> PairTruth:
    return PairTruth.model_validate(HANDMADE)


@pytest.fixture
def engine(pair: PairTruth) -> OracleEngine:
    return OracleEngine(handmade_truths(pair), max_sessions=3)


def test_sessions_are_opened_used_and_closed(engine: OracleEngine, pair: PairTruth) -> None:
    assert (engine.name, engine.policy_version, engine.max_sessions) == ("oracle", 0, 3)
    assert engine.collect() == []
    session = engine.open([shows(pair, FIRST)])
    engine.submit(RoundRequest(session))
    (result,) = engine.collect(0.1)
    assert result.session == session
    assert engine.collect() == []
    engine.close(session)
    engine.update_weights({}, 3)
    assert engine.policy_version == 3


def test_closing_drops_a_round_under_way(engine: OracleEngine, pair: PairTruth) -> None:
    session, other = engine.open([shows(pair, FIRST)]), engine.open([shows(pair, FIRST)])
    engine.submit(RoundRequest(session))
    engine.submit(RoundRequest(other))
    engine.close(session)
    assert [result.session for result in engine.collect()] == [other]
    engine.submit(RoundRequest(other))
    engine.shutdown()
    assert engine.collect() == []


def test_a_fork_writes_what_a_session_of_its_seed_writes(pair: PairTruth) -> None:
    engine = OracleEngine(handmade_truths(pair), MIXED)
    root = engine.open([shows(pair, FIRST)], seed=99)
    forks = engine.fork(root, [1, 2, 3, 4, 5, 6, 7, 8])
    opened = [engine.open([shows(pair, FIRST)], seed=seed) for seed in range(1, 9)]
    forked = [result.text for result in write_rounds(engine, [RoundRequest(s) for s in forks])]
    assert forked == [result.text for result in write_rounds(engine, [RoundRequest(s) for s in opened])]
    assert len(set(forked)) > 1


def refusals(pair: PairTruth) -> dict[str, tuple[Callable[[Any], RoundRequest], str]]:
    form = RoundLimits(form=(Choice(("yes", "no")),))
    other = pair.model_copy(update={"id": "other-1"})
    file = str(clip_paths(FOLDER, pair)[1])
    beyond = FrameSegment(ShownFrame(1, 90), (file, 57), (112, 112), no_pixels)
    thinned = FrameSegment(ShownFrame(1, 42), (file, 18), (112, 112), no_pixels)
    return {
        "a guided round": (lambda s: RoundRequest(s, limits=form), "not guided"),
        "a frame that expires twice": (lambda s: RoundRequest(s, expired=(ShownFrame(1, 5),)), "not live"),
        "a showing again": (lambda s: RoundRequest(s, (shows(pair, [9]),)), "live already"),
        "another pair's frame": (lambda s: RoundRequest(s, (shows(other, [3], outcome=1),)), "other clips"),
        "a frame beyond the end": (lambda s: RoundRequest(s, (Message("user", (beyond,)),)), "other clips"),
        "another frame": (lambda s: RoundRequest(s, (Message("user", (thinned,)),)), "other clips"),
    }


@pytest.mark.parametrize("name", refusals(PairTruth.model_validate(HANDMADE)))
def test_a_request_that_is_refused_changes_nothing(name: str, engine: OracleEngine, pair: PairTruth) -> None:
    make, words = refusals(pair)[name]
    session, untouched = engine.open([shows(pair, FIRST)]), engine.open([shows(pair, FIRST)])
    write_rounds(engine, [RoundRequest(session), RoundRequest(untouched)])
    with pytest.raises(EngineError, match=words):
        engine.submit(make(session))
    assert engine.collect() == []
    asked = (shows(pair, [10, 12, 14, 16], outcome=1),)
    one, two = write_rounds(engine, [RoundRequest(session, asked), RoundRequest(untouched, asked)])
    assert one.text == two.text


def test_a_guided_judge_says_so_at_once(easy: World) -> None:
    runner = EpisodeRunner(easy.engine(), EpisodeSettings(guided=True))
    trajectory = runner.run_one(easy.item(easy.truths[0]))
    assert trajectory.outcome.stop_reason is StopReason.ENGINE_ERROR
    assert "not guided" in (trajectory.outcome.reason or "")


def test_no_frames_are_no_input(engine: OracleEngine) -> None:
    with pytest.raises(EngineError, match="shows no frame"):
        engine.open([Message("user", (TextSegment("hello"),))])


def test_frames_shown_with_the_first_round_are_read_too(engine: OracleEngine, pair: PairTruth) -> None:
    session = engine.open([shows(pair, FIRST)])
    (result,) = write_rounds(engine, [RoundRequest(session, (shows(pair, [12], outcome=1),))])
    assert "; 9 red noise" in result.text, "the ninth of the frames that it was shown, number 12"
    assert "2 red at c +1 pale bars 10" in result.text


def test_a_gap_is_resolved_by_what_is_found_in_it_or_by_looking_everywhere_in_it(pair: PairTruth) -> None:
    """Confidence is middle for one or two gaps that are not, low for the three at first."""
    for numbers, confidence in (
        ([12], 2),  # the noise is found
        ([36], 3),  # an event that shows nothing is not
        ([34, 36, 38], 3),
        ([34, 36, 38, 40], 2),  # nothing can be left between these
        ([12, 34, 36, 38, 40, 46], 1),
    ):
        engine = OracleEngine(handmade_truths(pair), ONLY[Behavior.IMMEDIATE])
        session = engine.open([shows(pair, FIRST)])
        request = RoundRequest(session, (shows(pair, numbers, outcome=1),))
        (result,) = write_rounds(engine, [request])
        assert result.text.endswith(f"CF={confidence}</answer>"), (numbers, result.text)


def test_a_tool_that_shows_nothing_ends_in_an_answer_from_what_is_known(easy: World) -> None:
    class Refusing(SelectFrames):
        """Shows nothing, whatever it is asked for."""

        def run(self, arguments: Any, context: ToolContext) -> ToolOutcome:
            return ToolError(ToolErrorKind.UNKNOWN_FRAME, "no frame today.")

    runner = EpisodeRunner(easy.engine(calls=3), tools=ToolRegistry([Refusing()]))
    pair = next(p for p in easy.truths if sum(len(hinted_gaps(clip)) for clip in p.clips) >= 2)
    trajectory = runner.run_one(easy.item(pair))
    assert trajectory.tool_calls == 0
    assert len(trajectory.rounds) == 4
    assert "<snapshot>nothing new</snapshot>" in texts(trajectory)[1]
    assert trajectory.outcome.judgments == count(pair, first_seen(pair))


# What the runner tells tools, and what it shows first


class Notebook(SelectFrames):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[ToolContext] = []

    def run(self, arguments: Any, context: ToolContext) -> ToolOutcome:
        self.told.append(context)
        outcome = super().run(arguments, context)
        return outcome if len(self.told) != 2 else FramesShown((2,))


def test_tools_are_told_where_the_episode_stands(worlds: Mapping[Difficulty, World]) -> None:
    world = worlds["medium"]
    notebook = Notebook()
    engine = world.engine(mix=ONLY[Behavior.RANDOM_FRAMES], calls=3)
    for seed in range(50):
        notebook.told.clear()
        item = world.item(world.truths[0], seed)
        (trajectory,) = run(engine, [item], tools=ToolRegistry([notebook])).values()
        if trajectory.tool_calls == 3:
            break
    first, second, third = notebook.told
    pair = world.truths[0]
    numbers = [clip.n_frames for clip in pair.clips]
    for context in notebook.told:
        assert (context.n_frames, context.n_frames_1) == (sum(numbers), numbers[0])
        assert (context.max_frames, context.seed) == (8, seed)
    assert [context.call_number for context in notebook.told] == [1, 2, 3]
    asked = [set(record.tool.frame_numbers) for record in trajectory.rounds if record.tool]
    assert first.shown == {shown.frame_number for shown in trajectory.rounds[0].live}
    assert len(first.shown) == 8
    assert second.shown == first.shown | asked[0]
    assert third.shown == second.shown | {2}


def test_the_texts_name_every_shown_frame_once_and_in_order(worlds: Mapping[Difficulty, World]) -> None:
    for world in (worlds["easy"], worlds["medium"]):
        items = [world.item(pair, seed) for seed, pair in enumerate(world.truths)]
        for trajectory in run(world.engine(mix=MIXED), items).values():
            for record in trajectory.rounds:
                inside = re.search(r"<snapshot>(.*)</snapshot>", record.text, re.DOTALL)
                assert inside is not None
                named = [int(n) for n in re.findall(r"(?:^|: |; )(\d+) ", inside[1], re.MULTILINE)]
                latest = max(shown.outcome for shown in record.live)
                assert named == list(range(1, sum(s.outcome == latest for s in record.live) + 1))


def test_speed_hints_send_it_into_the_gap_before(worlds: Mapping[Difficulty, World]) -> None:
    world = worlds["medium"]
    looked = 0
    for pair in world.truths:
        speeds = [
            (number, event)
            for number, clip in enumerate(pair.clips)
            for event in clip.events
            if event.hint is Hint.SPEED
        ]
        (trajectory,) = run(world.engine(calls=8), [world.item(pair)]).values()
        for number, event in speeds:
            asked = seen_indices(pair, trajectory.frames_seen)[number]
            assert any(event.gap[0] < i < event.gap[1] for i in asked)
            looked += 1
    assert looked


def test_truths_are_found_by_both_clips_absolute_paths(tmp_path: Path, pair: PairTruth) -> None:
    found = truths_by_clip(tmp_path / "a" / "..", [pair])
    assert found == dict.fromkeys(
        (str(tmp_path / "clips" / "handmade-1-1.mp4"), str(tmp_path / "clips" / "handmade-1-2.mp4")), pair
    )
    assert json.loads(pair.model_dump_json())["id"] == "handmade-1"


def test_numbers_of_first_frames_are_checked_like_any_others(easy: World) -> None:
    item = easy.item(easy.truths[0], first_frames=(1, 65))
    with pytest.raises(InputError, match="65"):
        EpisodeRunner(easy.engine()).run_one(item)
