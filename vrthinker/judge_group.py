"""Ranks the clips of one caption into a folder. The work is resumable and can be shared by processes.

Each round of the schedule is judged by `judge_file`, so a pair that is recorded is not judged again. The
schedule depends only on what is recorded, so a run that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from vrthinker.data.pairs import Pair
from vrthinker.judge import Judge
from vrthinker.judge_comparisons import recorded, verdict_of
from vrthinker.judge_file import judge_file
from vrthinker.ranking.comparisons import Comparison, pair_name
from vrthinker.ranking.ranking import Ranking, rank_group
from vrthinker.ranking.schedules import Pairs
from vrthinker.records.verdict_log import VerdictLog, VerdictRecord


@dataclass(frozen=True)
class Cost:
    """What the comparisons of a group took.

    Attributes:
        pairs: The number of pairs that were compared, failed ones too.
        rounds: The number of rounds written.
        tool_calls: The number of tool calls that showed frames.
        prompt_tokens: The number of tokens read; None if the engine does not count them.
        sampled_tokens: The number of tokens written; None if the engine does not count them.
    """

    pairs: int
    rounds: int
    tool_calls: int
    prompt_tokens: int | None
    sampled_tokens: int | None


def cost_of(records: Iterable[VerdictRecord]) -> Cost:
    """The cost of recorded comparisons."""
    known = list(records)

    def total(values: Sequence[int | None]) -> int | None:
        return None if None in values else sum(value for value in values if value is not None)

    judged = [record for record in known if record.rounds]
    return Cost(
        pairs=len(known),
        rounds=sum(record.rounds for record in known),
        tool_calls=sum(record.tool_calls for record in known),
        prompt_tokens=total([record.prompt_tokens for record in judged]),
        sampled_tokens=total([record.sampled_tokens for record in judged]),
    )


def records_of(ranking: Ranking) -> list[VerdictRecord]:
    """The records of the comparisons whose episodes a ranking holds."""
    return [
        verdict.record(one.name) for one in ranking.comparisons if (verdict := verdict_of(one)) is not None
    ]


def cost_of_ranking(ranking: Ranking) -> Cost:
    """The cost of a ranking's comparisons. Pairs that could not start have no episode, and count too."""
    return replace(cost_of(records_of(ranking)), pairs=len(ranking.comparisons))


def rank_into(
    judge: Judge,
    prompt: str,
    clips: Sequence[str | PathLike[str]],
    log: VerdictLog,
    *,
    trajectories: Path,
    schedule: str = "all",
    budget: int | None = None,
    dataset: str | None = None,
    seed: int = 0,
    both_orders: bool = False,
    on_record: Callable[[VerdictRecord], None] = lambda record: None,
) -> Ranking:
    """Ranks clips by pairs that are recorded in a results file.

    Args:
        judge: The judge.
        prompt: The caption of all clips.
        clips: The clips. A pair's id is made of their 1-based numbers, the clip shown as video 1 first.
        log: The log that records are written to, and that recorded pairs are taken from.
        trajectories: The JSONL file that episodes are appended to.
        schedule: The name of the schedule (`vrthinker.ranking.schedules.SCHEDULES`).
        budget: The most pairs that are compared; the schedule's own number by default.
        dataset: The dataset whose names of the dimensions the prompt uses.
        seed: The seed of sampling and of the schedule.
        both_orders: Whether each pair is judged in both orders of its clips. It has one record.
        on_record: A function that is called with each new record.

    Raises:
        InputError: A number is out of range, or the schedule is unknown.
    """

    def compare(pairs: Pairs) -> Iterator[Comparison]:
        named = {pair_name(first, second): (first, second) for first, second in pairs}
        wanted = [
            Pair(id=name, prompt=prompt, video_1=Path(clips[i]), video_2=Path(clips[j]), dataset=dataset)
            for name, (i, j) in named.items()
        ]
        judge_file(
            judge,
            wanted,
            log,
            seed=seed,
            trajectories=trajectories,
            both_orders=both_orders,
            on_record=on_record,
        )
        for record in log.records():
            if record.id in named:
                yield recorded(named[record.id], record)

    return rank_group(len(clips), compare, schedule=schedule, budget=budget, seed=seed)
