"""The terminal output of the errors of a world evaluation: what was lost, per cause, and where to look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vrthinker.evals.world_errors import WorldErrors, slip_lines
from vrthinker.evals.world_table import TABLE_WIDTH
from vrthinker.progress import counted
from vrthinker.report.terminal import plain

_LISTED_SLIPS = 4


def print_errors(errors: WorldErrors, pages: Mapping[str, Path]) -> None:
    """Prints the table of causes, and the pages of the worst episodes with their first slips."""
    console = Console(highlight=False, width=max(Console().width, TABLE_WIDTH))
    console.print()
    n = len(errors.episodes)
    of_all = f"{errors.frames} frames, {errors.rounds} rounds, {counted(n, 'episode')}"
    console.print(Text(f"errors with own frames ({of_all}; {len(errors.wrong)} with OA wrong or missing)"))
    if errors.broken_rounds * 2 > errors.rounds:
        share = f"{errors.broken_rounds} of {errors.rounds} rounds"
        console.print(
            Text(
                f"{share} are not in the world's words: this model does not write them, "
                "and little else can be counted"
            )
        )
    counts = {kind: count for kind, count in errors.counts().items() if count.slips}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("what went wrong", "slips", "how often", "episodes", "first slip of wrong OA"):
        table.add_column(name, justify="left" if name == "what went wrong" else "right", no_wrap=True)
    for kind, count in counts.items():
        rate = "" if count.rate is None else f"{count.rate:.2f} per {count.per}"
        table.add_row(kind.words, str(count.slips), rate, str(count.episodes), str(count.causes or ""))
    if errors.unexplained:
        table.add_row("none found", "", "", "", str(errors.unexplained))
    if table.row_count:
        console.print(table)
    else:
        console.print(Text("no slip was found"))
    unsaid = [
        name
        for name, said in (("places", errors.dialect.places), ("what is left", errors.dialect.left))
        if not said
    ]
    if unsaid and errors.episodes:
        console.print(Text(f"it never says {' or '.join(unsaid)}, so this is not checked"))
    if errors.not_judged:
        console.print(
            Text(f"{counted(errors.not_judged, 'episode')} missing or ended by an error: not counted")
        )
    for episode in errors.wrong:
        if episode.id in pages:
            # Those that matter are shown first.
            order = sorted(range(len(episode.slips)), key=lambda i: not episode.slips[i].matters)
            lines = [slip_lines(episode)[i] for i in order]
            console.print(Text(plain(f"{pages[episode.id]}: {counted(len(lines), 'slip')}")))
            for line in lines[:_LISTED_SLIPS]:
                console.print(Text("  " + plain(line).replace("\n", " ")))
            if len(lines) > _LISTED_SLIPS:
                console.print(Text(f"  and {len(lines) - _LISTED_SLIPS} more, listed on the page"))
