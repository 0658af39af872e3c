"""The log-probabilities of a step's packs: of the policy, of the old policy and of the reference.

All come from the forward that trains. In the first step of a refresh the policy still is the old policy, so
that the step's own forward gives the old policy's. Those of the refresh's later steps are computed before the
weights change. They are kept in a file, because a run that is resumed in the middle of a refresh has other
weights.

A pack's frames are loaded once per step, for the policy and the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.model import FrameFeatures, VisionLanguageModel
from vrthinker.errors import InputError
from vrthinker.policy.batches import FrameLoader
from vrthinker.policy.packed_forward import LoadFrames, packed_logprobs, packed_logprobs_and_entropy
from vrthinker.policy.packing import Pack
from vrthinker.records.files import replace_file
from vrthinker.train.grpo_batch import Batch, own_packs
from vrthinker.train.grpo_settings import GrpoSettings
from vrthinker.train.loop.clock import Clock
from vrthinker.train.loop.ranks import Ranks
from vrthinker.train.model import TrainedPolicy, without_adapters
from vrthinker.train.rollouts import ROLLOUTS
from vrthinker.train.sft import base_folder

LOGPROBS_FILE = "logprobs.safetensors"


@dataclasses.dataclass(frozen=True)
class StepLogprobs:
    """The log-probabilities of a pack's sampled tokens.

    Attributes:
        policy: Those of the policy by trajectory, with gradient, float32 `[sampled]` each.
        entropies: The entropies in nats of what the policy drew from, in the same form, without gradient.
        old: Those of the old policy, the trajectories one after the other, float32 `[sampled of all]`.
        ref: Those of the reference, in the same form; None without one.
    """

    policy: list[torch.Tensor]
    entropies: list[torch.Tensor]
    old: torch.Tensor
    ref: torch.Tensor | None


class Logprobs:
    """Runs the policy and its reference over packs.

    Args:
        settings: The run's settings.
        trained: The policy.
        loader: The loader of frames.
        out: The run's folder.
        ranks: The processes of the run.
        temperature: The temperature of sampling.
        banned: The tokens that sampling never draws, bool `[vocab]`.
        clock: The clock that counts `frames`, `encode` (of a tower that is not trained) and `logprobs` (the
            forwards of the old policy and of the reference).
    """

    def __init__(
        self,
        settings: GrpoSettings,
        trained: TrainedPolicy,
        loader: FrameLoader,
        out: Path,
        ranks: Ranks,
        *,
        temperature: float,
        banned: torch.Tensor,
        clock: Clock,
    ) -> None:
        self._settings, self._trained, self._loader = settings, trained, loader
        self._out, self._ranks, self._clock = out, ranks, clock
        self._temperature, self._banned = temperature, banned
        self._reference: VisionLanguageModel | None = None

    def of_step(self, batch: Batch, index: int) -> StepLogprobs:
        """All log-probabilities that the loss of a pack needs.

        Raises:
            VRThinkerError: A frame cannot be read.
        """
        pack = batch.packs[index].pack
        arguments = self._arguments(pack)
        # The policy comes first: FSDP must not see adapters for the first time while they are switched off.
        policy, entropies = self._trained.forward(
            _logprobs_and_entropy, self._trained.policy, pack, *arguments
        )
        with self._clock.counts("logprobs"):
            ref = self._of_reference(pack, arguments) if self._settings.loss.kl_weight > 0 else None
        old = batch.old.get(index)
        return StepLogprobs(policy, entropies, torch.cat(policy).detach() if old is None else old, ref)

    @torch.no_grad()
    def _of_reference(self, pack: Pack, arguments: tuple[Any, ...]) -> torch.Tensor:
        if self._settings.lora is not None:
            with without_adapters(self._trained.model):
                return torch.cat(self._trained.forward(_logprobs, self._trained.policy, pack, *arguments))
        reference = self._reference_model()
        with torch.autocast(  # as in `TrainedPolicy.forward`
            reference.device.type,
            dtype=torch.bfloat16,
            enabled=self._settings.precision == "bfloat16",
            cache_enabled=False,
        ):
            return torch.cat(_logprobs(reference, pack, *arguments))

    def _reference_model(self) -> VisionLanguageModel:
        if self._reference is None:
            folder = base_folder(self._settings, self._out)
            device = self._ranks.device
            self._reference = self._ranks.together(
                lambda: VisionLanguageModel(folder, device=device, dtype=torch.float32)
            )
            self._reference.model.requires_grad_(False)
        return self._reference

    def _arguments(self, pack: Pack) -> tuple[Any, ...]:
        """What all forwards over a pack share: its frames, the temperature and the bans.

        The frames are read before the forward in which all processes wait for each other. A tower that is not
        trained is that of the reference too, and encodes them once for both.
        """
        with self._clock.counts("frames"):
            pixels = self._ranks.together(lambda: self._loader.load(pack.frames))
        features = None
        if not self._settings.train_vision and pixels:
            with self._clock.counts("encode"), torch.no_grad():
                features = self._trained.forward(self._trained.policy.encode, pixels)

        def load(keys: Sequence[FrameKey]) -> list[np.ndarray]:
            return pixels

        return load, features, self._temperature, self._banned

    # The old policy

    @torch.no_grad()
    def keep_old(self, number: int, batches: Sequence[Batch]) -> None:
        """Computes the old policy's with the weights of now, for all steps of a refresh but the first.

        They are kept in a file for a run that is resumed in the middle of the refresh, when these weights are
        gone.

        Args:
            number: The number of the refresh.
            batches: The packs of its steps.

        Raises:
            VRThinkerError: A frame cannot be read, or the file cannot be written.
        """
        from safetensors.torch import save

        kept = {}
        for place, batch in enumerate(batches[1:], 1):
            for index, _ in own_packs(batch, self._ranks):
                pack = batch.packs[index].pack
                arguments = self._arguments(pack)
                with self._clock.counts("logprobs"):
                    found = self._trained.forward(_logprobs, self._trained.policy, pack, *arguments)
                batch.old[index] = torch.cat(found)
                kept[_key(place, index)] = batch.old[index].cpu()
        if kept:
            path = self._file(number)
            self._ranks.together(lambda: replace_file(path, save(kept)))

    def load_old(self, number: int, batches: Sequence[Batch]) -> None:
        """Reads what `keep_old` kept, in the middle of the refresh.

        Raises:
            InputError: The file is missing, or is not that of these packs.
        """
        self._ranks.together(lambda: self._load_old(number, batches))

    def _load_old(self, number: int, batches: Sequence[Batch]) -> None:
        from safetensors.torch import load

        path = self._file(number)
        try:
            stored: dict[str, torch.Tensor] = {}
            for file in sorted(path.parent.glob(f"*{LOGPROBS_FILE}")):
                stored |= load(file.read_bytes())
            for place, batch in enumerate(batches[1:], 1):
                for index, _ in own_packs(batch, self._ranks):
                    values = stored[_key(place, index)]
                    if values.shape != (sum(map(len, batch.packs[index].pack.sampled)),):
                        raise KeyError(index)
                    batch.old[index] = values.to(self._trained.policy.device)
        except Exception as error:
            raise InputError(
                f"{path}: not the log-probabilities of this refresh ({type(error).__name__}); a run goes on "
                "in the middle of a refresh only with its files; put them back, or train into another folder"
            ) from None

    def _file(self, number: int) -> Path:
        own = "" if self._ranks.size == 1 else f"{self._ranks.rank}-of-{self._ranks.size}-"
        return self._out / ROLLOUTS / f"refresh-{number:05d}" / f"{own}{LOGPROBS_FILE}"


def _key(place: int, index: int) -> str:
    """The name of a pack's tensor in the file: the step's place in the refresh, and the pack's number."""
    return f"old.{place}.{index}"


def _logprobs(
    policy: VisionLanguageModel,
    pack: Pack,
    load: LoadFrames,
    features: Sequence[FrameFeatures] | None,
    temperature: float,
    banned: torch.Tensor,
) -> list[torch.Tensor]:
    """`packed_logprobs` by position, as `TrainedPolicy.forward` calls functions."""
    return packed_logprobs(
        policy,
        pack,
        load,
        features=features,
        temperature=temperature,
        banned=banned,
        implementation="torch",
    )


def _logprobs_and_entropy(
    policy: VisionLanguageModel,
    pack: Pack,
    load: LoadFrames,
    features: Sequence[FrameFeatures] | None,
    temperature: float,
    banned: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`packed_logprobs_and_entropy` by position."""
    return packed_logprobs_and_entropy(
        policy, pack, load, features=features, temperature=temperature, banned=banned
    )
