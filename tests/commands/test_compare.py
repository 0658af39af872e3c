"""`vrthinker compare`: a table, a page, the episodes; what is missing is named first; killed runs go on."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from cli_run import vrthinker
from clips import make_clip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of three clips, of which one breaks, and their prompts."""
    root = tmp_path_factory.mktemp("study")
    for letter, size in (("A", (48, 64)), ("B", (64, 48))):
        (root / letter).mkdir()
        for number in (1, 2, 3):
            make_clip(root / letter / f"{number}.mp4", 10, size=size)
    (root / "B" / "3.mp4").write_text("no video")
    (root / "p.txt").write_text("a <b>dog</b>\na cat\n=broken\n")
    return root


def compare(study: Path, tiny: Path, out: Path, *more: object) -> list[object]:
    given = ["compare", study / "A", study / "B", "--prompts", study / "p.txt", "--names", "X", "Y & Z"]
    return [*given, "--model", tiny, "--rounds", 2, "--out", out, *more]


def test_two_folders_become_a_table_and_a_page(study: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = vrthinker(*compare(study, tiny, out))
    assert done.code == 1, done.err  # one prompt has no verdict
    assert "2 prompts judged" in done.out
    assert "003: video_error:" in done.out
    with (out / "verdicts.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == ["001", "002", "003"]
    assert {row["OA"] for row in rows[:2]} <= {"X", "Y & Z", "tie"}
    assert rows[2]["OA"] == ""
    assert "3.mp4" in rows[2]["reason"]
    page = (out / "index.html").read_text()
    assert "<b>dog</b>" not in page
    assert "a &lt;b&gt;dog&lt;/b&gt;" in page
    links = re.findall(r'href="(pages/[^"]+)"', page)
    assert links == ["pages/00001.html", "pages/00002.html"]
    assert all((out / link).read_bytes().startswith(b"<!doctype html>") for link in links)
    assert len(re.findall(r'data-kinds="[^"]*failed', page)) == 1
    # Killed after its first pair: what is recorded stays, the rest is judged, missing pages are written.
    lines = (out / "verdicts.jsonl").read_text().splitlines()
    (out / "verdicts.jsonl").write_text(lines[0] + "\n")
    (out / links[0]).unlink()
    before = json.loads((out / "compare.json").read_text())
    again = vrthinker(*compare(study, tiny, out, "--json"))
    assert json.loads(again.out) == before
    assert (out / "verdicts.jsonl").read_text().splitlines()[0] == lines[0]
    assert (out / links[0]).exists()
    finished = vrthinker(*compare(study, tiny, out))
    assert "nothing to judge: 3 of 3 pairs recorded already" in finished.err
    assert "loading" not in finished.err
    (study / "q.txt").write_text("a\nb\nc\n")
    other = compare(study, tiny, out)
    other[4] = study / "q.txt"
    assert "was made with prompts_and_clips=" in vrthinker(*other).last_line


def test_a_retry_that_is_killed_leaves_no_page_of_an_older_verdict(
    study: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    vrthinker(*compare(study, tiny, out))
    lines = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    (failed,) = (line for line in lines if line["id"] == "002")
    failed |= {"judgment": None, "stop_reason": "engine_error", "reason": "it was killed"}
    (out / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, kept = out / "pages" / "00002.html", (out / "pages" / "00001.html").stat().st_mtime_ns
    page.write_text("an older episode")

    def killed(*arguments: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vrthinker.commands.compare.CompareCommand._written", killed)
        assert vrthinker(*compare(study, tiny, out, "--retry-failed")).code != 0
    done = vrthinker(*compare(study, tiny, out))
    assert "nothing to judge" in done.err
    assert page.read_bytes().startswith(b"<!doctype html>")
    assert (out / "pages" / "00001.html").stat().st_mtime_ns == kept


def test_both_orders_are_one_verdict_on_the_table_and_the_page(
    study: Path, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = vrthinker(*compare(study, tiny, out, "--both-orders"))
    assert done.code == 1, done.err  # one prompt has no verdict
    assert "2 prompts judged" in done.out
    lines = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    records = sorted(lines, key=lambda record: record["id"])
    assert [len(record.get("orders", ())) for record in records] == [2, 2, 0], "the third one has no verdict"
    with (out / "verdicts.csv").open(newline="") as stream:
        rows = {row["id"]: row for row in csv.DictReader(stream)}
    for record in records[:2]:
        one, other = (order["judgment"]["OA"] for order in record["orders"])
        assert rows[record["id"]]["consistent"] == ("true" if one == other else "false")
    assert rows["003"]["consistent"] == ""
    episodes = [json.loads(line)["id"] for line in (out / "trajectories.jsonl").read_text().splitlines()]
    assert sorted(episodes) == ["001", "001#swapped", "002", "002#swapped"]
    page = (out / "pages" / "00001.html").read_text()
    assert "In the pair&#39;s own order: " in page
    assert vrthinker(*compare(study, tiny, out)).code == 2, "the folder holds verdicts of both orders"


def test_a_dry_run_shows_who_belongs_to_whom(study: Path, tmp_path: Path) -> None:
    done = vrthinker(*compare(study, tmp_path / "no-model", tmp_path / "out", "--dry-run"))
    assert done.code == 0, done.err
    assert re.search(r"002  \S*A/2\.mp4  \S*B/2\.mp4  a cat", done.out)
    assert "3 prompts with both clips; nothing was judged" in done.out
    assert not (tmp_path / "out").exists()


def test_missing_clips_are_named_before_anything_is_judged(study: Path, tiny: Path, tmp_path: Path) -> None:
    (study / "four.txt").write_text("a\nb\nc\nd\n")
    given = compare(study, tiny, tmp_path / "out", "--match", "number")
    given[4] = study / "four.txt"
    done = vrthinker(*given)
    assert done.code == 2
    assert "1 of 4 prompts lack a clip (prompt 004: a clip with the number 4 in" in done.line
    assert not (tmp_path / "out").exists()
    for names in (("X", "X"), ("tie", "Y"), (" ", "Y")):
        given[6:8] = names
        assert "--names: got" in vrthinker(*given).line
