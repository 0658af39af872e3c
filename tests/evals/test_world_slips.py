"""Slips are found where they were planted, and only there."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from world_play import SPAN, Stage, checked, known_pair

from vrthinker.episode.trajectory import Trajectory
from vrthinker.evals.world_gaps import new_frames
from vrthinker.evals.world_slip_kinds import INVENTED, MISSED, Slip, SlipKind
from vrthinker.evals.world_slips import Dialect, dialect_of, is_judged, slips_of
from vrthinker.world.files import make_world, write_pairs
from vrthinker.world.oracle import BehaviorMix
from vrthinker.world.world import (
    COLORS,
    DEFECTS,
    PRESETS,
    Defect,
    Event,
    Hint,
    PairTruth,
    first_indices,
)

K = SlipKind
Texts = list[str]
Brief = list[tuple[int, SlipKind, bool]]
"""Slips as (round, kind, whether it matters)."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("known")
    write_pairs(folder, [known_pair()])
    return Stage(folder)


@pytest.fixture(scope="module")
def texts(stage: Stage) -> Texts:
    """What the oracle writes about the known pair, in three rounds."""
    texts = [record.text for record in stage.oracle(known_pair()).rounds]
    assert len(texts) == 3
    return texts


def brief(slips: Sequence[Slip]) -> Brief:
    return [(slip.round_number, slip.kind, slip.matters) for slip in slips]


def found(trajectory: Trajectory, dialect: Dialect | None = None) -> Brief:
    slips = slips_of(trajectory, known_pair(), span=SPAN, dialect=dialect or Dialect())
    assert all(slip.detail.isprintable() and len(slip.detail) < 300 for slip in slips)
    return brief(slips)


def edited(texts: Texts, edits: dict[int, list[tuple[str, str]]]) -> Texts:
    """The texts with replacements in some rounds; every replacement finds its place once."""
    result = list(texts)
    for number, changes in edits.items():
        for old, new in changes:
            assert result[number - 1].count(old) == 1, (old, result[number - 1])
            result[number - 1] = result[number - 1].replace(old, new)
    return result


# The last round about video 2 without the event at frame 67, the 7th, and what follows from that.
WITHOUT_67 = [
    ("; 7 wrong color = TA 3 VQ 0 MQ 2 sum 5", " = TA 2 VQ 0 MQ 2 sum 4"),
    ("sums 4 to 5", "sums 4 to 4"),
    ("TA=1, VQ=2, MQ=1, OA=1", "TA=0, VQ=2, MQ=1, OA=0"),
]
TOTAL = "TA 3 VQ 0 MQ 2 sum 5"
LISTED = f"2 wrong color off lane; 7 wrong color = {TOTAL}"
ANSWER = "TA=1, VQ=2, MQ=1, OA=1"

NOTHING_NEW = [
    (
        "video 2: 1 yellow; 2 red wrong color off lane; 3 red wrong color off lane; 4 yellow; 5 yellow; "
        "6 yellow; 7 red wrong color; 8 yellow",
        "nothing new",
    ),
    (f"TA 1 VQ 0 MQ 1 + {LISTED}", "TA 1 VQ 0 MQ 1 + nothing = TA 1 VQ 0 MQ 1 sum 2"),
    ("sums 4 to 5", "sums 4 to 2"),
    (ANSWER, "TA=2, VQ=2, MQ=0, OA=2"),
]
NO_SUCH_FRAME = [(2, K.FRAMES_ASKED, True)]

PLANTED: dict[str, tuple[dict[int, list[tuple[str, str]]], Brief]] = {
    "nothing": ({}, []),
    "text outside tags": ({2: [("<snapshot>", "Well. <snapshot>")]}, [(2, K.FORM, True)]),
    "a strange word": ({2: [("2 yellow", "2 shiny yellow")]}, [(2, K.FORM, True)]),
    "findings that cannot be read": ({1: [("sums 0 to 2\n", "")]}, [(1, K.FORM, True)]),
    "no verdict": ({3: [(f"{ANSWER}, CF=1", "TA=1")]}, [(3, K.FORM, True)]),
    "a frame without anything left out": ({2: [("2 yellow; ", "")]}, [(2, K.FRAMES_LISTED, False)]),
    "a frame with an event left out": (
        {3: [("7 red wrong color; ", ""), *WITHOUT_67]},
        [(3, K.FRAMES_LISTED, True)],
    ),
    "a frame twice": ({2: [("2 yellow", "2 yellow; 2 yellow")]}, [(2, K.FRAMES_LISTED, False)]),
    "a frame too many": ({2: [("8 yellow", "8 yellow; 9 yellow")]}, [(2, K.FRAMES_LISTED, False)]),
    "another frame's name": (
        {2: [("2 yellow", "3 yellow")]},
        [(2, K.FRAMES_LISTED, False), (2, K.FRAMES_LISTED, False)],
    ),
    "a frame's number in place of its name": (
        {3: [("7 red wrong color", "67 red wrong color"), ("; 7 wrong color", "; 67 wrong color")]},
        [(3, K.FRAMES_LISTED, True), (3, K.FRAMES_LISTED, True)],
    ),
    "a hint on a frame that there is not": (
        {
            1: [
                ("off lane at J +4 too far 64", "off lane at J +4 too far 64; 9 yellow at E pale bars 99"),
                ("left 49 and 64", "left 49 and 64 and 99"),
            ],
            2: [("left nothing", "left 99")],
        },
        [(1, K.FRAMES_LISTED, True)],
    ),
    "wrong color missed": (
        {3: [("7 red wrong color", "7 yellow"), *WITHOUT_67]},
        [(3, K.COLOR_MISSED, True)],
    ),
    "wrong color invented": ({3: [("8 yellow", "8 red wrong color")]}, [(3, K.COLOR_INVENTED, True)]),
    "noise invented": ({3: [("4 yellow", "4 yellow noise")]}, [(3, K.NOISE_INVENTED, True)]),
    "off lane missed": (
        {3: [("3 red wrong color off lane", "3 red wrong color")]},
        [(3, K.JUMP_MISSED, True)],
    ),
    "off lane invented": ({3: [("8 yellow", "8 yellow off lane")]}, [(3, K.JUMP_INVENTED, True)]),
    "color": ({3: [("4 yellow", "4 green")]}, [(3, K.COLOR_WORD, True)]),
    "another hint": ({1: [(" pale bars", " faint noise")]}, [(1, K.HINT_WORD, False)]),
    "a hint that names no gap": ({1: [(" too far 64", " too far"), (" pale bars 49", " pale bars")]}, []),
    "an event at its second frame": ({3: [("+ 2 ", "+ 3 ")]}, [(3, K.EVENTS, True)]),
    "an event twice": (
        {
            3: [
                (LISTED, LISTED.replace("2", "2 off lane; 3", 1).replace(TOTAL, "TA 3 VQ 0 MQ 3 sum 6")),
                ("sums 4 to 5", "sums 4 to 6"),
            ]
        },
        [(3, K.EVENTS, True)],
    ),
    "an event of the other video": (
        {
            3: [
                ("+ nothing = TA 2 VQ 1 MQ 1 sum 4", "+ 7 wrong color = TA 3 VQ 1 MQ 1 sum 5"),
                ("; 7 wrong color = TA 3 VQ 0 MQ 2 sum 5", " = TA 2 VQ 0 MQ 2 sum 4"),
                ("sums 4 to 5", "sums 5 to 4"),
                (ANSWER, "TA=2, VQ=2, MQ=1, OA=2"),
            ]
        },
        [(3, K.EVENTS, True), (3, K.EVENTS, True)],
    ),
    "a tally begins wrong": (
        {
            3: [
                (
                    f"TA 1 VQ 0 MQ 1 + {LISTED}",
                    f"TA 2 VQ 0 MQ 1 + {LISTED}".replace(TOTAL, "TA 4 VQ 0 MQ 2 sum 6"),
                ),
                ("sums 4 to 5", "sums 4 to 6"),
            ]
        },
        [(3, K.SUM, True)],
    ),
    "a tally ends wrong": (
        {
            3: [
                ("TA 3 VQ 0 MQ 2 sum 5", "TA 3 VQ 1 MQ 2 sum 6"),
                ("sums 4 to 5", "sums 4 to 6"),
                ("VQ=2", "VQ=0"),
            ]
        },
        [(3, K.SUM, True)],
    ),
    "a wrong sum": ({3: [("sum 5", "sum 6"), ("sums 4 to 5", "sums 4 to 6")]}, [(3, K.SUM, True)]),
    "sums copied wrong": ({3: [("sums 4 to 5", "sums 5 to 4"), ("OA=1", "OA=2")]}, [(3, K.SUM, True)]),
    "a gap lost from the list": ({1: [("left 49 and 64", "left 64")]}, [(1, K.TO_DO, True)]),
    "the list in another order": ({1: [("left 49 and 64", "left 64 and 49")]}, [(1, K.TO_DO, True)]),
    "a gap stays on the list": ({2: [("left nothing", "left 64")]}, [(2, K.TO_DO, True)]),
    "no list": ({1: [(" left 49 and 64", "")]}, [(1, K.TO_DO, True)]),
    "it gives up": (
        {
            2: [
                ("check 49 and 64 left nothing", "done"),
                ("<recommend answer>", "<answer>"),
                ("</recommend answer>", "</answer>"),
                (
                    '<tool_call>{"name": "select_frames", "arguments": {"target_frames": '
                    "[49, 51, 52, 54, 64, 66, 67, 69]}}</tool_call>",
                    "",
                ),
            ]
        },
        [(2, K.GAP_LEFT, True), (2, K.GAP_LEFT, True)],
    ),
    "the answer": ({3: [("OA=1", "OA=2")]}, [(3, K.ANSWER, True)]),
    "a dimension of the answer": ({3: [("TA=1", "TA=0")]}, [(3, K.ANSWER, False)]),
    "a recommended answer": ({1: [("OA=1", "OA=0")]}, [(1, K.ANSWER, False)]),
    "a frame beside": (
        {2: [("67, 69]", "67, 68]")], 3: [("8 yellow", "8 red wrong color")]},
        [(2, K.FRAMES_ASKED, True)],
    ),
    "a call for a frame too many": ({2: [("67, 69]", "67, 69, 77]")]}, [(2, K.FRAMES_ASKED, True)]),
    "no such frame": ({2: [("49, 51, 52, 54, 64, 66, 67, 69", "999")], 3: NOTHING_NEW}, NO_SUCH_FRAME),
    "done, and a call": ({2: [("check 49 and 64 left nothing", "done")]}, [(2, K.FRAMES_ASKED, True)]),
    "looks around, at the right frames": ({2: [("check 49 and 64 left nothing", "look around")]}, []),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_slip_in_the_words_is_found_where_it_is(name: str, stage: Stage, texts: Texts) -> None:
    edits, expected = PLANTED[name]
    trajectory = stage.texts(edited(texts, edits), known_pair())
    assert found(trajectory) == expected, slips_of(trajectory, known_pair(), span=SPAN)


DETAILS = {
    "a frame with an event left out": ["leaves out frame 67 (7th of the call), which shows wrong color"],
    "a frame too many": ["lists a frame no. 9 of the call, which has 8"],
    "another frame's name": [
        "leaves out frame 29 (2nd of the call), which shows nothing",
        "lists frame 31 (3rd of the call) a second time",
    ],
    "noise invented": ["frame 54 (4th of the call) shows nothing, read as noise"],
    "another hint": ["frame 48 (5th of the first input) shows pale bars, read as faint noise on frame 48"],
    "an event at its second frame": [
        "video 2: lists 52 (3rd) wrong color off lane; 67 (7th) wrong color, "
        "its snapshot says 51 (2nd) wrong color off lane; 67 (7th) wrong color"
    ],
    "a tally ends wrong": [
        "video 2: 1/0/1 + 51 (2nd) wrong color off lane; 67 (7th) wrong color is 3/0/2, written as 3/1/2"
    ],
    "the list in another order": [
        "says that 63 (7th), 48 (5th) is left, its own list has 48 (5th), 63 (7th)"
    ],
    "it gives up": [
        "read a hint to the gap behind 48 (5th) and answers, with",
        "read a hint to the gap behind 63 (7th) and answers, with",
    ],
    "a frame beside": ["looks behind 48 (5th), 63 (7th) and asks for 49, 51, 52, 54, 64, 66, 67, 68, wanted"],
}


@pytest.mark.parametrize("name", DETAILS)
def test_slips_are_told_with_frame_numbers(name: str, stage: Stage, texts: Texts) -> None:
    """A judge says places in a message; people look frames up by their numbers."""
    trajectory = stage.texts(edited(texts, PLANTED[name][0]), known_pair())
    details = [slip.detail for slip in slips_of(trajectory, known_pair(), span=SPAN)]
    assert len(details) == len(DETAILS[name])
    for detail, begins in zip(details, DETAILS[name], strict=True):
        assert detail.startswith(begins)


def test_a_frame_under_the_other_video(stage: Stage, texts: Texts) -> None:
    first = re.sub(r"\nvideo 2: (5 yellow at \w pale bars 49); ", r"; \1\nvideo 2: ", texts[0], count=1)
    assert found(stage.texts([first, *texts[1:]], known_pair())) == [(1, K.FRAMES_LISTED, True)]


@pytest.mark.parametrize(("name", "at"), [(1, "z"), (8, "z"), (8, "")])
def test_a_place(name: int, at: str, stage: Stage, texts: Texts) -> None:
    pattern = rf"(\b{name} \w+(?: wrong color off lane)?) at \w"
    first, count = re.subn(pattern, rf"\1 at {at}" if at else r"\1", texts[0])
    assert count == 1
    assert found(stage.texts([first, *texts[1:]], known_pair())) == [(1, K.PLACE, False)]


@pytest.mark.parametrize(
    ("old", "new"), [("at P +1 faint", "at P +2 faint"), ("5 yellow at Q", "5 yellow at Q +1")]
)
def test_how_far_an_object_has_come(old: str, new: str, stage: Stage, texts: Texts) -> None:
    changed = edited(texts, {1: [(old, new)]})
    assert found(stage.texts(changed, known_pair())) == [(1, K.PLACE, False)]


def test_a_judge_that_does_not_say_how_far_objects_have_come(stage: Stage, texts: Texts) -> None:
    first = (
        re.sub(r" \+[0-9](?! off)", "", texts[0].split("<think>")[0])
        + "<think>"
        + texts[0].split("<think>")[1]
    )
    assert found(stage.texts([first, *texts[1:]], known_pair())) == []


def test_the_same_gap_marked_by_the_frame_before_it(stage: Stage, texts: Texts) -> None:
    first = re.sub(r"(7 yellow at \w)", r"\1 pale bars 64", texts[0]).replace(" too far 64", "")
    assert found(stage.texts([first, *texts[1:]], known_pair())) == [(1, K.HINT_WORD, False)]


def test_a_hint_before_the_first_frame_marks_no_gap_of_the_other_video(stage: Stage, texts: Texts) -> None:
    """Nothing lies in front of a clip's first frame, so that nothing there can have come too far."""
    first = texts[0].replace(" pale bars 49", " too far")
    assert found(stage.texts([first, *texts[1:]], known_pair())) == [(1, K.HINT_WORD, False)]


@pytest.mark.parametrize(
    ("gap", "frames", "expected"),
    [
        (56, "56, 58, 60, 62", [(2, K.UNMARKED_GAP, True)]),
        (26, "26, 29, 31, 34", [(2, K.UNMARKED_GAP, True)]),
        (58, "58, 59, 60, 61", [(2, K.UNMARKED_GAP, True), (2, K.FRAMES_ASKED, True)]),
    ],
    ids=["without a hint", "a second time", "no gap"],
)
def test_a_gap_that_should_not_be_asked_for(
    gap: int, frames: str, expected: Brief, stage: Stage, texts: Texts
) -> None:
    """It is asked for in place of the gap behind 7, which comes a round later then."""
    numbers = sorted({49, 51, 52, 54, *map(int, frames.split(", "))})
    second = edited(
        texts,
        {
            2: [
                ("check 49 and 64 left nothing", f"check 49 and {gap} left 64"),
                ("49, 51, 52, 54, 64, 66, 67, 69", ", ".join(map(str, numbers))),
            ]
        },
    )[1]
    names = {number: name for name, number in enumerate(numbers, start=1)}
    shown = {n: f"{names[n]} yellow" for n in numbers}
    shown |= {n: f"{names[n]} red wrong color off lane" for n in (51, 52)}
    if gap == 26:
        shown[26] = "1 blue wrong color noise"
    lines = [
        f"video {video}: " + "; ".join(shown[n] for n in numbers if (n > 47) == (video == 2))
        for video in (1, 2)
        if any((n > 47) == (video == 2) for n in numbers)
    ]
    third = (
        "<snapshot>" + "\n".join(lines) + "</snapshot>"
        "<think>video 1: TA 2 VQ 1 MQ 1 + nothing = TA 2 VQ 1 MQ 1 sum 4\n"
        f"video 2: TA 1 VQ 0 MQ 1 + {names[51]} wrong color off lane = TA 2 VQ 0 MQ 2 sum 4\n"
        "sums 4 to 4\ncheck 64 left nothing</think>"
        "<recommend answer>TA=0, VQ=2, MQ=1, OA=0, CF=2</recommend answer>"
        '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [64, 66, 67, 69]}}</tool_call>'
    )
    last = edited(
        texts,
        {
            3: [
                (
                    "2 red wrong color off lane; 3 red wrong color off lane; 4 yellow; 5 yellow; 6 yellow; "
                    "7 red wrong color; 8 yellow",
                    "2 yellow; 3 red wrong color; 4 yellow",
                ),
                ("TA 1 VQ 0 MQ 1 + 2 wrong color off lane; 7", "TA 2 VQ 0 MQ 2 + 3"),
            ]
        },
    )[2]
    assert found(stage.texts([texts[0], second, third, last], known_pair())) == expected


# A judge that takes something else for the truth reads wrong, and does all the rest right


def replaced(pair: PairTruth, clip: int, **fields: object) -> PairTruth:
    clips = list(pair.clips)
    clips[clip] = clips[clip].model_copy(update=fields)
    return checked(pair.model_copy(update={"clips": tuple(clips)}))


def with_events(pair: PairTruth, clip: int, events: Sequence[Event]) -> PairTruth:
    return replaced(pair, clip, events=tuple(sorted(events, key=lambda event: event.first_index)))


def readings(trajectory: Trajectory) -> list[tuple[int, int]]:
    """Every (round, frame number) that was read."""
    return [(record.round_number, number) for record in trajectory.rounds for number in new_frames(record)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, list[PairTruth]]:
    folder = tmp_path_factory.mktemp("world")
    config = PRESETS["medium"]
    return Stage(folder), make_world(folder, config, pairs=8, seed=12, workers=1)


def read_as(stage: Stage, believed: PairTruth, pair: PairTruth) -> tuple[Trajectory, list[Slip]]:
    trajectory = stage.oracle(believed)
    return trajectory, slips_of(trajectory, pair, span=SPAN)


@given(st.data())
def test_defects_that_are_read_wrong(world: tuple[Stage, list[PairTruth]], data: st.DataObject) -> None:
    stage, pairs = world
    pair = data.draw(st.sampled_from([p for p in pairs if any(clip.events for clip in p.clips)]))
    which = data.draw(st.sampled_from([i for i in range(2) if pair.clips[i].events]))
    event = data.draw(st.sampled_from(pair.clips[which].events))
    defect = data.draw(st.sampled_from(DEFECTS))
    missed = defect in event.defects
    defects = [d for d in DEFECTS if (d in event.defects) != (d is defect)]
    others = [e for e in pair.clips[which].events if e != event]
    believed = with_events(pair, which, [*others, event.model_copy(update={"defects": tuple(defects)})])
    trajectory, slips = read_as(stage, believed, pair)
    first = 1 + which * pair.clips[0].n_frames
    misread = [(r, n) for r, n in readings(trajectory) if event.covers(n - first) and first <= n]
    misread = [(r, n) for r, n in misread if pair.locate(n)[0] == which]
    kind = (MISSED if missed else INVENTED)[defect]
    assert brief(slips) == [(round_number, kind, True) for round_number, _ in misread]
    assert [int(slip.detail.split()[1]) for slip in slips] == [number for _, number in misread]


@given(st.data())
def test_hints_that_are_missed(world: tuple[Stage, list[PairTruth]], data: st.DataObject) -> None:
    stage, pairs = world
    choices = [(p, i, e) for p in pairs for i in range(2) for e in p.clips[i].events if e.hidden]
    pair, which, event = data.draw(st.sampled_from(choices))
    believed = with_events(pair, which, [e for e in pair.clips[which].events if e != event])
    trajectory, slips = read_as(stage, believed, pair)
    places = [slip for slip in slips if slip.kind is K.PLACE]
    assert not places or event.hint is Hint.SPEED, "whoever sees no leap sees other places"
    assert brief([slip for slip in slips if slip.kind is not K.PLACE]) == [(1, K.HINT_MISSED, True)]
    assert trajectory.well_formed


@given(st.data(), st.sampled_from([Hint.BARS, Hint.FADE]))
def test_hints_that_are_invented(
    world: tuple[Stage, list[PairTruth]], data: st.DataObject, hint: Hint
) -> None:
    stage, pairs = world
    choices = []
    for pair in pairs:
        for i, clip in enumerate(pair.clips):
            starts = first_indices(clip.n_frames)
            used = {event.gap[0] for event in clip.events}
            choices += [
                (pair, i, (start, end))
                for start, end in zip(starts, [*starts[1:], clip.n_frames], strict=True)
                if start not in used
            ]
    pair, which, gap = data.draw(st.sampled_from(choices))
    nothing = Event(first_index=gap[0] + 1, end_index=gap[0] + 3, defects=(), gap=gap, hint=hint)
    believed = with_events(pair, which, [*pair.clips[which].events, nothing])
    _, slips = read_as(stage, believed, pair)
    assert brief(slips) == [(1, K.HINT_INVENTED, True)]


@given(st.data())
def test_colors_that_are_named_wrong(world: tuple[Stage, list[PairTruth]], data: st.DataObject) -> None:
    stage, pairs = world
    pair = data.draw(st.sampled_from(pairs))
    used = {color for color, _ in pair.objects} | {clip.wrong_color for clip in pair.clips}
    other = data.draw(st.sampled_from([i for i in range(len(COLORS)) if i not in used]))
    believed = checked(pair.model_copy(update={"objects": ((other, pair.objects[0][1]),)}))
    trajectory, slips = read_as(stage, believed, pair)
    plain = [
        (round_number, K.COLOR_WORD, True)
        for round_number, number in readings(trajectory)
        if Defect.COLOR not in pair.clips[pair.locate(number)[0]].defects_at(pair.locate(number)[1])
    ]
    assert brief(slips) == plain


@pytest.mark.parametrize(
    ("mix", "calls", "kinds"),
    [
        (BehaviorMix(), 7, set()),
        (BehaviorMix(oracle=0, immediate=1), 7, {K.GAP_LEFT}),
        (BehaviorMix(oracle=0, random_segment=1), 7, {K.GAP_LEFT, K.UNMARKED_GAP}),
        (BehaviorMix(oracle=0, random_frames=1), 7, {K.GAP_LEFT}),
        (BehaviorMix(), 1, {K.GAP_LEFT}),
    ],
    ids=["oracle", "immediate", "random segment", "random frames", "one call"],
)
def test_the_oracle_makes_the_slips_of_its_behavior_only(
    mix: BehaviorMix, calls: int, kinds: set[SlipKind], world: tuple[Stage, list[PairTruth]]
) -> None:
    stage, pairs = world
    kinds_found: set[SlipKind] = set()
    for pair in pairs:
        trajectory = stage.oracle(pair, mix=mix, calls=calls)
        kinds_found |= {slip.kind for slip in slips_of(trajectory, pair, span=SPAN)}
    assert kinds_found == kinds


# Judges that write otherwise


def without_new_words(texts: Texts) -> Texts:
    return [re.sub(r" left [\w ]+|(?<=[a-z]) at \w\b", "", text) for text in texts]


def test_what_a_judge_never_says_is_not_missed(stage: Stage, texts: Texts) -> None:
    older = stage.texts(without_new_words(texts), known_pair())
    newer = stage.texts(texts, known_pair())
    assert dialect_of([older]) == Dialect(places=False, left=False)
    assert dialect_of([newer]) == dialect_of([older, newer]) == dialect_of([]) == Dialect()
    assert slips_of(older, known_pair(), span=SPAN) == []
    assert found(older) == [*[(1, K.PLACE, False)] * 8, (1, K.TO_DO, True), (2, K.TO_DO, True)]


def test_a_judge_that_names_frames_by_their_numbers_is_read_without_an_error(
    stage: Stage, texts: Texts
) -> None:
    """As older judges do. What it says cannot be matched with frames, but for the lowest numbers."""
    shown = [
        [1, 12, 24, 36, 48, 55, 63, 70],
        [26, 29, 31, 34, 38, 41, 43, 46],
        [49, 51, 52, 54, 64, 66, 67, 69],
    ]
    older = []
    for numbers, text in zip(shown, texts, strict=True):
        first = re.sub(
            r"(: |; |\+ )([1-8])(?= [a-z])", lambda m, n=numbers: m[1] + str(n[int(m[2]) - 1]), text
        )
        # They name a gap by the frame in front of it.
        for gap, start in (("26", "24"), ("38", "36"), ("49", "48"), ("64", "63")):
            first = re.sub(
                rf"(?<=check )[\w ]*\b{gap}\b", lambda m, g=gap, s=start: m[0].replace(g, s), first
            )
            first = re.sub(rf"(?<=left )[\w ]*\b{gap}\b", lambda m, g=gap, s=start: m[0].replace(g, s), first)
        older.append(first)
    assert "check 24 and 36 left 48 and 63" in older[0]
    assert "+ 51 wrong color off lane; 67 wrong color = " in older[2]
    trajectory = stage.texts(older, known_pair())
    slips = slips_of(trajectory, known_pair(), span=SPAN)
    # Gaps are unknown, too: whether two frames show one event, and which gap a leap marks.
    assert {slip.kind for slip in slips} == {K.FRAMES_LISTED, K.UNMARKED_GAP, K.EVENTS, K.TO_DO}
    assert slips[0].detail == "lists a frame no. 12 of the first input, which has 8"


def test_words_of_another_kind_are_a_broken_form_and_nothing_else(stage: Stage) -> None:
    other = (
        "<snapshot>two clips of a ball</snapshot><think>Both look fine to me.</think>"
        "<answer>TA=0, VQ=0, MQ=0, OA=0, CF=1</answer>"
    )
    for text in (other, "no tag at all", ""):
        trajectory = stage.texts([text], known_pair())
        assert is_judged(trajectory)
        assert found(trajectory) == [(1, K.FORM, True)]


@given(st.data())
def test_any_replacement_in_the_words_is_bearable(stage: Stage, texts: Texts, data: st.DataObject) -> None:
    """Whatever a judge writes: no error, and every slip is of a round that there is."""
    result = list(texts)
    for _ in range(data.draw(st.integers(1, 4))):
        which = data.draw(st.integers(0, 2))
        parts = re.split(r"([ ;:,\n<>=]+)", result[which])
        at = data.draw(st.integers(0, len(parts) - 1))
        parts[at] = data.draw(
            st.sampled_from([*parts, "", "0", "77", "78", "99999999999", "video 1: ", "\n"])
        )
        result[which] = "".join(parts)
    trajectory = stage.texts([*result, *["<answer>TA=0, VQ=0, MQ=0, OA=0</answer>"] * 5], known_pair())
    slips = slips_of(trajectory, known_pair(), span=SPAN)
    rounds = [slip.round_number for slip in slips]
    assert rounds == sorted(rounds)
    assert set(rounds) <= {record.round_number for record in trajectory.rounds}
