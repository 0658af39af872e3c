"""A comparison of two generators on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vrthinker.progress import counted
from vrthinker.report.compare_page.page import ShareView
from vrthinker.report.page.text import shortened
from vrthinker.report.terminal import plain

_SHOWN = 20


def print_comparison(
    names: tuple[str, str],
    shares: Sequence[ShareView],
    prompts: int,
    failures: Sequence[tuple[str, str]],
    notes: Mapping[str, int],
    files: tuple[Path, Path],
) -> None:
    """Prints shares with intervals, failures, and where the page is, to stdout.

    Args:
        names: The names of the generators.
        shares: The shares per dimension.
        prompts: The number of prompts, failed ones too.
        failures: Id and reason of each prompt without a verdict.
        notes: Note on verdicts -> how many have it.
        files: The table of verdicts, and the page.
    """
    console = Console(highlight=False, soft_wrap=True)
    for note, count in notes.items():
        text = plain(f"note on {count} of {counted(prompts, 'prompt')}: {note}").replace("\n", " ")
        console.print(Text(text), style="yellow")
    if not console.is_terminal:
        console.width = max(console.width, 120)
    table = Table(show_edge=False, pad_edge=False)
    heads = (
        "",
        f"{plain(names[0])} better",
        "tie",
        f"{plain(names[1])} better",
        f"lead of {plain(names[0])}",
    )
    for head in heads:
        table.add_column(Text(head), justify="right" if head else "left", no_wrap=True)
    for share in shares:
        cells = (share.win, share.tie, share.loss, share.lead)
        table.add_row(share.code, *(_cell(cell) for cell in cells))
    console.print(table)
    judged = prompts - len(failures)
    console.print(Text(f"{counted(judged, 'prompt')} judged; in brackets: 95 % intervals over prompts"))
    if failures:
        console.print(Text(f"{counted(len(failures), 'prompt')} without a verdict, in no share:"))
        for name, reason in failures[:_SHOWN]:
            console.print(Text(plain(f"  {name}: {reason}").replace("\n", " ")))
        if len(failures) > _SHOWN:
            console.print(Text(f"  and {len(failures) - _SHOWN} more"))
    console.print(Text(plain(f"the table: {files[0]}")))
    console.print(Text(plain(f"the page, open it in a browser: {files[1]}")))


def print_matched(rows: Sequence[tuple[str, tuple[Path, Path], str]]) -> None:
    """Prints which clips belong to which prompt to stdout, a line for each prompt.

    Args:
        rows: The id, both clips, and the text of each prompt.
    """
    console = Console(highlight=False, soft_wrap=True)
    for name, clips, prompt in rows:
        line = f"{name}  {clips[0]}  {clips[1]}  {shortened(prompt, 80)}"
        console.print(Text(plain(line).replace("\n", " ")))
    console.print(Text(f"{counted(len(rows), 'prompt')} with both clips; nothing was judged"))


def _cell(share: tuple[float, float, float] | None) -> str:
    return "-" if share is None else f"{share[0]:.0f} % [{share[1]:.0f}, {share[2]:.0f}]"
