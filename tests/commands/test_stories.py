"""The pages for an evaluator and a notebook: their commands and code as they stand, on clips of the world."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from cli_run import vrthinker

from vrthinker.world.groups import sample_group, write_group
from vrthinker.world.world import PRESETS

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str = "") -> list[str]:
    """The blocks of code of a page."""
    text = (DOCS / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_two_folders_become_a_table_and_a_page_in_three_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    captions = []
    for letter in "AB":
        Path(letter).mkdir()
    for number in range(1, 5):
        group = sample_group(PRESETS["easy"], 21, number, 2)
        captions.append(group.caption)
        for letter, clip in zip("AB", write_group(tmp_path / "made" / str(number), group), strict=True):
            clip.rename(tmp_path / letter / f"{number}.mp4")
    Path("prompts.txt").write_text("\n".join(captions) + "\n")
    commands = [shlex.split(block)[1:] for block in blocks("evaluate_two_generators.md")]
    assert len(commands) == 3
    dry, judged, told = [vrthinker(*command) for command in commands]
    assert (dry.code, judged.code, told.code) == (0, 0, 0), judged.err
    assert "4 prompts with both clips" in dry.out
    assert "4 prompts judged" in judged.out
    assert json.loads(told.out)["judged"] == 4
    assert "loading" not in told.err
    page = Path("study/index.html").read_text("utf-8")
    assert len(re.findall(r'href="pages/', page)) == 4
    with open("study/verdicts.csv", newline="") as stream:
        assert {row["OA"] for row in csv.DictReader(stream)} <= {"X", "Y", "tie"}


@pytest.mark.slow
def test_a_notebook_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    group = sample_group(PRESETS["easy"], 22, 0, 4)
    write_group(tmp_path / "clips", group)
    Path("caption.txt").write_text(group.caption)
    (code,) = blocks("notebook.md", "python")
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "notebook.md", "exec"), {})
    first, *_, last = printed.getvalue().splitlines()
    assert first.startswith("Verdict(overall=")
    assert re.search(r"clips/\d.mp4 [+-]\d\.\d\d \[.*\] 3 pairs", last)
    assert Path("episode.html").read_bytes().startswith(b"<!doctype html>")
