"""The synthetic world: what is planted, and that it can be seen in the decoded files."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from world_eyes import see_clip, shape_of

from vrthinker.episode.dimensions import Preference
from vrthinker.video.open import open_reader
from vrthinker.world.pixels import draw_clip, write_clip
from vrthinker.world.world import (
    COLORS,
    DEFECTS,
    DIRECTIONS,
    PRESETS,
    SHAPES,
    WORLD_COMMENT,
    ClipTruth,
    Defect,
    Difficulty,
    Event,
    Hint,
    PairTruth,
    WorldConfig,
    first_indices,
    judgments_from_counts,
    sample_pair,
    span_limits,
)

PRESET_NAMES: tuple[Difficulty, ...] = ("easy", "medium", "hard")


@st.composite
def configs(draw: st.DrawFn) -> WorldConfig:
    """Any configuration that is allowed, the odd ones included."""
    objects = draw(st.integers(1, 2))
    weights = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    fewest = draw(st.integers(16, 400))
    # Shares that put a span's limits exactly on and just beside whole frames.
    shares = st.one_of(st.floats(1e-6, 0.5), st.sampled_from([0.125, 0.25, 0.375, 0.5, 1 / 3]))
    marks = draw(st.sets(st.sampled_from([Hint.BARS, Hint.FADE]), min_size=1))
    hints = [*marks, *([Hint.SPEED] if draw(st.booleans()) else [])]
    return WorldConfig.model_validate(
        {
            "frames": (fewest, draw(st.integers(fewest, fewest + 60) | st.just(4096))),
            "objects": objects,
            "colors": draw(st.integers(objects + 1, len(COLORS))),
            "directions": draw(st.integers(1, len(DIRECTIONS))),
            "hidden_events": tuple(weight / sum(weights) for weight in weights),
            "same_number": draw(st.booleans()),
            "visible_event": (draw(st.floats(0, 1)), draw(st.floats(0, 1))),
            "span": tuple(sorted((draw(shares), draw(shares)))),
            "decoys": draw(st.floats(0, 1)),
            "hints": tuple(draw(st.permutations(hints))),
        }
    )


seeds, indices = st.integers(0, 2**40), st.integers(0, 999_999)


def gaps_of(clip: ClipTruth) -> list[tuple[int, int]]:
    bounds = [clip.n_frames * quarter // 4 for quarter in range(5)]
    return list(pairwise(bounds))


@given(configs() | st.sampled_from([PRESETS[name] for name in PRESET_NAMES]), seeds, indices)
def test_a_pair_is_a_function_of_configuration_seed_and_index(
    config: WorldConfig, seed: int, index: int
) -> None:
    before = str(np.random.get_state())
    pair = sample_pair(config, seed, index)
    sample_pair(config, seed + 1, index)
    assert sample_pair(config, seed, index) == pair
    assert str(np.random.get_state()) == before
    assert PairTruth.model_validate_json(pair.model_dump_json()) == pair, "what is stored is what was drawn"


@given(configs() | st.sampled_from([PRESETS[name] for name in PRESET_NAMES]), seeds, indices)
def test_events_lie_where_they_should(config: WorldConfig, seed: int, index: int) -> None:
    pair = sample_pair(config, seed, index)
    for clip in pair.clips:
        assert config.frames[0] <= clip.n_frames <= config.frames[1]
        gaps = gaps_of(clip)
        shown_first = {start for start, _ in gaps}
        covered: list[int] = []
        for event in clip.events:
            frames = range(event.first_index, event.end_index)
            start, end = event.gap
            assert event.gap in gaps
            assert len(frames) > 0
            assert [i for i in range(clip.n_frames) if event.covers(i)] == list(frames)
            covered += frames
            assert list(event.defects) == [defect for defect in DEFECTS if defect in event.defects]
            if event.hidden:
                assert set(frames) <= set(range(start + 1, end)), "a hidden event touches no first frame"
                shortest, longest = span_limits(config, end - start)
                assert 2 <= shortest <= len(frames) <= longest < end - start
                assert len(frames) >= config.span[0] * (end - start)
                assert event.hint in config.hints
                assert event.hint_index == (end if event.hint is Hint.SPEED else start)
                assert event.hint_index in shown_first, "a hint is on a frame of the first input"
            else:
                assert set(frames) & shown_first == {start}, "a visible event covers its first frame"
                assert frames.stop <= end
                assert event.hint_index is None
                assert event.defects, "a visible event shows something"
        assert len(covered) == len(set(covered)), "events never overlap"
        assert len({event.gap for event in clip.events}) == len(clip.events)
        assert clip.events == tuple(sorted(clip.events, key=lambda event: event.first_index))
        hidden = sum(event.hidden for event in clip.events)
        assert config.hidden_events[hidden] > 0
        assert len(clip.events) - hidden <= 1
        for i in range(clip.n_frames):
            hits = [event for event in clip.events if i in range(event.first_index, event.end_index)]
            assert clip.defects_at(i) == (hits[0].defects if hits else ())
            behind = [event.hint for event in clip.events if event.gap[0] == i and event.hint_index == i]
            before = [event.hint for event in clip.events if event.gap[1] == i and event.hint_index == i]
            assert clip.hints_at(i) == (*behind, *before), "of the gap behind the frame first"
    if config.same_number:
        assert len({sum(e.hidden for e in clip.events) for clip in pair.clips}) == 1


@given(configs(), seeds, indices)
def test_labels_follow_from_the_events(config: WorldConfig, seed: int, index: int) -> None:
    pair = sample_pair(config, seed, index)

    def worse(kinds: tuple[Defect, ...]) -> int:
        first, second = (
            sum(kind in event.defects for event in clip.events for kind in kinds) for clip in pair.clips
        )
        return 0 if first == second else 1 if first < second else 2

    assert pair.judgments.as_dict() == {
        "TA": worse((Defect.COLOR,)),
        "VQ": worse((Defect.NOISE,)),
        "MQ": worse((Defect.JUMP,)),
        "OA": worse((Defect.COLOR, Defect.NOISE, Defect.JUMP)),
    }
    assert pair.swapped().judgments == pair.judgments.swapped()
    assert pair.swapped().swapped() == pair
    assert pair.hidden_events == sum(
        1 for clip in pair.clips for event in clip.events if event.hint is not None and event.defects
    )


@given(configs(), seeds, indices)
def test_a_caption_says_what_moves_and_where_and_nothing_of_the_truth(
    config: WorldConfig, seed: int, index: int
) -> None:
    pair = sample_pair(config, seed, index)
    words = pair.caption.rstrip(".").split()
    named = [(words[1], words[2])]
    if config.objects == 2:
        named.append((words[5], words[6]))
        assert words[3:5] == ["and", "a"]
    assert named == [(COLORS[color], SHAPES[shape]) for color, shape in pair.objects]
    assert words[-1] == DIRECTIONS[pair.direction]
    assert words[-2] == ("moves" if config.objects == 1 else "move")
    colors = [color for color, _ in pair.objects]
    assert all(clip.wrong_color not in colors and clip.wrong_color < config.colors for clip in pair.clips)
    assert len(set(colors)) == len(colors)
    other = sample_pair(config, seed + 1, index)
    assert pair.model_copy(update={"clips": other.clips}).caption == pair.caption


def test_frame_numbers_run_on_from_the_first_clip_to_the_second() -> None:
    pair = sample_pair(PRESETS["medium"], 0, 3)
    first, second = (clip.n_frames for clip in pair.clips)
    assert first != second
    places = [pair.locate(number) for number in range(1, first + second + 1)]
    assert places == [(0, i) for i in range(first)] + [(1, i) for i in range(second)]


def test_odds_are_those_of_the_configuration() -> None:
    pairs = 800
    sampled = {name: [sample_pair(PRESETS[name], 17, i) for i in range(pairs)] for name in PRESET_NAMES}

    def near(found: float, wanted: float, out_of: int) -> bool:
        """Within 4.5 standard deviations."""
        return abs(found / out_of - wanted) <= 4.5 * math.sqrt(wanted * (1 - wanted) / out_of)

    for name in PRESET_NAMES:
        config, clips = PRESETS[name], [clip for pair in sampled[name] for clip in pair.clips]
        # With equal numbers in both clips, only one of a pair's draws is independent.
        own = clips[::2] if config.same_number else clips
        hidden = Counter(sum(event.hidden for event in clip.events) for clip in own)
        for number, share in enumerate(config.hidden_events):
            assert near(hidden[number], share, len(own)), (name, number)
        for some in (False, True):
            those = [clip for clip in clips if any(e.hidden for e in clip.events) == some]
            visible = sum(any(not e.hidden for e in clip.events) for clip in those)
            assert near(visible, config.visible_event[some], len(those)), (name, some)
        events = [event for clip in clips for event in clip.events if event.hidden]
        for defect in DEFECTS:
            shown = sum(defect in event.defects for event in events)
            assert near(shown, 0.5 * (1 - config.decoys), len(events)), (name, defect)
        empty = sum(not event.defects for event in events)
        assert near(empty, config.decoys + (1 - config.decoys) / 8, len(events)), name
        quarters = Counter(gaps_of(clip).index(e.gap) for clip in clips for e in clip.events if e.hidden)
        assert all(near(quarters[quarter], 1 / 4, len(events)) for quarter in range(4)), name
        inner = [
            event
            for clip in clips
            for event in clip.events
            if event.hidden and event.gap != gaps_of(clip)[-1]
        ]
        for hint in config.hints:
            assert near(sum(e.hint is hint for e in inner), 1 / len(config.hints), len(inner)), (name, hint)
        assert len({pair.model_dump_json() for pair in sampled[name]}) == pairs
    starts = Counter(
        event.first_index - event.gap[0]
        for pair in sampled["easy"]
        for clip in pair.clips
        for event in clip.events
        if event.hidden and event.end_index - event.first_index == 2
    )
    assert set(starts) == {1, 2, 3, 4, 5, 6}
    assert all(near(count, 1 / 6, sum(starts.values())) for count in starts.values())


@pytest.mark.parametrize(
    ("name", "digest"),
    [("easy", "5439f4bb00ad2527"), ("medium", "0dd6c66b7ed6d4b3"), ("hard", "5ea6c60326249681")],
)
def test_a_seed_means_the_same_pairs_as_ever(name: Difficulty, digest: str) -> None:
    """Judges are trained on these; whoever changes the sampling on purpose renews the digests."""
    found = hashlib.sha256()
    for index in range(50):
        found.update(json.dumps(sample_pair(PRESETS[name], 7, index).model_dump(mode="json")).encode())
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 57}, "even"),
        ({"size": 54}, "56"),
        ({"size": 2048}, "1024"),
        ({"fps": 0}, "1"),
        ({"frames": (15, 32)}, "frames: got (15, 32)"),
        ({"frames": (32, 31)}, "ascending"),
        ({"frames": (32, 4097)}, "4096"),
        ({"colors": 9}, "8"),
        ({"colors": 2, "objects": 2}, "colors: got 2"),
        ({"directions": 0}, "1"),
        ({"objects": 3}, "1 or 2"),
        ({"hidden_events": ()}, "add up to 1"),
        ({"hidden_events": (0.5, 0.6)}, "add up to 1"),
        ({"hidden_events": (1.5, -0.5)}, "add up to 1"),
        ({"hidden_events": (math.nan, 0.5)}, "finite"),
        ({"hidden_events": (0.2,) * 5}, "up to 4"),
        ({"visible_event": (1.5, 0.3)}, "less than or equal to 1"),
        ({"visible_event": (0.5, -0.3)}, "greater than or equal to 0"),
        ({"span": (0.0, 0.2)}, "span"),
        ({"span": (0.3, 0.2)}, "ascending"),
        ({"span": (0.3, 0.51)}, "0.5"),
        ({"span": (math.nan, 0.3)}, "finite"),
        ({"decoys": 1.1}, "1"),
        ({"decoys": math.inf}, "finite"),
        ({"hints": ()}, "bars or fade"),
        ({"hints": ("speed",)}, "bars or fade"),
        ({"hints": ("smoke",)}, "speed"),
        ({"bars": 0.0}, "0"),
        ({"noise": 0.6}, "0.5"),
        ({"color": 3}, "Extra inputs"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=r"1 validation error") as caught:
        WorldConfig.model_validate(changes)
    assert words in str(caught.value)


def stored(**changes: Any) -> dict[str, Any]:
    """A stored truth of 32 frames a clip: a hidden event in 8..16 and a visible one at 24."""
    hidden = {
        "first_index": 10,
        "end_index": 12,
        "defects": ["noise"],
        "gap": [8, 16],
        "hint": "speed",
    }
    visible = {
        "first_index": 24,
        "end_index": 26,
        "defects": ["color", "jump"],
        "gap": [24, 32],
        "hint": None,
    }
    clip = {
        "n_frames": 32,
        "events": [hidden, visible],
        "lane": 1.0,
        "start": -1.0,
        "jump": -14.0,
        "wrong_color": 2,
        "seed": 5,
    }
    pair = {
        "schema_version": 1,
        "id": "easy-0-000000",
        "size": 112,
        "fps": 8,
        "objects": [[0, 1]],
        "direction": 1,
        "bars": 0.45,
        "noise": 0.3,
        "clips": [clip, {**clip, "events": []}],
    }
    for place, value in changes.items():
        *path, last = place.split("__")
        at: Any = pair
        for part in path:
            at = at[int(part)] if part.isdigit() else at[part]
        at[int(last) if last.isdigit() else last] = value
    return pair


HOSTILE: dict[str, dict[str, Any]] = {
    "a billion frames": {"clips__0__n_frames": 10**9},
    "a number of a thousand digits": {"clips__0__n_frames": 10**999},
    "too few frames": {"clips__1__n_frames": 15},
    "another clip's gaps": {"clips__0__n_frames": 40},
    "frames that are no number": {"clips__0__n_frames": "many"},
    "a negative index": {"clips__0__events__0__first_index": -3},
    "an index far behind": {"clips__0__events__0__end_index": 10**9},
    "an event that ends before it begins": {"clips__0__events__0__end_index": 9},
    "an event beyond its gap": {"clips__0__events__0__end_index": 17},
    "a hidden event on a first frame": {"clips__0__events__0__first_index": 8},
    "a visible event beside its first frame": {"clips__0__events__1__first_index": 25},
    "a gap that is none": {"clips__0__events__0__gap": [9, 16]},
    "a gap that goes backwards": {"clips__0__events__0__gap": [16, 8]},
    "a gap of negative frames": {"clips__0__events__0__gap": [-8, 16]},
    "two events in one gap": {
        "clips__0__events__1": {
            "first_index": 13,
            "end_index": 15,
            "defects": [],
            "gap": [8, 16],
            "hint": "bars",
        }
    },
    "five events": {"clips__1__events": [stored()["clips"][0]["events"][1]] * 5},
    "a defect twice": {"clips__0__events__0__defects": ["noise", "noise"]},
    "an unknown defect": {"clips__0__events__0__defects": ["smell"]},
    "an unknown hint": {"clips__0__events__0__hint": "rumour"},
    "a speed hint for the last gap": {
        "clips__0__events__1": {
            "first_index": 26,
            "end_index": 28,
            "defects": [],
            "gap": [24, 32],
            "hint": "speed",
        }
    },
    "an object outside the picture": {"clips__0__lane": 1e9},
    "a lane that is no number": {"clips__0__lane": math.nan},
    "an endless jump": {"clips__0__jump": -math.inf},
    "a start far off": {"clips__0__start": 3.0},
    "an unknown colour": {"clips__0__wrong_color": 8},
    "a wrong colour that is right": {"clips__0__wrong_color": 0},
    "a seed below zero": {"clips__0__seed": -1},
    "a seed beyond": {"clips__0__seed": 2**31},
    "an id that is a path": {"id": "../../etc/passwd"},
    "an id that is nothing": {"id": ""},
    "an id of two lines": {"id": "a\nb"},
    "an id without end": {"id": "a" * 5000},
    "a size of a cinema": {"size": 10**6},
    "an odd size": {"size": 113},
    "a size of nothing": {"size": 0},
    "no frames a second": {"fps": 0},
    "no object": {"objects": []},
    "three objects": {"objects": [[0, 0], [1, 0], [3, 0]]},
    "an object of an unknown colour": {"objects": [[8, 0]]},
    "an object of an unknown shape": {"objects": [[0, -1]]},
    "twins": {"objects": [[0, 0], [0, 1]]},
    "nowhere": {"direction": 4},
    "dark bars": {"bars": -0.1},
    "noise that never ends": {"noise": 1e300},
    "one clip": {"clips": stored()["clips"][:1]},
    "another version": {"schema_version": 2},
    "something else": {"answer": 42},
}


def test_the_stored_truth_that_hostile_ones_are_made_of_is_fine() -> None:
    pair = PairTruth.model_validate_json(json.dumps(stored()))
    assert pair.judgments.as_dict() == {"TA": 2, "VQ": 2, "MQ": 2, "OA": 2}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=list(HOSTILE))
def test_a_truth_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PairTruth.model_validate_json(json.dumps(stored(**changes)))


# Pixels


def decode(path: Path) -> np.ndarray[Any, Any]:
    reader = open_reader()
    data: np.ndarray[Any, Any] = reader.frames_at(path, range(reader.probe(path).n_frames)).data
    return data


def sized(name: Difficulty, size: int) -> WorldConfig:
    return WorldConfig.model_validate({**PRESETS[name].model_dump(), "size": size})


def look(path: Path, pair: PairTruth, clip: ClipTruth, seen: Counter[str]) -> None:
    """Reads every frame of a clip's file and compares it with the truth."""
    write_clip(path, pair, clip)
    frames = decode(path)
    assert frames.shape == (clip.n_frames, pair.size, pair.size, 3)
    sights = see_clip(list(frames), pair.caption)
    leaps = {event.first_index for event in clip.events if event.hint is Hint.SPEED}
    for index, sight in enumerate(sights):
        where = f"{pair.id}, {pair.caption} frame {index}, events {clip.events}"
        assert sight.defects == set(clip.defects_at(index)), where
        marks = {e.hint.value for e in clip.events if e.hint and e.hint_index == index} - {"speed"}
        assert {sight.hint} - {None} == marks, where
        assert sight.leap == (index in leaps), where
        if sight.color is not None:
            wrong = Defect.COLOR in clip.defects_at(index)
            assert sight.color == COLORS[clip.wrong_color if wrong else pair.objects[0][0]], where
        seen.update(sight.defects)
        seen.update(marks)
        seen["leap"] += sight.leap
    if len(pair.objects) == 1 and pair.size >= 112:
        plain = next(i for i, sight in enumerate(sights) if not sight.defects and sight.hint is None)
        assert shape_of(frames[plain]) == SHAPES[pair.objects[0][1]]


@pytest.mark.parametrize(
    ("name", "size", "pairs"),
    [
        ("easy", 112, 6),
        ("easy", 56, 2),
        ("easy", 224, 1),
        ("medium", 112, 6),
        ("medium", 56, 2),
        ("medium", 224, 1),
        ("hard", 112, 1),
    ],
)
def test_what_is_planted_is_seen_in_the_decoded_files_and_nothing_else(
    name: Difficulty, size: int, pairs: int, tmp_path: Path
) -> None:
    seen: Counter[str] = Counter()
    for index in range(pairs):
        pair = sample_pair(sized(name, size), 11, index)
        for clip in pair.clips:
            look(tmp_path / "clip.mp4", pair, clip, seen)
    if pairs >= 6:
        wanted = {"color", "noise", "jump", "bars", *({"fade", "leap"} if name != "easy" else ())}
        assert wanted <= {what for what, count in seen.items() if count}, seen


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pairs"), [("easy", 60), ("medium", 60), ("hard", 12)])
@pytest.mark.parametrize("size", [56, 112, 224])
def test_what_is_planted_is_seen_in_many_more_files(
    name: Difficulty, size: int, pairs: int, tmp_path: Path
) -> None:
    seen: Counter[str] = Counter()
    for index in range(pairs):
        pair = sample_pair(sized(name, size), 12, index)
        for clip in pair.clips:
            look(tmp_path / "clip.mp4", pair, clip, seen)


def test_files_are_h264_of_the_promised_form_and_say_whose_they_are(tmp_path: Path) -> None:
    for name in PRESET_NAMES:
        pair = sample_pair(PRESETS[name], 2, 0)
        clip = pair.clips[0]
        path = tmp_path / f"{name}.mp4"
        write_clip(path, pair, clip)
        with av.open(str(path)) as container:
            assert "mp4" in container.format.name
            assert len(container.streams) == 1
            (stream,) = container.streams.video
            assert stream.codec_context.name == "h264"
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert container.metadata["comment"] == WORLD_COMMENT
            pts = [frame.pts for frame in container.decode(stream)]
            assert len(pts) == clip.n_frames
        info = open_reader().probe(path)
        assert (info.codec, info.width, info.height) == ("h264", pair.size, pair.size)
        assert info.n_frames == clip.n_frames
        assert info.fps == pytest.approx(pair.fps)
        assert not info.is_variable_frame_rate
        assert info.pts_seconds == pytest.approx([i / pair.fps for i in range(clip.n_frames)])
        assert info.comment == WORLD_COMMENT
        assert info.truncated is None


def test_drawing_and_encoding_depend_on_the_truth_alone(tmp_path: Path) -> None:
    pair = sample_pair(PRESETS["medium"], 4, 1)
    clip = pair.clips[0]
    once, again = list(draw_clip(pair, clip)), list(draw_clip(pair, clip))
    assert len(once) == clip.n_frames
    assert all(a.dtype == np.uint8 and np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    for name in ("one", "two"):
        write_clip(tmp_path / name, pair, clip)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def without(clip: ClipTruth, keep: Callable[[Event], tuple[Defect, ...]]) -> ClipTruth:
    events = tuple(event.model_copy(update={"defects": keep(event)}) for event in clip.events)
    return clip.model_copy(update={"events": events})


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_defect_changes_the_frames_of_its_event_only(name: Difficulty) -> None:
    changed = 0
    for index in range(4):
        pair = sample_pair(PRESETS[name], 6, index)
        # Noise draws random numbers, which later noise would have been drawn from.
        clip = without(pair.clips[1], lambda event: tuple(d for d in event.defects if d is not Defect.NOISE))
        clean = without(clip, lambda event: ())
        for i, (a, b) in enumerate(zip(draw_clip(pair, clip), draw_clip(pair, clean), strict=True)):
            assert np.array_equal(a, b) == (not clip.defects_at(i)), (pair.id, i)
            changed += bool(clip.defects_at(i))
    assert changed


@pytest.mark.parametrize("size", [58, 100, 338])
def test_sizes_that_are_no_multiple_of_the_grid_are_drawn_too(size: int, tmp_path: Path) -> None:
    pair = sample_pair(sized("easy", size), 0, 0)
    for clip in pair.clips:
        write_clip(tmp_path / "clip.mp4", pair, clip)
        assert decode(tmp_path / "clip.mp4").shape == (clip.n_frames, size, size, 3)


def test_preference_is_for_the_video_with_fewer_defects() -> None:
    judgments = judgments_from_counts((0, 2, 1), (1, 1, 1))
    assert (judgments.TA, judgments.VQ) == (Preference.VIDEO_1, Preference.VIDEO_2)
    assert (judgments.MQ, judgments.OA) == (Preference.TIE, Preference.TIE)


def test_first_frames_are_spread_evenly_from_the_first_one() -> None:
    assert first_indices(32) == (0, 8, 16, 24)
    assert first_indices(23) == (0, 5, 11, 17)
