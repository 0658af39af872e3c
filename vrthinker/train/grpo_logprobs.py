"""The log-probabilities of a step's packs: of the policy, of the old policy and of the reference.

The old policy's and the reference's are computed when the sampler is refreshed, by the forward that trains.
They are kept in a file, because a run that is resumed in the middle of a refresh has other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.policy.batches import FrameLoader
from vrthinker.policy.packed_forward import packed_logprobs, packed_logprobs_and_entropy
from vrthinker.policy.packing import Pack
from vrthinker.records.files import replace_file
from vrthinker.train.grpo_batch import Batch, own_packs
from vrthinker.train.grpo_settings import GRPO, GrpoSettings
from vrthinker.train.loop.ranks import Ranks
from vrthinker.train.model import TrainedPolicy, without_adapters
from vrthinker.train.rollouts import ROLLOUTS
from vrthinker.train.sft import base_folder

LOGPROBS_FILE = "logprobs.safetensors"


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
    ) -> None:
        self._settings, self._trained, self._loader = settings, trained, loader
        self._out, self._ranks = out, ranks
        self._temperature, self._banned = temperature, banned
        self._reference: VisionLanguageModel | None = None

    def of_policy(self, pack: Pack) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The policy's log-probabilities, with gradient, and entropies (`packed_logprobs_and_entropy`)."""
        return self._trained.forward(
            _logprobs_and_entropy, self._trained.policy, pack, *self._arguments(pack)
        )

    @torch.no_grad()
    def compute(self, batches: Sequence[Batch]) -> None:
        """Computes the old policy's and the reference's, with the weights of now for the old policy."""
        policy, wants_ref = self._trained.policy, self._settings.loss.kl_weight > 0
        for batch in batches:
            for index, _ in own_packs(batch, self._ranks):
                pack = batch.packs[index].pack
                arguments = (pack, *self._arguments(pack))
                batch.old[index] = torch.cat(self._trained.forward(_logprobs, policy, *arguments))
                if not wants_ref:
                    continue
                if self._settings.lora is not None:
                    with without_adapters(policy.model):
                        found = self._trained.forward(_logprobs, policy, *arguments)
                else:
                    reference = self._reference_model()
                    with torch.autocast(  # as in `TrainedPolicy.forward`
                        reference.device.type,
                        dtype=torch.bfloat16,
                        enabled=self._settings.precision == "bfloat16",
                        cache_enabled=False,
                    ):
                        found = _logprobs(reference, *arguments)
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

    def _arguments(self, pack: Pack) -> tuple[Any, ...]:
        """The frames of a pack, read before the forward in which all processes wait for each other."""
        pixels = self._ranks.together(lambda: self._loader.load(pack.frames))

        def load(keys: Sequence[FrameKey]) -> list[np.ndarray]:
            return pixels

        return load, self._temperature, self._banned

    # A resumed run

    def store(self, number: int, batches: Sequence[Batch]) -> None:
        """Keeps them for a run that is resumed in the middle of a refresh, when the old weights are gone."""
        from safetensors.torch import save

        own = {
            f"{kind}.{place}.{index}": values.cpu()
            for place, batch in enumerate(batches)
            for kind, by_index in (("old", batch.old), ("ref", batch.ref))
            for index, values in by_index.items()
        }
        path = self._file(number)
        self._ranks.together(lambda: replace_file(path, save(own)))

    def load(self, number: int, batches: Sequence[Batch]) -> None:
        """Reads what `store` kept.

        Raises:
            InputError: The file is missing, or is not that of these packs.
        """
        self._ranks.together(lambda: self._load(number, batches))

    def _load(self, number: int, batches: Sequence[Batch]) -> None:
        from safetensors.torch import load

        path = self._file(number)
        try:
            stored: dict[str, torch.Tensor] = {}
            for file in sorted(path.parent.glob(f"*{LOGPROBS_FILE}")):
                stored |= load(file.read_bytes())
            for place, batch in enumerate(batches):
                for index, _ in own_packs(batch, self._ranks):
                    length = sum(map(len, batch.packs[index].pack.sampled))
                    for kind, by_index in (("old", batch.old), ("ref", batch.ref)):
                        if kind == "ref" and self._settings.loss.kl_weight == 0:
                            continue
                        values = stored[f"{kind}.{place}.{index}"]
                        if values.shape != (length,):
                            raise KeyError(kind)
                        by_index[index] = values.to(self._trained.policy.device)
        except Exception as error:
            raise InputError(
                f"{path}: not the log-probabilities of this refresh ({type(error).__name__}); a run goes on "
                "in the middle of a refresh only with its files; put them back, or train into another folder"
            ) from None

    def _file(self, number: int) -> Path:
        own = "" if self._ranks.size == 1 else f"{self._ranks.rank}-of-{self._ranks.size}-"
        return self._out / ROLLOUTS / f"refresh-{number:05d}" / f"{own}{LOGPROBS_FILE}"

    # The sampler's

    def drift(self, batches: Sequence[Batch]) -> dict[str, float]:
        """How far the training forward is from the sampler, over all packs.

        Returns:
            The metrics; empty if the sampler gave no log-probabilities.

        Raises:
            VRThinkerError: The two differ by more than `loss.most_drift`.
        """
        parts = [
            (batch.old[index].cpu() - batch.packs[index].sampler).abs()
            for batch in batches
            for index, counts in own_packs(batch, self._ranks)
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


def _logprobs(
    policy: VisionLanguageModel,
    pack: Pack,
    load: Callable[[Sequence[FrameKey]], list[np.ndarray]],
    temperature: float,
    banned: torch.Tensor,
) -> list[torch.Tensor]:
    """`packed_logprobs` by position, as `TrainedPolicy.forward` calls functions."""
    return packed_logprobs(policy, pack, load, temperature=temperature, banned=banned, implementation="torch")


def _logprobs_and_entropy(
    policy: VisionLanguageModel,
    pack: Pack,
    load: Callable[[Sequence[FrameKey]], list[np.ndarray]],
    temperature: float,
    banned: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`packed_logprobs_and_entropy` by position."""
    return packed_logprobs_and_entropy(policy, pack, load, temperature=temperature, banned=banned)
