"""Writes the index page of a comparison: shares with intervals, and a row for each prompt.

Rows can be sorted by any column and filtered by who won, by dimensions that disagree, by failure, and by
words. Each row opens the page of its episode, a file beside the index.
Invariant: as the evidence page (`report/page`), the file is self-contained and loads nothing, and no text can
run as code. A row is text only: a page of many prompts stays small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vrthinker._version import __version__
from vrthinker.episode.dimensions import dimension_texts
from vrthinker.records.files import replace_file
from vrthinker.report.page.page import check_page_path, content_policy
from vrthinker.report.page.templating import asset, page_template

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ShareView:
    """One dimension's shares: each is (value, low, high) in percent, or None without verdicts."""

    code: str
    win: tuple[float, float, float] | None
    tie: tuple[float, float, float] | None
    loss: tuple[float, float, float] | None
    lead: tuple[float, float, float] | None


@dataclass(frozen=True)
class RowView:
    """One prompt's row.

    Attributes:
        id: The id of the prompt.
        prompt: The prompt.
        judgment: Dimension code -> 0 (tie), 1 (the first generator) or 2; None without a verdict.
        kinds: What the row is filtered by, besides who won.
        probability: How likely the judge finds its overall label; None where that is not known.
        confidence: The stated confidence, 1 (high) to 3 (low).
        rounds: The number of rounds.
        story: The episode in words, or the reason why there is no verdict.
        href: The page of the episode, relative to the index; None if there is none.
    """

    id: str
    prompt: str
    judgment: Mapping[str, int] | None
    kinds: tuple[Literal["disagree", "failed", "changed"], ...]
    confidence: int | None
    rounds: int
    story: str
    href: str | None
    probability: float | None = None


def write_compare_page(
    path: Path,
    *,
    names: tuple[str, str],
    shares: Sequence[ShareView],
    rows: Sequence[RowView],
    facts: Sequence[tuple[str, str]],
    notes: Mapping[str, int],
    missing: Sequence[str] = (),
) -> None:
    """Writes the page atomically.

    Args:
        path: The HTML file. An older page is replaced.
        names: The names of the generators.
        shares: The shares per dimension, those of the first generator.
        rows: The rows.
        facts: Name and value of what the comparison was made with.
        notes: Note on verdicts -> how many have it.
        missing: What was not judged because a clip is missing.

    Raises:
        InputError: The path cannot be used.
        VRThinkerError: The file cannot be written.
    """
    check_page_path(path)
    style, script = asset(_TEMPLATES / "compare.css"), asset(_TEMPLATES / "compare.js")
    words = ("tie", *names)
    failed = sum(row.judgment is None for row in rows)
    wins = [
        sum(row.judgment is not None and row.judgment["OA"] == value for row in rows) for value in (0, 1, 2)
    ]
    page = page_template(_TEMPLATES / "compare.html.jinja").render(
        policy=content_policy(styles=(style,), script=script),
        style=style,
        script=script,
        names=names,
        words=words,
        wins=wins,
        shares=shares,
        dimensions={text.code: text.name for text in dimension_texts(None)},
        rows=rows,
        failed=failed,
        kinds={kind: sum(kind in row.kinds for row in rows) for kind in ("disagree", "changed", "failed")},
        facts=(*facts, ("Page written by", f"vrthinker {__version__}")),
        notes=notes,
        missing=missing,
    )
    replace_file(path, page.encode("utf-8"))
