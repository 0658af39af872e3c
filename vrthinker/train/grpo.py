"""Stage 3, GRPO: the policy learns which of its own episodes earn more than their group (method section 5).

What it does, over and over: it samples groups of episodes per pair, scores them, compares each with its own
group, packs every group into one sequence, and takes a few clipped steps. The sampler then gets the new
weights. The old policy's log-probabilities come from the training forward; the sampler's own are kept to
measure the drift between the two, and no step is taken beyond its bound.

How it differs from the paper: the two clip widths may differ; redraws of dynamic sampling have a bound; the
standard deviation of a group is the sample's; the order of the clips is drawn per group.

    vrthinker train grpo --model M --pairs pairs.jsonl --steps 100 --out RUN
    vrthinker train grpo --recipe nano-grpo --out RUN
    vrthinker train grpo --resume RUN
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vrthinker.data.pairs import Pair
from vrthinker.engine.hf.checkpoint import weights_fingerprint
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.vllm.engine import VLLMEngine
from vrthinker.engine.vllm.library import LocalOptions, require
from vrthinker.episode.settings import EpisodeSettings, JudgeSettings
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.judge import Judge
from vrthinker.judge_configuration import refuse_without_own_cache
from vrthinker.policy.batches import FrameLoader
from vrthinker.progress import Progress, counted
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.records.trackers import open_tracker
from vrthinker.reward.advantages import Advantages, advantages
from vrthinker.reward.group import EpisodeTruth
from vrthinker.train.grpo_batch import Batch, dealt, drift, own_packs, pack_batch, packed_loss
from vrthinker.train.grpo_logprobs import Logprobs
from vrthinker.train.grpo_settings import GRPO, GrpoSettings
from vrthinker.train.held_out import BEST_FOLDER
from vrthinker.train.items import pairs_of_items
from vrthinker.train.loop.checkpoint import latest_checkpoint
from vrthinker.train.loop.clock import Clock
from vrthinker.train.loop.loop import LoopResult, LoopSettings, MicroLoss, run_loop
from vrthinker.train.loop.ranks import Ranks, current_ranks
from vrthinker.train.model import live_weights
from vrthinker.train.rollouts import ROLLOUTS, Refresh, Rollouts, refuse_what_cannot_be_trained
from vrthinker.train.sft import (
    Start,
    base_folder,
    begin_run,
    export_judge,
    held_out_of,
    load_start,
    resume_hint,
    stage_folder,
)
from vrthinker.train.trials import Trial
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.world.world import PairTruth

LOSS = "loss/grpo"


def run_grpo(settings: GrpoSettings, out: Path) -> Path | None:
    """Trains a judge by GRPO, or resumes a run that was stopped.

    Args:
        settings: The settings. For a folder that holds a run, they must be the run's.
        out: The run's folder, as of a cold start, with the sampled episodes in `rollouts/`.

    Returns:
        The trained judge's checkpoint folder: `out/best` if held-out pairs are judged on the way and all
        steps are done, else `out/model`; None if a signal ended the run early.

    Raises:
        InputError: Settings, pairs or the folder cannot be used. A folder that this call made is removed.
        VRThinkerError: Sampling or training failed. What was recorded stays.
    """
    with stage_folder(out, ROLLOUTS):
        ranks = current_ranks()
        begin_run(settings, out)
        pairs, truths = pairs_of_items(settings.items, out / "data", ranks)
        ranks.together(lambda: _check_labels(pairs))
        start = load_start(settings, out)
        with contextlib.ExitStack() as stack:
            trainer = _Trainer(settings, start, pairs, truths, out, ranks, stack)
            return trainer.run()


def _check_labels(pairs: Sequence[Pair]) -> None:
    bare = [pair.id for pair in pairs if not pair.labels]
    if bare:
        raise InputError(
            f"pairs: {len(bare)} of {len(pairs)} have no label, such as {bare[0]!r}; a reward needs at least "
            "one of TA, VQ, MQ and OA; leave them out"
        )


def _refuse_engine(settings: GrpoSettings, sampled: EpisodeSettings, ranks: Ranks) -> None:
    """Refuses what vLLM cannot sample, before it is started."""
    if settings.rollouts.engine != "vllm":
        return
    refuse_without_own_cache(sampled, "with vLLM")
    if ranks.size > 1:
        raise InputError(
            f"rollouts.engine: got vllm with {ranks.size} processes, allowed: hf with several, vllm with "
            "one; a "
            "vLLM takes a GPU, or several, for itself"
        )
    require()


class _NothingToLearn(VRThinkerError):
    """No group of a refresh has episodes that differ."""


class _Trainer:
    """A run: it samples when the sampler is refreshed, and gives the losses of each step."""

    def __init__(
        self,
        settings: GrpoSettings,
        start: Start,
        pairs: Sequence[Pair],
        truths: Mapping[str, PairTruth],
        out: Path,
        ranks: Ranks,
        stack: contextlib.ExitStack,
    ) -> None:
        self._settings, self._start, self._out, self._ranks = settings, start, out, ranks
        self._trained = start.trained
        policy = start.policy
        sampled = start.judge_settings.episode.model_copy(
            update={"temperature": settings.rollouts.temperature, "top_p": 1.0, "guided": False}
        )
        self._judge_settings: JudgeSettings = start.judge_settings.model_copy(update={"episode": sampled})
        ranks.together(lambda: refuse_what_cannot_be_trained(sampled))
        ranks.together(lambda: _refuse_engine(settings, sampled, ranks))
        self._memory = sampled.memory
        self._markup = Markup(policy.tokenizer, policy.vocabulary_size)
        factor = policy.patch_size * policy.merge_size
        self._factor = (factor, factor)
        self._clock = Clock(policy.device)
        loader = FrameLoader(open_reader(), FrameCache(settings.frame_cache_bytes))
        stack.callback(loader.close)
        self._logprobs = Logprobs(
            settings,
            start.trained,
            loader,
            out,
            ranks,
            temperature=sampled.temperature,
            banned=self._markup.vocabulary(policy.device).banned,
            clock=self._clock,
        )
        self._rollouts = Rollouts(
            settings.rollouts,
            settings.reward,
            pairs,
            # A judge that skips frames numbers others than the truth does.
            truth_of=functools.partial(_truth_of, truths if sampled.numbers_all_frames else {}),
            seed=settings.seed,
            folder=out / ROLLOUTS,
            ranks=ranks,
            run={"base": ranks.first(lambda: weights_fingerprint(base_folder(settings, out)))},
        )
        self._judge: Judge | None = None
        self._stack = stack
        self._refreshed: tuple[int, list[Batch]] | None = None
        self._too_far = False
        self._step = 0

    def run(self) -> Path | None:
        """Trains and exports."""
        settings, ranks, learn = self._settings, self._ranks, self._settings.learn
        held_out = held_out_of(settings, self._start, (), learn.steps, self._out)
        begun = latest_checkpoint(self._out, ranks)
        tracker = open_tracker(
            settings.tracker if ranks.is_first else "none",
            run=self._out,
            title=GRPO.name,
            config=settings.model_dump(mode="json"),
            first_step=0 if begun is None else begun.step,
        )
        self._stack.callback(tracker.close)
        if begun is not None:
            lines = read_metrics(self._out / METRICS_FILE) if (self._out / METRICS_FILE).is_file() else []
            self._notice([line for line in lines if line["step"] == begun.step])
        try:
            result = self._loop(tracker.log, None if held_out is None else held_out.measure)
        except _NothingToLearn as error:
            if self._step == 0:
                raise
            Progress().say(f"{error}; what was learned in {counted(self._step, 'step')} is kept")
            return export_judge(self._start, settings, self._out / "model")
        if result.outcome == "interrupted":
            return None
        model = export_judge(self._start, settings, self._out / "model")
        best = self._out / BEST_FOLDER
        if result.outcome == "stopped":
            Progress().say(
                f"{GRPO.name}: the KL to the reference is above most_kl {settings.loss.most_kl} after step "
                f"{result.step}; what was learned until here is kept"
            )
            return model
        return best if held_out is not None and best.is_dir() else model

    def _loop(self, log: Any, measure: Any) -> LoopResult:
        settings, learn = self._settings, self._settings.learn
        return run_loop(
            self._start.policy.model,
            settings=LoopSettings(
                steps=learn.steps,
                checkpoint_every=settings.checkpoint_every,
                seed=settings.seed,
                optimizer=settings.optimizer,
            ),
            learning_rate=lambda step: learn.learning_rate.at(step, learn.steps),
            micro_losses=self.micro_losses,
            run=self._out,
            name=GRPO.name,
            loss_name=LOSS,
            on_step=self._watched(log),
            measure=measure,
            stop=lambda: self._too_far,
            resume_hint=resume_hint(GRPO, self._out),
            ranks=self._ranks,
        )

    def micro_losses(self, step: int) -> Iterator[MicroLoss]:
        """A 0-based step: sample, reward, advantage, pack, step. Gives the losses of this process's packs.

        Raises:
            InputError: The run's files are not those that this step needs.
            VRThinkerError: There is nothing to learn from, training and sampling differ by too much, or
                something cannot be read or written.
            StepInterrupted: A signal came while it sampled.
        """
        self._step = step
        learn, ranks, clock = self._settings.learn, self._ranks, self._clock
        number, place = divmod(step, learn.steps_per_refresh)
        metrics: dict[str, float] = {}
        if self._refreshed is None or self._refreshed[0] != number:
            sampled = self._sample(number, is_new=place == 0)  # with their rewards
            compared = advantages(
                self._settings.advantage,
                {group.id: group.rewards.totals for group in sampled.groups},
                device=self._start.policy.device,
            )
            with clock.counts("pack"):
                batches = ranks.together(lambda: self._packed(sampled, compared))
            if place == 0:
                self._logprobs.keep_old(number, batches)
                metrics = {**sampled.metrics, **compared.metrics}
            else:  # the old policy is gone
                self._logprobs.load_old(number, batches)
            self._refreshed = number, batches
        batch, own_drift = self._refreshed[1][place], 0.0
        own = own_packs(batch, ranks)
        for turn, (index, counts) in enumerate(own):
            micro = self._micro_loss(batch, index, share=1.0 if counts else 0.0)
            own_drift += float(micro.sums.get("drift/mean", 0.0))
            if turn == len(own) - 1 and ranks.is_first:
                sizes = {"batch/episodes": float(batch.n_episodes), "batch/tokens": float(batch.n_tokens)}
                micro = dataclasses.replace(micro, sums={**micro.sums, **metrics, **clock.take(), **sizes})
            yield micro
        self._refuse_drift(sum(ranks.gather(own_drift)))  # all gradients are there, no weight has moved yet

    # The parts of a step

    def _micro_loss(self, batch: Batch, index: int, *, share: float) -> MicroLoss:
        """The loss of a pack; a share of 0 makes it one that only fills up."""
        packed, found = batch.packs[index], self._logprobs.of_step(batch, index)
        loss, sums, largest = packed_loss(
            self._settings.loss, packed, batch, found.policy, found.old, found.ref
        )
        sums["policy/entropy"] = torch.cat(found.entropies).sum() / batch.n_tokens
        maxima = {"ratio/max": largest}
        if n_known := batch.n_known:
            drifts = drift(packed, found.old)
            sums["drift/mean"], maxima["drift/max"] = drifts.sum() / n_known, drifts.max()
        told = {name: value * share for name, value in sums.items()}
        return MicroLoss(loss * share, packed.pack.n_tokens if share else 0, told, maxima)

    def _sample(self, number: int, *, is_new: bool) -> Refresh:
        """Samples and scores the groups of a refresh by the weights of now. If it is not new, reads them.

        Raises:
            _NothingToLearn: No group is left.
        """
        learn = self._settings.learn
        first_step = number * learn.steps_per_refresh
        with self._clock.counts("weight_update"):
            # In the middle of a refresh, everything was sampled before, by weights that are gone.
            judge = self._sampler(first_step) if is_new else None
        with self._clock.counts("rollout"):
            refresh = self._rollouts.sample(
                number,
                judge,
                wanted=self._steps_of(number) * learn.groups_per_step,
                weights=f"after {first_step} steps",
            )
            if judge is not None:
                judge.engine.free_caches()  # type: ignore[attr-defined]
        if not refresh.groups:
            error = _NothingToLearn(
                f"{GRPO.name}: step {self._step}: nothing to learn from: none of {len(refresh.drawn)} groups "
                "has episodes that differ in accuracy "
                f"(mean accuracy {refresh.metrics.get('reward/accuracy', float('nan')):.3f}, "
                f"failed episodes {refresh.metrics.get('reward/failed', 0.0):.0%}); give harder or easier "
                f"pairs, or set rollouts.dynamic=false; {self._out / ROLLOUTS} has the episodes"
            )
            raise self._ranks.told_once(error)
        return refresh

    def _steps_of(self, number: int) -> int:
        """The number of steps of a refresh: the last may have fewer."""
        learn = self._settings.learn
        return min(learn.steps_per_refresh, learn.steps - number * learn.steps_per_refresh)

    def _packed(self, refresh: Refresh, compared: Advantages) -> list[Batch]:
        """The packs of each step of a refresh."""
        return [
            pack_batch(
                groups,
                compared,
                self._markup,
                self._factor,
                memory=self._memory,
                max_tokens=self._settings.learn.max_pack_tokens,
            )
            for groups in dealt(refresh.groups, self._steps_of(refresh.number))
        ]

    def _refuse_drift(self, mean: float) -> None:
        most = self._settings.loss.most_drift
        if not mean <= most:
            error = VRThinkerError(
                f"{GRPO.name}: step {self._step}: the training forward and the sampler differ by {mean:.3g} "
                f"nats per token, allowed: up to {most} (loss.most_drift); they do not compute the same "
                "policy, and training on this would ruin it"
            )
            raise self._ranks.told_once(error)

    def _sampler(self, version: int) -> Judge:
        """The judge that samples, with the policy's weights of now."""
        if self._judge is None:
            self._judge = self._ranks.together(self._make_sampler)
            self._stack.callback(self._judge.close)
        self._judge.engine.update_weights(live_weights(self._trained), version)
        return self._judge

    def _make_sampler(self) -> Judge:
        rollouts, folder = self._settings.rollouts, base_folder(self._settings, self._out)
        engine: HFEngine | VLLMEngine
        if rollouts.engine == "vllm":
            # Training and sampling take turns, and on a GPU so do their memories.
            local = LocalOptions(own_process=rollouts.vllm_process, sleep=self._ranks.device.type == "cuda")
            engine = VLLMEngine(folder, dtype=rollouts.dtype, max_sessions=rollouts.batch_size, local=local)
        else:
            engine = HFEngine(
                folder,
                device=str(self._ranks.device),
                dtype=rollouts.dtype,
                max_sessions=rollouts.batch_size,
            )
        return Judge(engine, self._judge_settings, templates=self._start.templates)

    def _watched(self, log: Any) -> Any:
        def on_step(metrics: Mapping[str, float], step: int) -> None:
            log(metrics, step)
            self._notice([metrics])

        return on_step

    def _notice(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Remembers whether the last step went beyond the limit of the KL."""
        limit = self._settings.loss.most_kl
        self._too_far = limit is not None and any((line.get("kl/ref") or 0.0) > limit for line in lines)


def _truth_of(truths: Mapping[str, PairTruth], trial: Trial) -> EpisodeTruth:
    """What is known about a trial's pair, in the trial's order; hidden events only in a synthetic world."""
    truth = truths.get(trial.source.id)
    evidence = None
    if truth is not None:
        shown = truth.swapped() if trial.swapped else truth
        offsets = (1, 1 + shown.clips[0].n_frames)
        evidence = tuple(
            (offset + event.first_index, offset + event.end_index)
            for clip, offset in zip(shown.clips, offsets, strict=True)
            for event in clip.events
            if event.hidden and event.defects
        )
    return EpisodeTruth(trial.pair.labels or {}, evidence)
