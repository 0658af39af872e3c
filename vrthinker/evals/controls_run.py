"""Runs the negative controls: judges their questions, and writes the table (`controls.json`).

Invariant: what a model said is in `verdicts.jsonl` and is not asked for twice; the table is computed from it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vrthinker.data.pairs import Pair
from vrthinker.errors import VideoError
from vrthinker.evals.baselines import SCORERS, Baseline, Verdicts, record_of_baseline, verdicts_of
from vrthinker.evals.control_rules import Passed, Row
from vrthinker.evals.pixel_statistics import clip_scores
from vrthinker.progress import counted
from vrthinker.records.files import replace_file
from vrthinker.records.provenance import provenance
from vrthinker.report.terminal import plain
from vrthinker.video.open import open_reader
from vrthinker.video.virtual import VirtualReader

CONTROLS_FILE = "controls.json"
_WIDTH = 200
CONTROLS_VERSION = 2
"""The version of the controls and their rules. It is raised when a row of an unchanged judge would change."""
QUESTIONS_VERSION = 1
"""The version of the questions alone. Verdicts about the questions of another version are not continued."""


def baseline_verdicts(
    baseline: Baseline,
    questions: Sequence[Pair],
    pairs: Sequence[Pair],
    seed: int,
    on_question: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Mapping[str, int] | None]:
    """Question id -> a baseline's verdict. A scorer prefers the clip with the higher score, in everything.

    Args:
        baseline: The baseline.
        questions: The questions.
        pairs: The pairs that they were made from.
        seed: The seed of the coin.
        on_question: A function that is called with (answered, all questions).
    """
    verdicts = _by_scores(baseline) if baseline in SCORERS else verdicts_of(baseline, pairs, seed)
    found: dict[str, Mapping[str, int] | None] = {}
    for number, question in enumerate(questions, start=1):
        found[question.id] = record_of_baseline(baseline, question, verdicts, seed).judgment
        on_question(number, len(questions))
    return found


def _by_scores(baseline: Baseline) -> Verdicts:
    reader = VirtualReader(open_reader())
    known: dict[Path, float | VideoError] = {}

    def score(path: Path) -> float:
        if path not in known:
            try:
                known[path] = clip_scores(path, reader)[baseline.value]
            except VideoError as error:
                known[path] = error
        found = known[path]
        if isinstance(found, VideoError):
            raise found
        return found

    def verdict(pair: Pair) -> dict[str, int]:
        difference = score(pair.video_1) - score(pair.video_2)
        return dict.fromkeys(("TA", "VQ", "MQ", "OA"), 0 if not difference else 1 if difference > 0 else 2)

    return verdict


def write_controls(out: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Writes the table atomically.

    Raises:
        VRThinkerError: The file could not be written.
    """
    content = {
        "schema_version": 1,
        "controls_version": CONTROLS_VERSION,
        **about,
        "passed": {name.value: count for name, count in _counts(rows).items()},
        "rows": [row.as_json() for row in rows],
        "provenance": provenance(),
    }
    replace_file(out / CONTROLS_FILE, (json.dumps(content, indent=2) + "\n").encode())


def print_controls(
    rows: Sequence[Row], *, judge: str, data: str, pairs: int, left_out: Mapping[str, int]
) -> None:
    """Prints the table.

    Args:
        rows: The rows.
        judge: The judge's name.
        data: The name of the pairs.
        pairs: The number of pairs that the questions were made from.
        left_out: `control: reason` -> the number of pairs that a control could not be made of.
    """
    console = Console(highlight=False, width=max(Console().width, _WIDTH))
    questions = f"{judge} on negative controls made of {counted(pairs, 'pair')} of {data}; 95% intervals"
    console.print(Text(plain(questions)), soft_wrap=True)
    shown = Table(show_edge=False, pad_edge=False)
    for heading in ("", "control", "number", "value", "has to be", "no verdict"):
        shown.add_column(heading, no_wrap=True)
    before = None
    for row in rows:
        control = row.control if row.control != before else ""
        before = row.control
        without = f"{row.without_verdict} of {row.questions}" if row.without_verdict else ""
        shown.add_row(row.passed.value, control, row.number, Text(str(row.estimate)), row.rule, without)
    console.print(shown)
    for reason, count in left_out.items():
        console.print(Text(plain(f"left out of {reason}: {counted(count, 'pair')}")), soft_wrap=True)
    found = _counts(rows)
    console.print(Text(", ".join(f"{found[name]} {name}" for name in Passed)))


def _counts(rows: Sequence[Row]) -> dict[Passed, int]:
    counts = Counter(row.passed for row in rows)
    return {name: counts[name] for name in Passed}
