"""Collects episodes to learn from: a judge tries pairs, and what is well formed and right is kept.

The judge may be a teacher on a server, a checkpoint, the oracle of a synthetic world, or the model that is
itself trained (rejection sampling). Its episodes come from the same runner and tools as every verdict,
through `judge_file`, and are kept by the same two filters (method section 5).

A collection is a folder:

- `pairs.jsonl`: the trials as a pairs file, with clips and labels in the order in which they are judged;
- `verdicts.jsonl`: the results file of the trials, with its configuration and locks, by which it resumes;
- `episodes.jsonl`: all episodes;
- `replies.jsonl`: a server's replies, so that a request that was answered is never sent again;
- `traces.jsonl`: the episodes that are kept, for `vrthinker train cold-start --traces`;
- `selection.json`: for every trial its pair, order and seed, and why it was dropped.

Invariant: what is recorded stays, however the process ends. The last two files are written anew at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrthinker.episode.dimensions import Dimension
from vrthinker.episode.trajectory import WRITTEN_STOPS, Trajectory, dump_line, load_trajectories
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.judge import Judge
from vrthinker.judge_configuration import JudgeConfiguration
from vrthinker.judge_file import judge_file, run_configuration
from vrthinker.records.files import replace_file
from vrthinker.records.trajectories import check_trajectories_file
from vrthinker.records.verdict_log import VerdictLog, VerdictRecord, run_file
from vrthinker.train.traces import Dropped, Selection, checked_labels, why_dropped
from vrthinker.train.trials import Trial, write_pairs_file

PAIRS, VERDICTS, EPISODES, REPLIES = "pairs.jsonl", "verdicts.jsonl", "episodes.jsonl", "replies.jsonl"
TRACES, SELECTION = "traces.jsonl", "selection.json"
_BY_MODEL = tuple(reason.value for reason in WRITTEN_STOPS)
_FAILURES_IN_A_ROW = 8
BEYOND_CAP = "right, but its pair has enough others"


@dataclass(frozen=True)
class Collection:
    """What became of the trials of a folder.

    Attributes:
        selection: The traces that are kept, and what was dropped.
        trials: The trials, in order.
        reasons: For each trial's id, why it was dropped; None if it is kept.
        unchecked: The number of judgments that no label could check, over all episodes with a verdict.
        failed: The ids of trials that failed without the model's doing. They are tried again next time.
    """

    selection: Selection
    trials: Sequence[Trial]
    reasons: Mapping[str, str | None]
    unchecked: int
    failed: Sequence[str]

    def without_a_right_episode(self) -> list[Trial]:
        """The first trial of each pair that was judged, but never well formed and right."""
        right = {trial.source.id for trial in self.trials if self.reasons[trial.id] in (None, BEYOND_CAP)}
        judged: dict[str, Trial] = {}
        for trial in self.trials:
            if trial.source.id not in right and trial.id not in self.failed:
                judged.setdefault(trial.source.id, trial)
        return list(judged.values())


def collect(
    configured: JudgeConfiguration,
    load: Callable[[], AbstractContextManager[Judge]],
    trials: Sequence[Trial],
    folder: Path,
    *,
    seed: int,
    run: Mapping[str, Any],
    on_start: Callable[[int], None] = lambda done: None,
    on_record: Callable[[VerdictRecord], None] = lambda record: None,
    on_wait: Callable[[int], None] = lambda waiting: None,
    reopen: bool = True,
) -> None:
    """Judges every trial that is not recorded yet. Several processes may share the folder.

    Trials that failed without the model's doing (a server that was down, a missing clip) are tried again.

    Args:
        configured: What the judge's verdicts depend on.
        load: A function that loads the judge, which is closed at the end as its context manager says. It is
            called only if there is something to judge.
        trials: The trials.
        folder: The folder of the collection.
        seed: The seed of sampling. Each trial is sampled with a seed of its own, derived from its id.
        run: Further values that verdicts depend on (the weights, the number of samples), as JSON values.
        on_start: A function that is called with the number of trials that are recorded already.
        on_record: A function that is called with each new record.
        on_wait: A function that is called while other processes hold the remaining trials.
        reopen: Whether failed trials are tried again even if all trials are recorded.

    Raises:
        InputError: The folder holds another collection or files of something else, or the judge cannot be
            used.
        VRThinkerError: Nothing works any more (a server is gone), or something could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_files_of_others(folder)
    configuration, ignored = run_configuration(configured, pairs_file=folder / PAIRS, seed=seed)
    pairs = [trial.pair for trial in trials]
    groups = {trial.id: trial.group_id for trial in trials}
    failures = _FailuresInARow()

    def recorded(record: VerdictRecord) -> None:
        on_record(record)
        failures.count(record)

    with VerdictLog(folder / VERDICTS, {**configuration, **run}, ignore=ignored) as log:
        check_trajectories_file(folder / EPISODES)
        with log.exclusive():
            write_pairs_file(folder / PAIRS, pairs)
        if reopen or log.pending(groups):
            log.drop_failed(spare=_BY_MODEL)
        pending = len(log.pending(groups))
        on_start(len(pairs) - pending)
        if not pending:
            return
        with load() as judge:
            judge_file(
                judge,
                pairs,
                log,
                seed=seed,
                trajectories=folder / EPISODES,
                group_of=lambda pair: groups[pair.id],
                on_record=recorded,
                on_wait=on_wait,
            )


def _refuse_files_of_others(folder: Path) -> None:
    """Refuses a folder whose files a collection would replace, such as that of the pairs or of a world."""
    # A results file's configuration is written before all of these.
    found = [name for name in (PAIRS, EPISODES, TRACES, SELECTION) if (folder / name).exists()]
    if found and not run_file(folder / VERDICTS).exists():
        raise InputError(
            f"{folder}: holds {found[0]}, which was not written there by such a run and would be replaced; "
            "choose another folder"
        )


class _FailuresInARow:
    """Ends a run in which nothing works any more, for instance because the server is gone."""

    def __init__(self) -> None:
        self._count = 0

    def count(self, record: VerdictRecord) -> None:
        failed = record.judgment is None and record.stop_reason in ("engine_error", "machine_error")
        self._count = self._count + 1 if failed else 0
        if self._count == _FAILURES_IN_A_ROW:
            raise VRThinkerError(
                f"{self._count} episodes in a row failed: {record.reason}; mend that, then give the same "
                "command again: what was recorded is kept"
            )


def select(trials: Sequence[Trial], folder: Path, *, keep_per_pair: int | None = None) -> Collection:
    """Filters the recorded episodes of a collection.

    Args:
        trials: The trials.
        folder: The collection's folder.
        keep_per_pair: The most episodes that are kept of a pair. Those of the lowest numbers are.

    Raises:
        InputError: A file cannot be read, or an episode is about something else than its trial.
    """
    by_id = {trial.id: trial for trial in trials}
    with_reason: dict[str, tuple[Trajectory | None, str | None, int]] = {}
    seeds = {}
    episodes = folder / EPISODES
    for trajectory in load_trajectories(episodes) if episodes.exists() else ():
        trial = by_id.get(trajectory.id)
        if trial is None:
            continue  # the pairs file had this pair before
        labels = checked_labels(
            trajectory, trial.pair, pairs_file=folder / PAIRS, record=episodes, all_four=False
        )
        reason = why_dropped(trajectory, labels)
        unchecked = 0 if trajectory.outcome.judgments is None else len(Dimension) - len(labels)
        with_reason[trial.id] = trajectory if reason is None else None, reason, unchecked
        seeds[trial.id] = trajectory.seed
    records = {record.id: record for record in _records(folder)}
    reasons: dict[str, str | None] = {}
    failed, kept, unchecked_in_all = [], [], 0
    kept_per_pair: dict[str, int] = {}
    for trial in sorted(trials, key=lambda trial: trial.sample):
        trajectory_or_none, reason, unchecked = with_reason.get(trial.id, (None, "not judged yet", 0))
        record = records.get(trial.id)
        if record is None or (record.judgment is None and record.stop_reason not in _BY_MODEL):
            failed.append(trial.id)
            trajectory_or_none = None
            reason = "not judged yet" if record is None else f"without a verdict ({record.stop_reason})"
        unchecked_in_all += unchecked
        if trajectory_or_none is not None:
            count = kept_per_pair.get(trial.source.id, 0)
            if keep_per_pair is not None and count >= keep_per_pair:
                reason = BEYOND_CAP
            else:
                kept_per_pair[trial.source.id] = count + 1
        reasons[trial.id] = reason
    for trial in trials:
        trajectory_or_none = with_reason.get(trial.id, (None, None, 0))[0]
        if reasons[trial.id] is None and trajectory_or_none is not None:
            kept.append(trajectory_or_none)
    dropped = tuple(
        Dropped(trial.id, seeds.get(trial.id, 0), reason)
        for trial in trials
        if (reason := reasons[trial.id]) is not None
    )
    selection = Selection(kept, len(trials), "form and labels", dropped)
    return Collection(selection, trials, reasons, unchecked_in_all, failed)


def write_selection(collection: Collection, folder: Path, account: Mapping[str, Any] | None = None) -> None:
    """Writes `traces.jsonl` and `selection.json`, atomically.

    Raises:
        VRThinkerError: A file could not be written. An older one is unchanged.
    """
    seeds = {trace.id: trace.seed for trace in collection.selection.traces}
    seeds |= {dropped.id: dropped.seed for dropped in collection.selection.dropped}
    described = {
        "schema_version": 1,
        "asked": len(collection.trials),
        "kept": len(collection.selection.traces),
        "kept_sha256": collection.selection.digest(),
        "dropped": collection.selection.reasons,
        "unchecked_judgments": collection.unchecked,
        "account": None if account is None else dict(account),
        "trials": [
            {
                "id": trial.id,
                "pair": trial.source.id,
                "sample": trial.sample,
                "swapped": trial.swapped,
                "seed": seeds[trial.id],
                "reason": collection.reasons[trial.id],
            }
            for trial in collection.trials
        ],
    }
    replace_file(folder / TRACES, "".join(map(dump_line, collection.selection.traces)).encode())
    replace_file(folder / SELECTION, (json.dumps(described, indent=1) + "\n").encode())


def _records(folder: Path) -> list[VerdictRecord]:
    from vrthinker.records.verdicts import read_verdicts

    try:
        return read_verdicts(folder / VERDICTS)
    except InputError:
        if (folder / VERDICTS).exists():
            raise
        return []
