"""Reading lessons: which frames they show, and that an episode shows just these."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.trajectory import FrameSegmentRecord
from vrthinker.errors import InputError
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace
from vrthinker.world.files import clip_paths, make_world
from vrthinker.world.lessons import lesson_frames
from vrthinker.world.oracle import BehaviorMix, OracleEngine, truths_by_clip
from vrthinker.world.truth_reader import count, seen_indices
from vrthinker.world.words import first_frame_words
from vrthinker.world.world import PRESETS, ClipTruth, Difficulty, first_indices, sample_pair

PRESET_NAMES: tuple[Difficulty, ...] = ("easy", "medium", "hard")


def quarter(clip: ClipTruth, index: int) -> int:
    return sum(index >= first for first in first_indices(clip.n_frames)) - 1


def shows_something(clip: ClipTruth, index: int) -> bool:
    return clip.defects_at(index) != () or clip.hints_at(index) != ()


@given(st.sampled_from(PRESET_NAMES), st.integers(0, 10**6), st.integers(1, 4))
def test_a_lesson_takes_at_most_one_frame_of_each_quarter(
    name: Difficulty, seed: int, frames_per_clip: int
) -> None:
    pair = sample_pair(PRESETS[name], seed, 0)
    numbers = lesson_frames(pair, frames_per_clip, np.random.default_rng(seed))
    assert numbers == lesson_frames(pair, frames_per_clip, np.random.default_rng(seed))
    assert list(numbers) == sorted(set(numbers))
    assert all(type(number) is int for number in numbers)
    places = [pair.locate(number) for number in numbers]
    for which, clip in enumerate(pair.clips):
        own = [index for clip_number, index in places if clip_number == which]
        assert len(own) == frames_per_clip
        assert all(0 <= index < clip.n_frames for index in own)
        assert len({quarter(clip, index) for index in own}) == frames_per_clip


def test_lessons_show_something_often_and_every_quarter() -> None:
    hits = chances = hint_hits = hint_chances = 0
    quarters = Counter[int]()
    for i in range(400):
        pair = sample_pair(PRESETS["easy"], 3, i)
        for number in lesson_frames(pair, 1, np.random.default_rng(i)):
            which, index = pair.locate(number)
            clip = pair.clips[which]
            part = quarter(clip, index)
            quarters[part] += 1
            own = [j for j in range(clip.n_frames) if quarter(clip, j) == part and shows_something(clip, j)]
            if own:
                chances += 1
                hits += index in own
            if [j for j in own if not clip.defects_at(j)] == own != []:
                hint_chances += 1
                hint_hits += index in own
    # 0.6 by choice, and often enough by chance otherwise: some 2 to 4 frames of 8 show something.
    assert 0.66 < hits / chances < 0.86, (hits, chances)
    # One frame of 8 where there is but a hint.
    assert 0.45 < hint_hits / hint_chances < 0.85, (hint_hits, hint_chances)
    assert all(150 < quarters[part] < 250 for part in range(4)), quarters


def test_five_frames_of_four_quarters_are_refused() -> None:
    with pytest.raises(ValueError, match="got 5, allowed: 1 to 4"):
        lesson_frames(sample_pair(PRESETS["easy"], 0, 0), 5, np.random.default_rng(0))


def test_an_episode_shows_the_lessons_frames_and_is_answered_from_them(tmp_path: Path) -> None:
    config = PRESETS["medium"]
    truths = make_world(tmp_path, config, pairs=6, seed=1, workers=1)
    engine = OracleEngine(truths_by_clip(tmp_path, truths), BehaviorMix(oracle=0, immediate=1), calls=0)
    runner = EpisodeRunner(engine, EpisodeSettings(max_rounds=1))
    reader, cache = open_reader(), FrameCache(64 << 20)

    def item(number: int, first_frames: tuple[int, ...] | None) -> EpisodeItem:
        def open_workspace() -> Workspace:
            files = clip_paths(tmp_path, truths[number])
            return Workspace.open(*files, reader=reader, resize=ResizeSettings(), cache=cache)

        return EpisodeItem(str(number), truths[number].caption, open_workspace, first_frames=first_frames)

    wanted = [lesson_frames(pair, 1 + i % 4, np.random.default_rng(i)) for i, pair in enumerate(truths)]
    for finished in runner.run(item(i, numbers) for i, numbers in enumerate(wanted)):
        trajectory = finished.trajectory
        assert trajectory is not None, finished.error
        number = int(finished.item.id)
        pair, numbers = truths[number], wanted[number]
        assert trajectory.frames_seen == numbers
        assert len(trajectory.rounds) == 1
        assert [shown.frame_number for shown in trajectory.rounds[0].live] == list(numbers)
        segments = [segment for message in trajectory.first_input for segment in message.segments]
        assert [s.frame_number for s in segments if isinstance(s, FrameSegmentRecord)] == list(numbers)
        for name, frame in enumerate(numbers, start=1):
            assert first_frame_words(pair, frame, name, numbers) in trajectory.rounds[0].text
        assert trajectory.outcome.judgments == count(pair, seen_indices(pair, numbers))

    plain = runner.run_one(item(0, None))
    assert len(plain.frames_seen) == 8, "without a choice, the usual first frames are shown"
    with pytest.raises(InputError, match="frame_number: got 9999"):
        runner.run_one(item(0, (1, 9999)))


def test_the_usual_first_frames_are_those_that_the_world_is_built_around(tmp_path: Path) -> None:
    reader, cache = open_reader(), FrameCache(64 << 20)
    lengths = set()
    for name in PRESET_NAMES[:2]:
        folder = tmp_path / name
        for pair in make_world(folder, PRESETS[name], pairs=5, seed=4, workers=1):
            files = clip_paths(folder, pair)
            workspace = Workspace.open(*files, reader=reader, resize=ResizeSettings(), cache=cache)
            numbers = workspace.initial_frames(EpisodeSettings().initial_frames)
            places = [pair.locate(number) for number in numbers]
            for which, clip in enumerate(pair.clips):
                own = tuple(index for clip_number, index in places if clip_number == which)
                assert own == first_indices(clip.n_frames)
                lengths.add(clip.n_frames)
            for number in range(1, workspace.n_frames + 1):
                frame = workspace.frame(number)
                assert (frame.video - 1, frame.frame_index) == pair.locate(number)
    assert len(lengths) > 4
