"""Traces to be learned, as packs: what a trace's rounds share is computed once.

A round is learned in the context in which it was written. Under `rerender` each round whose frames changed
has a context of its own, and most of its tokens are those of the round before. A pack holds them once, and
its forward gives the gradient of one forward per context (`benchmarks/trace_packs.py`). Under `evict` a trace
has a single context, which only a pack can represent.

Source: eq. 1 of the paper; docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.errors import InputError
from vrthinker.policy.batches import FrameLoader, StepSource, deal
from vrthinker.policy.losses import sft_loss_from_hidden
from vrthinker.policy.packed_attention import Implementation
from vrthinker.policy.packed_forward import packed_hidden
from vrthinker.policy.packing import Pack, pack_paths, pack_tokens
from vrthinker.policy.replay import Path


@dataclass(frozen=True)
class LearnedTrace:
    """A trace to be learned.

    Attributes:
        id: The id of the trajectory.
        paths: The contexts in which something is learned (`sequences.learned_paths`).
        n_tokens: The number of tokens of its own pack.
        n_learned: The number of tokens that the loss falls on.
        longest: The number of tokens of its longest context.
    """

    id: str
    paths: tuple[Path, ...]
    n_tokens: int
    n_learned: int
    longest: int

    @classmethod
    def of(cls, name: str, paths: Sequence[Path]) -> LearnedTrace:
        """The trace of some contexts, at least one."""
        learned, longest = sum(path.n_learned for path in paths), max(len(path.tokens) for path in paths)
        return cls(name, tuple(paths), pack_tokens(paths), learned, longest)


@dataclass(frozen=True)
class PackedTraces:
    """A pack of traces with the pixels of its frames.

    Attributes:
        pack: The pack.
        frames: The pixels of each of `pack.frames`, uint8 `[height, width, 3]`.
        counts: Whether it is learned. One that is not only keeps a process busy while the others compute.
    """

    pack: Pack
    frames: tuple[np.ndarray, ...]
    counts: bool = True

    @property
    def n_tokens(self) -> int:
        """The number of tokens that the model computes."""
        return self.pack.n_tokens

    @property
    def n_learned(self) -> int:
        """The number of tokens that the loss falls on."""
        return sum(map(len, self.pack.sampled)) if self.counts else 0


class PackSource(StepSource[LearnedTrace, PackedTraces]):
    """The packs of a training phase, step by step, decoded ahead of time.

    Args:
        traces: The traces to learn.
        loader: The loader of pixels.
        batch_size: The number of traces per step.
        micro_batch_size: The number of traces per forward.
        max_tokens: The most tokens of a forward. Contexts that do not fit are computed in another forward.
        seed: The seed of the order.
        rank: The number of this process among those that train together, from 0.
        processes: The number of those processes.

    Raises:
        InputError: There are several processes, and a trace shows no frame.
    """

    def __init__(
        self,
        traces: Sequence[LearnedTrace],
        loader: FrameLoader,
        *,
        batch_size: int,
        micro_batch_size: int,
        max_tokens: int | None = None,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if processes > 1:
            for trace in traces:
                _check_shows_frames(trace)
        super().__init__(
            traces,
            [trace.n_tokens for trace in traces],
            [trace.n_learned for trace in traces],
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            seed=seed,
            rank=rank,
            processes=processes,
        )
        self._loader, self._max_tokens = loader, max_tokens

    def _computed(self, parts: Sequence[Sequence[LearnedTrace]]) -> tuple[PackedTraces, ...]:
        packs = [
            pack
            for part in parts
            for pack in pack_paths([trace.paths for trace in part], max_tokens=self._max_tokens)
        ]
        dealt = deal([pack.n_tokens for pack in packs], self._processes)
        own = [(packs[index], True) for index in dealt[self._rank]]
        # The layers of a sharded model exchange messages: every process computes equally many packs.
        own += [(min(packs, key=lambda pack: pack.n_tokens), False)] * (max(map(len, dealt)) - len(own))
        return tuple(PackedTraces(pack, tuple(self._loader.load(pack.frames)), n) for pack, n in own)


def _check_shows_frames(trace: LearnedTrace) -> None:
    """Refuses a context without frames: the others would wait for it in the layers of the vision tower."""
    if any(all(stretch.frame is None for stretch in path.stretches) for path in trace.paths):
        raise InputError(
            f"trajectory {trace.id!r}: got a round that sees no frame, allowed with several processes: "
            "rounds that see some; set packed: false, train in one process, or leave it out"
        )


def packed_sft_loss(
    policy: VisionLanguageModel,
    traces: PackedTraces,
    *,
    freeze_vision: bool = False,
    attention: Implementation = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy of a pack's learned tokens, and the number that the policy predicts right.

    Args:
        policy: The model.
        traces: The pack.
        freeze_vision: Whether no gradient reaches the vision tower.
        attention: The implementation of attention.

    Returns:
        The loss, an fp32 scalar with gradient, and an int64 scalar; both 0 if the pack does not count.
    """
    pack, features = traces.pack, None
    if traces.frames and freeze_vision:
        with torch.no_grad():
            features = policy.encode(traces.frames)

    def load(keys: Sequence[FrameKey]) -> list[np.ndarray]:
        return list(traces.frames)

    hidden = packed_hidden(policy, pack, load, attention=attention, features=features)
    # A prediction that several traces share is stored once and learned as often.
    learned = torch.from_numpy(np.concatenate(pack.sampled)).to(hidden.device)
    labels = torch.from_numpy(pack.labels).to(hidden.device)[learned]
    loss, correct = sft_loss_from_hidden(hidden[learned], policy.model.lm_head.weight, labels)
    return (loss, correct) if traces.counts else (loss * 0.0, correct * 0)
