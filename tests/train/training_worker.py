"""A small language model that is trained, in processes that are killed. The tests import the first half.

As a program it reads lists of jobs, one a line, and runs each job in a process of its own, forked before
torch starts a thread; it prints how they ended.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vrthinker.errors import VRThinkerError
from vrthinker.policy.losses import sft_loss_from_hidden
from vrthinker.train.loop import checkpoint as checkpoint_module
from vrthinker.train.loop.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from vrthinker.train.loop.loop import LoopResult, LoopSettings, MicroLoss, run_loop
from vrthinker.train.loop.optimizer import OptimizerSettings, make_optimizer
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
            optimizer=OptimizerSettings(weight_decay=0.1, max_grad_norm=0.5),
        ),
        learning_rate=lambda step: RATE.at(step, 30),
        micro_losses=micro_losses,
        run=run,
        name="small",
    )


# Jobs. Each runs in a process of its own and returns what its outcome says.


def job_train(run: str, steps: int, signal_at: dict[str, list[str]], checkpoint_every: int = 5) -> object:
    """Trains, and sends itself signals: `{"17.1": ["SIGKILL"]}` means step 17, micro-batch 1."""

    def at(step: int, micro: int) -> None:
        for name in signal_at.get(f"{step}.{micro}", ()):
            os.kill(os.getpid(), getattr(signal, name))

    result = train(Path(run), steps=steps, checkpoint_every=checkpoint_every, at=at)
    return {"step": result.step, "outcome": result.outcome, "resumed_from": result.resumed_from}


def job_die_in_save(run: str, call: int) -> object:
    """Saves step 2, then dies in front of its `call`-th change of the file system while it saves step 3."""
    model = small_model()
    optimizer = make_optimizer(model, OptimizerSettings())
    micro = next(small_losses(model)(6))
    micro.loss.backward()
    optimizer.step()
    for step in (1, 2):
        save_checkpoint(Path(run), step=step, model=model, optimizer=optimizer, state={"n": step}, keep=1)
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
    save_checkpoint(Path(run), step=3, model=model, optimizer=optimizer, state={"n": 3}, keep=1)
    return {"calls": done}


def job_save_for_ever(run: str) -> object:
    """Saves checkpoints until it is killed."""
    Path(run).mkdir(parents=True, exist_ok=True)
    model = small_model()
    optimizer = make_optimizer(model, OptimizerSettings())
    found = latest_checkpoint(Path(run))
    step = 0
    if found is not None:
        load_checkpoint(found, model, optimizer)
        step = found.step
    Path(run, "ready").touch()
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
    load_checkpoint(found, model, make_optimizer(model, OptimizerSettings()))
    return {"step": found.step, "state": found.state, "weight": float(model.embed.weight[0, 0])}


def job_full_disk(run: str, limit: int) -> object:
    """Trains where no file may grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return job_train(run, 10, {})


JOBS: dict[str, Callable[..., object]] = {
    "train": job_train,
    "die_in_save": job_die_in_save,
    "save_for_ever": job_save_for_ever,
    "look": job_look,
    "full_disk": job_full_disk,
}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Forks, runs, waits: exit code (minus the signal that ended it), output, result or error."""
    ready = Path(job["arguments"]["run"], "ready")
    ready.unlink(missing_ok=True)
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            # Whoever runs the tests in the background may have left SIGINT ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            try:
                said: dict[str, Any] = {"result": JOBS[job["job"]](**job["arguments"])}
            except VRThinkerError as error:
                said = {"error": str(error), "exit_code": error.exit_code}
            except BaseException as error:
                said = {"crash": type(error).__name__, "text": str(error)}
            sys.stdout.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            os.pwrite(answer.fileno(), json.dumps(said).encode(), 0)
            os._exit(0 if "result" in said else 1)
        if "kill_after_seconds" in job:
            while not ready.exists():
                time.sleep(0.001)
            time.sleep(job["kill_after_seconds"])
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [os.pread(file.fileno(), 1 << 20, 0).decode() for file in (answer, out, err)]
    return {"code": code, "stdout": texts[1], "stderr": texts[2], **json.loads(texts[0] or "{}")}


def main() -> None:
    torch.set_num_threads(1)
    make_optimizer(small_model(), OptimizerSettings()).step()  # loads here what each job would load
    for line in sys.stdin:
        sys.stdout.write(json.dumps([run_job(job) for job in json.loads(line)]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
