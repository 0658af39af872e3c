"""Questions about single frames: their answers are what the decoded or drawn pixels show."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from world_eyes import color_name, see_clip

from vrthinker.video.open import open_reader
from vrthinker.world.frame_questions import QUESTIONS, frame_answers
from vrthinker.world.pixels import draw_clip, write_clip
from vrthinker.world.words import PHRASES, PLACES, frame_words, place
from vrthinker.world.world import (
    COLORS,
    DIRECTIONS,
    PRESETS,
    ClipTruth,
    Defect,
    Difficulty,
    Hint,
    PairTruth,
    WorldConfig,
    sample_pair,
)

PRESET_NAMES: tuple[Difficulty, ...] = ("easy", "medium", "hard")
TRIANGLE = 2.2
"""Units that the mass of a triangle may lie off its middle."""


def sampled(name: Difficulty, index: int, seed: int = 31) -> PairTruth:
    """A pair of a preset, of short clips."""
    frames = {"frames": (24, 40)} if name == "hard" else {}
    return sample_pair(WorldConfig.model_validate({**PRESETS[name].model_dump(), **frames}), seed, index)


def answered(pair: PairTruth, clip: ClipTruth, index: int) -> dict[str, int]:
    names = [question.name for question in QUESTIONS]
    return dict(zip(names, frame_answers(pair, clip, index), strict=True))


pairs = st.builds(
    lambda name, seed: sampled(name, 0, seed), st.sampled_from(PRESET_NAMES), st.integers(0, 10**6)
)


@given(pairs)
def test_every_answer_is_one_of_its_questions(pair: PairTruth) -> None:
    for clip in pair.clips:
        for index in range(clip.n_frames):
            found = frame_answers(pair, clip, index)
            assert all(type(answer) is int for answer in found)
            for question, answer in zip(QUESTIONS, found, strict=True):
                assert 0 <= answer < len(question.answers), question.name


def test_answers_that_have_a_phrase_have_one_of_the_worlds() -> None:
    known = {*PHRASES, *"".join(PLACES)}
    said = [answer for question in QUESTIONS for answer in question.answers if answer is not None]
    assert set(said) <= known
    assert len(said) == len(set(said)), "a phrase answers one question only, so that it means one thing"
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)


@given(pairs, st.data())
def test_answers_agree_with_what_is_written_about_the_frame(pair: PairTruth, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, sum(clip.n_frames for clip in pair.clips)))
    clip_number, index = pair.locate(number)
    clip = pair.clips[clip_number]
    found, said = answered(pair, clip, index), frame_words(pair, number, 1)
    assert said.split()[1] == COLORS[found["first_color"]]
    named = said.replace(" wrong color", "").split()[2] if len(pair.objects) > 1 else None
    colors = {number: color for number, color in enumerate(COLORS)} | {len(COLORS): None}
    assert colors[found["second_color"]] == named
    assert bool(found["noise"]) == (" noise" in said)
    assert "".join(PLACES)[found["place"]] == place(pair, number)
    assert bool(found["off_lane"]) == (" off lane" in said)
    hints = clip.hints_at(index)
    assert (bool(found["bars"]), bool(found["fade"])) == (Hint.BARS in hints, Hint.FADE in hints)


@given(pairs, st.data())
def test_a_frame_that_is_turned_over_its_diagonal_has_its_place_in_the_other_alphabet(
    pair: PairTruth, data: st.DataObject
) -> None:
    turned = pair.model_copy(update={"direction": (pair.direction + 2) % 4})
    clip = data.draw(st.sampled_from(pair.clips))
    index = data.draw(st.integers(0, clip.n_frames - 1))
    before, after = answered(pair, clip, index), answered(turned, clip, index)
    places = "".join(PLACES)
    assert places[after.pop("place")] == places[before.pop("place")].swapcase()
    assert after == before


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_centres_are_where_the_objects_are_drawn(name: Difficulty) -> None:
    """The pixel in the middle has the object's colour, and no pixel further off than its size has it."""
    checked = 0
    for number in range(4):
        pair = sampled(name, number)
        unit = pair.size / 56
        radius = 8.5 if len(pair.objects) == 1 else 6.5
        for clip in pair.clips:
            for index, frame in enumerate(draw_clip(pair, clip)):
                answers = answered(pair, clip, index)
                if answers["noise"] or answers["fade"]:
                    continue
                wanted = [answers["first_color"], answers["second_color"]][: len(pair.objects)]
                for (x, y), color in zip(pair.centres(clip, index), wanted, strict=True):
                    middle = frame[int(y * unit), int(x * unit)]
                    assert color_name(middle / 255) == COLORS[color], (pair.id, index)
                    rows, columns = np.nonzero((frame == middle).all(-1))
                    box = [(rows.min(), rows.max(), y), (columns.min(), columns.max(), x)]
                    for low, high, centre in box:
                        assert -radius <= low / unit - centre <= high / unit - centre <= radius
                    if pair.objects[wanted.index(color)][1] < 2:  # a circle or a square
                        assert (rows.mean() + 0.5) / unit == pytest.approx(y, abs=0.5)
                        assert (columns.mean() + 0.5) / unit == pytest.approx(x, abs=0.5)
                    checked += 1
    assert checked > 100


@pytest.mark.parametrize(("name", "count"), [("easy", 4), ("medium", 4), ("hard", 3)])
def test_answers_are_what_is_seen_in_the_decoded_file(name: Difficulty, count: int, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    reader = open_reader()
    for number in range(count):
        pair = sampled(name, number, seed=5)
        vertical = DIRECTIONS[pair.direction] in ("down", "up")
        for clip in pair.clips:
            write_clip(tmp_path / "clip.mp4", pair, clip)
            frames = reader.frames_at(tmp_path / "clip.mp4", range(clip.n_frames)).data
            sights = see_clip(list(frames), pair.caption)
            usual = np.median([sight.lane for sight in sights])
            for index, sight in enumerate(sights):
                where = f"{pair.id}, {pair.caption} frame {index}"
                answers = answered(pair, clip, index)
                if sight.color is not None:
                    assert sight.color == COLORS[answers["first_color"]], where
                assert bool(answers["noise"]) == ("noise" in sight.defects), where
                assert bool(answers["bars"]) == (sight.hint == "bars"), where
                assert bool(answers["fade"]) == (sight.hint == "fade"), where
                letter = "".join(PLACES)[answers["place"]]
                assert letter.isupper() == vertical, where
                middle = 9.0 + 2.0 * PLACES[vertical].index(letter) + 1.0
                assert abs(sight.along - middle) < 1.0 + TRIANGLE, where
                assert bool(answers["off_lane"]) == (abs(sight.lane - usual) > 6), where
                seen.update(defect.value for defect in clip.defects_at(index))
                seen.update(name for name in ("bars", "fade") if answers[name])
    assert {Defect.COLOR.value, Defect.NOISE.value, Defect.JUMP.value, "bars"} <= set(seen), seen
