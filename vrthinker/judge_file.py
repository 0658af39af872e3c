"""Judging a pairs file into a results file: resumable, shared by processes, failures kept apart.

Pairs are claimed one at a time as the judge has room, so several processes over one results file split
the work. A pair that fails is recorded with a null judgment and its reason; it never counts as a
verdict. Pairs that another live process holds are waited for, and taken over if it dies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vrthinker.data.pairs import Pair
from vrthinker.episode.runner import Finished
from vrthinker.episode.trajectory import dump_line, stop_reason_of
from vrthinker.errors import VRThinkerError
from vrthinker.judge import Judge, Verdict
from vrthinker.records.trajectories import append_trajectory
from vrthinker.records.verdict_log import VerdictLog, VerdictRecord

_POLL_SECONDS = 0.5


def record_of(finished: Finished, *, judge: Judge, seed: int) -> VerdictRecord:
    """The results line of a finished item, judged or failed."""
    if finished.trajectory is None:
        assert finished.error is not None
        return _failed(finished.item.id, finished.error, judge, seed)
    return Verdict.of(finished.trajectory, judge.settings.note).record(finished.item.id)


def judge_file(
    judge: Judge,
    pairs: Sequence[Pair],
    log: VerdictLog,
    *,
    seed: int = 0,
    trajectories: Path | None = None,
    on_record: Callable[[VerdictRecord], None] = lambda record: None,
    on_wait: Callable[[int], None] = lambda waiting: None,
) -> None:
    """Judges every pair that the log does not hold yet, by whatever process, and returns when all are in it.

    Args:
        judge: The judge.
        pairs: What to judge.
        log: Where records go; see `VerdictLog` for what it promises.
        seed: For sampling.
        trajectories: A JSONL file that each episode is appended to before its record is. After a kill
            it may hold an episode that the log lacks; the last line of an id is the one that counts.
        on_record: Called with each record that this process wrote.
        on_wait: Called with the number of pairs that other processes hold, while waiting for them.
    """

    def claimed(wanted: Sequence[Pair]) -> Iterator[Pair]:
        for pair in wanted:
            if log.claim(pair.id):
                yield pair

    by_id = {pair.id: pair for pair in pairs}
    left = list(pairs)
    while left:
        for finished in judge.judge_pairs(claimed(left), seed=seed):
            record = record_of(finished, judge=judge, seed=seed)
            if trajectories is not None and finished.trajectory is not None:
                append_trajectory(trajectories, dump_line(finished.trajectory))
            log.append(record)
            on_record(record)
        waiting = log.pending(by_id)
        left = [by_id[pair_id] for pair_id in log.claimable(waiting)]
        if waiting and not left:
            on_wait(len(waiting))
            time.sleep(_POLL_SECONDS)
            left = [by_id[pair_id] for pair_id in log.pending(by_id)]


def run_configuration(judge: Judge, *, pairs_file: Path, seed: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a results file's verdicts depend on, and which keys of it may differ between runs.

    Returns:
        The configuration (JSON values) and the keys that do not change verdicts.
    """
    from vrthinker.records.provenance import provenance

    run = {
        "pairs": str(pairs_file.resolve()),
        "model": judge.engine.name,
        "settings": judge.settings.model_dump(mode="json"),
        "templates": judge.templates.digest,
        "seed": seed,
        "provenance": provenance(),
    }
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
