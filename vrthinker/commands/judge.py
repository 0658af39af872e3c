"""`vrthinker judge` judges one pair on the terminal, or a file of pairs into a results file."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vrthinker.commands.judge_options import JudgeOptions
from vrthinker.commands.judges import JudgeSource
from vrthinker.commands.options import Flag, announce, option
from vrthinker.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vrthinker.data.pairs import Pair
    from vrthinker.judge import Judge
    from vrthinker.records.verdict_log import VerdictLog
    from vrthinker.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is judged, and where the verdicts go."""

    videos: Annotated[tyro.conf.Positional[tuple[Path, ...]], option("A B")] = ()
    """The two clips: files, or folders of images."""
    prompt: Annotated[str | None, option("TEXT")] = None
    """The caption that both clips were made from."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """Judge every pair of this file (.jsonl, .csv, .parquet): id, prompt, video_1, video_2, ..."""
    out: Annotated[Path | None, option("FILE")] = None
    """Write the verdicts of --pairs to this file, one JSON line each, or as a table (.csv, .parquet) with the
    lines beside it. A killed run continues there."""
    table: Annotated[Path | None, option("FILE")] = None
    """When all of --pairs are judged, write their verdicts to this .csv or .parquet file too."""
    retry_failed: Flag = False
    """Judge pairs again that are in --out without a judgment."""
    trajectories: Annotated[Path | None, option("FILE")] = None
    """Append the full record of each episode to this JSONL file."""
    report: Annotated[Path | None, option("FILE")] = None
    """Write an HTML page about the episode of a single pair: both clips, and what each round saw and said."""
    json: Flag = False
    """Print JSON instead of a table."""
    both_orders: Flag = False
    """Judge each pair in both orders of its clips. Its verdict is that of both; it counts once."""


@dataclass(frozen=True, kw_only=True)
class JudgeCommand(JudgeOptions, _Asked):
    """Judge which of two clips is better, or every pair of a file.

    One pair: vrthinker judge A.mp4 B.mp4 --prompt "a dog runs" --model M

    Many pairs: vrthinker judge --pairs pairs.jsonl --out verdicts.jsonl --model M
    """

    def run(self) -> int:
        """Judges; returns the exit code."""
        source = self.source()
        if self.pairs is not None:
            return self._judge_file(source)
        if len(self.videos) != 2 or self.prompt is None:
            clips = f"{len(self.videos)} clip{'s' * (len(self.videos) != 1)}"
            got = f"{clips} and {'a' if self.prompt is not None else 'no'} --prompt"
            raise InputError(f"judge: got {got}, wanted two clips with a --prompt, or --pairs with --out")
        for name, path in (("--out", self.out), ("--table", self.table)):
            if path is not None:
                raise InputError(f"{name}: goes with --pairs; for one pair use --json or --trajectories")
        # Clips are checked first, so that nobody waits for a model to load before a clip is refused.
        for video in self.videos:
            source.video_reader.probe(video, tolerate_truncation=self.tolerate_truncation)
        if self.report is not None:
            from vrthinker.report.page.page import check_page_path

            check_page_path(self.report, *self.videos, *([self.trajectories] if self.trajectories else []))
        self._check_trajectories(*self.videos)
        source.configuration()
        with source.load() as judge:
            verdict = judge(
                *(self.prompt, *self.videos),
                dataset=self.dataset,
                seed=self.seed,
                both_orders=self.both_orders,
            )
        if self.trajectories is not None:
            from vrthinker.episode.trajectory import dump_line
            from vrthinker.records.trajectories import append_trajectory

            for trajectory in (verdict.trajectory, verdict.other_order):
                if trajectory is not None:
                    append_trajectory(self.trajectories, dump_line(trajectory))
        show_verdict(verdict, as_json=self.json)
        if self.report is not None:
            self._write_page(self.report, verdict)
        return 0 if verdict.judgments is not None else 1

    def _check_trajectories(self, *others: Path) -> None:
        if self.trajectories is not None:
            from vrthinker.data.tables import refuse_table_ending
            from vrthinker.records.trajectories import check_trajectories_file

            refuse_table_ending("--trajectories", self.trajectories)
            check_trajectories_file(self.trajectories, *others)

    def _write_page(self, path: Path, verdict: Verdict) -> None:
        from vrthinker.evals.world_truth import find_truth, findings_of
        from vrthinker.report.page.page import write_page
        from vrthinker.report.terminal import plain

        sys.stdout.flush()  # the verdict is printed, whatever happens to the page
        truth = find_truth(*self.videos)
        write_page(
            path,
            verdict.trajectory,
            notes=verdict.shown_notes,
            both=verdict.merged,
            truth=truth,
            findings=findings_of(verdict.trajectory),
        )
        sys.stderr.write(f"the episode as a page: {plain(str(path))}\n")

    def _judge_file(self, source: JudgeSource) -> int:
        if self.videos or self.prompt is not None or self.dataset is not None:
            raise InputError("--pairs: goes without clips, --prompt and --dataset; the file holds them")
        if self.report is not None:
            raise InputError("--report: goes with a single pair; with --pairs, keep --trajectories")
        if self.out is None or self.pairs is None:
            raise InputError("--pairs: wants --out, the file that verdicts are written to")
        from vrthinker.data.pairs import load_pairs
        from vrthinker.data.tables import table_format
        from vrthinker.judge_file import run_configuration
        from vrthinker.records.verdict_log import VerdictLog

        if table_format(self.out) is not None and self.table is None:
            return self._judge_into_table(source, self.out)
        self._check_outputs(self.out, self.pairs)
        pairs = load_pairs(self.pairs)
        self._check_trajectories(self.pairs, self.out, *_clips_of(pairs))
        run, ignored = run_configuration(
            source.configuration(),
            pairs_file=self.pairs,
            seed=self.seed,
            both_orders=self.both_orders,
        )
        with contextlib.ExitStack() as stack:
            judge = None
            if not self.out.exists():  # a judge that cannot be loaded leaves no results file behind
                judge = stack.enter_context(source.load())
            log = stack.enter_context(VerdictLog(self.out, run, ignore=ignored))
            return self._judge_pairs(judge or source, pairs, log, stack)

    def _judge_into_table(self, source: JudgeSource, table: Path) -> int:
        """Judges into lines beside a table, because only lines survive a kill, and writes the table."""
        lines = table.with_suffix(".jsonl")
        announce(f"the verdicts are kept as lines, which a killed run continues: {lines}")
        return replace(self, out=lines, table=table)._judge_file(source)

    def _check_outputs(self, out: Path, pairs: Path) -> None:
        """Refuses names of outputs that would be misread or overwrite something."""
        from vrthinker.data.tables import refuse_table_ending, table_format
        from vrthinker.records.verdict_table import check_verdict_table

        if table_format(out) is not None:
            raise InputError(
                f"--out: got {out.name}, allowed: a file of JSON lines, like {out.stem or 'verdicts'}.jsonl, "
                f"because it is written pair by pair; --table {out.name} writes a table of it at the end"
            )
        refuse_table_ending("--out", out)
        if self.table is not None:
            others = [pairs, out, *([self.trajectories] if self.trajectories is not None else [])]
            check_verdict_table("--table", self.table, *others)

    def _judge_pairs(
        self, given: Judge | JudgeSource, pairs: Sequence[Pair], log: VerdictLog, stack: contextlib.ExitStack
    ) -> int:
        from vrthinker.data.pairs import missing_clips
        from vrthinker.judge_file import judge_file
        from vrthinker.progress import counted
        from vrthinker.report.terminal import FileProgress

        wanted = {pair.id for pair in pairs}
        pending = len(log.pending(wanted))
        again = self.retry_failed and bool(log.failed_ids())
        judge: Judge | None
        if not isinstance(given, JudgeSource):
            judge = given
        else:  # with nothing to judge, no model is loaded
            judge = stack.enter_context(given.load()) if pending or again else None
        if again:
            log.drop_failed()
            pending = len(log.pending(wanted))
        if judge is not None and (missing := missing_clips(pairs)):
            named = ", ".join(map(str, missing[:5])) + (" and others" if len(missing) > 5 else "")
            announce(f"{counted(len(missing), 'clip')} not there, so that pairs get no verdict: {named}")
        with FileProgress(len(pairs), done=len(pairs) - pending) as progress:
            if judge is not None:
                judge_file(
                    judge,
                    pairs,
                    log,
                    seed=self.seed,
                    trajectories=self.trajectories,
                    both_orders=self.both_orders,
                    on_record=progress.record,
                    on_wait=progress.wait,
                )
            records = [record for record in log.records() if record.id in wanted]
            decoding = {} if judge is None else judge.decode_metrics
            code = progress.summarise(records, log.path, as_json=self.json, decoding=decoding)
        if self.table is not None:
            from vrthinker.records.verdict_table import write_verdict_table

            sys.stdout.flush()  # the summary is printed, whatever happens to the table
            write_verdict_table(self.table, records)
            announce(f"the verdicts as a table: {self.table}")
        return code


def _clips_of(pairs: Sequence[Pair]) -> set[Path]:
    return {clip for pair in pairs for clip in (pair.video_1, pair.video_2)}


def show_verdict(verdict: Verdict, *, as_json: bool) -> None:
    """Prints a verdict to stdout, as a table or as its record in JSON with what explains it."""
    from vrthinker.evals.world_truth import findings_of
    from vrthinker.report.story import explanation
    from vrthinker.report.terminal import print_verdict

    if as_json:
        told = explanation(verdict.trajectory, findings_of(verdict.trajectory), both=verdict.merged)
        text = json.dumps({**verdict.to_dict(), "explain": told}, indent=2, ensure_ascii=False)
        # Lone surrogates, which no output can encode, are spelled out.
        sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
    else:
        print_verdict(
            verdict.trajectory,
            verdict.shown_notes,
            findings_of(verdict.trajectory),
            both=verdict.merged,
            seconds=verdict.record(verdict.trajectory.id).latency_seconds,
        )
