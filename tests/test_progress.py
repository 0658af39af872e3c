"""Where long work stands: bars on a terminal, lines elsewhere, nothing on stdout."""

from __future__ import annotations

import subprocess
import sys

import pytest
from terminals import stderr_on_terminal

from vrthinker.progress import Progress


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


@pytest.mark.parametrize(
    ("total", "every", "wanted"),
    [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (3, 1, [1, 2, 3]), (4, 9, [4]), (5, 0, [])],
)
def test_a_line_every_so_often_and_at_the_end(
    capsys: pytest.CaptureFixture[str], total: int, every: int, wanted: list[int]
) -> None:
    with Progress() as progress:
        assert not progress.on_terminal
        for done in range(total + 1):
            progress.show("a", done, total, line=f"{done}", every=every)
        progress.say("[red]so\\[/red]")
    assert lines_of(capsys) == [*map(str, wanted), "[red]so\\[/red]"]


def test_a_terminal_gets_a_bar_for_each_name() -> None:
    with stderr_on_terminal() as said, Progress(figures=True) as progress:
        assert progress.on_terminal
        progress.show("first", 2, 5, line="a line", every=1)
        progress.show("[b]second[/b]", 1, 3, figures="[i]fast[/i]", line="a line", every=1)
        progress.say("[u]by the way[/u]")
        progress.show("first", 5, 5, line="a line", every=1)
    (text,) = said
    for shown in ("first", "2/5", "5/5", "[b]second[/b]", "1/3", "[i]fast[/i]", "[u]by the way[/u]"):
        assert shown in text
    assert "a line" not in text
    assert "first" not in text.rpartition("[b]second[/b]")[2], "a second bar of the same name"


def test_a_bar_without_figures_has_no_room_for_them() -> None:
    with stderr_on_terminal() as said, Progress() as progress:
        progress.show("a", 1, 2, figures="fast")
    assert "1/2" in said[0]
    assert "fast" not in said[0]


def test_rich_is_loaded_where_something_is_shown_only() -> None:
    code = "import sys; from vrthinker import progress; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
