"""Stage 3, GRPO: the policy learns which of its own episodes earn more than their group (method section 5).

What it does, over and over: it samples groups of episodes per pair, scores them, compares each with its own
group, packs every group into one sequence, and takes a few clipped steps. The sampler then gets the new
weights. The old policy's log-probabilities are recomputed by the training forward when the sampler is
refreshed; the sampler's own are kept to measure the drift between the two.

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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import ConfigDict, Field, model_validator

from vrthinker.data.pairs import Pair
from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.checkpoint import weights_fingerprint
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.settings import JudgeSettings
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.judge import Judge
from vrthinker.kernels.grpo_loss.op import grpo_loss
from vrthinker.policy.batches import FrameLoader
from vrthinker.policy.packed_forward import packed_logprobs, packed_logprobs_and_entropy
from vrthinker.policy.packing import Pack, pack_group
from vrthinker.progress import Progress, counted
from vrthinker.records.files import replace_file
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.records.trackers import open_tracker
from vrthinker.reward.advantages import Advantages, advantages
from vrthinker.reward.group import EpisodeTruth
from vrthinker.reward.settings import AdvantageSettings, GrpoAdvantage, RewardSettings
from vrthinker.train.held_out import BEST_FOLDER
from vrthinker.train.loop.checkpoint import latest_checkpoint
from vrthinker.train.loop.loop import LoopResult, LoopSettings, MicroLoss, run_loop
from vrthinker.train.loop.ranks import Ranks, current_ranks
from vrthinker.train.loop.schedule import LearningRate
from vrthinker.train.model import TrainedPolicy, live_weights, without_adapters
from vrthinker.train.rejection import FilePairs, WorldPairs, pairs_of_items
from vrthinker.train.rollouts import (
    ROLLOUTS,
    Group,
    Rollouts,
    RolloutSettings,
    iter_valid,
    refuse_what_cannot_be_trained,
)
from vrthinker.train.settings import (
    MAX_STEPS,
    RunSettings,
    Stage,
    StageSettings,
    stage_settings,
    stored_settings,
)
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

GRPO = Stage("GRPO", "grpo")
LOSS = "loss/grpo"
LOGPROBS_FILE = "logprobs.safetensors"


# Settings


class LossSettings(StageSettings):
    """The clipped loss of a step. Defaults are the paper's where it says something."""

    model_config = ConfigDict(allow_inf_nan=False)

    clip_low: float = Field(0.2, ge=0.0, le=1.0)
    """The ratio to the old policy is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0.0)
    """The ratio is clipped above 1 + clip_high."""
    kl_weight: float = Field(0.01, ge=0.0)
    """Weight of the KL to the reference, the policy that the run starts from. With 0 there is no reference in
    memory and no KL is measured."""
    aggregation: Literal["episode_mean", "token_mean", "fixed_length"] = "episode_mean"
    """How tokens add up: the mean over episodes of their means (the paper's), the mean over all tokens of the
    batch, or the sum divided by `fixed_length` per episode (Dr. GRPO)."""
    fixed_length: int | None = Field(None, ge=1)
    """The number of tokens for the aggregation of that name, and only for it."""
    importance_cap: float | None = Field(None, gt=0.0)
    """Ours: weight each token's advantage by the ratio of the old policy to the sampler's own probability, at
    most this. None does not weight."""
    most_drift: float = Field(0.5, gt=0.0)
    """The largest mean difference between the old policy's and the sampler's log-probabilities, in nats. A
    larger one means that training computes something else than was sampled, and ends the run."""
    most_kl: float | None = Field(None, gt=0.0)
    """End the run, and keep what it has learned, once the mean KL to the reference is above this."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.fixed_length is None) != (self.aggregation != "fixed_length"):
            raise ValueError("fixed_length: wanted with aggregation fixed_length, and only with it")
        if self.most_kl is not None and self.kl_weight == 0.0:
            raise ValueError("most_kl: got a limit with kl_weight 0, which measures no KL; give a weight")
        return self


class GrpoRate(LearningRate):
    """A constant rate, unless it is told otherwise."""

    peak: float = Field(1e-6, gt=0.0)
    """The highest rate. The paper uses 1e-6."""
    warmup_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """The share of all steps in which the rate rises."""
    shape: Literal["cosine", "constant", "linear"] = "constant"
    """How the rate falls after the warm-up."""


class GrpoPhase(StageSettings):
    """How long and how fast the policy learns."""

    steps: int = Field(ge=1, le=MAX_STEPS)
    """Number of optimizer steps."""
    groups_per_step: int = Field(64, ge=1)
    """Number of groups per step. The paper uses 64."""
    steps_per_refresh: int = Field(4, ge=1)
    """Number of steps between two refreshes of the sampler and of the old policy. The paper uses 4."""
    learning_rate: GrpoRate = GrpoRate()
    max_pack_tokens: int | None = Field(None, ge=1)
    """The most tokens of a forward pass. A larger group is split. By default a group is one pack."""


class GrpoSettings(RunSettings):
    """All settings of GRPO."""

    items: Annotated[FilePairs | WorldPairs, Field(discriminator="kind")]
    rollouts: RolloutSettings = RolloutSettings()
    reward: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = GrpoAdvantage()
    loss: LossSettings = LossSettings()
    learn: GrpoPhase

    @model_validator(mode="after")
    def _computes_one_policy(self) -> Self:
        if self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                f"lora.dropout: got {self.lora.dropout}, allowed in GRPO: 0; with it, two forwards of one "
                "policy differ, and so would the ratio to the old one"
            )
        return self


def grpo_settings(values: Mapping[str, Any]) -> GrpoSettings:
    """Validates settings. An error names the first wrong key.

    Raises:
        InputError: A key is unknown, missing or out of range.
    """
    return stage_settings(GRPO, GrpoSettings, values)


def resume_settings(run: Path) -> GrpoSettings:
    """The settings that a run was started with.

    Raises:
        InputError: The folder does not hold a run of this stage.
    """
    return stored_settings(GRPO, GrpoSettings, run)


# The run


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


class _NothingToLearn(VRThinkerError):
    """No group of a refresh has episodes that differ."""


@dataclasses.dataclass(frozen=True)
class PackedEpisodes:
    """A pack with what its loss needs besides the policy.

    Attributes:
        pack: The pack.
        advantages: The advantage of each of the pack's trajectories.
        lengths: The number of sampled tokens of each trajectory in all packs together.
        sampler: The sampler's log-probabilities, float32 `[sampled]`, the trajectories one after the other.
    """

    pack: Pack
    advantages: tuple[float, ...]
    lengths: tuple[int, ...]
    sampler: torch.Tensor


@dataclasses.dataclass
class Batch:
    """The packs of one step.

    Attributes:
        packs: The packs.
        n_episodes: The number of episodes with sampled tokens.
        n_tokens: The number of their sampled tokens.
        old: The old policy's log-probabilities, in the form of `PackedEpisodes.sampler`, for this process's
            packs, by the packs' numbers.
        ref: The reference's; empty without one.
    """

    packs: list[PackedEpisodes]
    n_episodes: int
    n_tokens: int
    old: dict[int, torch.Tensor]
    ref: dict[int, torch.Tensor]


def pack_batch(
    groups: Sequence[Group],
    compared: Advantages,
    markup: Markup,
    factor: tuple[int, int],
    *,
    memory: str,
    max_tokens: int | None,
) -> Batch:
    """Packs the groups of a step. An episode counts once, in however many packs its tokens are.

    Raises:
        InputError: An episode was sampled under another memory mode, or is not one that can be trained.
    """
    packs: list[PackedEpisodes] = []
    n_episodes = n_tokens = 0
    for group in groups:
        members = list(iter_valid(group))
        for _, trajectory in members:
            if trajectory.settings.memory != memory:
                raise InputError(
                    f"trajectory {trajectory.id!r}: memory: got {trajectory.settings.memory!r}, allowed in "
                    f"this run: {memory!r}, under which the policy is trained"
                )
        if not members:
            continue
        found = pack_group([t for _, t in members], markup, factor, max_tokens=max_tokens)
        sampler = [_sampler_logprobs(t.rounds) for _, t in members]
        used = [0] * len(members)
        for pack in found:
            parts = []
            for member, indices in zip(pack.trajectories, pack.sampled, strict=True):
                parts.append(sampler[member][used[member] : used[member] + len(indices)])
                used[member] += len(indices)
            values = [compared.values[group.id][members[number][0]] for number in pack.trajectories]
            packs.append(
                PackedEpisodes(
                    pack,
                    tuple(0.0 if value is None else value for value in values),
                    tuple(len(sampler[number]) for number in pack.trajectories),
                    torch.from_numpy(np.concatenate(parts)),
                )
            )
        n_episodes += sum(len(logprobs) > 0 for logprobs in sampler)
        n_tokens += sum(map(len, sampler))
    return Batch(packs, n_episodes, n_tokens, {}, {})


def _sampler_logprobs(rounds: Sequence[Any]) -> np.ndarray:
    """The sampler's log-probabilities of an episode; NaN where an engine gives none."""
    values: list[float] = []
    for record in rounds:
        values += record.logprobs or [float("nan")] * len(record.token_ids or ())
    return np.array(values, np.float32)


def packed_loss(
    settings: LossSettings,
    packed: PackedEpisodes,
    batch: Batch,
    policy: Sequence[torch.Tensor],
    old: torch.Tensor,
    ref: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """A pack's part of a step's loss.

    Every episode is one call of the op, normalised by the episode's tokens in all packs, so that an episode
    whose tokens are in several packs counts as one that is in a single pack.

    Args:
        settings: The settings of the loss.
        packed: The pack.
        batch: The step's packs, for the normalisers.
        policy: The policy's log-probabilities of each trajectory, with gradient, `[sampled]`.
        old: The old policy's, `[sampled of all]`.
        ref: The reference's; None without one.

    Returns:
        The loss, the metrics as sums that add up to means over the step's tokens, and the largest ratio.
    """
    losses, sums, largest = [], dict[str, torch.Tensor](), []
    start = 0
    for logprobs, advantage, length in zip(policy, packed.advantages, packed.lengths, strict=True):
        count = len(logprobs)
        end = start + count
        if count == 0:
            continue
        device = logprobs.device
        value = torch.full((count,), advantage, dtype=torch.float32, device=device)
        if settings.importance_cap is not None:
            weight = (old[start:end] - packed.sampler[start:end].to(device)).exp()
            value = value * weight.clamp(max=settings.importance_cap)
        normalizer = {
            "episode_mean": length * batch.n_episodes,
            "token_mean": batch.n_tokens,
            "fixed_length": batch.n_episodes * (settings.fixed_length or 1),
        }[settings.aggregation]
        result = grpo_loss(
            logprobs,
            old[start:end],
            None if ref is None else ref[start:end],
            value,
            torch.ones(count, dtype=torch.bool, device=device),
            torch.tensor([0, count], device=device),
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            kl_weight=settings.kl_weight,
            aggregation="token_mean",
            normalizer=float(normalizer),
        )
        losses.append(result.loss)
        largest.append(result.metrics["ratio/max"])
        for name, mean in result.metrics.items():
            if name != "ratio/max":
                sums[name] = sums.get(name, torch.zeros((), device=device)) + mean * (count / batch.n_tokens)
        start = end
    return torch.stack(losses).sum(), sums, torch.stack(largest).max()


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
        self._trained: TrainedPolicy = start.trained
        policy = start.policy
        sampled = start.judge_settings.episode.model_copy(
            update={"temperature": settings.rollouts.temperature, "top_p": 1.0, "guided": False}
        )
        self._judge_settings: JudgeSettings = start.judge_settings.model_copy(update={"episode": sampled})
        ranks.together(lambda: refuse_what_cannot_be_trained(sampled))
        self._temperature, self._memory = sampled.temperature, sampled.memory
        self._markup = Markup(policy.tokenizer, policy.vocabulary_size)
        self._banned = self._markup.vocabulary(policy.device).banned
        factor = policy.patch_size * policy.merge_size
        self._factor = (factor, factor)
        self._loader = FrameLoader(open_reader(), FrameCache(settings.frame_cache_bytes))
        stack.callback(self._loader.close)
        self._rollouts = Rollouts(
            settings.rollouts,
            settings.reward,
            pairs,
            # A judge that skips frames numbers others than the truth does.
            truth_of=functools.partial(_truth_of, truths if sampled.max_fps is None else {}),
            seed=settings.seed,
            folder=out / ROLLOUTS,
            ranks=ranks,
            run={"base": ranks.first(lambda: weights_fingerprint(base_folder(settings, out)))},
        )
        self._judge: Judge | None = None
        self._stack = stack
        self._reference: VisionLanguageModel | None = None
        self._refreshed: tuple[int, list[Batch], dict[str, float]] | None = None
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
        """The losses of this process's packs in a 0-based step: sample, reward, advantage, pack, step."""
        self._step = step
        number, place = divmod(step, self._settings.learn.steps_per_refresh)
        if self._refreshed is None or self._refreshed[0] != number:
            self._refreshed = (number, *self._refresh(number, step))
        _, batches, metrics = self._refreshed
        batch = batches[place]
        policy, loss = self._start.policy, self._settings.loss
        for turn, (index, counts) in enumerate(self._own(batch)):
            packed = batch.packs[index]
            logprobs, entropies = self._trained.forward(
                packed_logprobs_and_entropy_of,
                policy,
                packed.pack,
                self._pixels(packed.pack),
                self._temperature,
                self._banned,
            )
            ref = batch.ref.get(index)
            summed, sums, largest = packed_loss(loss, packed, batch, logprobs, batch.old[index], ref)
            sums["policy/entropy"] = torch.cat(entropies).sum() / batch.n_tokens
            share = 1.0 if counts else 0.0
            told: dict[str, float | torch.Tensor] = {name: value * share for name, value in sums.items()}
            if turn == 0 and self._ranks.is_first:
                told |= metrics if place == 0 else {}
                told["batch/episodes"], told["batch/tokens"] = float(batch.n_episodes), float(batch.n_tokens)
            n_tokens = packed.pack.n_tokens if counts else 0
            yield MicroLoss(summed * share, n_tokens, told, {"ratio/max": largest})

    # A refresh

    def _refresh(self, number: int, step: int) -> tuple[list[Batch], dict[str, float]]:
        """Samples with the weights of now, compares, packs, and computes the old and reference logprobs."""
        learn, clock = self._settings.learn, _Clock()
        first_step = number * learn.steps_per_refresh
        steps = min(learn.steps_per_refresh, learn.steps - first_step)
        # In the middle of a refresh, everything was sampled before, by weights that are gone.
        judge = self._sampler(first_step) if step == first_step else None
        clock.lap("weight_update")
        refresh = self._rollouts.sample(
            number, judge, wanted=steps * learn.groups_per_step, weights=f"after {first_step} steps"
        )
        if judge is not None:
            judge.engine.free_caches()  # type: ignore[attr-defined]
        clock.lap("rollout")
        if not refresh.groups:
            raise _NothingToLearn(
                f"{GRPO.name}: step {step}: nothing to learn from: none of {len(refresh.drawn)} groups has "
                "episodes that differ in accuracy "
                f"(mean accuracy {refresh.metrics.get('reward/accuracy', float('nan')):.3f}, "
                f"failed episodes {refresh.metrics.get('reward/failed', 0.0):.0%}); give harder or easier "
                f"pairs, or set rollouts.dynamic=false; {self._out / ROLLOUTS} has the episodes"
            )
        compared = advantages(
            self._settings.advantage,
            {group.id: group.rewards.totals for group in refresh.groups},
            device=self._start.policy.device,
        )
        batches = self._ranks.together(
            lambda: [
                pack_batch(
                    groups,
                    compared,
                    self._markup,
                    self._factor,
                    memory=self._memory,
                    max_tokens=learn.max_pack_tokens,
                )
                for groups in _dealt(refresh.groups, steps)
            ]
        )
        clock.lap("pack")
        if step == first_step:
            self._compute_logprobs(batches)
            self._store_logprobs(number, batches)
        else:
            self._ranks.together(lambda: self._load_logprobs(number, batches))
        clock.lap("logprobs")
        drift = self._drift(batches)
        metrics = {
            **refresh.metrics,
            **compared.metrics,
            **drift,
            **{f"perf/{name}_seconds": seconds for name, seconds in clock.seconds.items()},
        }
        return batches, metrics

    def _sampler(self, version: int) -> Judge:
        """The judge that samples, with the policy's weights of now."""
        if self._judge is None:
            self._judge = self._ranks.together(self._make_sampler)
            self._stack.callback(self._judge.close)
        self._judge.engine.update_weights(live_weights(self._trained), version)
        return self._judge

    def _make_sampler(self) -> Judge:
        engine = HFEngine(
            base_folder(self._settings, self._out),
            device=str(self._ranks.device),
            dtype=self._settings.rollouts.dtype,
            max_sessions=self._settings.rollouts.batch_size,
        )
        return Judge(engine, self._judge_settings, templates=self._start.templates)

    def _pixels(self, pack: Pack) -> Callable[[Sequence[FrameKey]], list[np.ndarray]]:
        """The frames of a pack, read before the forward in which all processes wait for each other."""
        pixels = self._ranks.together(lambda: self._loader.load(pack.frames))
        return lambda keys: pixels

    def _own(self, batch: Batch) -> list[tuple[int, bool]]:
        """This process's packs by number, and whether each counts. Every process has equally many."""
        size, rank = self._ranks.size, self._ranks.rank
        own = []
        for first in range(0, len(batch.packs), size):
            is_there = first + rank < len(batch.packs)
            own.append((first + rank if is_there else first, is_there))
        return own

    @torch.no_grad()
    def _compute_logprobs(self, batches: Sequence[Batch]) -> None:
        policy, wants_ref = self._start.policy, self._settings.loss.kl_weight > 0
        for batch in batches:
            for index, _ in self._own(batch):
                pack = batch.packs[index].pack
                arguments = (pack, self._pixels(pack), self._temperature, self._banned)
                batch.old[index] = torch.cat(self._trained.forward(packed_logprobs_of, policy, *arguments))
                if not wants_ref:
                    continue
                if self._settings.lora is not None:
                    with without_adapters(policy.model):
                        found = self._trained.forward(packed_logprobs_of, policy, *arguments)
                else:
                    reference = self._reference_model()
                    with torch.autocast(  # as in `TrainedPolicy.forward`
                        reference.device.type,
                        dtype=torch.bfloat16,
                        enabled=self._settings.precision == "bfloat16",
                        cache_enabled=False,
                    ):
                        found = packed_logprobs_of(reference, *arguments)
                batch.ref[index] = torch.cat(found)

    def _reference_model(self) -> VisionLanguageModel:
        if self._reference is None:
            folder = base_folder(self._settings, self._out)
            device = self._ranks.device
            self._reference = self._ranks.together(
                lambda: VisionLanguageModel(folder, device=device, dtype=torch.float32)
            )
            self._reference.model.requires_grad_(False)
        return self._reference

    def _store_logprobs(self, number: int, batches: Sequence[Batch]) -> None:
        """Keeps them for a run that is resumed in the middle of a refresh, when the old weights are gone."""
        from safetensors.torch import save

        own = {
            f"{kind}.{place}.{index}": values.cpu()
            for place, batch in enumerate(batches)
            for kind, by_index in (("old", batch.old), ("ref", batch.ref))
            for index, values in by_index.items()
        }
        path = self._logprobs_file(number)
        self._ranks.together(lambda: replace_file(path, save(own)))

    def _load_logprobs(self, number: int, batches: Sequence[Batch]) -> None:
        from safetensors.torch import load

        path = self._logprobs_file(number)
        try:
            stored: dict[str, torch.Tensor] = {}
            for file in sorted(path.parent.glob(f"*{LOGPROBS_FILE}")):
                stored |= load(file.read_bytes())
            for place, batch in enumerate(batches):
                for index, _ in self._own(batch):
                    length = sum(map(len, batch.packs[index].pack.sampled))
                    for kind, by_index in (("old", batch.old), ("ref", batch.ref)):
                        if kind == "ref" and self._settings.loss.kl_weight == 0:
                            continue
                        values = stored[f"{kind}.{place}.{index}"]
                        if values.shape != (length,):
                            raise KeyError(kind)
                        by_index[index] = values.to(self._start.policy.device)
        except Exception as error:
            raise InputError(
                f"{path}: not the log-probabilities of this refresh ({type(error).__name__}); a run goes on "
                "in the middle of a refresh only with its files; put them back, or train into another folder"
            ) from None

    def _logprobs_file(self, number: int) -> Path:
        own = "" if self._ranks.size == 1 else f"{self._ranks.rank}-of-{self._ranks.size}-"
        return self._out / ROLLOUTS / f"refresh-{number:05d}" / f"{own}{LOGPROBS_FILE}"

    def _drift(self, batches: Sequence[Batch]) -> dict[str, float]:
        """How far the training forward is from the sampler, over this process's packs."""
        parts = [
            (batch.old[index].cpu() - batch.packs[index].sampler).abs()
            for batch in batches
            for index, counts in self._own(batch)
            if counts
        ]
        known = torch.cat(parts) if parts else torch.zeros(0)
        known = known[~known.isnan()]
        told = [float(known.sum()), float(known.max()) if len(known) else 0.0, float(len(known))]
        reports = self._ranks.gather(told)
        number = sum(report[2] for report in reports)
        if not number:
            return {}
        mean, largest = sum(r[0] for r in reports) / number, max(r[1] for r in reports)
        if not mean <= self._settings.loss.most_drift:
            raise VRThinkerError(
                f"{GRPO.name}: the training forward and the sampler differ by {mean:.3g} nats per token, "
                f"allowed: up to {self._settings.loss.most_drift} (loss.most_drift); they do not compute the "
                "same policy, and training on this would ruin it"
            )
        return {"drift/mean": mean, "drift/max": largest}

    def _watched(self, log: Any) -> Any:
        def on_step(metrics: Mapping[str, float], step: int) -> None:
            log(metrics, step)
            self._notice([metrics])

        return on_step

    def _notice(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Remembers whether the last step went beyond the limit of the KL."""
        limit = self._settings.loss.most_kl
        self._too_far = limit is not None and any((line.get("kl/ref") or 0.0) > limit for line in lines)


class _Clock:
    """Wall-clock seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        """Counts the time since the last call for this name."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._began
        self._began = now


def packed_logprobs_of(
    policy: VisionLanguageModel, pack: Pack, load: Any, temperature: float, banned: torch.Tensor
) -> list[torch.Tensor]:
    """`packed_logprobs` by position, as `TrainedPolicy.forward` calls functions."""
    return packed_logprobs(policy, pack, load, temperature=temperature, banned=banned, implementation="torch")


def packed_logprobs_and_entropy_of(
    policy: VisionLanguageModel, pack: Pack, load: Any, temperature: float, banned: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`packed_logprobs_and_entropy` by position."""
    return packed_logprobs_and_entropy(policy, pack, load, temperature=temperature, banned=banned)


def _dealt(groups: Sequence[Group], steps: int) -> list[list[Group]]:
    """The groups of each step, as evenly as possible. With fewer groups than steps, groups come again."""
    dealt = [list(groups[step::steps]) for step in range(steps)]
    return [some or [groups[step % len(groups)]] for step, some in enumerate(dealt)]


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
