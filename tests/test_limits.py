"""Limits are in one place, each can be raised, and the page names all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vrthinker import limits
from vrthinker.errors import InputError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "limits.md"


def test_the_variable_of_a_limit_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in limits.LIMITS:
        monkeypatch.delenv(limit.variable, raising=False)
        assert limit.value == limit.default
        monkeypatch.setenv(limit.variable, f" {limit.default + 7} ")
        assert limit.value == limit.default + 7
        assert limit.variable in limit.how_to_raise


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "many", "1e9", "9" * 30, "\u0664", "1\n2", "x" * 900])
def test_a_variable_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("VRTHINKER_MAX_FRAMES", text)
    with pytest.raises(
        InputError, match=r"VRTHINKER_MAX_FRAMES: got .*allowed: a whole number of frames"
    ) as caught:
        _ = limits.MAX_FRAMES.value
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


def test_the_page_names_every_limit() -> None:
    if not PAGE.exists():
        pytest.skip("needs the source tree")
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (.*?) \| (.*?) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    stated = [(name, int(value.replace(",", "")), unit, bounds) for name, value, unit, bounds in rows]
    assert stated == [(limit.name, limit.default, limit.unit, limit.bounds) for limit in limits.LIMITS]
    assert len({limit.name for limit in limits.LIMITS}) == len(limits.LIMITS)
