"""Splits: no caption and no clip crosses parts, whatever their names; sizes are said honestly."""

from __future__ import annotations

import random
import shutil
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.data.pairs import Pair
from vrthinker.data.splits import Split, label_balance, normalised, parse_parts, split_pairs
from vrthinker.errors import InputError

HALVES = {"train": 0.5, "test": 0.5}


def pair(name: str, prompt: str, first: Path | str, second: Path | str, label: int = 1) -> Pair:
    return Pair(id=name, prompt=prompt, video_1=Path(first), video_2=Path(second), labels={"OA": label})


def part_of(split: Split) -> dict[str, str]:
    return {pair.id: name for name, members in split.parts.items() for pair in members}


def test_copies_of_a_clip_and_spellings_of_a_caption_stay_together(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / f"{name}.mp4").write_bytes(name.encode() * 100)
    shutil.copyfile(tmp_path / "a.mp4", tmp_path / "copy.mp4")
    clip = {name: tmp_path / f"{name}.mp4" for name in ("copy", *"abcdefgh")}
    pairs = [
        pair("1", "A boat", clip["a"], clip["b"]),
        pair("2", "something else", clip["copy"], clip["c"]),
        pair("3", "  a  BOAT\n", clip["d"], clip["e"]),
        pair("4", "a car", clip["f"], clip["g"]),
        pair("5", "a bus", clip["h"], tmp_path / "gone.mp4"),
        pair("6", "", tmp_path / "gone.mp4", clip["h"]),
    ]
    split = split_pairs(pairs, HALVES, 0)
    part = part_of(split)
    assert part["1"] == part["2"] == part["3"] != part["5"]
    assert part["5"] == part["6"]
    assert (split.components, split.largest, split.by_path) == (3, 3, 1)
    assert [member.id for member in split.parts[part["1"]]] == ["1", "2", "3"]


def test_captions_that_differ_in_form_only_are_one() -> None:
    assert normalised("Ａ  Straße\n") == normalised("a STRASSE")  # noqa: RUF001 - a full-width letter
    assert normalised("a boat") != normalised("a boot")


@given(st.integers(0, 10_000), st.integers(2, 40))
def test_nothing_crosses_parts_and_the_order_of_lines_does_not_matter(seed: int, count: int) -> None:
    draw = random.Random(seed)
    pairs = [
        pair(f"p{index}", f"c{draw.randrange(count)}", f"/no/{draw.randrange(2 * count)}", f"/no/{index}.mp4")
        for index in range(count)
    ]
    parts = {"train": 0.6, "dev": 0.2, "test": 0.2}
    try:
        split = split_pairs(pairs, parts, seed)
    except InputError as refused:
        assert "would be empty" in str(refused)  # noqa: PT017
        return
    assert sorted(part_of(split)) == sorted(pair.id for pair in pairs)
    for one, other in combinations(split.parts.values(), 2):
        assert not {normalised(p.prompt) for p in one} & {normalised(p.prompt) for p in other}
        clips = [{clip for p in part for clip in (p.video_1, p.video_2)} for part in (one, other)]
        assert not clips[0] & clips[1]
    draw.shuffle(pairs)
    assert part_of(split_pairs(pairs, parts, seed)) == part_of(split)


def test_sizes_follow_the_shares_and_the_seed_changes_the_members() -> None:
    pairs = [pair(f"p{i}", f"c{i}", f"/no/{i}", f"/no/{i}b", label=i % 3) for i in range(200)]
    split = split_pairs(pairs, {"train": 0.9, "test": 0.1}, 1)
    assert {name: len(members) for name, members in split.parts.items()} == {"train": 180, "test": 20}
    assert split.warnings == ()
    assert part_of(split_pairs(pairs, {"train": 0.9, "test": 0.1}, 2)) != part_of(split)
    assert label_balance(pairs) == {"OA": {"video_1": 67, "video_2": 66, "ties": 67}}


def test_a_group_that_is_larger_than_a_part_is_said() -> None:
    pairs = [pair(f"p{i}", "one caption" if i < 80 else f"c{i}", f"/no/{i}", f"/no/{i}b") for i in range(100)]
    split = split_pairs(pairs, HALVES, 0)
    assert {name: len(members) for name, members in split.parts.items()} == {"train": 80, "test": 20}
    assert len(split.warnings) == 2
    assert "the largest such group has 80 pairs" in split.warnings[0]
    with pytest.raises(InputError, match="test would be empty: 80 pairs are 1 groups"):
        split_pairs(pairs[:80], HALVES, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a=x",
        "a=0,b=1",
        "a=1,a=1",
        "a=0.5,b=0.4",
        "a=nan",
        "../x=1",
        "a=2,b=-1",
        ",".join(["a=1"] * 99),
    ],
)
def test_shares_that_cannot_be_used_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--parts: got"):
        parse_parts(text)


def test_shares_are_read() -> None:
    assert parse_parts("train=0.8, dev=0.1,test=0.1") == {"train": 0.8, "dev": 0.1, "test": 0.1}
