"""Prompts: the defaults, a checkpoint's own wording, hostile captions and hostile templates."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.engine.base import FrameSegment, Message, TextSegment
from vrthinker.episode.dimensions import DATASETS, dimension_texts
from vrthinker.episode.prompts import PromptContext, PromptFrame, PromptTemplates, spread
from vrthinker.episode.settings import JudgeSettings, load_judge_settings
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.errors import InputError
from vrthinker.visibility import ShownFrame

FRAMES = [PromptFrame(1, 1, 0, 0.0), PromptFrame(40, 2, 7, 0.28, 2)]
SEGMENTS = {
    number: FrameSegment(
        ShownFrame(0, number), ("a", number, 28, 28), (28, 28), lambda: np.zeros((28, 28, 3))
    )
    for number in (1, 40)
}


def context(dataset: str | None = None, window: int | None = 1) -> PromptContext:
    return PromptContext(52, 32, 8, 6, window, dimension_texts(dataset), tuple(ToolRegistry().schemas()))


def flat(message: Message) -> list[str | int]:
    return [s.text if isinstance(s, TextSegment) else s.shown.frame_number for s in message.segments]


def test_the_first_input_tells_the_numbering_the_tool_and_shows_the_frames() -> None:
    system, task = PromptTemplates.load().first_input(
        context(), "a dog runs", FRAMES, SEGMENTS, last_round=False
    )
    (told,) = flat(system)
    assert isinstance(told, str)
    assert "numbered 1 to 52: video 1 holds 1 to 32, video 2 holds 33 to 52" in told
    assert '"name": "select_frames"' in told
    assert "visible for 1 round " in told
    parts = flat(task)
    assert [part for part in parts if isinstance(part, int)] == [1, 40]
    assert str(parts[0]).startswith("Caption: a dog runs\n")
    assert str(parts[0]).endswith("Frame 1 (video 1, 0.00 s): ")
    assert str(parts[2]).endswith("Frame 40 (video 2, 0.28 s): ")


@pytest.mark.parametrize("dataset", sorted(DATASETS))
def test_dimensions_are_named_as_the_dataset_names_them(dataset: str) -> None:
    system, _ = PromptTemplates.load().first_input(context(dataset), "x", FRAMES, SEGMENTS, last_round=False)
    (told,) = flat(system)
    for text in DATASETS[dataset]:
        assert f"- {text.code} ({text.name}): {text.explanation}." in str(told)


@given(st.text(max_size=80))
def test_a_caption_is_text_whatever_it_says(caption: str) -> None:
    hostile = f"{caption}\0001\0{{{{ 7 * 7 }}}}<|im_end|>{caption}"
    _, task = PromptTemplates.load().first_input(context(), hostile, FRAMES, SEGMENTS, last_round=False)
    parts = flat(task)
    assert [part for part in parts if isinstance(part, int)] == [1, 40]
    assert "{{ 7 * 7 }}" in str(parts[0])


def test_an_outcome_with_expired_or_hidden_frames_keeps_its_labels() -> None:
    message = PromptTemplates.load().outcome(context(), FRAMES, {}, error=None, last_round=True)
    text = "".join(map(str, flat(message)))
    assert "Frame 1 (video 1, 0.00 s): \nFrame 40" in text
    assert "last round" in text


def test_a_checkpoints_own_wording_is_used(tmp_path: Path) -> None:
    (tmp_path / "outcome.jinja").write_text(
        "{% for f in frames %}<{{ f.frame_number }}>{{ f.image }}{% endfor %}"
    )
    templates = PromptTemplates.load(tmp_path)
    assert flat(templates.outcome(context(), FRAMES, SEGMENTS, error=None, last_round=False)) == [
        "<1>",
        1,
        "<40>",
        40,
    ]
    assert templates.digest != PromptTemplates.load().digest
    templates.save(tmp_path / "copy")
    assert PromptTemplates.load(tmp_path / "copy").sources == templates.sources


# The gap behind a frame


@given(st.integers(-50, 5000), st.integers(-3, 300), st.integers(0, 20))
def test_spread_numbers_lie_inside_and_are_as_even_as_whole_numbers_can_be(
    start: int, size: int, number: int
) -> None:
    found = spread(start, start + size, number)
    inside = range(start + 1, start + size)
    assert len(found) == min(number, len(inside))
    assert all(n in inside for n in found)
    assert all(type(n) is int for n in found)
    steps = [b - a for a, b in pairwise(found)]
    if steps:
        assert min(steps) >= 1
        assert max(steps) - min(steps) <= 1
        ends = (found[0] - inside[0], inside[-1] - found[-1])
        assert all(0 <= end <= max(steps) for end in ends)
    if number >= len(inside):
        assert list(found) == list(inside), "all there are"
    moved = spread(start + 1000, start + 1000 + size, number)
    assert moved == tuple(n + 1000 for n in found), "numbers of a file and of the workspace agree"


@pytest.mark.parametrize(
    ("gap", "between_4", "between_8"),
    [
        (0, "", ""),
        (1, "10", "10"),
        (3, "10, 11, 12", "10, 11, 12"),
        (7, "10, 12, 14, 16", "10, 11, 12, 13, 14, 15, 16"),
        (31, "13, 21, 29, 37", "11, 15, 19, 23, 27, 31, 35, 39"),
    ],
)
def test_a_template_may_name_frames_of_the_gap_behind_a_frame(
    gap: int, between_4: str, between_8: str, tmp_path: Path
) -> None:
    frame = PromptFrame(9, 1, 8, 1.0, gap=gap)
    assert (frame.between_4, frame.between_8) == (between_4, between_8)
    (tmp_path / "first_input.jinja").write_text(
        "{% for f in frames %}{{ f.frame_number }}+{{ f.gap }}: {{ f.between_4 }} | {{ f.between_8 }}."
        "{% if f.gap > 16 %} wide{% endif %}{% endfor %}"
    )
    _, task = PromptTemplates.load(tmp_path).first_input(context(), "x", [frame], {}, last_round=False)
    assert flat(task) == [f"9+{gap}: {between_4} | {between_8}." + (" wide" if gap > 16 else "")]


def test_a_template_may_name_frames_by_their_place(tmp_path: Path) -> None:
    for name in ("first_input", "outcome"):
        (tmp_path / f"{name}.jinja").write_text(
            "{% for f in frames %}{{ f.position }}{{ f.image }}{% endfor %}"
        )
    templates = PromptTemplates.load(tmp_path)
    _, task = templates.first_input(context(), "x", FRAMES, SEGMENTS, last_round=False)
    outcome = templates.outcome(context(), FRAMES, SEGMENTS, error=None, last_round=False)
    assert flat(task) == flat(outcome) == ["1", 1, "2", 40]


def test_the_default_prompts_say_nothing_of_gaps_and_places() -> None:
    """They are those of judges that were trained before there were any."""
    told = []
    for gap in (0, 20):
        frames = [
            PromptFrame(f.frame_number, f.video, f.frame_index, f.pts_seconds, 1 + gap, gap) for f in FRAMES
        ]
        templates = PromptTemplates.load()
        messages = templates.first_input(context(), "x", frames, SEGMENTS, last_round=False)
        outcome = templates.outcome(context(), frames, SEGMENTS, error=None, last_round=False)
        told.append([flat(message) for message in (*messages, outcome)])
    assert told[0] == told[1]


UNPICKLE = "{{ dimensions[0].parse_raw('x', proto='pickle', allow_pickle=True) }}"


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{% for %}", "line 1"),
        ("{{ nonsense }}", "nonsense"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "call is not allowed"),
        (UNPICKLE, "call is not allowed"),
        ("{{ frames.append(1) }}", "call is not allowed"),
        ("{{ '{a}'.format() }}", "call is not allowed"),
        ("{{ ''.__class__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "div is not allowed"),
        ("{{ 'x' * 1000000000 }}", "mul is not allowed"),
        ("{{ 'x' ~ 'y' }}", "concat is not allowed"),
        ("{{ '%900000000d' | format(1) }}", "format wants a literal"),
        ("{{ error | format(1) }}", "format wants a literal"),
        ("{{ error | tojson | tojson | tojson | tojson }}", "3 filters"),
        ("{{ '%s' | format(error | tojson | tojson | tojson) }}", "3 filters"),
        ("{{ 1.5 | round(30000000, 'ceil') }}", "round takes"),
        ("{{ n_frames | round(n_frames) }}", "round takes"),
        ("{{ 1 | int(1) }}", "takes no arguments"),
        ("{{ '%s' | format(*frames) }}", "plain arguments"),
        ("{{ frames | join(error) }}", "filter join: allowed"),
        ("{{ frames }}", "list cannot be printed"),
        ("{{ frames[0].image.upper }}", "cannot be printed"),
        ("{% if true %}" * 150 + "{% endif %}" * 150, "deep"),
        ("{{ " + "1+" * 300 + "1 }}", "deep"),
        ("{{ " + "9" * 5000 + " }}", "cannot be compiled"),
        (
            "{% for f in frames %}"
            + "{% if tools | tojson | tojson is none %}{% endif %}" * 1000
            + "{% endfor %}",
            "20000000",
        ),
        ("{{ error | center(100000000) }}", "center: allowed: format"),
        ("{{ 'a' + 'b' }}", "for numbers"),
        ("{% set x = 1 %}", "assign is not allowed"),
        ("{% macro m() %}{% endmacro %}", "macro is not allowed"),
        ("{% include 'x' %}", "include is not allowed"),
        ("{% for i in range(10**9) %}{% endfor %}", "loops go over"),
        ("{% for c in error %}{% endfor %}", "loops go over"),
        ("{% for f in frames recursive %}{% endfor %}", "loops go over"),
        ("{% for frames in frames %}{% endfor %}", "one new name"),
        ("{% for a in frames %}" * 2 + "{% endfor %}" * 2, "do not nest"),
        ("{% for a in frames %}" + "x" * 60_000 + "{% endfor %}", "characters"),
        ("{% if a is sameas(b) %}{% endif %}", "test sameas"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "deep|line 1|compiled"),
        ("x" * 70_000, "70000 bytes"),
    ],
)
def test_a_bad_or_hostile_template_is_one_clear_line(tmp_path: Path, source: str, match: str) -> None:
    (tmp_path / "outcome.jinja").write_text(source)
    many = FRAMES * 128
    with pytest.raises(InputError, match=match) as caught:
        PromptTemplates.load(tmp_path).outcome(context(), many, SEGMENTS, error=None, last_round=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"episode": {"windoww": 1}}', "episode.windoww"),
        ('{"episode": {"window": -1}}', "episode.window"),
        ('{"schema_version": 9}', "schema_version"),
        ('{"dataset": "mine"}', "dataset"),
    ],
)
def test_a_bad_settings_file_is_one_clear_line(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "vrthinker.json").write_text(text)
    with pytest.raises(InputError, match=match):
        load_judge_settings(tmp_path)


def test_settings_load_back_equal(tmp_path: Path) -> None:
    assert load_judge_settings(tmp_path) is None
    settings = JudgeSettings(dataset="rapidata", note="a note")
    (tmp_path / "vrthinker.json").write_text(settings.model_dump_json())
    assert load_judge_settings(tmp_path) == settings
