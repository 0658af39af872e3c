"""The phases of a supervised run: what each learns from, and the losses of its steps.

A phase learns traces here. `frame_phase.py` has another kind, which learns what single frames show. Either
kind begins as a `PhaseRun`. A curriculum is the list of them, one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.policy.batches import Batch, BatchSource, FrameLoader
from vrthinker.policy.forward import learned_hidden
from vrthinker.policy.losses import sft_loss_from_hidden
from vrthinker.policy.sequences import learned_paths, training_sequences
from vrthinker.policy.trace_packs import LearnedTrace, PackedTraces, PackSource, packed_sft_loss
from vrthinker.train.loop.loop import MicroLoss
from vrthinker.train.loop.ranks import Ranks
from vrthinker.train.loop.schedule import LearningRate
from vrthinker.train.model import TrainedPolicy
from vrthinker.train.settings import SftPhase
from vrthinker.train.traces import Selection
from vrthinker.video.resize import ResizeSettings


class PhaseRun(Protocol):
    """A phase that has what it learns from."""

    name: str
    steps: int
    rate: LearningRate

    def micro_losses(self, trained: TrainedPolicy, step: int) -> Iterator[MicroLoss]:
        """The losses of this process's micro-batches in a 0-based step of the phase."""

    def record(self) -> dict[str, Any]:
        """What the phase learns from, for `traces.json`; `kept_sha256` tells two contents apart."""

    def close(self) -> None:
        """Stops reading ahead."""


class Lessons(Protocol):
    """What one phase learns from, before the run begins."""

    @property
    def traces(self) -> Sequence[Trajectory]:
        """The traces that are learned."""

    def begin(
        self, trained: TrainedPolicy, loader: FrameLoader, resize: ResizeSettings, seed: int
    ) -> PhaseRun:
        """Makes what the steps need.

        Raises:
            InputError: Nothing is left to learn from, or a trace is not what it says.
        """


@dataclasses.dataclass(frozen=True)
class TraceLessons:
    """Traces to learn.

    Attributes:
        phase: How long and how fast.
        selection: The traces.
        source: Where they come from, for the record in `traces.json`.
    """

    phase: SftPhase
    selection: Selection
    source: Mapping[str, Any]

    @property
    def traces(self) -> Sequence[Trajectory]:
        """The traces that are learned."""
        return self.selection.traces

    def begin(
        self, trained: TrainedPolicy, loader: FrameLoader, resize: ResizeSettings, seed: int
    ) -> PhaseRun:
        """Makes what the steps learn of the traces.

        Raises:
            InputError: A trace is too long for the model, or no trace is left.
        """
        return _TracePhase(self, _source(self, loader, trained, resize, seed), trained.ranks)


def _source(
    lessons: TraceLessons, loader: FrameLoader, trained: TrainedPolicy, resize: ResizeSettings, seed: int
) -> PackSource | BatchSource:
    """Reads the traces as what a step computes: packs, or rows of padded batches."""
    phase, selection, policy = lessons.phase, lessons.selection, trained.policy
    markup = Markup(policy.tokenizer, policy.vocabulary_size)
    factor = policy.patch_size * policy.merge_size
    common = {
        "batch_size": phase.batch_size,
        "micro_batch_size": phase.micro_batch_size,
        "seed": seed,
        "rank": trained.ranks.rank,
        "processes": trained.ranks.size,
    }

    def read() -> PackSource | BatchSource:
        kept = zip(selection.traces, selection.parts, strict=True)
        if phase.packed:
            traces = [
                LearnedTrace.of(trace.id, paths)
                for trace, part in kept
                if (paths := learned_paths(trace, markup, (factor, factor), learned=part, resize=resize))
            ]
            _check_lengths(phase, [trace.longest for trace in traces], policy)
            return PackSource(traces, loader, max_tokens=phase.max_pack_tokens, **common)
        sequences = [
            sequence
            for trace, part in kept
            for sequence in training_sequences(trace, markup, (factor, factor), learned=part, resize=resize)
        ]
        _check_lengths(phase, list(map(len, sequences)), policy)
        return BatchSource(sequences, loader, blank=np.zeros((factor, factor, 3), np.uint8), **common)

    return trained.ranks.together(read)


def _check_lengths(phase: SftPhase, lengths: Sequence[int], policy: VisionLanguageModel) -> None:
    longest = max(lengths, default=0)
    if longest > policy.max_positions:
        raise InputError(
            f"phase {phase.name}: a trace has {longest} tokens, the model allows {policy.max_positions}"
        )
    if not lengths:
        raise InputError(f"phase {phase.name}: no trace passes the filters; nothing to learn from")


class _TracePhase:
    """A phase of traces together with what its steps compute."""

    def __init__(self, lessons: TraceLessons, source: PackSource | BatchSource, ranks: Ranks) -> None:
        self._lessons, self._phase, self._source, self._ranks = lessons, lessons.phase, source, ranks
        self.name, self.rate = self._phase.name, self._phase.learning_rate
        self.steps = self._phase.steps or max(1, source.count // self._phase.batch_size)

    def micro_losses(self, trained: TrainedPolicy, step: int) -> Iterator[MicroLoss]:
        """The losses of this process's micro-batches, divided by the learned tokens of the whole step."""
        total = self._source.n_learned(step)
        for batch in self._ranks.together(lambda: self._source.batches(step)):
            frozen = self._phase.freeze_vision
            summed, correct = trained.forward(_summed_loss, trained.policy, batch, frozen)
            sums: dict[str, float | torch.Tensor] = {
                "sft/token_accuracy": correct / total,
                "sft/tokens": float(batch.n_learned),
            }
            yield MicroLoss(summed / total, batch.n_tokens, sums)

    def record(self) -> dict[str, Any]:
        """Which traces were kept, and which were dropped and why."""
        selection = self._lessons.selection
        return {
            "phase": self.name,
            "steps": self.steps,
            "unit": "traces" if self._phase.packed else "contexts",
            "traces": dict(self._lessons.source),
            "checked": selection.checked,
            "read": selection.n_read,
            "kept": len(selection.traces),
            "kept_sha256": selection.digest(),
            "dropped": selection.reasons,
            "dropped_traces": [dataclasses.asdict(dropped) for dropped in selection.dropped],
        }

    def close(self) -> None:
        """Stops reading ahead."""
        self._source.close()


def _summed_loss(
    policy: VisionLanguageModel, batch: PackedTraces | Batch, freeze_vision: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(batch, PackedTraces):
        return packed_sft_loss(policy, batch, freeze_vision=freeze_vision)
    hidden, labels = learned_hidden(policy, batch, freeze_vision=freeze_vision)
    return sft_loss_from_hidden(hidden, policy.model.lm_head.weight, labels)


class Curriculum:
    """The phases in order. A step's phase, rate and batches follow from its number."""

    def __init__(self, phases: Sequence[PhaseRun]) -> None:
        self._phases = phases
        self.steps = sum(phase.steps for phase in phases)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a 0-based step."""
        phase, local = self._locate(step)
        return phase.rate.at(local, phase.steps)

    def micro_losses(self, trained: TrainedPolicy, step: int) -> Iterator[MicroLoss]:
        """The losses of this process's micro-batches."""
        phase, local = self._locate(step)
        yield from phase.micro_losses(trained, local)

    def close(self) -> None:
        """Stops reading ahead."""
        for phase in self._phases:
            phase.close()

    def _locate(self, step: int) -> tuple[PhaseRun, int]:
        for phase in self._phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise ValueError(f"step {step} lies behind the last phase")
