"""Verdicts, episodes and progress on a terminal. Results go to stdout, everything else to stderr.

Text by a model or from a caption is printed as plain text: rich markup in it is not read, and control
characters do not reach the terminal.
"""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vrthinker.episode.dimensions import Dimension, Judgments, Preference, dimension_texts
from vrthinker.episode.trajectory import WRITTEN_STOPS
from vrthinker.progress import Progress, counted
from vrthinker.report.page.rounds import Group, RoundView, round_views
from vrthinker.report.story import Findings, told_story

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vrthinker.episode.orders import MergedOrders
    from vrthinker.episode.trajectory import Trajectory
    from vrthinker.records.verdict_log import VerdictRecord

_LISTED_FAILURES = 20
_LISTED_NOTES = 5
_NAME_WIDTH = 11
_PART_LINES = 12
"""The most lines of a part of a round. The page has the whole text."""


def plain(text: str) -> str:
    """The text without control characters, because escape sequences would control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def print_verdict(
    trajectory: Trajectory,
    notes: Sequence[str],
    findings: Sequence[Findings] = (),
    *,
    both: MergedOrders | None = None,
    seconds: float | None = None,
) -> None:
    """Prints the verdict of an episode as a small table, with its story and notes for its reader.

    Args:
        trajectory: The record of the episode.
        notes: The notes.
        findings: What each round found, for the story.
        both: What both orders of the clips say together, if both were judged. The table is theirs, and the
            story is that of the episode.
        seconds: How long it took; what the episode took by default.
    """
    _print_table(Console(highlight=False), trajectory, notes, findings, both, seconds)


def print_episode(trajectory: Trajectory, notes: Sequence[str], findings: Sequence[Findings] = ()) -> None:
    """Prints the whole episode, round by round as the page shows them, and its verdict."""
    console = Console(highlight=False, width=min(110, Console().width))
    console.print(Text(f"caption: {plain(trajectory.prompt)}"))
    for number, video in enumerate(trajectory.videos, start=1):
        first = 1 if number == 1 else trajectory.n_frames_1 + 1
        last = trajectory.n_frames_1 if number == 1 else trajectory.n_frames
        size = f"{video.width}x{video.height}"
        line = (
            f"video {number}: {video.n_frames} frames, {video.fps:g} fps, {size}, numbered {first} to {last}"
        )
        console.print(Text(line))
    for view in round_views(trajectory):
        _print_round(console, trajectory, view)
    console.print()
    _print_table(console, trajectory, notes, findings)


def print_truth(judged: Judgments | None, truth: Judgments, facts: Sequence[str]) -> None:
    """Prints the judgments beside the truth, and what was planted.

    Args:
        judged: The judge's judgments; None if it gave no verdict.
        truth: The true judgments.
        facts: A line for each planted event.
    """
    console = Console(highlight=False)
    table = Table(show_edge=False, pad_edge=False)
    for name in ("", "verdict", "truth", ""):
        table.add_column(name)
    for dimension in Dimension:
        true = getattr(truth, dimension)
        given = None if judged is None else getattr(judged, dimension)
        said = "none" if given is None else str(given)
        table.add_row(dimension.value, said, str(true), "right" if given == true else "wrong")
    console.print()
    console.print(table)
    console.print(Text("planted:"))
    for fact in facts:
        console.print(Text(plain(f"  {fact}")))


_DECODING = {
    "decode/pixel_wait_share": "the engine waited for them {:.0%} of the time",
    "decode/frames_per_frame_shown": "{:.1f} frames decoded for each one read",
    "decode/cache_hit_share": "{:.0%} of the frames were still in memory",
}
"""How the summary says each metric of reading pixels."""


class FileProgress(Progress):
    """The progress of judging a pairs file, with failures and counts at the end.

    Args:
        total: The number of pairs in the file.
        done: The number of pairs that were recorded before this run.
    """

    def __init__(self, total: int, *, done: int) -> None:
        super().__init__()
        self._total, self._count, self._waiting = total, done, False
        self.show("judging", done, total)
        if done == total:
            self.say(f"nothing to judge: {done} of {counted(total, 'pair')} recorded already")
        elif done and not self.on_terminal:
            self.say(f"{done} of {counted(total, 'pair')} recorded already")

    def record(self, record: VerdictRecord) -> None:
        """Counts a record that was just written."""
        self._count += 1
        line = f"{self._count} of {counted(self._total, 'pair')}"
        self.show("judging", self._count, self._total, line=line, every=max(1, self._total // 20))

    def wait(self, waiting: int) -> None:
        """Writes once that other processes hold the remaining pairs."""
        if not self._waiting:
            self.say(f"waiting for {counted(waiting, 'pair')} that other processes are judging")
            self._waiting = True

    def summarise(
        self,
        records: list[VerdictRecord],
        out: Path,
        *,
        as_json: bool,
        decoding: Mapping[str, float] | None = None,
    ) -> int:
        """Prints notes, counts and failures, and returns the exit code (1 if a pair has no verdict).

        Args:
            records: The records of all pairs.
            out: The results file.
            as_json: Whether to print JSON.
            decoding: How this run read pixels (`Judge.decode_metrics`).
        """
        failed = [record for record in records if record.judgment is None]
        notes = Counter(note for record in records for note in dict.fromkeys(record.notes))
        known = [record.consistent for record in records if record.consistent is not None]
        if as_json:
            import json

            summary = {
                "out": str(out),
                "verdicts": len(records) - len(failed),
                "notes": dict(notes.most_common()),
                **({} if not known else {"both_orders": len(known), "consistent": sum(known)}),
                "failed": [{"id": r.id, "stop_reason": r.stop_reason, "reason": r.reason} for r in failed],
                "metrics": dict(decoding or {}),
            }
            sys.stdout.write(json.dumps(summary, indent=2) + "\n")
            return 1 if failed else 0
        console = Console(highlight=False, soft_wrap=True)  # a path on two lines could not be copied
        for note, count in notes.most_common(_LISTED_NOTES):
            text = plain(f"note on {count} of {counted(len(records), 'pair')}: {note}").replace("\n", " ")
            console.print(Text(text), style="yellow")
        if len(notes) > _LISTED_NOTES:
            console.print(Text(f"and {counted(len(notes) - _LISTED_NOTES, 'other note')}, in {out}"))
        overall = Counter(r.judgment["OA"] for r in records if r.judgment is not None)
        console.print(Text(f"{counted(len(records) - len(failed), 'verdict')} in {out}"))
        if overall:
            counts = ", ".join(f"{preference} {overall[preference]}" for preference in Preference)
            console.print(Text(f"better overall: {counts}"))
        if known:
            share = f"{sum(known)} of {counted(len(known), 'pair')} ({sum(known) / len(known):.0%})"
            console.print(Text(f"both orders of the clips agree overall on {share}"))
        if decoding:
            said = [words.format(decoding[name]) for name, words in _DECODING.items() if name in decoding]
            console.print(Text(f"pixels: {', '.join(said)}"))
        if failed:
            by_model = all(record.stop_reason in WRITTEN_STOPS for record in failed)
            # What a model wrote it writes again, because a pair's seed stays the same.
            remedy = "another judge may do better" if by_model else "--retry-failed judges them again"
            console.print(Text(f"{counted(len(failed), 'pair')} without a verdict ({remedy}):"))
            for record in failed[:_LISTED_FAILURES]:
                line = plain(f"  {record.id}: {record.stop_reason}: {record.reason}").replace("\n", " ")
                console.print(Text(line))
            if len(failed) > _LISTED_FAILURES:
                console.print(Text(f"  and {len(failed) - _LISTED_FAILURES} more, in {out}"))
        return 1 if failed else 0


def _print_table(
    console: Console,
    trajectory: Trajectory,
    notes: Sequence[str],
    findings: Sequence[Findings],
    both: MergedOrders | None = None,
    seconds: float | None = None,
) -> None:
    outcome = trajectory.outcome if both is None else both
    if outcome.judgments is None:
        console.print(Text(plain(f"no verdict ({outcome.stop_reason}): {outcome.reason}")))
    else:
        table = Table(show_edge=False, pad_edge=False)
        table.add_column("")
        table.add_column("dimension")
        table.add_column("better")
        for text in dimension_texts(trajectory.dataset):
            preference = getattr(outcome.judgments, text.code)
            style = "bold" if text.code == Dimension.OA else ""
            table.add_row(text.code, text.name, str(preference), style=style)
        console.print(table)
    confidence = "not said" if outcome.confidence is None else outcome.confidence.name.lower()
    rounds, calls = len(trajectory.rounds), trajectory.tool_calls
    seen = trajectory.frames_seen
    if both is not None:
        rounds, calls, seen = both.rounds, both.tool_calls, both.frames_seen
    took = trajectory.latency_seconds if seconds is None else seconds
    console.print(
        Text(
            f"{counted(rounds, 'round')}, {counted(calls, 'tool call')}, "
            f"{len(seen)} of {trajectory.n_frames} frames seen, "
            f"confidence {confidence}, {took:.1f} s"
        )
    )
    if outcome.judgments is not None:
        console.print(Text(plain(told_story(trajectory, findings, both=both)).replace("\n", " ")))
    for note in notes:
        console.print(Text(plain(f"note: {note}")), style="yellow")


def _print_round(console: Console, trajectory: Trajectory, view: RoundView) -> None:
    """Prints a round as the page shows it: frames, texts, answer, calls and what came back."""
    console.print()
    console.print(Text(f"Round {view.record.round_number}", style="bold"))
    for group in view.live:
        new = " (new)" if group.is_new else ""
        _print_part(console, "sees", f"{group.title.lower()}: {_numbers(group)}{new}")
    gone = [str(tile.frame.frame_number) for group in view.expired for row in group.rows for tile in row]
    if gone:
        _print_part(console, "", f"expired: {', '.join(gone)}")
    for failure in view.record.failures:
        _print_part(console, "form", f"{failure.reason}: {failure.message}")
    if view.record.repairs:
        kinds = ", ".join(repair.kind.value for repair in view.record.repairs)
        _print_part(console, "form", f"read although not in the right form: {kinds}")
    for section in view.sections:
        _print_part(console, _SECTIONS[section.kind], section.text, style="dim")
    if view.judgments is not None:
        told = [
            f"{code} {getattr(view.judgments, code)}" + " (changed)" * (code in view.changed)
            for code in (text.code for text in dimension_texts(trajectory.dataset))
        ]
        sure = "" if view.confidence is None else f"; confidence {view.confidence.name.lower()}"
        _print_part(console, "answer" if view.is_final else "so far", ", ".join(told) + sure)
    for call, tool in zip_longest(view.calls, view.record.tools):
        name = (tool.name if tool is not None else call.name) or "a call without a name"
        if tool is None:
            answer = call.failure
        elif tool.error is not None:
            answer = f"refused: {tool.error}"
        else:
            answer = f"shows frames {', '.join(map(str, tool.frame_numbers))}"
            answer += f"; {tool.note}" if tool.note else ""
        _print_part(console, "call", f"{name}: {answer}")


_SECTIONS = {"snapshot": "snapshot", "think": "thinking", "raw": "as written"}


def _numbers(group: Group) -> str:
    """The numbers of a group's frames, video by video."""
    rows = (
        f"video {row[0].frame.video}: {', '.join(tile.frame.label for tile in row)}" for row in group.rows
    )
    return "; ".join(rows)


def _print_part(console: Console, name: str, text: str, *, style: str = "") -> None:
    """Prints a part of a round beside its name. Line breaks of the text stay."""
    width = max(20, console.width - _NAME_WIDTH - 2)
    lines = [piece for line in plain(text).split("\n") for piece in textwrap.wrap(line, width) or [""]]
    if len(lines) > _PART_LINES:
        lines = [*lines[: _PART_LINES - 1], "…"]
    for number, line in enumerate(lines):
        head = Text(f"  {name if number == 0 else '':<{_NAME_WIDTH}}")
        console.print(head.append(line, style=style))
