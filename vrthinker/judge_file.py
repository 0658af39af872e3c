"""Judges a pairs file into a results file. The work is resumable and can be shared by processes.

Pairs are claimed one at a time, and at most about as many ahead of their sessions as are judged at once, so
that several processes with one results file split the work. A pair that fails is recorded with a null
judgment and its reason, and never counts as a verdict. If another live process holds pairs, this one waits
for them, and takes them over if that process dies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrthinker.data.pairs import Pair
from vrthinker.episode.orders import SWAPPED
from vrthinker.episode.runner import Finished
from vrthinker.episode.trajectory import dump_line, stop_reason_of
from vrthinker.errors import VRThinkerError
from vrthinker.judge import Judge
from vrthinker.judge_configuration import JudgeConfiguration
from vrthinker.records.trajectories import append_trajectory
from vrthinker.records.verdict_log import VerdictLog, VerdictRecord
from vrthinker.verdict import Verdict

if TYPE_CHECKING:
    from vrthinker.episode.tools.registry import ToolRegistry

_POLL_SECONDS = 0.5


def record_of(finished: Finished, *, judge: Judge, seed: int) -> VerdictRecord:
    """The record of a finished item, whether it was judged or failed."""
    if finished.trajectory is None:
        assert finished.error is not None
        return _failed(finished.item.id, finished.error, judge, seed)
    return Verdict.of(finished.trajectory, judge.settings.note).record(finished.item.id)


def record_of_orders(first: Finished, second: Finished, *, judge: Judge, seed: int) -> VerdictRecord:
    """The record of a pair that was judged in its own order and then in the other one."""
    if first.trajectory is not None and second.trajectory is not None:
        verdict = Verdict.of_orders(first.trajectory, second.trajectory, judge.settings.note)
        return verdict.record(first.item.id)
    error = first.error or second.error
    assert error is not None
    return _failed(first.item.id, error, judge, seed)


def swapped_ids_of(pair_ids: Collection[str]) -> dict[str, str]:
    """The id of each pair -> the id of its second episode, if both orders are judged."""
    taken = set(pair_ids)
    return {pair_id: _free_id(pair_id, taken) for pair_id in pair_ids}


def _free_id(pair_id: str, taken: Collection[str]) -> str:
    """The id of a pair's second episode, which no pair has."""
    name = f"{pair_id}{SWAPPED}"
    while name in taken:
        name += "'"
    return name


def judge_file(
    judge: Judge,
    pairs: Sequence[Pair],
    log: VerdictLog,
    *,
    seed: int = 0,
    trajectories: Path | None = None,
    both_orders: bool = False,
    group_of: Callable[[Pair], str] = lambda pair: pair.id,
    tools: ToolRegistry | None = None,
    on_record: Callable[[VerdictRecord], None] = lambda record: None,
    on_wait: Callable[[int], None] = lambda waiting: None,
) -> None:
    """Judges every pair that is not in the log, and returns when all are there, also from other processes.

    Args:
        judge: The judge.
        pairs: The pairs to judge.
        log: The log that records are written to. `VerdictLog` states its guarantees.
        seed: The seed of sampling.
        trajectories: A JSONL file that each episode is appended to before its record is. After a kill it may
            have an episode that the log lacks. The last line of an id is the one that counts.
        both_orders: Whether each pair is judged in both orders of its clips. It has one record, of both, and
            two episodes, of which the second has an id of its own (`<id>#swapped`).
        group_of: A function that gives the id of a pair's group. Neighbouring pairs of one group are sampled
            as one (`Judge.judge_groups`). By default every pair is a group of its own.
        tools: The tools that rounds may call; `select_frames` by default. With other tools every pair is
            a group of its own.
        on_record: A function that is called with each record that this process wrote.
        on_wait: A function that is called with the number of pairs that other processes hold, while waiting.
    """

    def claimed(wanted: Sequence[Pair]) -> Iterator[tuple[str, list[Pair]]]:
        for group_id, group in groupby(wanted, group_of):
            if pairs_of_group := [pair for pair in group if log.claim(pair.id)]:
                yield group_id, pairs_of_group
                if both_orders:
                    turned = [
                        p.swapped().model_copy(update={"id": swapped_ids[p.id]}) for p in pairs_of_group
                    ]
                    yield f"{group_id}{SWAPPED}", turned

    by_id = {pair.id: pair for pair in pairs}
    swapped_ids = swapped_ids_of(by_id) if both_orders else {}
    pair_ids = {swapped_id: pair_id for pair_id, swapped_id in swapped_ids.items()}
    halves: dict[str, Finished] = {}
    left = list(pairs)
    while left:
        if tools is None:
            episodes = judge.judge_groups(claimed(left), seed=seed, look_ahead=True)
        else:
            episodes = judge.judge_pairs(
                (pair for _, group in claimed(left) for pair in group), seed=seed, tools=tools
            )
        for finished in episodes:
            if trajectories is not None and finished.trajectory is not None:
                append_trajectory(trajectories, dump_line(finished.trajectory))
            if both_orders:
                pair_id = pair_ids.get(finished.item.id, finished.item.id)
                half = halves.pop(pair_id, None)
                if half is None:
                    halves[pair_id] = finished
                    continue
                first, second = (half, finished) if half.item.id == pair_id else (finished, half)
                record = record_of_orders(first, second, judge=judge, seed=seed)
            else:
                record = record_of(finished, judge=judge, seed=seed)
            log.append(record)
            on_record(record)
        waiting = log.pending(by_id)
        left = [by_id[pair_id] for pair_id in log.claimable(waiting)]
        if waiting and not left:
            on_wait(len(waiting))
            time.sleep(_POLL_SECONDS)
            left = [by_id[pair_id] for pair_id in log.pending(by_id)]


def run_configuration(
    judge: Judge | JudgeConfiguration, *, pairs_file: Path, seed: int, both_orders: bool = False
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The configuration that a results file's verdicts depend on, and the keys that may differ between runs.

    Returns:
        The configuration (JSON values) and the keys that do not change verdicts.
    """
    from vrthinker.records.provenance import provenance

    used = judge.configuration if isinstance(judge, Judge) else judge
    run = {
        "pairs": str(pairs_file.resolve()),
        "model": used.model,
        "settings": used.settings.model_dump(mode="json"),
        "templates": used.templates.digest,
        "seed": seed,
        "provenance": provenance(),
    }
    if both_orders:
        run["both_orders"] = True
    return run, ("provenance", "pairs", "settings.note")


def _failed(pair_id: str, error: VRThinkerError, judge: Judge, seed: int) -> VerdictRecord:
    return VerdictRecord(
        id=pair_id,
        judgment=None,
        confidence=None,
        rounds=0,
        tool_calls=0,
        frames_seen=[],
        stop_reason=stop_reason_of(error).value,
        reason=str(error),
        notes=[],
        well_formed=None,
        latency_seconds=None,
        prompt_tokens=None,
        sampled_tokens=None,
        seed=seed,
        model=judge.engine.name,
    )
