"""How far a world evaluation has come, on stderr."""

from __future__ import annotations

import pytest
from terminals import stderr_on_terminal

from vrthinker.evals.retrieval import Retrieval
from vrthinker.evals.world import report_of
from vrthinker.evals.world_table import EvalProgress, print_report
from vrthinker.world.world import PRESETS, sample_pair


def test_a_line_every_so_often_for_each_retrieval(capsys: pytest.CaptureFixture[str]) -> None:
    with EvalProgress() as progress:
        for done in range(18):
            progress.episode("own", done, 17)
        progress.episode("random", 1, 2)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        *(f"own frames: {done} of 17 episodes" for done in [*range(2, 17, 2), 17]),
        "random frames: 1 of 2 episodes",
    ]


def test_a_terminal_gets_a_bar_for_each_retrieval() -> None:
    with stderr_on_terminal() as said, EvalProgress() as progress:
        progress.episode("own", 17, 17)
        progress.episode("random", 1, 2)
    for shown in ("own frames", "17/17", "random frames", "1/2"):
        assert shown in said[0]
    assert "episodes" not in said[0]


def test_failures_are_a_share_and_errors_among_them_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    truths = [sample_pair(PRESETS["easy"], 1, index) for index in range(25)]
    report = report_of(truths, {Retrieval.OWN: {}}, {f"own/{truths[0].id}": "a clip\nis damaged"})
    print_report(report, difficulty="easy", model="m")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-23] == "without a verdict: 25 of 25 episodes (100%); they count as wrong:"
    assert lines[-22] == f"  own/{truths[0].id}: a clip is damaged"
    assert lines[-2:] == ["  and 5 more", "25 of them by an error or not judged yet, not by its words"]
