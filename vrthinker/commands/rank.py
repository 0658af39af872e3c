"""`vrthinker rank` ranks several clips of one caption, and says which is the best."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vrthinker.commands.judge_options import JudgeOptions
from vrthinker.commands.options import Flag, announce, option
from vrthinker.errors import InputError, unwritable

if TYPE_CHECKING:
    from vrthinker.commands.judges import JudgeSource
    from vrthinker.judge_group import Cost
    from vrthinker.ranking.ranking import Ranking

VERDICTS_FILE, TRAJECTORIES_FILE, RANKING_FILE = "verdicts.jsonl", "trajectories.jsonl", "ranking.json"


@dataclass(frozen=True, kw_only=True)
class _Group:
    """What is ranked, and where the results go."""

    prompt: Annotated[tyro.conf.Positional[str], option("PROMPT")]
    """The caption that all clips were made from."""
    clips: Annotated[tyro.conf.Positional[tuple[Path, ...]], option("CLIPS")]
    """The clips: files, or folders of images."""
    schedule: Literal["all", "swiss", "knockout"] = "all"
    """Which pairs are compared: all of them; rounds between clips with about as many wins (swiss); or a
    knockout, which finds the best clip with a third of the pairs."""
    budget: Annotated[int | None, option("PAIRS")] = None
    """The most pairs that are compared. The schedule's own number by default."""
    both_orders: Flag = False
    """Judge each pair in both orders of its clips. Its verdict is that of both; it counts once."""
    out: Annotated[Path | None, option("FOLDER")] = None
    """Keep the verdicts, the episodes and the ranking in this folder. A killed run continues there."""
    retry_failed: Flag = False
    """Compare pairs of --out that failed again."""
    json: Flag = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class RankCommand(JudgeOptions, _Group):
    """Rank several clips of one caption: best of n, strengths with intervals, win rates per dimension.

    vrthinker rank "a dog runs" 1.mp4 2.mp4 3.mp4 4.mp4 --model M
    """

    def run(self) -> int:
        """Ranks and prints; returns 1 if a pair failed."""
        from vrthinker.ranking.ranking import MAX_CLIPS
        from vrthinker.ranking.schedules import number_of_pairs, usual_budget

        source = self.source()
        n_clips = len(self.clips)
        if not 2 <= n_clips <= MAX_CLIPS:
            raise InputError(f"rank: got {n_clips} clip{'s' * (n_clips != 1)}, allowed: 2 to {MAX_CLIPS}")
        if len({clip.resolve() for clip in self.clips}) < n_clips:
            raise InputError("rank: got a clip twice, allowed: each clip once")
        if self.retry_failed and self.out is None:
            raise InputError("--retry-failed: got it without --out, allowed: with the folder of a ranking")
        if self.budget is not None and not 1 <= self.budget <= number_of_pairs(n_clips):
            raise InputError(
                f"--budget: got {self.budget}, allowed: 1 to {number_of_pairs(n_clips)}, all pairs of "
                f"{n_clips} clips"
            )
        # Clips are checked first, so that nobody waits for a model to load before a clip is refused.
        for clip in self.clips:
            source.video_reader.probe(clip, tolerate_truncation=self.tolerate_truncation)
        pairs = usual_budget(self.schedule, n_clips) if self.budget is None else self.budget
        started = time.process_time()
        ranking, cost = self._ranked(source, pairs)
        cpu_seconds = time.process_time() - started
        if self.json:
            told = {
                "prompt": self.prompt,
                "clips": [str(clip) for clip in self.clips],
                **ranking.as_json(),
                "cost": {**asdict(cost), "cpu_seconds": round(cpu_seconds, 2)},
            }
            sys.stdout.write(json.dumps(told, indent=2) + "\n")
        else:
            from vrthinker.report.ranking_table import print_ranking

            print_ranking(ranking, self.clips, asdict(cost), cpu_seconds)
        return 1 if ranking.failures else 0

    def _ranked(self, source: JudgeSource, pairs: int) -> tuple[Ranking, Cost]:
        from vrthinker.judge_group import cost_of, cost_of_ranking, rank_into
        from vrthinker.progress import Progress

        options = {"schedule": self.schedule, "budget": self.budget, "seed": self.seed}
        if self.out is None:
            source.configuration()
            with source.load() as judge:
                announce(f"comparing {pairs} pairs of {len(self.clips)} clips")
                ranking = judge.rank(
                    self.prompt,
                    self.clips,
                    schedule=self.schedule,
                    budget=self.budget,
                    dataset=self.dataset,
                    seed=self.seed,
                    both_orders=self.both_orders,
                )
            return ranking, cost_of_ranking(ranking)
        from vrthinker.judge_file import run_configuration
        from vrthinker.records.files import replace_file
        from vrthinker.records.trajectories import check_trajectories_file
        from vrthinker.records.verdict_log import VerdictLog

        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.out, error, "name another folder") from None
        trajectories = self.out / TRAJECTORIES_FILE
        check_trajectories_file(trajectories, *self.clips)
        run, ignored = run_configuration(
            source.configuration(),
            pairs_file=self.out / VERDICTS_FILE,
            seed=self.seed,
            both_orders=self.both_orders,
        )
        about = {"prompt": self.prompt, "clips": [str(clip.resolve()) for clip in self.clips]}
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(
                VerdictLog(
                    self.out / VERDICTS_FILE, {**run, **about, "dataset": self.dataset}, ignore=ignored
                )
            )
            judge = stack.enter_context(source.load())
            progress = stack.enter_context(Progress())
            if self.retry_failed and log.failed_ids():
                announce(
                    f"{len(log.failed_ids())} pairs failed; those that the schedule needs are compared again"
                )
                log.drop_failed()
            done = len(log.records())

            def count(record: object) -> None:
                nonlocal done
                done += 1
                # What was compared before may be more than the schedule needs after a pair was retried.
                total = max(pairs, done)
                progress.show("comparing", done, total, line=f"{done} of {total} pairs")

            ranking = rank_into(
                judge,
                self.prompt,
                self.clips,
                log,
                trajectories=trajectories,
                schedule=self.schedule,
                budget=self.budget,
                dataset=self.dataset,
                seed=self.seed,
                both_orders=self.both_orders,
                on_record=count,
            )
            named = {one.name for one in ranking.comparisons}
            cost = cost_of(record for record in log.records() if record.id in named)
        told = {**about, **options, **ranking.as_json(), "cost": asdict(cost)}
        replace_file(self.out / RANKING_FILE, (json.dumps(told, indent=2) + "\n").encode())
        return ranking, cost
