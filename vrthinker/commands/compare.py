"""`vrthinker compare` compares two generators over many prompts: shares with intervals, a table, a page."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vrthinker.commands.judge_options import JudgeOptions
from vrthinker.commands.options import Flag, announce, option
from vrthinker.errors import InputError, unwritable

if TYPE_CHECKING:
    from vrthinker.commands.judges import JudgeSource
    from vrthinker.data.matching import Matched
    from vrthinker.data.pairs import Pair
    from vrthinker.episode.trajectory import Trajectory
    from vrthinker.evals.generators import Compared, Shares
    from vrthinker.records.verdict_log import VerdictRecord
    from vrthinker.report.compare_page.page import RowView, ShareView

PAIRS_FILE, VERDICTS_FILE, TRAJECTORIES_FILE = "pairs.jsonl", "verdicts.jsonl", "trajectories.jsonl"
SUMMARY_FILE, INDEX_FILE, PAGES_FOLDER = "compare.json", "index.html", "pages"
_MAX_PAGE_CLIP_BYTES = 4_000_000
"""The most bytes of a clip on an episode's page: of hundreds of pages, each has to stay small."""


@dataclass(frozen=True, kw_only=True)
class _Study:
    """What is compared, and where the results go."""

    folders: Annotated[tyro.conf.Positional[tuple[Path, Path]], option("A B")]
    """The folder of each generator's clips, one clip for each prompt."""
    prompts: Annotated[Path, option("FILE")]
    """The prompts: a text file with one a line, or a table (.csv, .parquet, .jsonl) that may name the clips
    in a column video, or video_1 and video_2."""
    out: Annotated[Path, option("DIR")]
    """The folder for the verdicts, the table, the page and the episodes. A killed run continues there."""
    names: Annotated[tuple[str, str] | None, option("X Y")] = None
    """What the generators are called. The names of their folders by default."""
    match: Literal["order", "number"] = "order"
    """How clips belong to prompts that do not name them: in the order of their names, or by the last number
    in each name."""
    both_orders: Flag = False
    """Judge each prompt in both orders of its clips. Its verdict is that of both; it counts once."""
    skip_missing: Flag = False
    """Judge the other prompts if clips are missing. By default nothing is judged then."""
    dry_run: Flag = False
    """Print which clips belong to which prompt, and judge nothing."""
    table: Literal["csv", "parquet"] = "csv"
    """The format of the table of verdicts."""
    retry_failed: Flag = False
    """Judge prompts again that are in --out without a verdict."""
    json: Flag = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class CompareCommand(JudgeOptions, _Study):
    """Compare two generators over many prompts: win, tie and loss with intervals, a table, and a page.

    vrthinker compare A/ B/ --prompts prompts.txt --names X Y --model M --out DIR
    """

    def run(self) -> int:
        """Compares and prints; returns 1 if a prompt has no verdict."""
        from vrthinker.data.matching import listed, match_clips
        from vrthinker.data.tables import check_table
        from vrthinker.evals.generators import drawn_places, pairs_of

        source = self.source()
        names = self._checked_names()
        check_table("--table", self._table)
        matched = match_clips(self.folders, self.prompts, match=self.match)
        if matched.missing and not self.skip_missing:
            raise InputError(
                f"{len(matched.missing)} of {len(matched.missing) + len(matched.samples)} prompts lack a "
                f"clip ({listed(matched.missing)}); add them, or give --skip-missing"
            )
        if not matched.samples:
            raise InputError("compare: got no prompt with both clips, allowed: at least one")
        if matched.missing:
            announce(f"not judged, because a clip is missing: {listed(matched.missing)}")
        if self.dry_run:
            return self._shown(matched)
        swapped = drawn_places([sample.id for sample in matched.samples], self.seed)
        pairs = pairs_of(matched.samples, swapped, self.dataset)
        records, judged_now = self._judged(source, pairs)
        return self._written(matched, swapped, names, records, judged_now)

    @property
    def _table(self) -> Path:
        return self.out / f"verdicts.{self.table}"

    def _shown(self, matched: Matched) -> int:
        """Prints the prompts and their clips."""
        from vrthinker.report.compare_table import print_matched

        if self.json:
            rows = [
                {"id": one.id, "prompt": one.prompt, "clips": [str(clip) for clip in one.clips]}
                for one in matched.samples
            ]
            sys.stdout.write(json.dumps({"prompts": rows, "missing": matched.missing}, indent=2) + "\n")
        else:
            print_matched([(one.id, one.clips, one.prompt) for one in matched.samples])
        return 0

    def _checked_names(self) -> tuple[str, str]:
        names = self.names or (self.folders[0].resolve().name, self.folders[1].resolve().name)
        if self.names is None and names[0] == names[1]:
            names = ("A", "B")
        if names[0] == names[1] or any(not name.strip() or name == "tie" for name in names):
            raise InputError(f"--names: got {names[0]!r} and {names[1]!r}, allowed: two names, not tie")
        return names

    def _judged(
        self, source: JudgeSource, pairs: Sequence[Pair]
    ) -> tuple[dict[str, VerdictRecord], set[str]]:
        """The records of all pairs, and the ids of those that were judged in this run."""
        from vrthinker.data.pairs import dump_pair
        from vrthinker.judge_file import judge_file, run_configuration
        from vrthinker.records.files import replace_file
        from vrthinker.records.trajectories import check_trajectories_file
        from vrthinker.records.verdict_log import VerdictLog
        from vrthinker.report.terminal import FileProgress

        out = self.out
        try:
            (out / PAGES_FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(out, error, "name another folder") from None
        check_trajectories_file(out / TRAJECTORIES_FILE)
        lines = "".join(dump_pair(pair, out) for pair in pairs).encode()
        run, ignored = run_configuration(
            source.configuration(),
            pairs_file=out / PAIRS_FILE,
            seed=self.seed,
            both_orders=self.both_orders,
        )
        about = {"prompts_and_clips": hashlib.sha256(lines).hexdigest()}
        judged_now: set[str] = set()
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(VerdictLog(out / VERDICTS_FILE, {**run, **about}, ignore=ignored))
            replace_file(out / PAIRS_FILE, lines)
            if self.retry_failed and (failed := log.failed_ids()):
                # An episode without a page gets one, even if this run is killed before it writes pages.
                for number, pair in enumerate(pairs, start=1):
                    if pair.id in failed:
                        (out / _page_of(number)).unlink(missing_ok=True)
                log.drop_failed()
            pending = log.pending([pair.id for pair in pairs])
            progress = stack.enter_context(FileProgress(len(pairs), done=len(pairs) - len(pending)))

            def count(record: VerdictRecord) -> None:
                judged_now.add(record.id)
                progress.record(record)

            if pending:
                judge = stack.enter_context(source.load())
                judge_file(
                    judge,
                    pairs,
                    log,
                    seed=self.seed,
                    trajectories=out / TRAJECTORIES_FILE,
                    both_orders=self.both_orders,
                    on_record=count,
                    on_wait=progress.wait,
                )
            return {record.id: record for record in log.records()}, judged_now

    def _written(
        self,
        matched: Matched,
        swapped: frozenset[str],
        names: tuple[str, str],
        records: Mapping[str, VerdictRecord],
        judged_now: set[str],
    ) -> int:
        from vrthinker.data.tables import table_bytes
        from vrthinker.episode.trajectory import load_trajectories
        from vrthinker.evals.generators import COLUMNS, as_json, compared, rows_of, shares
        from vrthinker.judge_file import swapped_ids_of
        from vrthinker.records.files import replace_file
        from vrthinker.report.compare_page.page import write_compare_page

        out = self.out
        verdicts = compared(matched.samples, swapped, records)
        replace_file(self._table, table_bytes(self._table, rows_of(verdicts, names), COLUMNS))
        told = as_json(verdicts, names, self.folders, matched.missing)
        replace_file(out / SUMMARY_FILE, (json.dumps(told, indent=2) + "\n").encode())
        # The last line of an id is the one that counts: a killed run may have left an earlier one.
        episodes = {one.id: one for one in load_trajectories(out / TRAJECTORIES_FILE)}
        others = swapped_ids_of([one.sample.id for one in verdicts]) if self.both_orders else dict[str, str]()
        announce("writing the pages of the episodes")
        rows = []
        for number, one in enumerate(verdicts, start=1):
            page = _page_of(number)
            name = one.sample.id
            shown = episodes.get(name), episodes.get(others.get(name, name))
            rows.append(self._row(one, *shown, page, name in judged_now))
        measured = shares(verdicts)
        notes = Counter(note for one in verdicts for note in dict.fromkeys(one.record.notes))
        model = verdicts[0].record.model if verdicts else str(self.model)
        write_compare_page(
            out / INDEX_FILE,
            names=names,
            shares=[_share_view(code, share) for code, share in measured.items()],
            rows=rows,
            facts=[
                ("Model", model),
                ("Clips of " + names[0], str(self.folders[0])),
                ("Clips of " + names[1], str(self.folders[1])),
                ("Prompts", str(self.prompts)),
                ("Shown as video 1", f"{names[1]} at {len(swapped)} prompts, else {names[0]}"),
                ("Orders", "both" if self.both_orders else "one"),
                ("Seed", str(self.seed)),
            ],
            notes=dict(notes.most_common()),
            missing=matched.missing,
        )
        if self.json:
            sys.stdout.write(json.dumps(told, indent=2) + "\n")
        else:
            from vrthinker.report.compare_table import print_comparison

            failures = [
                (one.sample.id, f"{one.record.stop_reason}: {one.record.reason}")
                for one in verdicts
                if one.judgment is None
            ]
            views = [_share_view(code, share) for code, share in measured.items()]
            print_comparison(names, views, len(verdicts), failures, notes, (self._table, out / INDEX_FILE))
        return 1 if any(one.judgment is None for one in verdicts) else 0

    def _row(
        self, one: Compared, episode: Trajectory | None, other: Trajectory | None, page: str, is_new: bool
    ) -> RowView:
        """The row of a prompt. Its page is written if it is missing, or the verdict is new.

        Args:
            one: The prompt with its record.
            episode: Its episode.
            other: The episode with its clips in the other order; the same one if only one order was judged.
            page: The path of its page in the folder.
            is_new: Whether it was judged in this run.
        """
        from vrthinker.episode.orders import merged_orders
        from vrthinker.evals.world_truth import findings_of
        from vrthinker.report.compare_page.page import RowView
        from vrthinker.report.page.page import write_page
        from vrthinker.report.story import first_overall, told_story

        kinds: list[Literal["disagree", "failed", "changed"]] = []
        if one.dimensions_disagree:
            kinds.append("disagree")
        if one.judgment is None:
            kinds.append("failed")
        told = f"No verdict: {one.record.reason}"
        if episode is not None:
            file, findings = self.out / page, findings_of(episode)
            both = None if other is None or other is episode else merged_orders(episode, other)
            if is_new or not file.exists():
                write_page(
                    file,
                    episode,
                    notes=one.record.notes,
                    both=both,
                    findings=findings,
                    max_clip_bytes=_MAX_PAGE_CLIP_BYTES,
                )
            told = told_story(episode, findings, both=both)
            first = first_overall(episode)
            if one.record.judgment is not None and first is not None and first != one.record.judgment["OA"]:
                kinds.append("changed")
        return RowView(
            id=one.sample.id,
            prompt=one.sample.prompt,
            judgment=one.judgment,
            kinds=tuple(kinds),
            confidence=one.record.confidence,
            rounds=one.record.rounds,
            story=told,
            href=page if episode is not None else None,
            probability=one.overall_probability,
        )


def _page_of(number: int) -> str:
    """The page of a prompt's episode, relative to the folder. Prompts are counted from 1."""
    return f"{PAGES_FOLDER}/{number:05d}.html"


def _share_view(code: str, share: Shares) -> ShareView:
    from vrthinker.report.compare_page.page import ShareView

    parts = []
    for estimate in (share.win, share.tie, share.loss, share.lead):
        ends = (estimate.value, estimate.low, estimate.high)
        known = [100 * end for end in ends if end is not None]
        parts.append((known[0], known[1], known[2]) if len(known) == 3 else None)
    return ShareView(code, *parts)
