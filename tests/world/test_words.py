"""The words for what is seen: places are those of the objects, hints are said where they can be seen."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.world import words
from vrthinker.world.words import (
    PHRASES,
    PLACES,
    first_frame_words,
    frame_words,
    gap_name,
    place,
    place_letter,
)
from vrthinker.world.world import (
    DIRECTIONS,
    PRESETS,
    ClipTruth,
    Difficulty,
    Hint,
    PairTruth,
    first_indices,
    sample_pair,
)

PRESET_NAMES: tuple[Difficulty, ...] = ("easy", "medium", "hard")
WIDTH = 2.0
"""Units of the picture that one letter stands for. The picture has 56."""
pairs = st.builds(
    lambda name, seed: sample_pair(PRESETS[name], seed, 0),
    st.sampled_from(PRESET_NAMES),
    st.integers(0, 10**6),
)


def first_numbers(pair: PairTruth) -> list[int]:
    offsets = (1, 1 + pair.clips[0].n_frames)
    return [
        offset + index
        for offset, clip in zip(offsets, pair.clips, strict=True)
        for index in first_indices(clip.n_frames)
    ]


# Places


@given(st.floats(9.0, 46.99), st.booleans())
def test_a_place_is_a_letter_for_every_two_units(along: float, vertical: bool) -> None:
    letter = place_letter(along, vertical=vertical)
    number = "ABCDEFGHIJKLMNOPQRS".index(letter.upper())
    assert letter.isupper() == vertical, "no letter stands for a distance from the left and from the top"
    assert 9.0 + WIDTH * number <= along < 9.0 + WIDTH * (number + 1)


@pytest.mark.parametrize("vertical", [False, True])
def test_what_lies_outside_of_all_places_is_at_the_nearest_one(vertical: bool) -> None:
    letters = PLACES[vertical]
    assert [place_letter(along, vertical=vertical) for along in (-20.0, 0.0, 8.9)] == [letters[0]] * 3
    assert [place_letter(along, vertical=vertical) for along in (47.0, 56.0, 900.0)] == [letters[-1]] * 3


def test_places_never_mean_two_things_and_are_no_numbers() -> None:
    assert len(set("".join(PLACES))) == len("".join(PLACES))
    assert all(letter.isalpha() for letter in "".join(PLACES))


@given(pairs, st.data())
def test_a_frames_place_is_that_of_the_last_object_along_the_way(
    pair: PairTruth, data: st.DataObject
) -> None:
    """The last one keeps to its lane whatever happens, and all objects are equally far along the way."""
    number = data.draw(st.integers(1, sum(clip.n_frames for clip in pair.clips)))
    clip, index = pair.locate(number)
    x, y = pair.centres(pair.clips[clip], index)[-1]
    horizontal = DIRECTIONS[pair.direction] in ("right", "left")
    assert place(pair, number) == place_letter(x if horizontal else y, vertical=not horizontal)
    assert place(pair, number).islower() == horizontal


@given(pairs)
def test_places_go_on_in_the_direction_of_the_caption(pair: PairTruth) -> None:
    rises = pair.caption.rstrip(".").split()[-1] in ("right", "down")
    offset = 1
    for clip in pair.clips:
        letters = [place(pair, offset + index) for index in range(clip.n_frames)]
        order = letters if rises else letters[::-1]
        assert order == sorted(order)
        assert len(set(letters)) > 4, "11 units without a leap are at least five places"
        offset += clip.n_frames


# Frames of the first input, and of calls


@given(pairs)
def test_a_leap_is_said_only_beside_the_frame_in_front_of_its_gap(pair: PairTruth) -> None:
    numbers = first_numbers(pair)
    for name, number in enumerate(numbers, start=1):
        clip_number, index = pair.locate(number)
        clip = pair.clips[clip_number]
        leaps = [e for e in clip.events if e.hint is Hint.SPEED and e.gap[1] == index]
        said = first_frame_words(pair, number, name, numbers)
        assert (" too far" in said) == bool(leaps)
        for event in leaps:
            before = number - (event.gap[1] - event.gap[0])
            assert pair.locate(before) == (clip_number, event.gap[0])
            assert " too far" not in first_frame_words(pair, number, name, set(range(number, 10_000)))
            assert " too far" in first_frame_words(pair, number, name, {before, number})
            named = gap_name(pair, clip_number, event.gap, 0.25)
            assert f" too far {named}" in first_frame_words(pair, number, name, numbers, 0.25)
            assert before < named < number
        # What is seen on the frame itself does not depend on other frames.
        alone = first_frame_words(pair, number, name, {number})
        assert alone == re.sub(r" \+[0-9]+( too far)?", "", said)


@given(pairs)
def test_how_far_objects_have_come_tells_of_a_leap(pair: PairTruth) -> None:
    """Between neighbours of the first input they come at most two places, and with a leap at least four."""
    numbers = first_numbers(pair)
    for name, number in enumerate(numbers, start=1):
        _, index = pair.locate(number)
        said = first_frame_words(pair, number, name, numbers)
        come = re.search(r" \+([0-9]+)(?= |$)", said)
        assert (come is None) == (index == 0), said
        if come is not None:
            before, here = (place(pair, n).upper() for n in (numbers[numbers.index(number) - 1], number))
            assert int(come[1]) == abs(ord(here) - ord(before))
            assert int(come[1]) >= 4 if " too far" in said else int(come[1]) <= 2


@given(pairs, st.data())
def test_a_leap_is_said_on_the_first_frame_behind_it(pair: PairTruth, data: st.DataObject) -> None:
    """Whichever frames are shown: lessons have others than those at the ends of gaps."""
    offset, clip = 1, pair.clips[0]
    indices = sorted(data.draw(st.sets(st.integers(0, clip.n_frames - 1), min_size=1, max_size=4)))
    numbers = [offset + index for index in indices]
    leaps = [event.first_index for event in clip.events if event.hint is Hint.SPEED]
    for before, index in zip([None, *indices], indices, strict=False):
        said = first_frame_words(pair, offset + index, 1, numbers)
        leapt = before is not None and any(before < leap <= index for leap in leaps)
        assert (" too far" in said) == leapt


def test_a_frame_with_two_hints_names_both_gaps_in_their_order() -> None:
    both = 0
    for name in ("medium", "hard"):
        for seed in range(300):
            pair = sample_pair(PRESETS[name], seed, 1)
            numbers = first_numbers(pair)
            for number in numbers:
                clip, index = pair.locate(number)
                hints = pair.clips[clip].hints_at(index)
                if len(hints) == 2:
                    assert hints[1] is Hint.SPEED
                    marked = [event.gap for event in pair.clips[clip].events if event.hint_index == index]
                    first, second = (gap_name(pair, clip, gap, 0.125) for gap in marked)
                    end = f" too far {first}{words.HINT_WORDS[hints[0]]} {second}"
                    assert first_frame_words(pair, number, 1, numbers, 0.125).endswith(end)
                    both += 1
    assert both > 10


@given(pairs, st.data())
def test_a_frame_of_a_call_says_neither_places_nor_hints(pair: PairTruth, data: st.DataObject) -> None:
    """It may be a frame of the first input again, and hints lead to gaps that were looked into by then."""
    total = sum(clip.n_frames for clip in pair.clips)
    number = data.draw(st.integers(1, total) | st.sampled_from(first_numbers(pair)))
    said = frame_words(pair, number, 1)
    assert said.startswith("1 ")
    assert not any(hint in said for hint in words.HINT_WORDS.values())
    assert " at " not in said
    assert first_frame_words(pair, number, 1, {number}).startswith(f"{said} at ")
    assert words.snapshot(pair, [number], first=False) == (
        f"<snapshot>video {1 + pair.locate(number)[0]}: {said}</snapshot>"
    )


@given(pairs, st.data(), st.booleans())
def test_a_snapshot_names_frames_by_their_place_in_what_was_shown(
    pair: PairTruth, data: st.DataObject, first: bool
) -> None:
    """Whatever their numbers are, and in whatever order they were shown; places go on over both videos."""
    total = sum(clip.n_frames for clip in pair.clips)
    numbers = data.draw(st.lists(st.integers(1, total), unique=True, min_size=1, max_size=12))
    content = words.snapshot(pair, numbers, first=first).removeprefix("<snapshot>").split("</snapshot>")[0]
    said = {}
    for line in content.split("\n"):
        video, _, entries = line.partition(": ")
        for entry in entries.split("; "):
            said[int(entry.split()[0])] = (video, entry)
    assert sorted(said) == list(range(1, len(numbers) + 1))
    for name, number in enumerate(numbers, start=1):
        entry = first_frame_words(pair, number, name, numbers) if first else frame_words(pair, number, name)
        assert said[name] == (f"video {pair.locate(number)[0] + 1}", entry)


def test_a_snapshot_of_nothing() -> None:
    pair = sample_pair(PRESETS["easy"], 0, 0)
    assert words.snapshot(pair, [], first=False) == "<snapshot>nothing new</snapshot>"


# The list of what is left


@pytest.mark.parametrize(
    ("checked", "left", "said"),
    [
        ([], [], "done"),
        ([], [2], "done"),
        ([2], [], "check 2 left nothing"),
        ([2, 5], [7], "check 2 and 5 left 7"),
        ([2], [5, 7, 8], "check 2 left 5 and 7 and 8"),
    ],
)
def test_decisions_carry_the_list_of_what_is_left(checked: list[int], left: list[int], said: str) -> None:
    assert words.decision(checked, left) == said


def test_everything_that_is_written_is_made_of_phrases_numbers_blanks_and_places() -> None:
    """So that a tokenizer that has them spells no word letter by letter."""
    known = sorted([*PHRASES, " ", *"".join(PLACES)], key=len, reverse=True)
    for name in PRESET_NAMES:
        for seed in range(20):
            pair = sample_pair(PRESETS[name], seed, 2)
            text = words.snapshot(pair, first_numbers(pair), first=True, span=0.25)
            text += "\n" + words.decision([2, 5], [7])
            position = 0
            while position < len(text):
                if text[position].isdigit():
                    position += 1
                    continue
                phrase = next((p for p in known if text.startswith(p, position)), None)
                assert phrase is not None, text[position : position + 20]
                position += len(phrase)


# What is drawn from


@given(pairs)
def test_objects_move_evenly_but_for_leaps(pair: PairTruth) -> None:
    for clip in pair.clips:
        way = [clip.travelled(index) for index in range(clip.n_frames)]
        steps = [b - a for a, b in pairwise(way)]
        leaps = {e.first_index for e in clip.events if e.hint is Hint.SPEED}
        plain = [step for index, step in enumerate(steps, start=1) if index not in leaps]
        assert max(plain) - min(plain) < 1e-9
        assert all(abs(steps[index - 1] - plain[0] - 7.0) < 1e-9 for index in leaps)
        assert way[0] == 12.0 + clip.start
        # Every clip has the same speed, so that a leap can be told by how far an object has come.
        assert abs(way[-1] + plain[0] - (way[0] + 11.0 + 7.0 * len(leaps))) < 1e-9


def test_a_clip_of_no_event_has_no_hint() -> None:
    clip = ClipTruth(n_frames=32, events=(), lane=0, start=0, jump=14, wrong_color=2, seed=1)
    assert {clip.hints_at(index) for index in range(32)} == {()}
