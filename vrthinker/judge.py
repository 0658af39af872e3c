"""`Judge`, the main entry point: it takes a caption and two clips and returns a verdict.

A judge consists of an engine, a checkpoint's settings and prompts, and a video reader. A verdict says which
video is better per dimension. If it cannot, it is null with a reason; a judgment is never made up.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vrthinker.episode.episode import EpisodeItem, episode_seed
from vrthinker.episode.orders import SWAPPED
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.runner import EpisodeRunner, Finished
from vrthinker.episode.settings import JudgeSettings
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import EngineError
from vrthinker.judge_comparisons import comparisons_of
from vrthinker.judge_configuration import (
    JudgeConfiguration,
    LocalEngine,
    check_grid,
    checkpoint_configuration,
    endpoint_configuration,
)
from vrthinker.judge_items import JudgeItems
from vrthinker.judge_threads import CLOSED, CLOSED_MEANWHILE, JudgeThreads, Turn
from vrthinker.ranking.comparisons import Comparison, pair_name
from vrthinker.ranking.ranking import Ranking, rank_group
from vrthinker.verdict import Judged, Verdict
from vrthinker.video.clips import ClipSource, as_clip
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.reader import ReadCounts, VideoReader, close_idle_clips
from vrthinker.video.workspace import Workspace

if TYPE_CHECKING:
    from vrthinker.data.pairs import Pair
    from vrthinker.engine.base import Engine
    from vrthinker.episode.tools.registry import ToolRegistry

_logger = logging.getLogger(__name__)

DEFAULT_FRAME_CACHE_BYTES = 1 << 30
_AHEAD_BYTES = 256 << 20
"""The most bytes of first frames that are decoded before there is a session for them."""


class Judge:
    """Judges pairs of clips.

    Args:
        engine: The engine that writes the rounds.
        settings: The sizes, limits and window; usually a checkpoint's own.
        templates: The prompts; the package's by default.
        reader: The video reader (`open_reader`); PyAV's on the CPU by default.
        frame_cache_bytes: The most bytes of decoded frames that are kept in memory.
    """

    def __init__(
        self,
        engine: Engine,
        settings: JudgeSettings | None = None,
        *,
        templates: PromptTemplates | None = None,
        reader: VideoReader | None = None,
        frame_cache_bytes: int = DEFAULT_FRAME_CACHE_BYTES,
    ) -> None:
        self.engine = engine
        self.settings = settings or JudgeSettings()
        self.templates = templates or PromptTemplates.load()
        self._reader = reader or open_reader()
        self._cache = FrameCache(frame_cache_bytes)
        self._items = JudgeItems(self.settings, self._reader, self._cache, check=self._check_open)
        self._runner = self._make_runner()
        self._turn = Turn()
        self._threads: JudgeThreads[Verdict] = JudgeThreads(self._runner, self._turn)
        self._closed = False

    @property
    def reader(self) -> VideoReader:
        """What decodes the clips of files."""
        return self._reader

    @property
    def configuration(self) -> JudgeConfiguration:
        """What the verdicts depend on, besides the weights."""
        return JudgeConfiguration(self.engine.name, self.settings, self.templates)

    @staticmethod
    def configuration_of(model: str | Path, **options: Any) -> JudgeConfiguration:
        """The configuration that `from_pretrained` would give a judge. No weights are loaded.

        If the checkpoint has settings of its own, this takes no longer than reading them.

        Args:
            model: A checkpoint folder or a hub id.
            **options: `engine`, `templates`, `max_pixels`, `profile` and fields of `EpisodeSettings`, as in
                `from_pretrained`.

        Raises:
            InputError: The checkpoint, a template or a setting cannot be used.
        """
        return checkpoint_configuration(model, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        engine: LocalEngine = "hf",
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 8,
        templates: str | PathLike[str] | None = None,
        max_pixels: int | None = None,
        profile: str | None = None,
        engine_options: Mapping[str, Any] | None = None,
        reader: VideoReader | None = None,
        **episode_settings: Any,
    ) -> Judge:
        """Loads a Qwen2.5-VL or Qwen3-VL checkpoint with its own settings and prompts.

        Args:
            model: A checkpoint folder or a hub id.
            engine: What runs it: `hf`, or `vllm` if that is installed.
            device: The device: `cpu`, `cuda`, `cuda:1`. By default a GPU if there is one.
            dtype: The dtype: `float32`, `bfloat16` or `float16`. By default bfloat16 on a GPU, float32 on a
                CPU.
            batch_size: The number of episodes that advance together.
            templates: A folder of jinja2 templates to use instead of the checkpoint's.
            max_pixels: The most pixels of a frame, instead of the checkpoint's.
            profile: The settings and prompts of a released checkpoint (docs/checkpoints.md), instead of the
                checkpoint's. By default the one that goes with its hub id, if it has no settings of its own.
            engine_options: Further arguments of the engine (`HFEngine`, `VLLMEngine`).
            reader: The video reader (`open_reader`); PyAV's on the CPU by default.
            **episode_settings: Fields of `EpisodeSettings` to override (`window=2`, `max_rounds=4`, …).

        Raises:
            InputError: The checkpoint, a template or a setting cannot be used, or the engine cannot run here.
            EngineError: vLLM does not start.
        """
        from vrthinker.engine.hf.checkpoint import resolve_checkpoint

        # Everything about the checkpoint that can be refused is refused before its weights are loaded.
        configured = checkpoint_configuration(
            model,
            engine=engine,
            templates=templates,
            max_pixels=max_pixels,
            profile=profile,
            **episode_settings,
        )
        folder = resolve_checkpoint(model)
        check_grid(folder, configured.settings)
        options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "max_sessions": batch_size,
            **(engine_options or {}),
        }
        loaded: Engine
        if engine == "vllm":
            from vrthinker.engine.vllm.engine import VLLMEngine

            loaded = VLLMEngine(folder, **options)
        else:
            from vrthinker.engine.hf.engine import HFEngine

            loaded = HFEngine(folder, **options)
        return cls(loaded, configured.settings, templates=configured.templates, reader=reader)

    @classmethod
    def from_endpoint(
        cls,
        base_url: str,
        model: str,
        *,
        engine_options: dict[str, Any] | None = None,
        reader: VideoReader | None = None,
        **options: Any,
    ) -> Judge:
        """Makes a judge that uses an OpenAI-compatible server.

        Args:
            base_url: The address of the server.
            model: The name that the server knows the model by.
            engine_options: Options of `EndpointEngine`.
            reader: The video reader (`open_reader`); PyAV's on the CPU by default.
            **options: `templates`, `max_pixels`, `profile` and fields of `EpisodeSettings`, as in
                `from_pretrained`.

        Raises:
            InputError: The address, a template or a setting cannot be used.
        """
        from vrthinker.engine.endpoint.engine import EndpointEngine

        settings, templates = endpoint_configuration(model, **options)
        engine = EndpointEngine(base_url, model, **(engine_options or {}))
        return cls(engine, settings, templates=templates, reader=reader)

    def __call__(
        self,
        prompt: str,
        video_1: ClipSource,
        video_2: ClipSource,
        *,
        dataset: str | None = None,
        seed: int = 0,
        both_orders: bool = False,
        time_limit_seconds: float | None = None,
    ) -> Verdict:
        """Judges one pair, from any thread.

        If nothing else is under way and there is no time limit, this thread runs the pair alone. Calls that
        come meanwhile wait for its end, and those that wait run as one batch, which later calls join. With
        `submit` or a time limit, a call is in such a batch from the start.

        Args:
            prompt: The caption that both videos were made from.
            video_1: The first clip: a file, a folder of images, the bytes of a file, an open binary file, or
                a `Clip` (for arrays, tensors and frames).
            video_2: The second clip.
            dataset: The dataset whose names of the dimensions the prompt uses; the checkpoint's by default.
            seed: The seed of the sampling. Greedy episodes do not use it.
            both_orders: Whether the clips are judged in the other order too. The two episodes run side by
                side, and the verdict is that of both (`merge_orders`).
            time_limit_seconds: The longest time to wait for the verdict; None waits on.

        Raises:
            VideoError: A clip cannot be read.
            InputError: The caption or an option cannot be used.
            EngineError: The judge is or was closed, the time limit has passed, or this thread is in the
                middle of `judge_pairs`.
        """
        items = self._items.of_call("pair", prompt, video_1, video_2, dataset, seed, both_orders=both_orders)
        if time_limit_seconds is not None or not self._turn.take(timeout_seconds=0):
            return self._threads.run(items, self._read, time_limit_seconds=time_limit_seconds)
        try:
            self._check_open()
            finished = {id(done.item): done for done in self._runner.run(items)}
        finally:
            self._turn.give_back()
        trajectories = []
        for done in (finished[id(item)] for item in items):
            if self._closed and (done.trajectory is None or done.trajectory.outcome.judgments is None):
                raise EngineError(CLOSED_MEANWHILE)  # what the engine says is only that it was shut down
            if done.trajectory is None:
                assert done.error is not None
                raise done.error
            trajectories.append(done.trajectory)
        return self._read(trajectories)

    def submit(
        self,
        prompt: str,
        video_1: ClipSource,
        video_2: ClipSource,
        *,
        dataset: str | None = None,
        seed: int = 0,
        both_orders: bool = False,
        time_limit_seconds: float | None = None,
        id: str = "pair",
    ) -> Future[Verdict]:
        """Queues one pair, from any thread, and returns a future. Calls that wait together run as one batch.

        Callbacks of the future (`add_done_callback`) run in the threads that end calls, so they hold up other
        calls. They may call this, if the queue has room, but must not wait for a verdict.

        Args:
            prompt: The caption that both videos were made from.
            video_1: The first clip. A clip in memory must not be changed until the future has ended.
            video_2: The second clip.
            dataset: The dataset whose names of the dimensions the prompt uses; the checkpoint's by default.
            seed: The seed of the sampling.
            both_orders: Whether the clips are judged in the other order too.
            time_limit_seconds: The longest time until the future ends, counted from this call; None waits on.
            id: The id of the verdict's trajectory.

        Raises:
            InputError: The caption or an option cannot be used. What is found out later (a clip that cannot
                be read, a time limit) is the future's error.
            EngineError: The judge is closed, this thread is in the middle of `judge_pairs`, or this is a
                callback and the queue is full.
        """
        items = self._items.of_call(id, prompt, video_1, video_2, dataset, seed, both_orders=both_orders)
        return self._threads.submit(items, self._read, time_limit_seconds=time_limit_seconds)

    async def ajudge(
        self,
        prompt: str,
        video_1: ClipSource,
        video_2: ClipSource,
        *,
        dataset: str | None = None,
        seed: int = 0,
        both_orders: bool = False,
        time_limit_seconds: float | None = None,
        id: str = "pair",
    ) -> Verdict:
        """Does what `submit` does, for `await`. The event loop is never blocked."""
        items = self._items.of_call(id, prompt, video_1, video_2, dataset, seed, both_orders=both_orders)
        return await self._threads.arun(items, self._read, time_limit_seconds=time_limit_seconds)

    def judge_pairs(
        self,
        pairs: Iterable[Pair | tuple[str, ClipSource, ClipSource]],
        *,
        seed: int = 0,
        tools: ToolRegistry | None = None,
    ) -> Iterator[Judged]:
        """Judges many pairs, `batch_size` at a time, and yields each as it finishes (not in order).

        Each pair is sampled with a separate seed, derived from `seed` and the pair's id. An item that cannot
        start is yielded with its error; it never stops the others.

        Args:
            pairs: The pairs to judge, or tuples of a caption and two clips. The id of a tuple is its place,
                counted from "0".
            seed: The seed of the sampling.
            tools: The tools that rounds may call; `select_frames` by default.

        Raises:
            EngineError: The judge is closed or busy.
        """
        runner = self._runner if tools is None else self._make_runner(tools)
        items = (self._items.of_pair(number, pair, seed) for number, pair in enumerate(pairs))
        for done in self._run(runner, items):
            found = done.trajectory
            verdict = None if found is None else Verdict.of(found, self.settings.note)
            # Whoever keeps the result keeps no clips in memory and no open files with it.
            item = replace(done.item, open_workspace=_judged_already)
            yield Judged(item, done.trajectory, done.error, verdict)

    def _run(
        self, runner: EpisodeRunner, items: Iterable[EpisodeItem], *, ahead_bytes: int = 0
    ) -> Iterator[Finished]:
        """Runs items when no other run of this judge is under way."""
        self._turn.take()
        try:
            self._check_open()
            yield from runner.run(items, ahead_bytes=ahead_bytes)
        finally:
            self._turn.give_back()

    def judge_groups(
        self, groups: Iterable[tuple[str, Sequence[Pair]]], *, seed: int = 0, look_ahead: bool = False
    ) -> Iterator[Finished]:
        """Judges groups of episodes about the same clips, and yields each episode as it finishes.

        The episodes of a group share the first input, which is decoded, encoded and prefilled once. Each is
        sampled with a separate seed, derived from `seed` and its pair's id, as in `judge_pairs`. A group of
        more episodes than may run at once is split.

        Args:
            groups: The id of each group, and its pairs, which differ in their ids only.
            seed: The seed of the sampling.
            look_ahead: Whether clips of later groups are opened and decoded while all sessions are taken. If
                False, a group is taken from `groups` only when there is room for it.

        Raises:
            EngineError: The judge is closed or busy.
            InputError: The pairs of a group are about different clips or captions.
        """
        items = (
            item
            for group_id, pairs in groups
            for start in range(0, len(pairs), self._runner.concurrency)
            for item in [
                self._items.of_group(group_id, pairs[start : start + self._runner.concurrency], seed=seed)
            ]
        )
        ahead_bytes = min(_AHEAD_BYTES, self._cache.max_bytes // 4) if look_ahead else 0
        yield from self._run(self._runner, items, ahead_bytes=ahead_bytes)

    @property
    def decode_metrics(self) -> dict[str, float]:
        """How pixels were read so far, as metrics; without those of which nothing is known yet.

        `decode/frames_per_frame_shown` counts the pictures that came out of decoders for each frame that was
        read, `decode/cache_hit_share` is the share of frames that were still in memory, and
        `decode/pixel_wait_share` is the share of the time in which the engine had nothing to write because
        every episode waited for pixels.
        """
        metrics: dict[str, float] = {}
        counts: ReadCounts | None = getattr(self._reader, "counts", None)
        if counts is not None and counts.shown:
            metrics["decode/frames_per_frame_shown"] = counts.decoded / counts.shown
        if asked := self._cache.hits + self._cache.misses:
            metrics["decode/cache_hit_share"] = self._cache.hits / asked
        if (share := self._runner.statistics.pixel_wait_share) is not None:
            metrics["decode/pixel_wait_share"] = share
        return metrics

    def rank(
        self,
        prompt: str,
        clips: Sequence[ClipSource],
        *,
        schedule: str = "all",
        budget: int | None = None,
        dataset: str | None = None,
        seed: int = 0,
        both_orders: bool = False,
    ) -> Ranking:
        """Ranks the clips of one caption: best of n, strengths with intervals, win rates per dimension.

        Pairs of a round are judged together. Each distinct frame is decoded and encoded once for all of them,
        as far as the caches have room. A pair that fails is counted and judges nobody.

        Args:
            prompt: The caption that all clips were made from.
            clips: The clips, at least 2.
            schedule: Which pairs are compared: `all`, `swiss`, or `knockout`, which finds the best with a
                third of the pairs (`vrthinker.ranking.schedules`).
            budget: The most pairs that are compared; the schedule's own number by default.
            dataset: The dataset whose names of the dimensions the prompt uses; the checkpoint's by default.
            seed: The seed of the sampling and of the schedule.
            both_orders: Whether each pair is judged in both orders of its clips. It counts once.

        Raises:
            InputError: The caption, a number or an option cannot be used.
            EngineError: The judge is closed or busy.
        """
        # Bytes and open files are read once, here, whatever number of pairs shows them.
        clips = [as_clip(clip, f"clip {number}") for number, clip in enumerate(clips, start=1)]

        def compare(pairs: list[tuple[int, int]]) -> Iterator[Comparison]:
            named = {pair_name(first, second): (first, second) for first, second in pairs}
            items = (
                item
                for name, (i, j) in named.items()
                for item in self._items.of_call(
                    name,
                    prompt,
                    clips[i],
                    clips[j],
                    dataset,
                    episode_seed(seed, name),
                    both_orders=both_orders,
                    swapped_seed=episode_seed(seed, name + SWAPPED),
                )
            )
            return comparisons_of(self._run(self._runner, items), named, both_orders=both_orders)

        return rank_group(len(clips), compare, schedule=schedule, budget=budget, seed=seed)

    def _make_runner(self, tools: ToolRegistry | None = None) -> EpisodeRunner:
        episode, templates = self.settings.episode, self.templates
        return EpisodeRunner(self.engine, episode, templates=templates, tools=tools, probabilities=True)

    def close(self) -> None:
        """Shuts the engine down (connections, caches). A closed judge judges no more.

        Calls that are not answered yet end with an error that says so. A run that another thread is in the
        middle of (a single call, `judge_pairs`) has a few seconds to end; then the engine is left to that
        thread and not shut down. Closing twice is harmless.
        """
        self._closed = True
        try:
            ended = self._threads.close(self.engine.shutdown)
        finally:
            close_idle_clips(self._reader)  # last, because calls that ended meanwhile read until then
        if not ended:
            _logger.warning(
                "%s is not shut down: another thread does not come back from a call of it, or is in the "
                "middle of a run; end that first, then close the judge again",
                self.engine.name,
            )

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(CLOSED)

    def _read(self, trajectories: Sequence[Trajectory]) -> Verdict:
        """The verdict of the episodes of one call."""
        first, *others = trajectories
        if not others:
            return Verdict.of(first, self.settings.note)
        return Verdict.of_orders(first, others[0], self.settings.note)


def _judged_already() -> Workspace:
    raise EngineError("the pair is judged, and its clips are let go; judge it again to open them")
