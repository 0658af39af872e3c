"""A ranking on a terminal: places, strengths with intervals, win rates, failures, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vrthinker.progress import counted
from vrthinker.ranking.comparisons import CODES
from vrthinker.report.names import distinct_names
from vrthinker.report.terminal import plain

if TYPE_CHECKING:
    from vrthinker.ranking.ranking import Ranking

_SHOWN_FAILURES = 20


def print_ranking(
    ranking: Ranking, clips: Sequence[Path], cost: Mapping[str, int | None], cpu_seconds: float
) -> None:
    """Prints a ranking to stdout.

    Args:
        ranking: The ranking.
        clips: The clips, in the order in which they were given.
        cost: What the comparisons took: `pairs`, `rounds`, `tool_calls`, `prompt_tokens`, `sampled_tokens`.
        cpu_seconds: The CPU seconds of this process.
    """
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    names = [plain(name) for name in distinct_names(clips)]
    table = Table(show_edge=False, pad_edge=False)
    for head in ("", "clip", "strength (OA), 95 %", "won/tied/lost"):
        table.add_column(head, no_wrap=True)
    for code in CODES:
        table.add_column(f"{code} win rate", justify="right")
    for standing in ranking.standings:
        score, strength = standing.scores["OA"], standing.strengths["OA"]
        rates = (standing.scores[code].win_rate for code in CODES)
        table.add_row(
            "-" if standing.rank is None else str(standing.rank),
            Text(names[standing.clip]),
            "not judged" if strength is None else str(strength),
            f"{score.wins}/{score.ties}/{score.losses}",
            *("-" if rate is None else f"{100 * rate:.0f} %" for rate in rates),
        )
    console.print(table)
    if ranking.best is not None:
        console.print(Text(f"best: {names[ranking.best]}{_beside(ranking, names)}"))
    if ranking.consistency is not None:
        share = f"{100 * ranking.consistency:.0f} %"
        console.print(Text(f"{share} of the judged pairs gave the same overall verdict in both orders"))
    every = len(names) * (len(names) - 1) // 2
    told = [
        f"{cost['pairs']} of {counted(every, 'pair')} compared ({ranking.schedule})",
        counted(cost["rounds"] or 0, "round"),
        counted(cost["tool_calls"] or 0, "tool call"),
    ]
    if cost["prompt_tokens"] is not None and cost["sampled_tokens"] is not None:
        told.append(f"{cost['prompt_tokens']:,} tokens read and {cost['sampled_tokens']:,} written")
    console.print(Text(f"{', '.join(told)}, {cpu_seconds:.1f} CPU seconds"))
    if ranking.failures:
        console.print(
            Text(f"{counted(len(ranking.failures), 'pair')} without a verdict, counted for nobody:")
        )
        for one in ranking.failures[:_SHOWN_FAILURES]:
            pair = f"{names[one.first]} and {names[one.second]}"
            console.print(Text(plain(f"  {pair}: {one.reason}").replace("\n", " ")))
        if len(ranking.failures) > _SHOWN_FAILURES:
            console.print(Text(f"  and {len(ranking.failures) - _SHOWN_FAILURES} more"))


def _beside(ranking: Ranking, names: Sequence[str]) -> str:
    """Which clips are not clearly worse than the best one."""
    if not ranking.rivals:
        return ", clearly above all others"
    if len(ranking.rivals) == len(names) - 1:
        return ", but not clearly above any other (at 95 %)"
    listed = ", ".join(names[clip] for clip in ranking.rivals)
    return f", but not clearly above {listed} (at 95 %)"
