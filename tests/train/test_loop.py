"""The loop: same bits after a kill, bad steps not applied, signals, one process a folder, progress."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Outcomes
from pydantic import ValidationError
from terminals import stderr_on_terminal
from training_worker import RATE, SmallModel, job, small_losses, small_model, train

from vrthinker.errors import InputError, VRThinkerError
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.records.run_lock import lock_run
from vrthinker.train.loop.checkpoint import STATE_FILE, latest_checkpoint, open_checkpoint
from vrthinker.train.loop.loop import LoopResult, LoopSettings, MicroLoss, run_loop
from vrthinker.train.loop.optimizer import AdamWSettings, make_optimizer

SEED = 20261121
MEASURED = ("time_seconds", "perf/tokens_per_s", "perf/step_seconds", "perf/optimizer_seconds")


def curve(run: Path) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    return [{n: v for n, v in line.items() if n not in MEASURED} for line in read_metrics(run / METRICS_FILE)]


def hashes(run: Path) -> dict[str, Any]:
    found = latest_checkpoint(run)
    assert found is not None
    record: dict[str, Any] = json.loads((found.path / STATE_FILE).read_text())
    return record


def one_weight() -> torch.nn.Module:
    """A model of one weight, 0."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    return model


def pull(
    model: torch.nn.Module, factors: Callable[[int], Iterable[float]]
) -> Callable[[int], Iterator[MicroLoss]]:
    """Losses that are the weight times a factor: their gradients are the factors."""

    def micro_losses(step: int) -> Iterator[MicroLoss]:
        for factor in factors(step):
            yield MicroLoss(model.weight.sum() * factor, 10, {"a/sum": factor}, {"a/max": factor})

    return micro_losses


def run_pull(
    run: Path,
    factors: Callable[[int], Iterable[float]],
    *,
    model: torch.nn.Module | None = None,
    rate: Callable[[int], float] = lambda step: 0.1,
    **settings: Any,
) -> LoopResult:
    model = model or one_weight()
    named = {"steps": 4, **settings}
    names = ("on_log", "on_step", "measure", "stop", "save_state", "load_state")
    loop = {name: named.pop(name) for name in names if name in named}
    return run_loop(
        model,
        settings=LoopSettings(**named),
        learning_rate=rate,
        micro_losses=pull(model, factors),
        run=run,
        name="pull",
        **loop,
    )


# The same bits


@pytest.mark.multi_process
def test_killed_and_resumed_ends_in_the_same_bits(run: Path, outcomes_of: Outcomes) -> None:
    chance = random.Random(SEED)
    kills = [f"{step}.{chance.randrange(3)}" for step in (2, 9, 17, 26)]
    straight, broken = str(run / "straight"), str(run / "broken")
    jobs = [job("train", straight, steps=30)]
    jobs += [job("train", broken, steps=30, signal_at={at: ["SIGKILL"]}) for at in kills]
    jobs += [job("train", broken, steps=30)]
    outcomes = outcomes_of(jobs)
    assert [outcome["code"] for outcome in outcomes] == [0, -9, -9, -9, -9, 0], outcomes
    assert outcomes[0]["result"] == {"step": 30, "outcome": "finished", "resumed_from": None}
    assert outcomes[-1]["result"] == {"step": 30, "outcome": "finished", "resumed_from": 25}
    # Weights, buffers and optimizer state are in the two files whose hashes these are.
    assert hashes(run / "broken") == hashes(run / "straight")
    found = curve(run / "straight")
    assert curve(run / "broken") == found
    assert [line["step"] for line in found] == list(range(1, 31))
    assert sum(line["loss/sft"] for line in found[-5:]) < 0.8 * sum(line["loss/sft"] for line in found[:5])


def test_dropout_differs_between_steps_and_the_callers_generator_is_left_alone(run: Path) -> None:
    drawn: list[float] = []

    def factors(step: int) -> list[float]:
        drawn.append(float(torch.rand(())))
        return [1.0]

    model = one_weight()
    before = torch.get_rng_state()
    run_pull(run / "a", factors, model=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(drawn)) == 4
    run_pull(run / "b", factors)
    assert drawn[4:] == drawn[:4]
    run_pull(run / "c", factors, seed=1)
    assert not set(drawn[8:]) & set(drawn[:4])


def test_a_finished_run_does_nothing_more_and_more_steps_go_on(run: Path) -> None:
    train(run, steps=4)
    before = (run / METRICS_FILE).read_bytes()
    result = train(run, steps=4)
    assert (result.step, result.outcome, result.resumed_from, result.metrics) == (4, "finished", 4, {})
    assert result.checkpoint == run / "checkpoints" / "step-00000004"
    assert (run / METRICS_FILE).read_bytes() == before
    assert train(run, steps=6).resumed_from == 4
    assert [line["step"] for line in read_metrics(run / METRICS_FILE)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InputError, match="has 6 steps, more than the 5 asked for"):
        train(run, steps=5)


def test_a_stages_own_state_comes_back(run: Path) -> None:
    got: list[Mapping[str, Any]] = []
    for steps in (2, 4):
        run_pull(run, lambda step: [1.0], steps=steps, save_state=lambda: {"drawn": 7}, load_state=got.append)
    assert got == [{"drawn": 7}]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"skipped_steps": 0, "bad_in_a_row": 0},
        {"skipped_steps": "0", "bad_in_a_row": 0, "stage": {}},
        {"skipped_steps": 0, "bad_in_a_row": -1, "stage": {}},
        {"skipped_steps": True, "bad_in_a_row": 0, "stage": {}},
        {"skipped_steps": 0, "bad_in_a_row": 0, "stage": []},
    ],
)
def test_a_checkpoint_with_another_state_is_one_line(run: Path, state: dict[str, Any]) -> None:
    checkpoint = train(run, steps=2).checkpoint
    assert checkpoint is not None
    record = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps(record | {"state": state}))
    with pytest.raises(InputError, match="step-00000002: its state is not that of a training run"):
        train(run, steps=3)


def test_another_model_is_refused_before_anything_changes(run: Path) -> None:
    train(run, steps=2)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="does not fit this model"):
        run_pull(run, lambda step: [1.0])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(run: Path) -> None:
    result = train(run, steps=3)
    assert result.checkpoint is not None
    (result.checkpoint / STATE_FILE).unlink()
    before = (run / METRICS_FILE).read_bytes()
    with pytest.raises(VRThinkerError, match="none of its checkpoints is whole; remove checkpoints"):
        train(run, steps=4)
    assert (run / METRICS_FILE).read_bytes() == before


# One step


def test_micro_batches_add_up_to_one_step(run: Path) -> None:
    whole, parts = one_weight(), one_weight()
    run_pull(run / "a", lambda step: [0.6], model=whole, steps=1)
    result = run_pull(run / "b", lambda step: [0.1, 0.3, 0.2], model=parts, steps=1)
    assert torch.allclose(whole.weight, parts.weight)
    assert result.metrics["optim/grad_norm"] == pytest.approx(0.6)
    assert result.metrics["a/sum"] == pytest.approx(0.6)
    assert result.metrics["a/max"] == pytest.approx(0.3)


def test_the_rate_is_set_and_the_gradient_clipped(run: Path) -> None:
    model = one_weight()
    rates = [0.5, 0.25, 0.125, 0.0625]
    # The mean of the gradients alone (beta1 0, beta2 0): each step moves the weight by the rate.
    run_pull(
        run,
        lambda step: [3.0],
        model=model,
        rate=rates.__getitem__,
        optimizer=AdamWSettings(beta1=0.0, beta2=0.0, eps=1e-12),
    )
    assert float(model.weight.detach()) == pytest.approx(-sum(rates))
    assert [line["optim/learning_rate"] for line in curve(run)] == rates
    assert [line["optim/grad_norm"] for line in curve(run)] == [3.0] * 4
    other = one_weight()
    settings = AdamWSettings(beta1=0.0, beta2=0.0, eps=1.0, max_grad_norm=0.5)
    run_pull(run / "b", lambda step: [3.0], model=other, steps=1, optimizer=settings)
    assert float(other.weight.detach()) == pytest.approx(-0.1 * 0.5 / 1.5)


def test_each_step_has_its_metrics(run: Path) -> None:
    result = run_pull(run, lambda step: [2.0, -1.0], steps=3)
    lines = read_metrics(run / METRICS_FILE)
    assert list(lines[0]) == [
        "step",
        "time_seconds",
        "loss/sft",
        "a/sum",
        "a/max",
        "optim/learning_rate",
        "optim/grad_norm",
        "optim/skipped_steps",
        "perf/tokens_per_s",
        "perf/step_seconds",
        "perf/optimizer_seconds",
    ]
    assert all(0 < line["perf/optimizer_seconds"] < line["perf/step_seconds"] for line in lines)
    assert lines[-1]["perf/tokens_per_s"] * lines[-1]["perf/step_seconds"] == pytest.approx(20)
    assert {"step": 3, **result.metrics}.items() <= lines[-1].items()


def test_a_stage_cannot_write_the_loops_metrics(run: Path) -> None:
    model = one_weight()

    def micro_losses(step: int) -> Iterator[MicroLoss]:
        yield MicroLoss(model.weight.sum(), 1, {"loss/sft": 1.0})

    with pytest.raises(ValueError, match="got 'loss/sft', which the loop writes"):
        run_loop(
            model,
            settings=LoopSettings(steps=1),
            learning_rate=lambda step: 0.1,
            micro_losses=micro_losses,
            run=run,
            name="x",
        )


def test_a_step_without_micro_batches_is_an_error(run: Path) -> None:
    with pytest.raises(VRThinkerError, match="step 2: got no micro-batches"):
        run_pull(run, lambda step: [1.0] if step < 2 else [])
    with lock_run(run):
        pass


# Steps that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_is_not_applied_and_counted(
    run: Path, bad: float, capfd: pytest.CaptureFixture[str]
) -> None:
    good, broken = one_weight(), one_weight()
    run_pull(run / "a", lambda step: [1.0], model=good, steps=3)
    result = run_pull(
        run / "b",
        lambda step: [1.0, bad] if step in (1, 3) else [1.0],
        model=broken,
        steps=5,
        max_bad_steps=2,
    )
    assert torch.equal(good.weight, broken.weight)
    assert result.skipped_steps == 2
    lines = curve(run / "b")
    assert [line["optim/skipped_steps"] for line in lines] == [0, 1, 1, 2, 2]
    assert [line["loss/sft"] is None for line in lines] == [False, True, False, True, False]
    assert f"pull: step 2 not applied: loss {-bad}, gradient norm" in capfd.readouterr().err


def test_a_gradient_that_is_not_finite_is_bad_too(run: Path) -> None:
    model = one_weight()

    def micro_losses(step: int) -> Iterator[MicroLoss]:
        yield MicroLoss(model.weight.sum().abs().sqrt(), 1)

    with pytest.raises(VRThinkerError, match=r"step 5: loss 0\.0, gradient norm nan; the last 5 steps"):
        run_loop(
            model,
            settings=LoopSettings(steps=9),
            learning_rate=lambda step: 0.1,
            micro_losses=micro_losses,
            run=run,
            name="x",
        )
    assert torch.equal(model.weight, torch.zeros(1, 1))


def test_too_many_bad_steps_in_a_row_end_the_run_and_the_checkpoint_stays(run: Path) -> None:
    def factors(step: int) -> list[float]:
        return [math.nan] if step in (1, 2, 4, 5, 6) else [1.0]

    for _ in range(2):
        with pytest.raises(VRThinkerError, match=r"step 7: loss nan.*the last 3 steps.*step-00000006 stays"):
            run_pull(run, factors, steps=9, max_bad_steps=3, checkpoint_every=2)
        found = latest_checkpoint(run)
        assert found is not None
        assert found.state == {"skipped_steps": 4, "bad_in_a_row": 2, "stage": {}}


# Ends


@pytest.mark.multi_process
def test_signals_finish_the_step_and_a_second_one_ends_at_once(run: Path, outcomes_of: Outcomes) -> None:
    def signalled(folder: str, signal_at: dict[str, list[str]]) -> dict[str, Any]:
        return job("train", run / folder, steps=20, signal_at=signal_at, checkpoint_every=50)

    outcomes = outcomes_of(
        [
            signalled("term", {"7.1": ["SIGTERM"]}),
            signalled("term", {"11.0": ["SIGINT"]}),
            signalled("twice", {"7.0": ["SIGTERM"], "7.2": ["SIGTERM"]}),
            signalled("both", {"7.0": ["SIGTERM", "SIGINT"]}),
            signalled("straight", {}),
            signalled("term", {}),
        ]
    )
    term, interrupt, twice, both, _, rest = outcomes
    assert term["result"] == {"step": 8, "outcome": "interrupted", "resumed_from": None}
    where = run / "term" / "checkpoints" / "step-00000008"
    assert (
        f"small: got SIGTERM, stopped after step 8 of 20; checkpoint {where}; run the same" in term["stderr"]
    )
    assert "finishing this step" in term["stderr"]
    assert interrupt["result"] == {"step": 12, "outcome": "interrupted", "resumed_from": 8}
    assert "got SIGINT" in interrupt["stderr"]
    assert twice["code"] == -15
    assert both["crash"] == "KeyboardInterrupt"
    assert latest_checkpoint(run / "twice") is None
    assert rest["result"] == {"step": 20, "outcome": "finished", "resumed_from": 12}
    assert hashes(run / "term") == hashes(run / "straight")
    assert not any(outcome["stdout"] for outcome in outcomes)


def test_stop_writes_a_checkpoint(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = iter([False, False, True])  # before the first step, and after each
    result = run_pull(run, lambda step: [1.0], steps=9, stop=lambda: next(asked))
    assert (result.step, result.outcome) == (2, "stopped")
    assert result.checkpoint is not None
    assert open_checkpoint(result.checkpoint).step == 2
    assert "pull: was asked to, stopped after step 2 of 9; checkpoint" in capfd.readouterr().err


def test_handlers_are_put_back(run: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    seen: list[object] = []
    run_pull(
        run, lambda step: [1.0], steps=1, on_log=lambda *_: seen.append(signal.getsignal(signal.SIGTERM))
    )
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert seen != before[:1]


@pytest.mark.multi_process
def test_a_second_process_is_told_and_touches_nothing(run: Path, outcomes_of: Outcomes) -> None:
    with lock_run(run):
        train(run, steps=2)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        (outcome,) = outcomes_of([job("train", run, steps=4)])
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert outcome["exit_code"] == 1
    assert outcome["error"] == (
        f"{run}: another process trains into it (process {os.getpid()}); wait for it, or choose another run "
        "folder"
    )
    assert train(run, steps=4).resumed_from == 2


def test_a_run_folder_that_is_a_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="cannot be used as a run folder"):
        run_pull(tmp_path / "run", lambda step: [1.0])


# Progress


def test_lines_go_to_stderr_every_so_often(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logged: list[int] = []
    run_pull(run, lambda step: [1.0], steps=7, log_every=3, on_log=lambda metrics, step: logged.append(step))
    out, err = capfd.readouterr()
    assert out == ""
    assert logged == [3, 6, 7]
    lines = err.splitlines()
    figures = r"loss -?[\d.e-]+, lr 0\.1, [\d,]+ tokens/s, \d+:\d\d:\d\d left"
    assert [line.split(",")[0] for line in lines] == [f"pull: step {n} of 7" for n in (3, 6, 7)]
    assert all(re.fullmatch(rf"pull: step \d of 7, {figures}", line) for line in lines)


def test_a_terminal_gets_a_bar(run: Path) -> None:
    with stderr_on_terminal() as said:
        run_pull(run, lambda step: [1.0], steps=5, log_every=1)
    assert "pull" in said[0]
    assert "5/5" in said[0]
    assert "tokens/s" in said[0]
    assert "step 1 of 5" not in said[0]


# Settings


def test_norms_and_biases_are_not_decayed() -> None:
    model = small_model()
    optimizer = make_optimizer(model, AdamWSettings(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    wanted = {n: 0.1 if p.dim() >= 2 else 0.0 for n, p in model.named_parameters() if p.requires_grad}
    assert {n: decay[id(p)] for n, p in model.named_parameters() if id(p) in decay} == wanted
    assert wanted["layer.norm1.weight"] == wanted["seldom.bias"] == 0.0
    assert wanted["embed.weight"] == 0.1
    assert len(decay) == sum(map(len, (group["params"] for group in optimizer.param_groups)))


def test_half_precision_weights_and_frozen_models_are_refused() -> None:
    with pytest.raises(InputError, match=r"embed.weight: got trainable bfloat16, allowed: float32"):
        make_optimizer(small_model().bfloat16(), AdamWSettings())
    with pytest.raises(InputError, match="got no trainable parameter"):
        make_optimizer(small_model().requires_grad_(False), AdamWSettings())
    partly = small_model().bfloat16().requires_grad_(False)
    partly.seldom.float().requires_grad_(True)
    assert len(make_optimizer(partly, AdamWSettings()).param_groups) == 2


@pytest.mark.parametrize("values", [{"steps": 0}, {"keep_checkpoints": 0}, {"log_every": 0}, {"lr": 1.0}])
def test_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LoopSettings.model_validate({"steps": 1, **values})


def test_the_small_model_learns(run: Path) -> None:
    assert RATE.at(29, 30) > 0
    model = small_model().train()
    result = run_loop(
        model,
        settings=LoopSettings(steps=60),
        learning_rate=lambda step: 0.02,
        micro_losses=small_losses(model),
        run=run,
        name="small",
    )
    assert isinstance(model, SmallModel)
    assert result.metrics["train/accuracy"] > 0.3 > 3 * curve(run)[0]["train/accuracy"]


def test_what_a_stage_measures_is_in_the_metrics_and_told(run: Path) -> None:
    """Also before the first step, but only once, however often a run begins again."""
    told: list[tuple[int, dict[str, float]]] = []

    def measure(step: int) -> dict[str, float]:
        return {"eval/a": step / 2} if step % 2 == 0 else {}

    def on_step(metrics: Mapping[str, float], step: int) -> None:
        told.append((step, dict(metrics)))

    (run / METRICS_FILE).parent.mkdir(parents=True)
    (run / METRICS_FILE).write_text('{"step": 0, "time_seconds": 1.0, "eval/a": 7.0}\n')
    run_pull(run, lambda step: [1.0], steps=3, measure=measure, on_step=on_step)
    lines = read_metrics(run / METRICS_FILE)
    assert [(line["step"], line.get("eval/a")) for line in lines] == [
        (0, 7.0),
        (1, None),
        (2, 1.0),
        (3, None),
    ]
    assert [step for step, _ in told] == [1, 2, 3], "an earlier process told of step 0"
    assert [metrics.get("eval/a") for _, metrics in told] == [None, 1.0, None]
    fresh = run.with_name("fresh")
    told.clear()
    run_pull(fresh, lambda step: [1.0], steps=1, measure=measure, on_step=on_step)
    assert told[0] == (0, {"eval/a": 0.0})
    assert read_metrics(fresh / METRICS_FILE)[0]["eval/a"] == 0.0
