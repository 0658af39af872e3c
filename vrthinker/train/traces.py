"""Traces to train on: which ones are kept, and those of a file.

Cold start (method section 5) keeps a trace only if every round has the right form and all four judgments are
right, as its texts say when they are parsed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from vrthinker.data.pairs import Pair, load_pairs
from vrthinker.episode.dimensions import Dimension
from vrthinker.episode.grammar import FinalAnswer, parse_round
from vrthinker.episode.prompts import clean
from vrthinker.episode.trajectory import StopReason, Trajectory, load_trajectories
from vrthinker.errors import InputError, one_line
from vrthinker.policy.parts import LearnedPart
from vrthinker.train.trace_sources import FileTraces
from vrthinker.video.content import clip_content

_REASONS = 4
"""The most reasons that a line names. The run's `traces.json` has them all."""


def why_dropped(trajectory: Trajectory, labels: Mapping[str, int] | None) -> str | None:
    """Why the filters drop a trace; None if it is kept.

    The texts are parsed again: what a record says about them may have been edited, or made by a version with
    another grammar.

    Args:
        trajectory: The trace.
        labels: The right judgments by code; None to check only the form.
    """
    parsed = [parse_round(record.text) for record in trajectory.rounds]
    final = parsed[-1].ending if parsed else None
    if trajectory.outcome.judgments is None or not isinstance(final, FinalAnswer):
        stop = trajectory.outcome.stop_reason
        return "without a verdict" + ("" if stop is StopReason.ANSWERED else f" ({stop.value})")
    if not all(read.well_formed for read in parsed):
        return "not well formed"
    judgments = final.answer.judgments.as_dict()
    wrong = [code for code, label in (labels or {}).items() if judgments[code] != label]
    return f"wrong in {' and '.join(wrong)}" if wrong else None


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A trace that the filters dropped."""

    id: str
    seed: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Selection:
    """The traces that the filters kept, and what they dropped.

    Attributes:
        traces: The traces that are kept.
        n_read: The number of distinct episodes that the traces were chosen from.
        checked: What the filters checked.
        dropped: The dropped traces, if they are known: the oracle's are not stored.
        learned: The part that is learned of each trace; of all of them their rounds if it is empty.
    """

    traces: list[Trajectory]
    n_read: int
    checked: Literal["form and labels", "form"]
    dropped: tuple[Dropped, ...] = ()
    learned: tuple[LearnedPart, ...] = ()

    @property
    def parts(self) -> tuple[LearnedPart, ...]:
        """The part that is learned of each trace."""
        whole: LearnedPart = "rounds"
        return self.learned or (whole,) * len(self.traces)

    @classmethod
    def joined(cls, selections: Sequence[Selection]) -> Selection:
        """What several sources give together."""
        return cls(
            [trace for selection in selections for trace in selection.traces],
            sum(selection.n_read for selection in selections),
            min((s.checked for s in selections), key=("form", "form and labels").index),
            tuple(dropped for selection in selections for dropped in selection.dropped),
            learned_parts([part for selection in selections for part in selection.parts]),
        )

    @property
    def reasons(self) -> dict[str, int]:
        """How many traces were dropped for which reason; the most frequent reason comes first."""
        counts = dict(Counter(dropped.reason for dropped in self.dropped).most_common())
        rest = self.n_read - len(self.traces) - len(self.dropped)
        return counts | ({"not right" if self.checked != "form" else "not well formed": rest} if rest else {})

    @property
    def without_content(self) -> int:
        """The number of kept traces that do not say which content their clips had."""
        return sum(any(video.sha256 is None for video in trace.videos) for trace in self.traces)

    def summary(self, noun: str = "traces") -> str:
        """What was kept and why the others were not, as a part of a line: `kept 6 of 11 traces (...)`."""
        counts = list(self.reasons.items())
        if rest := sum(count for _, count in counts[_REASONS:]):
            counts = [*counts[:_REASONS], ("for other reasons", rest)]
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        return f"kept {len(self.traces)} of {self.n_read} {noun}" + (f" ({reasons})" if reasons else "")

    def digest(self) -> str:
        """A SHA-256 of everything in the traces that is learned, in hexadecimal digits."""
        digest = hashlib.sha256()
        for trace, part in zip(self.traces, self.parts, strict=True):
            learned = [[record.text, record.token_ids] for record in trace.rounds]
            what = [trace.id, trace.seed, trace.prompt, learned, *([part] if part != "rounds" else [])]
            digest.update(json.dumps(what).encode())
        return digest.hexdigest()


def learned_parts(parts: Sequence[LearnedPart]) -> tuple[LearnedPart, ...]:
    """The parts as `Selection` has them: none where all rounds are learned."""
    return tuple(parts) if set(parts) - {"rounds"} else ()


def read_traces(source: FileTraces) -> Selection:
    """The traces of a file that pass the filters.

    If an episode is there more than once (because the teacher was killed and resumed), the last one counts.

    Raises:
        InputError: A file cannot be read, a trace's pair is unknown, lacks labels or is about something else,
            or nothing is kept.
    """
    pairs = None if source.pairs is None else {pair.id: pair for pair in load_pairs(source.pairs)}
    latest: dict[tuple[object, ...], tuple[Trajectory, str | None]] = {}
    for trajectory in load_trajectories(source.path):
        labels = None
        if pairs is not None and source.pairs is not None:
            pair = pairs.get(trajectory.id)
            labels = checked_labels(trajectory, pair, pairs_file=source.pairs, record=source.path)
        clips = tuple(video.path for video in trajectory.videos)
        key = (trajectory.id, trajectory.seed, trajectory.prompt, clips)
        latest[key] = trajectory, why_dropped(trajectory, labels)
    selection = Selection(
        [trajectory for trajectory, reason in latest.values() if reason is None],
        len(latest),
        "form" if pairs is None else "form and labels",
        tuple(Dropped(t.id, t.seed, reason) for t, reason in latest.values() if reason is not None),
    )
    if not selection.traces:
        raise InputError(f"{source.path}: {selection.summary()}; nothing to learn from")
    return selection


def checked_labels(
    trajectory: Trajectory, pair: Pair | None, *, pairs_file: Path, record: Path, all_four: bool = True
) -> Mapping[str, int]:
    """The labels of a trace's pair, if the trace is about the pair's caption and clips.

    Args:
        trajectory: The trace.
        pair: The pair with the trace's id.
        pairs_file: The file of the pair, for messages.
        record: The file of the trace, for messages.
        all_four: Whether the pair must have all four labels.

    Raises:
        InputError: There is no such pair, a label is missing, or the trace is about something else.
    """
    name = one_line(repr(trajectory.id))
    if pair is None:
        raise InputError(
            f"{pairs_file}: has no pair {name}, of which {record} has a trace; give the pairs file "
            "that was judged"
        )
    labels = pair.labels or {}
    if all_four and (missing := [code for code in Dimension if code not in labels]):
        raise InputError(
            f"{pairs_file}: pair {name} lacks the label {', '.join(missing)}; add it, because a trace is "
            "kept only if all four judgments are right; or train without pairs"
        )
    if clean(pair.prompt) != trajectory.prompt:
        raise InputError(f"{pairs_file}: pair {name} has another caption than its trace in {record}")
    clips = [os.path.realpath(clip) for clip in (pair.video_1, pair.video_2)]
    judged = [os.path.realpath(video.path) for video in trajectory.videos]
    if clips[0] != clips[1] and judged == clips[::-1]:
        # Records of version 0.1.0 have nothing else by which this is noticed.
        raise InputError(
            f"{pairs_file}: pair {name} has its clips in another order than its trace in {record}, so that "
            "its labels would be wrong; give the pairs file that was judged"
        )
    for video, clip in zip(trajectory.videos, (pair.video_1, pair.video_2), strict=True):
        if video.sha256 is None or os.path.realpath(clip) == os.path.realpath(video.path):
            continue
        content = clip_content(clip)
        if content is not None and content != (video.size_bytes, video.sha256):
            raise InputError(
                f"{pairs_file}: pair {name} has {clip} where its trace in {record} was judged on "
                f"{one_line(video.path)}, another clip"
            )
    return labels
