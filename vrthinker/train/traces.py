"""Traces to train on: made from the synthetic world by its oracle, or read from a file.

Cold start (method section 5) keeps a trace only if every round has the right form and all four judgments are
right, as its texts say when they are parsed again. Making traces is resumable: finished traces of a killed
run are not made again. Invariant: equal sources make equal files, in the same folder, whatever the number of
processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vrthinker.data.pairs import Pair, load_pairs
from vrthinker.episode.dimensions import Dimension
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.grammar import FinalAnswer, parse_round
from vrthinker.episode.prompts import PromptTemplates, clean
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import JudgeSettings
from vrthinker.episode.trajectory import StopReason, Trajectory, dump_line, load_trajectories
from vrthinker.errors import InputError, VRThinkerError, one_line
from vrthinker.policy.parts import LearnedPart
from vrthinker.records.files import replace_file
from vrthinker.video.content import clip_content
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.workspace import Workspace
from vrthinker.world.files import PAIRS_FILE, load_truths, make_world
from vrthinker.world.lessons import lesson_frames
from vrthinker.world.oracle import Behavior, BehaviorMix, OracleEngine, truths_by_clip
from vrthinker.world.world import FIRST_FRAMES, PairTruth, WorldConfig

_SHARD_PAIRS = 250
_CACHE_BYTES = 64 << 20
_REASONS = 4
"""The most reasons that a line names. The run's `traces.json` has them all."""
MAX_TRACE_PAIRS, MAX_SEED = 10_000_000, 1 << 40


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class WorldTraces(_Settings):
    """Traces that the oracle makes in a synthetic world, which is generated for them."""

    kind: Literal["world"] = "world"
    world: WorldConfig = WorldConfig()
    pairs: int = Field(ge=1, le=MAX_TRACE_PAIRS)
    """Number of pairs, each of which gives one trace, before filtering."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the pairs, added to the run's seed. The sum should differ from seeds that are evaluated on."""
    mix: BehaviorMix = BehaviorMix()
    """The oracle's behaviours and their weights."""
    calls: int = Field(2, ge=0)
    """The most tool calls of a trace."""
    lesson_frames: int | None = Field(None, ge=1, le=FIRST_FRAMES)
    """Make reading lessons instead: episodes of one round about this many chosen frames of each clip."""
    filter: bool = True
    """Keep only traces whose four judgments are all right."""
    learned: LearnedPart = "rounds"
    """The part of each round that is learned: `rounds` (all of it), `snapshots` (lessons only), or `calls`
    (how a round asks for frames: the last line of the thinking, the recommended answer and the call)."""

    @model_validator(mode="after")
    def _behaves(self) -> Self:
        drawn = {name for name, weight in self.mix.model_dump().items() if weight}
        if not drawn:
            raise ValueError("mix: got only zeros, wanted at least one behavior above")
        if self.lesson_frames is not None and self.most_calls:
            got = ", ".join(sorted(drawn))
            raise ValueError(f"mix: got {got}, allowed in a lesson: immediate alone, or calls: 0")
        return self

    @model_validator(mode="after")
    def _has_what_is_learned(self) -> Self:
        if self.learned == "snapshots" and self.most_calls:
            raise ValueError("learned: got snapshots, allowed with tool calls: rounds, calls")
        return self

    @property
    def most_calls(self) -> int:
        """The most tool calls that the oracle's behaviours can make."""
        looks = any(weight for name, weight in self.mix.model_dump().items() if name != Behavior.IMMEDIATE)
        return self.calls if looks else 0


class FileTraces(_Settings):
    """Traces from a trajectories file, written by a teacher (`vrthinker judge --trajectories`)."""

    kind: Literal["file"] = "file"
    path: Path
    pairs: Path | None = None
    """The pairs file with the labels. Without it, traces are filtered by their form only."""

    @field_validator("path", "pairs")
    @classmethod
    def _from_anywhere(cls, path: Path | None) -> Path | None:
        """Makes a path absolute, because a run may be resumed from another folder."""
        return None if path is None else path.absolute()


OneSource = WorldTraces | FileTraces


class MixedTraces(_Settings):
    """Traces from several sources, which are shuffled together."""

    kind: Literal["mixed"] = "mixed"
    of: tuple[Annotated[OneSource, Field(discriminator="kind")], ...] = Field(min_length=1)
    """The sources."""


TraceSource = OneSource | MixedTraces


def sources_of(source: TraceSource) -> tuple[OneSource, ...]:
    """The sources that a phase's traces come from."""
    return source.of if isinstance(source, MixedTraces) else (source,)


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
            _learned([part for selection in selections for part in selection.parts]),
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


def _learned(parts: Sequence[LearnedPart]) -> tuple[LearnedPart, ...]:
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


def make_traces(
    source: WorldTraces,
    folder: Path,
    settings: JudgeSettings,
    templates: PromptTemplates,
    *,
    seed: int,
    workers: int | None = None,
) -> Selection:
    """Makes a world in a folder and lets the oracle judge it. Existing results are kept.

    Args:
        source: The world and the traces to make.
        folder: The folder for worlds and their traces.
        settings: The settings of the judge to be trained.
        templates: The prompts of the judge to be trained.
        seed: The run's seed. Equal seeds make equal traces.
        workers: The number of processes; by default the number of cores.

    Returns:
        The traces that pass the filters, in the order of the pairs.

    Raises:
        InputError: The folder holds other traces, or the judge's settings do not fit the world.
        VRThinkerError: An episode failed.
    """
    rounds = settings.episode.max_rounds
    if source.most_calls >= rounds:
        allowed = f"up to {rounds - 1}, one less than the judge's rounds"
        raise InputError(f"calls: got {source.calls}, allowed: {allowed}")
    if settings.episode.max_fps is not None:
        raise InputError(
            f"max_fps: got {settings.episode.max_fps}, allowed for traces of the synthetic world: none, its "
            "truth numbers every frame"
        )
    workers = workers or len(os.sched_getaffinity(0))
    folder = world_folder(folder, source.world, source.pairs, source.seed, seed=seed, workers=workers)
    parts = folder / "traces"
    parts.mkdir(exist_ok=True)
    shards = [
        _Shard(folder, source, settings, templates.sources, seed, start, start + _SHARD_PAIRS)
        for start in range(0, source.pairs, _SHARD_PAIRS)
    ]
    todo = [shard for shard in shards if not shard.path.is_file()]
    if workers == 1 or len(todo) < 2:
        for shard in todo:
            _run_shard(shard)
    else:
        # The pool must not fork, because the caller has torch's threads.
        context, number = get_context("spawn"), min(workers, len(todo))
        with ProcessPoolExecutor(number, mp_context=context, initializer=_end_with_parent) as pool:
            for _ in pool.map(_run_shard, todo):
                pass
    traces = [trajectory for shard in shards for trajectory in load_trajectories(shard.path)]
    checked: Literal["form and labels", "form"] = "form and labels" if source.filter else "form"
    return Selection(traces, source.pairs, checked, learned=_learned([source.learned] * len(traces)))


def world_folder(
    folder: Path, world: WorldConfig, pairs: int, offset: int, *, seed: int, workers: int | None = None
) -> Path:
    """Makes a world for a run, in a folder of its own inside `folder`; returns that folder.

    Sources share a world if they differ only in what is learned from it.

    Args:
        folder: The folder for worlds.
        world: The difficulty.
        pairs: The number of pairs.
        offset: The source's seed, which is added to the run's.
        seed: The run's seed.
        workers: The number of processes; by default the number of cores.

    Raises:
        InputError: The folder holds another world.
        VRThinkerError: A clip could not be written.
    """
    world_seed = offset + 1_000_003 * seed
    run = f"{world.model_dump_json()}:{pairs}:{world_seed}"
    made = folder / hashlib.sha256(run.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    make_world(made, world, pairs=pairs, seed=world_seed, workers=workers)
    return made


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A part of a source's pairs, whose traces one process writes to one file."""

    folder: Path
    source: WorldTraces
    settings: JudgeSettings
    templates: Mapping[str, str]
    seed: int
    start: int
    stop: int

    @property
    def path(self) -> Path:
        """The path of the file. Its name depends on everything that its content depends on."""
        what = [
            self.source.model_dump_json(exclude={"learned"}),
            self.settings.model_dump_json(),
            json.dumps(dict(self.templates), sort_keys=True),
            str(self.seed),
        ]
        digest = hashlib.sha256("\0".join(what).encode()).hexdigest()[:12]
        return self.folder / "traces" / f"{digest}-{self.start:06d}.jsonl"


def _end_with_parent() -> None:
    """Makes a worker end with the process that started it. A later process would write the same files."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches workers too, which should print nothing
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run_shard(shard: _Shard) -> None:
    truths = load_truths(shard.folder)[shard.start : shard.stop]
    by_id = {truth.id: truth for truth in truths}
    engine = OracleEngine(
        truths_by_clip(shard.folder, truths),
        shard.source.mix,
        calls=shard.source.most_calls,
        span=shard.source.world.span[0],
    )
    # The oracle keeps to the grammar by itself.
    episode = shard.settings.episode.model_copy(update={"guided": False})
    if shard.source.lesson_frames is not None:
        episode = episode.model_copy(update={"max_rounds": 1})
    # The oracle reads the truth. Pixels are not needed before training.
    runner = EpisodeRunner(engine, episode, templates=PromptTemplates(shard.templates), decode_ahead=False)
    finished = {}
    for done in runner.run(_items(shard, truths)):
        if done.trajectory is None or done.trajectory.outcome.judgments is None:
            reason = done.error or (done.trajectory and done.trajectory.outcome.reason)
            raise VRThinkerError(f"traces: pair {done.item.id}: {reason}")
        # The time has no meaning here, and without it equal sources make equal files.
        finished[done.item.id] = done.trajectory.model_copy(update={"latency_seconds": 0.0})
    kept = []
    for truth_id, truth in by_id.items():
        labels = truth.judgments.as_dict() if shard.source.filter else None
        if why_dropped(finished[truth_id], labels) is None:
            kept.append(finished[truth_id])
    replace_file(shard.path, "".join(map(dump_line, kept)).encode())


def _items(shard: _Shard, truths: Iterable[PairTruth]) -> Iterator[EpisodeItem]:
    """The items of the shard's episodes."""
    from vrthinker.episode.episode import episode_seed

    reader, cache = open_reader(), FrameCache(_CACHE_BYTES)
    pairs = {pair.id: pair for pair in load_pairs(shard.folder / PAIRS_FILE)}
    for truth in truths:
        pair = pairs[truth.id]
        item_seed = episode_seed(shard.seed, f"{shard.source.seed}:{truth.id}")
        first_frames = None
        if shard.source.lesson_frames is not None:
            rng = np.random.default_rng([item_seed, shard.source.lesson_frames])
            first_frames = lesson_frames(truth, shard.source.lesson_frames, rng)

        def open_workspace(first: Path = pair.video_1, second: Path = pair.video_2) -> Workspace:
            return Workspace.open(first, second, reader=reader, resize=shard.settings.resize, cache=cache)

        yield EpisodeItem(
            truth.id, pair.prompt, open_workspace, shard.settings.dataset, item_seed, first_frames
        )
