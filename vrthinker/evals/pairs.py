"""Evaluation on labelled pairs: how often a judge says what people said (method section 6).

Anybody's pairs file will do. Every labelled pair is judged once, and only the labels that a pair has are
counted: a pair without a label for a dimension is in no accuracy of that dimension, and how many such pairs
there are is said. Pairs without any label are not judged.

Invariants: a pair that cannot be judged, and an answer that cannot be read, stay in the denominator and are
wrong. The verdicts are a results file like that of `vrthinker judge` (`records/verdict_log.py`), so that an
evaluation that was killed goes on, and several processes can share one.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrthinker.data.pairs import Pair
from vrthinker.episode.dimensions import Dimension, Preference
from vrthinker.episode.trajectory import WRITTEN_STOPS
from vrthinker.errors import InputError, unwritable
from vrthinker.evals.intervals import Estimate
from vrthinker.evals.metrics import ScoredPair, as_json, measure
from vrthinker.judge import Judge
from vrthinker.judge_configuration import JudgeConfiguration
from vrthinker.judge_file import judge_file, run_configuration
from vrthinker.records.files import replace_file
from vrthinker.records.provenance import provenance
from vrthinker.records.trajectories import check_trajectories_file
from vrthinker.records.verdict_log import VerdictLog, VerdictRecord

EVAL_FILE, VERDICTS_FILE, TRAJECTORIES_FILE = "eval.json", "verdicts.jsonl", "trajectories.jsonl"
ALL = "all"
"""The column of all pairs. If pairs come from several datasets, each dataset has a column too."""
_COUNTED = (*map(str, Preference), "missing")
_WRITTEN = frozenset(reason.value for reason in WRITTEN_STOPS)


@dataclass(frozen=True)
class PairsReport:
    """The result of an evaluation.

    Attributes:
        judged: Column (`ALL`, and the datasets if there are several) -> measure -> estimate. Measures that
            no pair counts for are left out.
        labels: Dimension code -> how many labels are `tie`, `video 1`, `video 2`, and how many are `missing`.
        commonest: Dimension code -> the accuracy of always giving the commonest label; None without labels.
        episodes: Means over the pairs that have them: `rounds`, `sampled_tokens_per_round`,
            `latency_seconds`.
        notes: Note -> the number of pairs whose verdict has it.
        failures: `id: reason` of every pair without a verdict.
        errors: Those of the failures that an error caused (a clip, the engine, the machine), or that are not
            judged yet. The others are due to what the judge wrote.
        pairs: The number of labelled pairs, judged or not.
    """

    judged: Mapping[str, Mapping[str, Estimate]]
    labels: Mapping[str, Mapping[str, int]]
    commonest: Mapping[str, float | None]
    episodes: Mapping[str, float]
    notes: Mapping[str, int]
    failures: tuple[str, ...]
    errors: tuple[str, ...]
    pairs: int

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "judged": as_json(self.judged),
            "labels": {code: dict(counts) for code, counts in self.labels.items()},
            "accuracy_of_the_commonest_label": dict(self.commonest),
            "episodes": dict(self.episodes),
            "notes": dict(self.notes),
            "failures": list(self.failures),
            "errors": list(self.errors),
            "pairs": self.pairs,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PairsReport:
        """The report that `as_json` spelled.

        Raises:
            InputError: The value is no report.
        """
        try:
            shares = value["accuracy_of_the_commonest_label"]
            return cls(
                judged={
                    str(column): {str(name): _estimate(spelled) for name, spelled in measures.items()}
                    for column, measures in value["judged"].items()
                },
                labels={
                    code.value: {name: int(value["labels"][code][name]) for name in _COUNTED}
                    for code in Dimension
                },
                commonest={
                    code.value: None if (share := shares[code]) is None else float(share)
                    for code in Dimension
                },
                episodes={str(name): float(mean) for name, mean in value["episodes"].items()},
                notes={str(note): int(count) for note, count in value["notes"].items()},
                failures=tuple(map(str, value["failures"])),
                errors=tuple(map(str, value["errors"])),
                pairs=int(value["pairs"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise InputError(
                "got no report of labelled pairs, allowed: what `vrthinker eval pairs` wrote"
            ) from None


def labelled(pairs: Sequence[Pair], *, limit: int | None = None, seed: int = 0) -> list[Pair]:
    """The pairs that have a label, in the order of the file.

    Args:
        pairs: The pairs.
        limit: How many of them to draw by chance; all by default. They are not simply the first ones, because
            files are often sorted by model or by dataset.
        seed: The seed of the draw.

    Raises:
        InputError: No pair has a label, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit: got {limit}, allowed: at least 1 pair")
    with_labels = [pair for pair in pairs if pair.labels]
    if not with_labels:
        raise InputError(
            "pairs: got none with a label, allowed: pairs with labels (TA, VQ, MQ, OA), which "
            "verdicts can be compared with"
        )
    if limit is None or limit >= len(with_labels):
        return with_labels
    drawn = random.Random(seed).sample(range(len(with_labels)), limit)
    return [with_labels[place] for place in sorted(drawn)]


def open_log(
    out: Path,
    judge: Judge | JudgeConfiguration,
    pairs: Sequence[Pair],
    *,
    pairs_file: Path,
    seed: int,
    weights: str | None,
    protocol: Mapping[str, Any] | None = None,
) -> VerdictLog:
    """Opens the verdicts of an evaluation, new or continued.

    Args:
        out: The evaluation's folder, which is made if it is missing.
        judge: The judge, or what its verdicts depend on.
        pairs: The pairs to judge.
        pairs_file: The file that they come from.
        seed: The seed of the sampling.
        weights: A fingerprint of the judge's weights; None if they are not local files.
        protocol: What of the protocol departs from the default and changes what is asked.

    Raises:
        InputError: The folder cannot be used, or holds an evaluation of another judge or of other pairs.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error, "name another", failed="the folder cannot be made") from None
    run, ignored = run_configuration(judge, pairs_file=pairs_file, seed=seed)
    run |= {"weights": weights, "judged_pairs": len(pairs), "judged_pairs_sha256": _digest(pairs)}
    if protocol:
        run["protocol"] = dict(protocol)
    log = VerdictLog(out / VERDICTS_FILE, run, ignore=ignored)
    try:
        check_trajectories_file(out / TRAJECTORIES_FILE, pairs_file, log.path)
    except BaseException:
        log.close()
        raise
    return log


def evaluate_pairs(
    judge: Judge,
    pairs: Sequence[Pair],
    log: VerdictLog,
    *,
    seed: int = 0,
    on_record: Callable[[VerdictRecord], None] = lambda record: None,
    on_wait: Callable[[int], None] = lambda waiting: None,
) -> PairsReport:
    """Judges the pairs that are not in the log, and measures all of them.

    Args:
        judge: The judge.
        pairs: The pairs to judge, each with a label.
        log: The verdicts (`open_log`). Episodes go to `TRAJECTORIES_FILE` beside it.
        seed: The seed of the sampling.
        on_record: A function that is called with each record that this process wrote.
        on_wait: A function that is called with the number of pairs that other processes hold, while waiting.
    """
    judge_file(
        judge,
        pairs,
        log,
        seed=seed,
        trajectories=log.path.with_name(TRAJECTORIES_FILE),
        on_record=on_record,
        on_wait=on_wait,
    )
    return report_of(pairs, log.records())


def report_of(pairs: Sequence[Pair], records: Sequence[VerdictRecord]) -> PairsReport:
    """Measures records against the labels of their pairs. A pair without a record counts as not judged.

    Args:
        pairs: The pairs, each with a label.
        records: Records of verdicts. Those of other pairs are not looked at.
    """
    by_id = {record.id: record for record in records}
    scored = [_score(pair, by_id.get(pair.id)) for pair in pairs]
    judged_records = [by_id[pair.id] for pair in pairs if pair.id in by_id]
    failures, errors = {}, {}
    for pair in pairs:
        record = by_id.get(pair.id)
        if record is not None and record.judgment is not None:
            continue
        failures[pair.id] = "not judged yet" if record is None else f"{record.stop_reason}: {record.reason}"
        if record is None or record.stop_reason not in _WRITTEN:
            errors[pair.id] = failures[pair.id]
    columns = {ALL: scored}
    names = {pair.id: pair.dataset for pair in pairs}
    if len(set(names.values())) > 1:
        for name in sorted({name or "no dataset" for name in names.values()}):
            columns[name] = [one for one in scored if (names[one.id] or "no dataset") == name]
    judged = {name: measure(column) for name, column in columns.items()}
    return PairsReport(
        judged={
            name: {key: estimate for key, estimate in estimates.items() if estimate.n}
            for name, estimates in judged.items()
        },
        labels={code: _counts(code, pairs) for code in Dimension},
        commonest={code: _commonest(_counts(code, pairs)) for code in Dimension},
        episodes=_means(judged_records),
        notes=Counter(note for record in judged_records for note in dict.fromkeys(record.notes)),
        failures=tuple(f"{name}: {reason}" for name, reason in failures.items()),
        errors=tuple(f"{name}: {reason}" for name, reason in errors.items()),
        pairs=len(pairs),
    )


def write_report(out: Path, report: PairsReport, about: Mapping[str, Any]) -> None:
    """Writes `EVAL_FILE` atomically: the measures, what was evaluated, and the provenance.

    Args:
        out: The evaluation's folder.
        report: The measures.
        about: What was evaluated, as JSON values.

    Raises:
        VRThinkerError: The file could not be written.
    """
    content = {"schema_version": 1, **about, **report.as_json(), "provenance": provenance()}
    replace_file(out / EVAL_FILE, (json.dumps(content, indent=2) + "\n").encode())


def _score(pair: Pair, record: VerdictRecord | None) -> ScoredPair:
    label = dict(pair.labels or {})
    if record is None:
        return ScoredPair(id=pair.id, label=label, prediction=None)
    return ScoredPair(
        id=pair.id,
        label=label,
        prediction=record.judgment,
        well_formed=record.well_formed,
        tool_calls=record.tool_calls,
    )


def _counts(code: str, pairs: Sequence[Pair]) -> dict[str, int]:
    found = Counter((pair.labels or {}).get(code) for pair in pairs)
    named = {str(preference): found[preference.value] for preference in Preference}
    return {**named, "missing": found[None]}


def _commonest(counts: Mapping[str, int]) -> float | None:
    known = [count for name, count in counts.items() if name != "missing"]
    return max(known) / sum(known) if sum(known) else None


def _means(records: Sequence[VerdictRecord]) -> dict[str, float]:
    values = {
        "rounds": [float(record.rounds) for record in records if record.rounds],
        "sampled_tokens_per_round": [
            record.sampled_tokens / record.rounds
            for record in records
            if record.sampled_tokens is not None and record.rounds
        ],
        "latency_seconds": [r.latency_seconds for r in records if r.latency_seconds is not None],
    }
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items() if numbers}


def _digest(pairs: Collection[Pair]) -> str:
    """A SHA-256 of what is judged: ids, captions, datasets, and the names of the clips."""
    digest = hashlib.sha256()
    for pair in pairs:
        names = [pair.id, pair.prompt, pair.dataset, pair.video_1.name, pair.video_2.name]
        digest.update(json.dumps(names).encode() + b"\n")
    return digest.hexdigest()


def _estimate(spelled: Mapping[str, Any]) -> Estimate:
    ends = [None if spelled[name] is None else float(spelled[name]) for name in ("value", "low", "high")]
    return Estimate(ends[0], ends[1], ends[2], int(spelled["n"]))
