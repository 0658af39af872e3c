"""The tables that the method's paper published, as data with their source (`published.json`).

They are shown beside a run over a whole public benchmark, and never beside anything else: a part of a
benchmark, other pairs, or the synthetic world cannot be compared with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vrthinker.bounded_files import read_json

_FILE = Path(__file__).with_name("published.json")


@cache
def published() -> Mapping[str, Any]:
    """The content of the file.

    `source`; `rows`: benchmark -> [least, most] rows of its whole annotation file, which differ where only a
    rounded number is published; and `tables`: benchmark -> subset -> model -> [tau, diff].
    """
    content: Mapping[str, Any] = read_json(_FILE)
    return content


def is_whole(benchmark: str, rows: int) -> bool:
    """Whether an annotation file with this number of rows can be the whole benchmark.

    Args:
        benchmark: Its name.
        rows: The rows of the annotation file, also those that give no pair.
    """
    least, most = published()["rows"].get(benchmark, (0, -1))
    return bool(least <= rows <= most)


def print_published(benchmark: object) -> None:
    """Prints what was published about a whole benchmark; nothing for anything else.

    Args:
        benchmark: The benchmark that a run judged as a whole; None for other runs.
    """
    tables = published()["tables"]
    if not isinstance(benchmark, str) or benchmark not in tables:
        return
    console = Console(highlight=False)
    console.print()
    console.print(Text(f"published about {benchmark} ({published()['source']})"), soft_wrap=True)
    shown = Table(show_edge=False, pad_edge=False)
    for name in ("", "", "tau", "diff"):
        shown.add_column(name, justify="left" if not name else "right")
    for subset, models in tables[benchmark].items():
        for model, (tau, diff) in models.items():
            shown.add_row(subset, model, f"{tau:.1f}", f"{diff:.1f}")
    console.print(shown)
