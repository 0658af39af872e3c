"""A small language model that is trained, also in processes that are killed: jobs for `forks.py`."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what an optimizer's first step loads

from vrthinker.policy.losses import sft_loss_from_hidden
from vrthinker.train.loop import checkpoint as checkpoint_module
from vrthinker.train.loop.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from vrthinker.train.loop.loop import LoopResult, LoopSettings, MicroLoss, run_loop
from vrthinker.train.loop.optimizer import AdamWSettings, make_optimizer
from vrthinker.train.loop.schedule import LearningRate

VOCABULARY, WIDTH, LENGTH, ROWS, MICRO_BATCHES = 61, 16, 12, 8, 3
RATE = LearningRate(peak=0.02)


class SmallModel(torch.nn.Module):
    """Tied embeddings, dropout, norms, a counting buffer, and a part that seldom gets a gradient."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.1, batch_first=True)
        self.seldom = torch.nn.Linear(WIDTH, WIDTH)
        self.frozen = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: torch.Tensor, *, with_seldom: bool) -> torch.Tensor:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden: torch.Tensor = self.layer(self.embed(ids), src_mask=mask, is_causal=True)
        self.count += 1
        hidden = hidden + self.frozen(hidden)
        return hidden + self.seldom(hidden) if with_seldom else hidden


def small_model() -> SmallModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20261121)
        return SmallModel()


def small_losses(model: SmallModel) -> Callable[[int], Iterator[MicroLoss]]:
    """Counting sequences modulo the vocabulary; the step between two numbers is to be found out."""

    def micro_losses(step: int) -> Iterator[MicroLoss]:
        generator = torch.Generator().manual_seed(step)
        for micro in range(MICRO_BATCHES):
            first = torch.randint(VOCABULARY, (ROWS, 1), generator=generator)
            stride = torch.randint(1, 4, (ROWS, 1), generator=generator)
            ids = (first + stride * torch.arange(LENGTH + 1)) % VOCABULARY
            hidden = model(ids[:, :-1], with_seldom=step % 7 == 6 and micro == 0)
            total = ROWS * LENGTH * MICRO_BATCHES
            loss, correct = sft_loss_from_hidden(
                hidden.flatten(0, 1), model.head.weight, ids[:, 1:].flatten(), chunk=40
            )
            yield MicroLoss(loss / total, ROWS * LENGTH, {"train/accuracy": correct / total})

    return micro_losses


def train(
    run: Path, *, steps: int, checkpoint_every: int = 5, at: Callable[[int, int], None] | None = None
) -> LoopResult:
    """Trains the small model; `at(step, micro)` is called in the middle of each step."""
    model = small_model().train()
    losses = small_losses(model)

    def micro_losses(step: int) -> Iterator[MicroLoss]:
        for number, micro in enumerate(losses(step)):
            if at is not None:
                at(step, number)
            yield micro

    return run_loop(
        model,
        settings=LoopSettings(
            steps=steps,
            checkpoint_every=checkpoint_every,
            optimizer=AdamWSettings(weight_decay=0.1, max_grad_norm=0.5),
        ),
        learning_rate=lambda step: RATE.at(step, 30),
        micro_losses=micro_losses,
        run=run,
        name="small",
    )


# Jobs; each runs in a process of its own.


def job(name: str, run: Path | str, **arguments: Any) -> dict[str, Any]:
    """What `forks.py` runs: one of the functions below, by its name without `job_`."""
    return {"job": f"training_worker:job_{name}", "arguments": {"run": str(run), **arguments}}


def job_train(
    run: str, steps: int, signal_at: dict[str, list[str]] | None = None, checkpoint_every: int = 5
) -> object:
    """Trains, and sends itself signals: `{"17.1": ["SIGKILL"]}` means step 17, micro-batch 1."""

    def at(step: int, micro: int) -> None:
        for name in (signal_at or {}).get(f"{step}.{micro}", ()):
            os.kill(os.getpid(), getattr(signal, name))

    result = train(Path(run), steps=steps, checkpoint_every=checkpoint_every, at=at)
    return {"step": result.step, "outcome": result.outcome, "resumed_from": result.resumed_from}


def job_die_in_save(run: str, call: int) -> object:
    """Saves step 2, then dies in front of its `call`-th change of the file system while it saves step 3."""
    model = small_model()
    optimizer = make_optimizer(model, AdamWSettings())
    micro = next(small_losses(model)(6))
    micro.loss.backward()
    optimizer.step()
    for step in (1, 2):
        save_checkpoint(Path(run), step=step, model=model, optimizer=optimizer, state={"n": step}, keep=1)
    calls = _die_at(call)
    save_checkpoint(Path(run), step=3, model=model, optimizer=optimizer, state={"n": 3}, keep=1)
    return {"calls": calls()}


def _die_at(call: int) -> Callable[[], int]:
    """Dies in front of the `call`-th change of the file system; what it returns counts them."""
    done = 0

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            nonlocal done
            done += 1
            if done == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **named)

        return counting

    for name in ("mkdir", "rename", "open", "fsync", "chmod", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    checkpoint_module.save_file = counted(checkpoint_module.save_file)
    return lambda: done


def job_save_until_killed(run: str, calls: int, size: int) -> object:
    """Goes on saving checkpoints. Dies at a change of the file system, or when it writes that much of a file.

    Args:
        run: The run's folder.
        calls: It dies in front of this change of the file system; 0 for none.
        size: It dies in the middle of writing a file of more than so many bytes; 0 for none.
    """
    model = small_model()
    optimizer = make_optimizer(model, AdamWSettings())
    found = latest_checkpoint(Path(run))
    step = 0
    if found is not None:
        load_checkpoint(found, model, optimizer)
        step = found.step
    if size:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    _die_at(calls)
    with torch.no_grad():
        while True:
            step += 1
            for parameter in model.parameters():
                parameter.fill_(step)
            save_checkpoint(Path(run), step=step, model=model, optimizer=optimizer, state={"n": step}, keep=1)


def job_look(run: str) -> object:
    """Loads the latest checkpoint."""
    model = small_model()
    found = latest_checkpoint(Path(run))
    if found is None:
        return None
    load_checkpoint(found, model, make_optimizer(model, AdamWSettings()))
    return {"step": found.step, "state": found.state, "weight": float(model.embed.weight[0, 0])}


def job_full_disk(run: str, limit: int) -> object:
    """Trains where no file may grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return job_train(run, 10)


def prepare() -> None:
    """Loads what each job would load."""
    torch.set_num_threads(1)
    make_optimizer(small_model(), AdamWSettings()).step()
