"""A real small judge that several processes train together: jobs for `forks.py`, one for each process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import command_worker
import numpy as np
import torch
from loopback import free_port
from safetensors.torch import save_file

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.tiny import make_tiny
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import VideoError
from vrthinker.policy.batches import Batch, BatchSource
from vrthinker.policy.forward import learned_hidden
from vrthinker.policy.losses import sft_loss_from_hidden
from vrthinker.policy.sequences import TrainingSequence
from vrthinker.train.loop.loop import LoopSettings, MicroLoss, run_loop
from vrthinker.train.loop.optimizer import AdamWSettings, MuonSettings
from vrthinker.train.loop.ranks import joined_ranks
from vrthinker.train.model import LoraSettings, PolicySettings, TrainedPolicy, load_policy
from vrthinker.world.nano import write_nano

SIDE = 56
"""The frames' side in pixels: 4 tokens with nano and the tiny Qwen2.5-VL."""


def write_base(folder: Path, kind: str) -> Path:
    """A checkpoint of a real class: `nano`, whose embeddings are its output weights too, or a family."""
    if kind in ("qwen2.5-vl", "qwen3-vl"):
        return make_tiny(folder, kind, seed=4)  # type: ignore[arg-type]
    return write_nano(folder, seed=4)


class _Pixels:
    """Frames whose pixels follow from their number."""

    def load(self, keys: Any) -> list[np.ndarray]:
        return [
            np.random.default_rng(key.frame_index).integers(0, 256, (key.height, key.width, 3), np.uint8)
            for key in keys
        ]


def sequences_of(trained: TrainedPolicy, count: int = 13) -> list[TrainingSequence]:
    """Sequences of uneven lengths. Every third has no frame."""
    config, side = trained.model.config, _side(trained)
    per_frame = (side // (trained.policy.patch_size * trained.policy.merge_size)) ** 2
    found = []
    for number in range(count):
        rng = np.random.default_rng(number)
        ids = list(rng.integers(5, 200, 4 + 3 * number))
        frames: list[tuple[int, FrameKey]] = []
        for frame in range(number % 3):
            key = FrameKey("none", number * 7 + frame, side, side, None, None)
            frames.append((len(ids) + 1, key))
            ids += [config.vision_start_token_id, *[config.image_token_id] * per_frame]
            ids += [config.vision_end_token_id]
        learned = rng.integers(5, 200, 3 + number % 5)
        mask = np.array([False] * len(ids) + [True] * len(learned))
        tokens = np.array([*ids, *learned], np.int64)
        positions = np.broadcast_to(np.arange(len(tokens)), (3, len(tokens))).copy()
        found.append(TrainingSequence(str(number), tokens, positions, mask, tuple(frames)))
    return found


def _side(trained: TrainedPolicy) -> int:
    return 2 * trained.policy.patch_size * trained.policy.merge_size


def source_of(trained: TrainedPolicy, *, batch_size: int = 6, micro_batch_size: int = 2) -> BatchSource:
    """The batches of this process: 3 micro-batches of uneven length a step, for 2 processes one too few."""
    factor = trained.policy.patch_size * trained.policy.merge_size
    return BatchSource(
        sequences_of(trained),
        _Pixels(),  # type: ignore[arg-type]
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        seed=5,
        rank=trained.ranks.rank,
        processes=trained.ranks.size,
        blank=np.zeros((factor, factor, 3), np.uint8),
    )


def micro_loss(trained: TrainedPolicy, batch: Batch, total: int) -> MicroLoss:
    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        hidden, labels = learned_hidden(trained.policy, batch)
        return sft_loss_from_hidden(hidden, trained.model.lm_head.weight, labels)

    summed, correct = trained.forward(compute)
    return MicroLoss(summed / total, batch.n_tokens, {"sft/token_accuracy": correct / total})


# Jobs; each runs in a process of its own.


def jobs(name: str, size: int, **arguments: Any) -> list[dict[str, Any]]:
    """The processes of one run of `size` processes, as torchrun would start them."""
    shared = {**arguments, "size": size, "port": free_port()}
    return [
        {"job": f"ranks_worker:job_{name}", "arguments": {**shared, "rank": rank}} for rank in range(size)
    ]


def _environment(rank: int, size: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def settings_of(values: dict[str, Any]) -> PolicySettings:
    return PolicySettings.model_validate(values)


def job_command(
    rank: int,
    size: int,
    port: int,
    given: list[str],
    moments: dict[str, list[dict[str, Any]]] | None = None,
    lacks_clips: int | None = None,
) -> object:
    """Runs a whole command, as torchrun would.

    `moments` are those of each process (`command_worker`). The machine of the process `lacks_clips` has no
    clips.
    """
    _environment(rank, size, port)
    moments = moments or {}
    if rank == lacks_clips:
        from vrthinker.train import phases

        def no_clip(trajectory: Trajectory, *_: object, **__: object) -> None:
            raise VideoError(trajectory.videos[0].path, "no such file")

        for read in ("learned_paths", "training_sequences"):  # of packs, and of padded batches
            assert read in vars(phases)
            vars(phases)[read] = no_clip
    return command_worker.job_command(given, moments.get(str(rank), []))


def job_gradients(
    rank: int, size: int, port: int, base: str, out: str, settings: dict[str, Any] | None = None
) -> object:
    """The gradients of step 0, whole, in the file `out`; returns the losses of each micro-batch, summed."""
    _environment(rank, size, port)
    with joined_ranks() as ranks:
        trained = load_policy(Path(base), settings_of(settings or {}), ranks, seed=6)
        if trained.settings.lora is not None:
            for (
                name,
                parameter,
            ) in trained.model.named_parameters():  # B is 0 at first, and hides A's gradient
                if ".lora_B." in name:
                    torch.nn.init.constant_(parameter, 0.01)
        source = source_of(trained)
        total = source.n_learned(0)
        losses, count = 0.0, 0
        for batch in source.batches(0):
            micro = micro_loss(trained, batch, total)
            micro.loss.backward()  # type: ignore[no-untyped-call]
            losses, count = losses + float(micro.loss.detach()), count + 1
        source.close()
        gradients = {}
        for name, parameter in trained.model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                gradients[name] = whole.contiguous().clone()
        if ranks.is_first:
            save_file(gradients, out)
        return {"loss": sum(ranks.gather(losses)), "micros": count, "learned": total}


def job_whole(rank: int, size: int, port: int, base: str, settings: dict[str, Any]) -> object:
    """The norm of step 0's gradients, before and after the first process alone ran the model."""
    _environment(rank, size, port)
    with joined_ranks() as ranks:
        trained = load_policy(Path(base), settings_of(settings), ranks, seed=6)
        source = source_of(trained)

        def norm() -> float:
            for batch in source.batches(0):
                micro_loss(trained, batch, 27).loss.backward()  # type: ignore[no-untyped-call]
            total = torch.nn.utils.get_total_norm(
                [p.grad for p in trained.model.parameters() if p.grad is not None]
            )
            trained.model.zero_grad()
            return float(total.full_tensor())  # type: ignore[attr-defined]

        @torch.inference_mode()
        def run() -> list[float]:
            hidden = trained.model.model.language_model(
                input_ids=torch.arange(20, 44)[None],
                position_ids=torch.arange(24).expand(3, 1, -1),
                use_cache=False,
            ).last_hidden_state
            logits: list[float] = trained.model.lm_head(hidden)[0, -1].float().tolist()
            return logits

        found: dict[str, Any] = {"norms": [norm()], "logits": []}
        for _ in range(2):
            with trained.whole():
                found["logits"].append(ranks.first(run))
            found["norms"].append(norm())
        source.close()
        return found


def job_train(
    rank: int,
    size: int,
    port: int,
    base: str,
    run: str,
    steps: int,
    settings: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    at: dict[str, str] | None = None,
    limit: int = 0,
    checkpoint_every: int = 2,
) -> object:
    """Trains. `at` says what happens in which process, step and micro-batch, as `{"1.3.0": "SIGKILL"}`."""
    import resource

    _environment(rank, size, port)
    if limit and rank == size - 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with joined_ranks() as ranks:
        trained = load_policy(Path(base), settings_of(settings or {}), ranks, seed=6)
        source = source_of(trained)

        def micro_losses(step: int) -> Any:
            total = source.n_learned(step)
            for number, batch in enumerate(source.batches(step)):
                act = (at or {}).get(f"{rank}.{step}.{number}", "")
                micro = micro_loss(trained, batch, total)
                if act.startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, act))
                yield MicroLoss(micro.loss * float("nan"), 1, micro.sums) if act == "nan" else micro

        adamw = AdamWSettings(weight_decay=0.1)
        result = run_loop(
            trained.model,
            settings=LoopSettings(
                steps=steps,
                checkpoint_every=checkpoint_every,
                optimizer=MuonSettings() if optimizer == "muon" else adamw,
            ),
            learning_rate=lambda step: 1e-3,
            micro_losses=micro_losses,
            run=Path(run),
            name="ranks",
            ranks=ranks,
        )
        source.close()
        return {
            "step": result.step,
            "outcome": result.outcome,
            "resumed_from": result.resumed_from,
            "skipped": result.skipped_steps,
        }


LORA = {"lora": LoraSettings(rank=4, alpha=8.0).model_dump(mode="json")}


def prepare() -> None:
    """Loads what each job would load."""
    import torch._dynamo
    import torch.distributed.fsdp
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

    torch.set_num_threads(1)
    assert AutoModelForImageTextToText is not None
    assert Qwen2_5_VLForConditionalGeneration is not None
