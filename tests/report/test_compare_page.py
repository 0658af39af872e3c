"""The index page of a comparison: small, harmless, sorted and filtered; each row opens its episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vrthinker import InputError
from vrthinker.report.compare_page.page import RowView, ShareView, write_compare_page

HOSTILE = "<img src=x onerror=\"document.title='owned'\"> \u202eabc {{ 7*7 }} </script>"
STORY = "First a tie. It asked for 8 frames, found noise in 14 of video 1, and changed to video 2."


def row(number: int) -> RowView:
    judged = number % 10 != 0
    overall = number % 3
    return RowView(
        id=f"{number:03d}",
        prompt=HOSTILE if number == 1 else f"a dog number {number} runs on the beach while waves break " * 2,
        judgment={"TA": 1, "VQ": 2 if number % 4 == 0 else 1, "MQ": 0, "OA": overall} if judged else None,
        kinds=(("disagree",) if judged and number % 4 == 0 else ()) if judged else ("failed",),
        confidence=1 + number % 3 if judged else None,
        rounds=number % 5,
        story=STORY if judged else "No verdict: the clip breaks",
        href=f"pages/{number:05d}.html" if judged else None,
    )


def write(path: Path, rows: int = 200) -> Path:
    parts = (40.0, 33.5, 47.0)
    write_compare_page(
        path,
        names=("X & Z", HOSTILE),
        shares=[ShareView(code, parts, (20, 15, 25), parts, (0, -9, 9)) for code in ("TA", "VQ", "MQ", "OA")],
        rows=[row(number) for number in range(1, rows + 1)],
        facts=[("Model", "nano")],
        notes={"a note": 3},
        missing=["prompt 7: gone.mp4"],
    )
    return path


def test_two_hundred_prompts_are_a_small_page(tmp_path: Path) -> None:
    page = write(tmp_path / "index.html").read_text("utf-8")
    assert len(page) < 300_000
    assert page.count("<tr data-kinds") == 200
    assert page.count('href="pages/') == 180
    assert "<img" not in page
    assert "U+202E" in page
    assert "20 without a verdict, in no share below" in page
    assert "1 not judged, because a clip is missing: prompt 7: gone.mp4" in page
    assert "http" not in page.replace("http-equiv", "")


def test_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("notes of mine")
    with pytest.raises(InputError, match="holds something else than a page"):
        write(tmp_path / "index.html")


def test_without_verdicts_there_are_no_shares(tmp_path: Path) -> None:
    write_compare_page(
        tmp_path / "index.html",
        names=("X", "Y"),
        shares=[ShareView("OA", None, None, None, None)],
        rows=[row(10)],
        facts=[],
        notes={},
    )
    assert "<svg" not in (tmp_path / "index.html").read_text()


def shown(browser: Any) -> list[str]:
    ids: list[str] = browser.evaluate(
        """[...document.querySelectorAll(".rows tbody tr")].filter((row) => !row.hidden)
             .map((row) => row.cells[0].textContent.trim())"""
    )
    return ids


def test_rows_are_sorted_and_filtered(browser: Any, tmp_path: Path) -> None:
    page = write(tmp_path / "index.html", 40)
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "00008.html").write_text("<!doctype html><title>episode 8</title>")
    browser.goto(page)
    assert browser.evaluate("document.title").startswith("X & Z and")
    assert len(shown(browser)) == 40
    heads = "document.querySelectorAll('.rows thead button')"
    browser.evaluate(f"{heads}[2].click()")  # by who is better overall: the first, the second, ties, failures
    order = [row(int(name)).judgment for name in shown(browser)]
    assert [None if one is None else one["OA"] for one in order] == [1] * 12 + [2] * 12 + [0] * 12 + [
        None
    ] * 4
    browser.evaluate(f"{heads}[0].click()")
    browser.evaluate(f"{heads}[0].click()")
    assert shown(browser) == [f"{number:03d}" for number in range(40, 0, -1)]
    pick = (
        "{const s = document.querySelector('.tools select'); s.value = '%s';"
        "s.dispatchEvent(new Event('change'))}"
    )
    browser.evaluate(pick % "failed")
    assert shown(browser) == ["040", "030", "020", "010"]
    browser.evaluate(pick % "disagree")
    assert shown(browser) == ["036", "032", "028", "024", "016", "012", "008", "004"]
    browser.evaluate(
        "{const w = document.querySelector('.tools input'); w.value = 'DOG 028';"
        "w.dispatchEvent(new Event('input'))}"
    )
    assert shown(browser) == ["028"]
    assert "1 of 40 prompts" in browser.evaluate("document.querySelector('.tools .count').textContent")
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    browser.events.clear()
    browser.evaluate("document.querySelector('a[href=\"pages/00008.html\"]').closest('tr').cells[8].click()")
    while not any(event["method"] == "Page.loadEventFired" for event in browser.events):
        browser.events.append(browser._receive())
    assert browser.evaluate("document.title") == "episode 8"


@pytest.mark.parametrize("width", [390, 1440, 2400])
def test_nothing_overflows(browser: Any, tmp_path: Path, width: int) -> None:
    browser.goto(write(tmp_path / "index.html", 12), width=width, height=900)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("document.title") != "owned"
