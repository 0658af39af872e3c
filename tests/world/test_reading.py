"""Reading the world's words back: the oracle's are read as they were meant, and no text breaks the reader."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.world import words
from vrthinker.world.reading import (
    ReadDecision,
    ReadFindings,
    ReadFrame,
    read_decision,
    read_round,
    read_snapshot,
)
from vrthinker.world.world import (
    COLORS,
    DEFECTS,
    PRESETS,
    Defect,
    Difficulty,
    Hint,
    first_indices,
    judgments_from_counts,
    sample_pair,
)

PRESET_NAMES: tuple[Difficulty, ...] = ("easy", "medium", "hard")


@st.composite
def event_lists(draw: st.DrawFn) -> list[words.Found]:
    names = draw(st.lists(st.integers(1, 512), unique=True, max_size=4))
    return [
        (n, tuple(draw(st.lists(st.sampled_from(DEFECTS), min_size=1, max_size=3, unique=True))))
        for n in names
    ]


def spelled(frames: Sequence[ReadFrame]) -> str:
    """Frames that were read, in the words that they were read from."""
    lines = []
    for video in (1, 2):
        entries = [
            " ".join([str(frame.name), *frame.colors[:1]])
            + words.defect_words([d for d in frame.defects if d is Defect.COLOR])
            + "".join(f" {color}" for color in frame.colors[1:])
            + words.defect_words([d for d in frame.defects if d is not Defect.COLOR])
            + ("" if frame.place is None else f" at {frame.place}")
            + ("" if frame.come is None else f" +{frame.come}")
            + "".join(words.HINT_WORDS[hint] + (f" {gap}" if gap else "") for hint, gap in frame.hints)
            for frame in frames
            if frame.video == video
        ]
        if entries:
            lines.append(f"video {video}: " + "; ".join(entries))
    return "<snapshot>" + ("\n".join(lines) or "nothing new") + "</snapshot>"


@given(st.data(), st.sampled_from(PRESET_NAMES), st.integers(0, 10**6), st.booleans())
def test_what_the_oracle_writes_is_read_as_it_was_meant(
    data: st.DataObject, name: Difficulty, seed: int, first: bool
) -> None:
    pair = sample_pair(PRESETS[name], seed, 0)
    n_frames = [clip.n_frames for clip in pair.clips]
    if first:
        shown = [1 + i for i in first_indices(n_frames[0])]
        shown += [1 + n_frames[0] + i for i in first_indices(n_frames[1])]
    else:
        shown = sorted(data.draw(st.sets(st.integers(1, sum(n_frames)), max_size=12)))
    before = [data.draw(event_lists()) for _ in range(2)]
    new = [data.draw(event_lists()) for _ in range(2)]
    checked, left = (data.draw(st.lists(st.integers(1, 512), max_size=4)) for _ in range(2))
    counts = [words.defect_counts([*a, *b]) for a, b in zip(before, new, strict=True)]
    span = data.draw(st.sampled_from([None, PRESETS[name].span[0]]))
    snapshot = words.snapshot(pair, shown, first=first, span=span)
    answer = words.answer(judgments_from_counts(*counts), 1)
    text = (
        f"{snapshot}<think>{words.findings(before, new)}\n{words.decision(checked, left)}</think>"
        f"<answer>{answer}</answer>"
    )

    read = read_round(text)
    assert read.unread == ()
    assert [frame.name for frame in read.frames] == list(range(1, len(shown) + 1))
    assert spelled(read.frames) == snapshot
    for frame in read.frames:
        clip, index = pair.locate(shown[frame.name - 1])
        assert frame.video == clip + 1
        assert set(frame.defects) == set(pair.clips[clip].defects_at(index))
        expected = [COLORS[color] for color, _ in pair.objects]
        if Defect.COLOR in frame.defects:
            expected[0] = COLORS[pair.clips[clip].wrong_color]
        assert list(frame.colors) == expected
        assert (frame.place is not None) == first
        marked = [event for event in pair.clips[clip].events if first and event.hint_index == index]
        gaps = [(e.hint, None if span is None else words.gap_name(pair, clip, e.gap, span)) for e in marked]
        assert list(frame.hints) == gaps
    for findings, earlier, added, after in zip(read.findings, before, new, counts, strict=True):
        assert findings == ReadFindings(
            tuple(words.defect_counts(earlier)),
            tuple(added),
            tuple(after),
            sum(after),  # type: ignore[arg-type]
        )
    assert read.sums == (sum(counts[0]), sum(counts[1]))
    assert read.decision == (ReadDecision(tuple(checked), tuple(left)) if checked else ReadDecision())


@pytest.mark.parametrize(
    ("line", "decision"),
    [
        ("done", ReadDecision()),
        ("look around", ReadDecision(looks_around=True)),
        ("check 9 and 33 left 41 and 49", ReadDecision((9, 33), (41, 49))),
        ("check 9 left nothing", ReadDecision((9,), ())),
        ("check 9 and 33", ReadDecision((9, 33), None)),
        ("check nothing left 9", None),
        ("check 9 and left 10", None),
        ("check 9 left", None),
        ("check 1234567890", None),
        ("check ٣", None),
        ("Done", None),
        ("", None),
    ],
)
def test_decisions(line: str, decision: ReadDecision | None) -> None:
    assert read_decision(line) == decision


def test_what_is_not_in_these_words_is_left_out_and_listed() -> None:
    text = (
        "<snapshot>video 1: 1 green; 12 green shiny noise at q pale bars 3 pale bars 3; x red; 2 mauve\n"
        "a red ball\nvideo 3: 7 red\nvideo 2: 46 blue at  off lane</snapshot>"
        "<think>video 1: TA 0 VQ 0 MQ 0 + 12 odd = TA 0 VQ 1 MQ 0 sum 1\n"
        "video 2: TA 0 VQ 0 + 46 off lane = TA 0 VQ 0 MQ 1 sum one\nwell\nsums 1 to 1\n</think>"
        "<answer>TA=0, VQ=2, MQ=1, OA=0</answer>"
    )
    read = read_round(text)
    assert read.frames == (
        ReadFrame(1, 1, ("green",)),
        ReadFrame(1, 12, ("green",), (Defect.NOISE,), "q", ((Hint.BARS, 3),)),
        ReadFrame(1, 2),
        ReadFrame(2, 46, ("blue",), (Defect.JUMP,)),
    )
    assert read.findings[0] == ReadFindings((0, 0, 0), None, (0, 1, 0), 1)
    assert read.findings[1] == ReadFindings(None, ((46, (Defect.JUMP,)),), None, None)
    assert (read.sums, read.decision) == ((1, 1), None)
    for part in (" shiny", "x red", " mauve", "a red ball", "video 3: 7 red", "well", "what to do next"):
        assert part in read.unread
    for part in ("video 1: its events", "video 2: its before", "video 2: its after", "video 2: its total"):
        assert part in read.unread
    nothing = read_round("I cannot see any video.")
    assert (nothing.frames, nothing.sums, nothing.decision) == ((), None, None)
    assert nothing.unread[:2] == ("the snapshot", "the thinking")


FRAGMENTS = st.sampled_from(
    [
        *words.PHRASES,
        "video 1: ",
        "video 2: ",
        " sum ",
        "check ",
        " at a",
        " +2",
        "left",
        "\n",
        " ",
        ";",
        "9" * 20,
        "٣",
    ]
)


@given(st.lists(st.one_of(FRAGMENTS, st.text(max_size=4), st.integers(0, 600).map(str)), max_size=60))
def test_no_text_breaks_it(parts: list[str]) -> None:
    """Whatever is read is in the text: nothing is made up."""
    text = "".join(parts)
    for candidate in (text, f"<snapshot>{text}</snapshot><think>{text}</think>"):
        read = read_round(candidate)
        assert all(str(frame.name) in text for frame in read.frames)
        assert all(set(frame.colors) <= set(COLORS) for frame in read.frames)
        assert len(read.frames) <= text.count("; ") + text.count("\n") + 1
        assert all(isinstance(part, str) for part in read.unread)
    read_snapshot(text)
    read_decision(text)


@pytest.mark.parametrize(
    "unit",
    [
        "1 ",
        "1; ",
        "check 1 and ",
        " and 1",
        "video 1: ",
        "9",
        " noise",
        "TA 0 VQ ",
        " = ",
        "<snapshot>",
        "\n",
        " at ",
    ],
)
def test_long_texts_take_no_more_steps_than_they_have_letters(unit: str) -> None:
    """With a reader that tried every split, this would not end within a test's time."""
    content = unit * (100_000 // len(unit))
    for text in (content, "video 1: " + content, "check 1" + content):
        read_round(f"<snapshot>{text}</snapshot><think>{text}</think>")
