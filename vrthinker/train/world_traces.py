"""Traces that the oracle makes in a synthetic world, by several processes.

Making them is resumable: finished traces of a killed run are not made again. Invariant: equal sources make
equal files, in the same folder, whatever the number of processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Literal

import numpy as np

from vrthinker.data.pairs import load_pairs
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import JudgeSettings
from vrthinker.episode.trajectory import dump_line, load_trajectories
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.records.files import replace_file
from vrthinker.train.trace_sources import WorldTraces
from vrthinker.train.traces import Selection, learned_parts, why_dropped
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.workspace import Workspace
from vrthinker.world.files import PAIRS_FILE, load_truths, make_world
from vrthinker.world.lessons import lesson_frames
from vrthinker.world.oracle import OracleEngine, truths_by_clip
from vrthinker.world.world import PairTruth, WorldConfig

_SHARD_PAIRS = 250
_CACHE_BYTES = 64 << 20


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
    for name in ("max_fps", "frames_per_video"):
        if (got := getattr(settings.episode, name)) is not None:
            raise InputError(
                f"{name}: got {got}, allowed for traces of the synthetic world: none, "
                "its truth numbers every frame"
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
    return Selection(traces, source.pairs, checked, learned=learned_parts([source.learned] * len(traces)))


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
