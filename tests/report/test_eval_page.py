"""The page of an evaluation: what it shows, that nothing in it can run, and which errors are listed first."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from known_judges import labelled_pair

from vrthinker.errors import InputError
from vrthinker.evals.summary import summarise
from vrthinker.records.eval_items import EvalItem, ItemCost, ItemStatus
from vrthinker.report.eval_page import page
from vrthinker.report.eval_page.charts import bar, spelled
from vrthinker.report.eval_page.errors import episodes_of, surest_errors
from vrthinker.report.eval_page.page import write_eval_page

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e"


def item(number: int, verdict: int | None, **changes: Any) -> EvalItem:
    pair = labelled_pair(number, number % 3)
    status = ItemStatus.JUDGED if verdict is not None else ItemStatus.UNPARSED
    usual: dict[str, Any] = {
        "id": pair.id,
        "prompt": f"caption {number}",
        "video_1": "1.mp4",
        "video_2": "2.mp4",
        "labels": {"TA": 1, "VQ": 1, "MQ": 1, "OA": number % 3},
        "status": status,
        "judgment": None if verdict is None else {"TA": 1, "VQ": 1, "MQ": 2, "OA": verdict},
        "reason": None if verdict is not None else "unparseable: no answer",
        "seconds": (1.0 + number, 2.0),
        "frames": (24, 48),
        "cost": ItemCost(rounds=2, latency_seconds=0.5),
    }
    return EvalItem(**{**usual, **changes})


ITEMS = [
    *(item(n, n % 3, confidence=1) for n in range(12)),
    item(12, 1, confidence=2),
    item(13, 2, confidence=1, prompt=HOSTILE),
    item(14, 0, confidence=None),
    item(15, None),
]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([4.0] * 20, []),
        ([4.0] * 19 + [8.0], [(4, 4, 19), (8, 8, 1)]),
        ([1.0] * 3 + [2.0] * 4 + [3.0] * 13, [(1, 1, 3), (2, 2, 4), (3, 3, 13)]),
        ([float(n) for n in range(20)], [(4 * n, 4 * n + 3, 4) for n in range(5)]),
    ],
)
def test_items_of_one_length_are_in_one_bin(seconds: list[float], expected: list[Any]) -> None:
    items = [item(n, n % 3, seconds=(length, 0.0)) for n, length in enumerate(seconds)]
    bins = summarise(items)["by_length"].get("seconds of both clips", [])
    assert [(each["from"], each["to"], each["n"]) for each in bins] == expected


def about_of(items: list[EvalItem]) -> dict[str, Any]:
    summary = summarise(items, left_out={f"rows dropped: {HOSTILE}": 3})
    return {
        "judge": f"m {HOSTILE}",
        "data": "pairs.jsonl",
        "protocol": {"both_orders": True},
        "settings": {"episode": {"window": 1}},
        "summary": json.loads(json.dumps(summary)),
    }


class Elements(HTMLParser):
    """Counts elements, and collects the text and every address."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.addresses.append(str(value))
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_shows_every_table_and_nothing_in_it_can_run(tmp_path: Path) -> None:
    controls = {
        "judge": "m",
        "rows": [
            {
                "control": "swapped order",
                "number": "share that turns",
                "rule": "at least 0.8",
                "estimate": {"value": 0.5, "low": 0.3, "high": 0.7, "n": 20},
                "without_verdict": 1,
                "questions": 20,
                "passed": "failed",
            }
        ],
    }
    out = write_eval_page(tmp_path / "page.html", ITEMS, about_of(ITEMS), controls=controls)
    page = out.read_text("utf-8")
    found = Elements()
    found.feed(page)
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert found.addresses == found.handlers == []
    assert "\u202e" not in page, "what would turn the text round is named"
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1]
    for words in (
        "<script>alert(1)</script>",  # as text
        "16 items",
        "protocol 2, both_orders True",
        "15 judged, 1 unparsed, 0 failed, 0 missing",
        "left out: 3",
        "always tie",
        "expected calibration error",
        "long prompts (top 10%)",
        "swapped order",
        "0.500 [0.300, 0.700]",
        "1 of 20",
        "episode.window",
    ):
        assert words in " ".join(found.text.split()), words
    errors = found.text.partition("The surest errors")[2]
    ids = re.findall(r"\bp1[0-9]\b", errors)
    assert ids == ["p13", "p12", "p14"], "high before middle before not said"


def test_evidence_is_found_if_the_page_s_name_has_signs_of_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "episodes_of", lambda path, ids: dict.fromkeys(ids))
    monkeypatch.setattr(page, "write_page", lambda path, episode, reader: path.write_text("evidence"))
    lines = tmp_path / "trajectories.jsonl"
    out = write_eval_page(tmp_path / "run #1?100%.html", ITEMS, about_of(ITEMS), trajectories=lines)
    found = Elements()
    found.feed(out.read_text("utf-8"))
    assert len(found.addresses) > 1
    for address in found.addresses:
        parts = urlsplit(address)
        assert (parts.query, parts.fragment) == ("", "")
        assert (tmp_path / unquote(parts.path)).is_file()


def test_errors_are_those_of_verdicts_and_scores_by_sureness() -> None:
    scored = [
        item(number, None, status=ItemStatus.JUDGED, reason=None, scores={"OA": difference})
        for number, difference in ((1, -0.2), (2, 0.9), (3, 0.05), (4, 0.3))
    ]
    assert [one.id for one in surest_errors(scored, 9)] == ["p2", "p1", "p3"]
    assert [one.id for one in surest_errors(scored, 9, tie_threshold=0.1)] == ["p2", "p1"]
    assert surest_errors(scored, 1) == scored[1:2]
    voted = [item(n, 0, agreement=share) for n, share in ((1, 0.6), (2, 1.0))]
    assert [one.id for one in surest_errors(voted, 9)] == ["p2", "p1"]


def test_bars_have_no_place_for_what_is_missing() -> None:
    nothing = bar("a", {"value": None, "low": None, "high": None, "n": 0})
    assert (nothing.value, nothing.low, nothing.text) == (None, None, "-")
    full = bar("b", {"value": 1.0, "low": 0.9, "high": 1.0, "n": 3}, 0.25)
    assert (full.value, full.low, full.high, full.mark) == (100, 90, 100, 25)
    assert full.text == "1.000 [0.900, 1.000], n = 3"
    assert spelled({"value": 0.5}) == "0.500"


def test_files_that_are_no_run_are_refused_and_other_files_are_kept(tmp_path: Path) -> None:
    other = tmp_path / "notes.html"
    other.write_text("my notes")
    with pytest.raises(InputError, match="holds something else"):
        write_eval_page(other, ITEMS, about_of(ITEMS))
    for broken in ({}, {"summary": {}}, {"summary": {**about_of(ITEMS)["summary"], "measures": 3}}):
        with pytest.raises(InputError, match=r"eval\.json is not what"):
            write_eval_page(tmp_path / "page.html", ITEMS, broken)
    without = {**about_of(ITEMS)["summary"]}
    del without["protocol_version"]  # the template asks for it
    with pytest.raises(InputError, match=r"eval\.json is not what"):
        write_eval_page(tmp_path / "page.html", ITEMS, {**about_of(ITEMS), "summary": without})
    lines = tmp_path / "trajectories.jsonl"
    lines.write_bytes(b'{"schema_version":1,"id":"p1"}\n{"schema_version":1,"id":"p1\n\x00\n')
    assert episodes_of(lines, {"p1"}) == {}
    assert episodes_of(tmp_path / "gone", {"p1"}) == {}
