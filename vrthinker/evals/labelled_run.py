"""A run over labelled pairs: every pair is judged as the protocol says, and the run's folder tells all of it.

Invariant: a run that was stopped goes on where it was. What a model said is in `verdicts.jsonl`, and what a
scorer measured in `clip_scores.jsonl`; neither is asked for twice. A score is used again only for a clip
with the same content, and a virtual clip's file is named by its own content. Judges that answer at once (one
answer to everything, a coin) are simply asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vrthinker.bounded_files import parse_json, read_lines
from vrthinker.data.pairs import Pair
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.errors import InputError, VideoError, unwritable
from vrthinker.evals.baselines import Baseline, record_of_baseline, verdicts_of
from vrthinker.evals.items import item_of_answer
from vrthinker.evals.labelled_data import LabelledData
from vrthinker.evals.pairs import TRAJECTORIES_FILE, PairsReport, report_of
from vrthinker.evals.pixel_statistics import clip_scores
from vrthinker.evals.protocols import (
    Protocol,
    check_ids,
    combined,
    first_answer,
    item_of_presentations,
    presentations,
    waves,
)
from vrthinker.evals.retrieval import Retrieval, tools_for
from vrthinker.evals.verdict_files import Answer
from vrthinker.judge import Judge
from vrthinker.judge_file import judge_file
from vrthinker.records.eval_items import EvalItem, ItemStatus
from vrthinker.records.files import append_line, replace_file
from vrthinker.records.verdict_log import VerdictLog, VerdictRecord
from vrthinker.video.content import clip_content
from vrthinker.video.open import open_reader
from vrthinker.video.virtual import ENDING, Redundant, VirtualReader, is_virtual, source_of, virtual_clip

CLIPS_FOLDER, SCORES_FILE = "clips", "clip_scores.jsonl"
_MAX_LINE_BYTES = 1 << 16
_DIGITS = 24
Lengths = Mapping[str, tuple[tuple[int, int], tuple[float, float]]]


@dataclass(frozen=True)
class Judged:
    """What came out of a run.

    Attributes:
        items: One for each pair.
        report: The same in the older form of `eval.json`; None for scorers.
    """

    items: list[EvalItem]
    report: PairsReport | None


def redundant_pairs(pairs: Sequence[Pair], out: Path, seed: int) -> list[Pair]:
    """The pairs with virtual clips in which random frames are repeated, until they are twice as long.

    Args:
        pairs: The pairs.
        out: The run's folder. The virtual clips are written to `clips/` in it.
        seed: The seed of the frames that are repeated.

    Raises:
        InputError: The folder cannot be made.
    """
    folder = out / CLIPS_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error, "name another", failed="the folder cannot be made") from None
    made = []
    for pair in pairs:
        paths = {}
        for name in ("video_1", "video_2"):
            content = virtual_clip(getattr(pair, name), Redundant(seed=seed))
            digest = hashlib.sha256(content).hexdigest()[:_DIGITS]
            paths[name] = folder / f"redundant-{digest}{ENDING}"
            if not paths[name].is_file() or paths[name].read_bytes() != content:
                replace_file(paths[name], content)
        made.append(pair.model_copy(update=paths))
    return made


def with_virtual_clips(judge: Judge) -> Judge:
    """The same judge, which reads virtual clips too."""
    reader = VirtualReader(judge.reader)
    return Judge(judge.engine, judge.settings, templates=judge.templates, reader=reader)


def asked_protocol(protocol: Protocol) -> dict[str, Any]:
    """What of a protocol changes the questions to the judge, and not only how its answers are read."""
    own = Retrieval.OWN if protocol.retrieval is Retrieval.NONE else protocol.retrieval
    return replace(protocol, retrieval=own, first_answer_from=None).as_json()


def judge_pairs(
    judge: Judge | Callable[[], Judge],
    pairs: Sequence[Pair],
    protocol: Protocol,
    log: VerdictLog,
    *,
    seed: int,
    on_wave: Callable[[int, int], None] = lambda done, total: None,
    on_record: Callable[[VerdictRecord], None] = lambda record: None,
    on_wait: Callable[[int], None] = lambda waiting: None,
) -> None:
    """Puts every presentation that is not in the log to a judge.

    Args:
        judge: The judge, or a function that loads it, which is called if there is something to judge.
        pairs: The pairs.
        protocol: How they are judged.
        log: The verdicts so far. Episodes go to `trajectories.jsonl` beside it.
        seed: The seed of the sampling.
        on_wave: A function that is called with (recorded presentations, all of which are known to be needed)
            before each wave of questions.
        on_record: A function that is called with each record.
        on_wait: A function that is called with the number of pairs that other processes hold, while waiting.

    Raises:
        InputError: An id is that of another pair's presentation.
    """
    check_ids(pairs, protocol)
    tools = None if protocol.retrieval in (Retrieval.OWN, Retrieval.NONE) else tools_for(protocol.retrieval)
    records = {record.id: record for record in log.records()}
    for todo in waves(pairs, protocol, records):
        on_wave(len(records), len(records) + len(todo))
        if not isinstance(judge, Judge):
            judge = judge()
        judge_file(
            judge,
            todo,
            log,
            seed=seed,
            trajectories=log.path.with_name(TRAJECTORIES_FILE),
            tools=tools,
            on_record=on_record,
            on_wait=on_wait,
        )
        records.update({record.id: record for record in log.records()})


def judged_by_model(
    data: LabelledData,
    protocol: Protocol,
    records: Iterable[VerdictRecord],
    trajectories: Path,
    lengths: Lengths | None = None,
) -> Judged:
    """The items of a run, from the records of its presentations.

    Args:
        data: The pairs.
        protocol: How they were judged.
        records: The records.
        trajectories: The file of their episodes, which is read if verdicts come from first rounds.
        lengths: The lengths of the clips by the pair's id, if they are known (`lengths_of`).

    Raises:
        InputError: The file of episodes is needed and cannot be read.
    """
    by_id = {record.id: record for record in records}
    whole = dict(by_id)  # an id may have several episodes; the last one counts, as it was recorded
    if protocol.needs_trajectories and trajectories.is_file():
        for trajectory in load_trajectories(trajectories):
            if trajectory.id in by_id:
                by_id[trajectory.id] = first_answer(whole[trajectory.id], trajectory, protocol)
    items, one_each = [], []
    for pair in data.pairs:
        items.append(
            item_of_presentations(
                pair, protocol, by_id, data.tie_kinds.get(pair.id), **_length(lengths, pair)
            )
        )
        record, _ = combined(pair, protocol, by_id)
        one_each += [] if record is None else [record]
    return Judged(items, report_of(data.pairs, one_each))


def judged_by_baseline(
    baseline: Baseline,
    data: LabelledData,
    protocol: Protocol,
    *,
    seed: int,
    lengths: Lengths | None = None,
) -> Judged:
    """The items of a baseline that gives verdicts."""
    check_ids(data.pairs, protocol)
    verdicts = verdicts_of(baseline, data.pairs, seed)
    records = [
        record_of_baseline(baseline, one, verdicts, seed)
        for pair in data.pairs
        for one in presentations(pair, protocol)
    ]
    return judged_by_model(data, protocol, records, Path(os.devnull), lengths)


def judged_by_scorer(
    baseline: Baseline,
    data: LabelledData,
    out: Path,
    *,
    lengths: Lengths | None = None,
    on_clip: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """The items of a baseline that gives scores. Each clip is decoded once, also after a run was stopped.

    A clip whose content is another than the one that was measured is measured again.

    Args:
        baseline: The baseline.
        data: The pairs.
        out: The run's folder, for the scores of the clips.
        lengths: The lengths of the clips, if they are known.
        on_clip: A function that is called with (measured clips, all clips).

    Raises:
        InputError: The file of scores cannot be read or written.
    """
    path = out / SCORES_FILE
    known = _read_scores(path)
    clips = list(dict.fromkeys(str(clip) for pair in data.pairs for clip in (pair.video_1, pair.video_2)))
    reader, failures = VirtualReader(open_reader()), {}
    scores: dict[str, dict[str, float]] = {}
    for number, clip in enumerate(clips, start=1):
        content = _content(clip)
        if content is not None and (clip, content) in known:
            scores[clip] = known[clip, content]
        else:
            try:
                scores[clip] = clip_scores(clip, reader)
                row = {"clip": clip, "content": content, **scores[clip]}
                append_line(path, json.dumps(row) + "\n", unfinished="cut")
            except VideoError as error:
                failures[clip] = str(error)
            except OSError as error:
                raise unwritable(path, error, "give another folder") from None
        on_clip(number, len(clips))
    items = []
    for pair in data.pairs:
        both = [str(pair.video_1), str(pair.video_2)]
        broken = [failures[clip] for clip in both if clip in failures]
        if broken:
            answer = Answer(status=ItemStatus.FAILED, reason=f"video_error: {broken[0]}")
        else:
            first, second = (scores[clip][baseline.value] for clip in both)
            answer = Answer(scores=dict.fromkeys(("TA", "VQ", "MQ", "OA"), first - second))
        item = item_of_answer(pair, answer, data.tie_kinds.get(pair.id))
        items.append(item.model_copy(update=_length(lengths, pair)))
    return Judged(items, None)


def lengths_of(pairs: Sequence[Pair]) -> dict[str, tuple[tuple[int, int], tuple[float, float]]]:
    """Pair id -> the frames and the seconds of both clips. A pair with a broken clip is left out."""
    reader, probed, found = VirtualReader(open_reader()), {}, {}
    for pair in pairs:
        try:
            for path in (pair.video_1, pair.video_2):
                if path not in probed:
                    info = reader.probe(path)
                    probed[path] = (info.n_frames, info.duration_seconds)
        except VideoError:
            continue
        (frames_1, seconds_1), (frames_2, seconds_2) = probed[pair.video_1], probed[pair.video_2]
        found[pair.id] = (frames_1, frames_2), (seconds_1, seconds_2)
    return found


def _length(lengths: Lengths | None, pair: Pair) -> dict[str, Any]:
    if lengths is None or pair.id not in lengths:
        return {}
    frames, seconds = lengths[pair.id]
    return {"frames": frames, "seconds": seconds}


def _content(clip: str) -> str | None:
    """The digest of a clip's content, of a virtual one also of its source's; None if it cannot be read."""
    parts = [clip_content(clip)]
    if is_virtual(clip):
        try:
            parts.append(clip_content(source_of(clip)))
        except VideoError:
            return None
    digests = [part.sha256 for part in parts if part is not None]
    return "+".join(digests) if len(digests) == len(parts) else None


def _read_scores(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    """(clip, digest of its content) -> the scores that an earlier run wrote.

    An unfinished last line, and a line that does not say which content it is about, are measured again.
    """
    known: dict[tuple[str, str], dict[str, float]] = {}
    if not path.is_file():
        return known
    for number, line in read_lines(path, _MAX_LINE_BYTES):
        if not line.endswith(b"\n"):
            break
        row = parse_json(line, f"{path}: line {number}")
        try:
            clip, content = str(row.pop("clip")), row.pop("content", None)
            scores = {str(name): float(value) for name, value in row.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(
                f"{path}: line {number} holds no scores; remove the file and run again"
            ) from None
        if isinstance(content, str):
            known[clip, content] = scores
    return known
