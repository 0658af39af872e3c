"""The training loop that the stages share. It accumulates, clips, steps, logs, checkpoints and resumes.

    with lock_run(run):                      # optional: the loop holds the folder itself too
        result = run_loop(model, settings=..., learning_rate=lambda step: rate.at(step, total),
                          micro_losses=losses_of_step, run=run, name="cold start")

A stage gives the losses of a step as a function of the step's number. Invariant: a step is a pure function of
the settings' seed, the step's number, the weights and the optimizer state, so that a run that was killed and
resumed ends with the same bits as one that was not. This holds on the same machine with the same versions, if
torch's kernels are deterministic (on a CPU they are; on a GPU some are only under
`torch.use_deterministic_algorithms`). The loop seeds torch's generators before each step. A stage that draws
other random numbers must use separate generators, seeded by (seed, step).

A step whose loss or gradient is not finite is not applied, but counted. The stage sets train or eval mode.
The loop writes nothing to stdout.

Several processes may train one model together (`ranks`). Each yields its own part of a step's micro-batches,
and every process yields equally many. Losses are divided by the normaliser of the whole step, over all
processes, and gradients are summed over them, so that the step is that of one process with all micro-batches.
A step is then a function of the number of processes too. All processes decide alike: whether a step is
applied, when to stop, and which checkpoint to begin with. The first one alone writes metrics and progress.

The run folder has `checkpoints/` (`checkpoint`), `metrics.jsonl` (`metrics_file`) and `.lock` (`run_lock`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.distributed.tensor import DTensor

from vrthinker.errors import InputError, VRThinkerError
from vrthinker.records.metrics_file import METRICS_FILE, MetricsFile
from vrthinker.records.run_lock import lock_run
from vrthinker.train.loop.checkpoint import (
    CHECKPOINTS_FOLDER,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from vrthinker.train.loop.interrupts import Interrupts, StepInterrupted
from vrthinker.train.loop.micro_loss import MicroLoss, StepSums, step_totals
from vrthinker.train.loop.optimizer import AdamWSettings, OptimizerSettings, make_optimizer
from vrthinker.train.loop.progress import StepProgress
from vrthinker.train.loop.ranks import ALONE, Ranks

__all__ = ["LoopResult", "LoopSettings", "MicroLoss", "run_loop"]

RESUME_HINT = "run the same command again to go on"


class LoopSettings(BaseModel):
    """The settings of the loop. Only `steps` has no default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(ge=1)
    """Number of optimizer steps of the whole run."""
    checkpoint_every: int = Field(100, ge=1)
    """Number of steps between checkpoints. The last step always has one."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints to keep on the disk."""
    log_every: int = Field(10, ge=1)
    """Number of steps between lines on stderr and calls of `on_log`. The metrics file has every step."""
    max_bad_steps: int = Field(5, ge=1)
    """Number of consecutive steps with a loss or gradient that is not finite after which the run ends."""
    seed: int = 0
    """Seed of torch's own generators in a step (dropout)."""
    optimizer: OptimizerSettings = AdamWSettings()
    """The optimizer's settings."""


@dataclass(frozen=True)
class LoopResult:
    """The result of a run.

    Attributes:
        step: The number of finished steps, including those of earlier processes.
        outcome: How the run ended: `finished` (all steps), `stopped` (by `stop`) or `interrupted` (by a
            signal).
        resumed_from: The number of steps of the checkpoint that this process began with; None for a fresh
            start.
        skipped_steps: The number of steps that were not applied.
        checkpoint: The newest checkpoint; None if the run ended before its first step.
        metrics: The metrics of the last step; empty if this process ran none.
    """

    step: int
    outcome: Literal["finished", "stopped", "interrupted"]
    resumed_from: int | None
    skipped_steps: int
    checkpoint: Path | None
    metrics: dict[str, float]


def run_loop(
    model: torch.nn.Module,
    *,
    settings: LoopSettings,
    learning_rate: Callable[[int], float],
    micro_losses: Callable[[int], Iterable[MicroLoss]],
    run: Path,
    name: str,
    loss_name: str = "loss/sft",
    on_log: Callable[[Mapping[str, float], int], None] | None = None,
    on_step: Callable[[Mapping[str, float], int], None] | None = None,
    measure: Callable[[int], Mapping[str, float]] | None = None,
    stop: Callable[[], bool] | None = None,
    save_state: Callable[[], Mapping[str, Any]] | None = None,
    load_state: Callable[[Mapping[str, Any]], None] | None = None,
    resume_hint: str = RESUME_HINT,
    ranks: Ranks = ALONE,
) -> LoopResult:
    """Trains until all steps are done, starting from the run folder's latest checkpoint if it has one.

    On SIGTERM or Ctrl-C, to whichever process, the current step is finished, a checkpoint is written and the
    loop returns in all processes. A second signal ends it at once.

    Args:
        model: The model, with trainable parameters in fp32, on their device. It is changed in place.
        settings: The settings of the loop.
        learning_rate: A function that returns the rate of a 0-based step.
        micro_losses: A function that returns the micro-batches of a 0-based step, at least one. The backward
            pass of each runs before the next is taken. It may raise `StepInterrupted` after a signal.
        run: The run folder, which is made if it is missing, and held while the loop runs.
        name: The name of what is running, for messages.
        loss_name: The name of the metric of the summed loss.
        on_log: A function that is called with a step's metrics and the number of finished steps, every
            `log_every` steps and after the last.
        on_step: A function that is called like `on_log`, but after each step.
        measure: A function that is called after each step, and once before the first, with the number of
            finished steps. What it returns is added to the step's metrics. It must not change the model.
        stop: A function that is called before the first step and after each. If it returns True, a
            checkpoint is written and the loop ends.
        save_state: A function that returns what the stage needs to resume, as JSON values.
        load_state: A function that is called with those values before the first step.
        resume_hint: The advice how to resume, for the message after a signal.
        ranks: The processes of the run. Of the functions above, `on_log`, `on_step`, `stop` and `save_state`
            count on the first process only, and what `measure` returns is taken from there.

    Returns:
        The result. If the outcome is `interrupted` or `stopped`, the run is not finished: do not export its
        weights as a result.

    Raises:
        InputError: The checkpoint does not fit the model, or has more steps than `settings.steps`.
        VRThinkerError: Another process holds the folder, none of its checkpoints is complete, a step has no
            micro-batches, too many steps in a row were not finite, or something could not be written. The
            checkpoints are kept.
    """
    with contextlib.ExitStack() as stack:
        hold_run(run, ranks, stack)
        stack.enter_context(_own_generators(model))
        interrupts = stack.enter_context(Interrupts(told=ranks.is_first))
        loop = _Loop(model, settings, run, loss_name, save_state or dict, ranks, measure)
        stack.callback(loop.close)
        resumed_from = loop.resume(load_state)
        progress = stack.enter_context(
            StepProgress(name, settings.steps, done=loop.step, every=settings.log_every, loss_name=loss_name)
        )
        if resumed_from is not None:
            progress.say(f"resumed from {loop.checkpoint}")
        tell = on_step if ranks.is_first and on_step is not None else _tell_nobody
        if measured := loop.measure_first():
            tell(measured, 0)
        wants_stop = ranks.is_first and stop is not None and stop()
        stopped = _agreed(ranks, "stop" if wants_stop else None) is not None
        signal_seen = _agreed(ranks, interrupts.seen)
        while loop.step < settings.steps and not stopped and signal_seen is None:
            skipped = loop.skipped
            try:
                metrics = loop.do_step(learning_rate(loop.step), micro_losses(loop.step))
            except StepInterrupted:
                signal_seen = _agreed(ranks, interrupts.seen) or "a signal"
                break
            progress.update(loop.step, metrics)
            tell(metrics, loop.step)
            if loop.skipped > skipped:
                norm = metrics["optim/grad_norm"]
                progress.say(f"step {loop.step} not applied: loss {metrics[loss_name]}, gradient norm {norm}")
            if loop.step % settings.checkpoint_every == 0 or loop.step == settings.steps:
                loop.save()
            is_logged = loop.step % settings.log_every == 0 or loop.step == settings.steps
            if ranks.is_first and on_log is not None and is_logged:
                on_log(metrics, loop.step)
            wants_stop = ranks.is_first and stop is not None and stop()
            stopped = _agreed(ranks, "stop" if wants_stop else None) is not None
            signal_seen = _agreed(ranks, interrupts.seen)
        if loop.step > 0:
            loop.save()
        if loop.step < settings.steps:
            why = "was asked to" if signal_seen is None else f"got {signal_seen}"
            kept = f"; checkpoint {loop.checkpoint}" if loop.checkpoint is not None else ""
            hint = f"; {resume_hint}" if signal_seen is not None else ""
            progress.say(f"{why}, stopped after step {loop.step} of {settings.steps}{kept}{hint}")
    done = loop.step == settings.steps
    return LoopResult(
        step=loop.step,
        outcome="finished" if done else "stopped" if signal_seen is None else "interrupted",
        resumed_from=resumed_from,
        skipped_steps=loop.skipped,
        checkpoint=loop.checkpoint,
        metrics=loop.metrics,
    )


class _Loop:
    """The state of a run between steps."""

    def __init__(
        self,
        model: torch.nn.Module,
        settings: LoopSettings,
        run: Path,
        loss_name: str,
        save_state: Callable[[], Mapping[str, Any]],
        ranks: Ranks,
        measure: Callable[[int], Mapping[str, float]] | None,
    ) -> None:
        self._ranks, self._measure = ranks, measure
        self._model, self._settings, self._run, self._loss_name = model, settings, run, loss_name
        self._save_state = save_state
        self._optimizer = make_optimizer(model, settings.optimizer)
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._bad_in_a_row = 0
        self.step = 0
        self.skipped = 0
        self.checkpoint: Path | None = None
        self._saved_step: int | None = None
        self.metrics: dict[str, float] = {}
        self._metrics_file: MetricsFile | None = None

    def close(self) -> None:
        """Closes the metrics file."""
        if self._metrics_file is not None:
            self._metrics_file.close()

    def resume(self, load_state: Callable[[Mapping[str, Any]], None] | None) -> int | None:
        """Loads the latest checkpoint, or starts from the beginning."""
        ranks = self._ranks
        ranks.first(lambda: remove_leftovers(self._run))
        found = latest_checkpoint(self._run, ranks)
        ranks.together(lambda: self._begin_with(found, load_state))
        ranks.first(self._open_metrics)
        return None if found is None else found.step

    def _begin_with(
        self, found: Checkpoint | None, load_state: Callable[[Mapping[str, Any]], None] | None
    ) -> None:
        if found is not None:
            if found.step > self._settings.steps:
                raise InputError(
                    f"{found.path}: has {found.step} steps, more than the {self._settings.steps} asked for; "
                    "ask for at least as many, or choose another run folder"
                )
            skipped, bad_in_a_row, stage = _stored_state(found)
            load_checkpoint(found, self._model, self._optimizer)
            self.skipped, self._bad_in_a_row = skipped, bad_in_a_row
            self.step, self._saved_step, self.checkpoint = found.step, found.step, found.path
            if load_state is not None:
                load_state(stage)
        elif any((self._run / CHECKPOINTS_FOLDER).glob("step-*")):
            raise VRThinkerError(
                f"{self._run}: none of its checkpoints is whole; remove {CHECKPOINTS_FOLDER} to begin again, "
                "or choose another run folder"
            )

    def _open_metrics(self) -> None:
        self._metrics_file = MetricsFile(self._run / METRICS_FILE)
        self._metrics_file.drop_after(self.step)

    def do_step(self, rate: float, micros: Iterable[MicroLoss]) -> dict[str, float]:
        """Does one step and returns its metrics."""
        began = time.perf_counter()
        _seed(self._settings.seed, self.step, self._ranks.rank)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        sums = StepSums(self._loss_name)
        for micro in micros:
            micro.loss.backward()  # type: ignore[no-untyped-call]
            sums.add(micro)
        totals = step_totals(self._ranks.gather(sums.report()))
        if totals.count == 0:
            raise VRThinkerError(f"step {self.step}: got no micro-batches, wanted at least one")
        apply_began = time.perf_counter()
        norm = self._apply(totals.values[self._loss_name])
        apply_seconds = time.perf_counter() - apply_began
        self.step += 1
        seconds = time.perf_counter() - began
        logged = totals.values | {
            "optim/learning_rate": rate,
            "optim/grad_norm": norm,
            "optim/skipped_steps": float(self.skipped),
            "perf/tokens_per_s": totals.n_tokens / seconds,
            "perf/step_seconds": seconds,
            "perf/optimizer_seconds": apply_seconds,
            **self._measured(),
        }
        self.metrics = logged
        self._ranks.together(lambda: self._log(logged))
        return logged

    def measure_first(self) -> dict[str, float]:
        """Writes what is measured before the first step, unless an earlier process did."""
        file = self._metrics_file
        if self._measure is None or self.step or self._ranks.first(lambda: bool(file and file.has_lines)):
            return {}
        measured = self._measured()
        if measured:
            self._ranks.together(lambda: self._log(measured))
        return measured

    def _measured(self) -> dict[str, float]:
        """What the stage measures after this step."""
        measure, step = self._measure, self.step
        return {} if measure is None else self._ranks.together(lambda: dict(measure(step)))

    def _log(self, logged: Mapping[str, float]) -> None:
        """Writes the step's metrics.

        Raises:
            VRThinkerError: They cannot be written, or too many steps in a row were not finite.
        """
        if self._metrics_file is not None:
            self._metrics_file.log(logged, self.step)
        if self._bad_in_a_row >= self._settings.max_bad_steps:
            kept = f"{self.checkpoint} stays" if self.checkpoint is not None else "there is no checkpoint yet"
            raise VRThinkerError(
                f"step {self.step}: loss {logged[self._loss_name]}, gradient norm "
                f"{logged['optim/grad_norm']}; the last {self._bad_in_a_row} steps were not finite and not "
                f"applied; {kept}; lower the learning rate or look at the data of these steps"
            )

    def _apply(self, loss: float) -> float:
        """Clips and steps, or counts the step as not applied. Returns the norm before clipping."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        if isinstance(total, DTensor):
            total = total.full_tensor()  # each process has the norm of its shards only
        norm = float(total)
        if math.isfinite(loss) and math.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(
                self._parameters, self._settings.optimizer.max_grad_norm, total
            )
            self._optimizer.step()
            self._bad_in_a_row = 0
        else:
            self.skipped += 1
            self._bad_in_a_row += 1
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self) -> None:
        """Writes a checkpoint, unless this step has one."""
        if self._saved_step == self.step:
            return
        if self._metrics_file is not None:
            self._metrics_file.sync()
        state = {
            "skipped_steps": self.skipped,
            "bad_in_a_row": self._bad_in_a_row,
            "stage": dict(self._save_state()) if self._ranks.is_first else {},
        }
        self.checkpoint = save_checkpoint(
            self._run,
            step=self.step,
            model=self._model,
            optimizer=self._optimizer,
            state=state,
            keep=self._settings.keep_checkpoints,
            ranks=self._ranks,
        )
        self._saved_step = self.step


def _stored_state(checkpoint: Checkpoint) -> tuple[int, int, dict[str, Any]]:
    """What `_Loop.save` wrote about the run: skipped steps, those of them in a row, the stage's state."""
    counts = [checkpoint.state.get(name) for name in ("skipped_steps", "bad_in_a_row")]
    stage = checkpoint.state.get("stage")
    if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(stage, dict):
        raise InputError(
            f"{checkpoint.path}: its state is not that of a training run; remove this checkpoint, then resume"
        )
    return counts[0], counts[1], stage  # type: ignore[return-value]


def _tell_nobody(metrics: Mapping[str, float], step: int) -> None:
    """What is called after a step where nobody wants to know."""


@contextlib.contextmanager
def _own_generators(model: torch.nn.Module) -> Iterator[None]:
    """Restores the state of torch's generators at its end."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=devices):
        yield


def hold_run(run: Path, ranks: Ranks, stack: contextlib.ExitStack) -> None:
    """Holds a run folder until the end of `stack`. The first process holds it for all processes of a run."""
    ranks.together(lambda: stack.enter_context(lock_run(run)) if ranks.is_first else None)


def _agreed(ranks: Ranks, said: str | None) -> str | None:
    """What the first process that says anything says."""
    return next((word for word in ranks.gather(said) if word is not None), None)


def _seed(seed: int, step: int, rank: int) -> None:
    own = f" {rank}" if rank else ""  # what a process alone draws does not depend on there being others
    digest = hashlib.sha256(f"{seed} {step}{own}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
