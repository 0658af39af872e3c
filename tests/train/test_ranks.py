"""Several processes train one policy: the step of one process, one decision, whole checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_worker import at as moment
from forks import Outcomes
from hypothesis import given
from hypothesis import strategies as st
from ranks_worker import LORA, jobs, write_base
from safetensors.torch import load_file

from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.policy.batches import deal
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.train.loop.checkpoint import STATE_FILE, latest_checkpoint
from vrthinker.world.files import PAIRS_FILE, make_world
from vrthinker.world.world import PRESETS

GRADIENTS = 1e-5
"""Relative; float32 additions in another order. Seen: 7e-8."""
LOST = "another process of this run ended early"


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "nano", "nano")


def train(ranked: Outcomes, size: int, base: Path, run: Path, **arguments: Any) -> list[dict[str, Any]]:
    return ranked(jobs("train", size, base=str(base), run=str(run), **arguments), together=True)


def results(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert all("result" in outcome for outcome in outcomes), outcomes
    return [outcome["result"] for outcome in outcomes]


def saved(run: Path) -> dict[str, Any]:
    """The latest checkpoint's record, with the hashes of all files."""
    found = latest_checkpoint(run)
    assert found is not None
    record: dict[str, Any] = json.loads((found.path / STATE_FILE).read_text())
    return record


# The same step


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 9))
def test_micro_batches_are_dealt_evenly(costs: list[int], processes: int) -> None:
    dealt = deal(costs, processes)
    assert sorted(index for part in dealt for index in part) == list(range(len(costs)))
    counts = [len(part) for part in dealt]
    assert max(counts) - min(counts) <= 1
    loads = [sum(costs[index] for index in part) for part in dealt]
    assert max(loads) - min(loads) <= max(costs), "no process has more to do by more than one micro-batch"
    assert deal(costs, 1) == [list(range(len(costs)))]


def assert_same_gradients(
    ranked: Outcomes, base: Path, out: Path, settings: dict[str, Any], sizes: tuple[int, ...] = (1, 2)
) -> None:
    """Gradients and loss of one step, in which the processes have unevenly many micro-batches."""
    said = {}
    for size in sizes:
        arguments = {"base": str(base), "out": str(out / f"{size}.safetensors"), "settings": settings}
        said[size] = results(ranked(jobs("gradients", size, **arguments), together=True))
    (alone,) = said[1]
    assert alone["micros"] == 3
    wanted = load_file(out / "1.safetensors")
    whole_norm = float(torch.stack([gradient.norm() for gradient in wanted.values()]).norm())
    for size in sizes[1:]:
        assert [one["micros"] for one in said[size]] == [-(-3 // size)] * size
        assert said[size][0]["loss"] == pytest.approx(alone["loss"], rel=GRADIENTS)
        got = load_file(out / f"{size}.safetensors")
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            # A gradient that is nearly nothing (a key's bias) is compared on the scale of all of them.
            scale = max(float(gradient.norm()), 1e-4 * whole_norm)
            assert float((got[name] - gradient).norm()) <= GRADIENTS * scale, (size, name)


@pytest.mark.multi_process
def test_two_processes_compute_the_gradients_of_one(ranked: Outcomes, nano: Path, tmp_path: Path) -> None:
    assert_same_gradients(ranked, nano, tmp_path, {})


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.multi_process
@pytest.mark.parametrize("kind", ["nano", "qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize(
    "settings",
    [{}, LORA, {**LORA, "train_vision": False}, {"train_vision": False}, {"gradient_checkpointing": True}],
    ids=["full", "lora", "lora-text", "frozen-tower", "recomputed"],
)
def test_gradients_of_all_kinds(
    ranked: Outcomes, kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", kind)
    names = set(load_file(base / "model.safetensors"))
    assert ("lm_head.weight" in names) == (kind != "nano")
    assert_same_gradients(ranked, base, tmp_path, settings, (1, 2, 5))


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(
    "settings",
    [{}, {**LORA, "precision": "bfloat16", "gradient_checkpointing": True}],
    ids=["full", "lora-bfloat16-recomputed"],
)
def test_one_process_may_run_the_model_between_two_steps(
    ranked: Outcomes, nano: Path, settings: dict[str, Any]
) -> None:
    outcomes = results(ranked(jobs("whole", 2, base=str(nano), settings=settings), together=True))
    for one in outcomes:
        assert one["norms"] == [outcomes[0]["norms"][0]] * 3
        assert one["logits"][0] == one["logits"][1] == outcomes[0]["logits"][0]
    policy = VisionLanguageModel(nano, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        hidden = policy.model.model.language_model(
            input_ids=torch.arange(20, 44)[None], position_ids=torch.arange(24).expand(3, 1, -1)
        ).last_hidden_state
        wanted = policy.model.lm_head(hidden)[0, -1]
    close = 0.1 if settings else 1e-4  # bfloat16 has 8 bits
    torch.testing.assert_close(torch.tensor(outcomes[0]["logits"][0]), wanted, atol=close, rtol=close)


# Kills, signals, full disks


@pytest.mark.multi_process
def test_one_killed_process_ends_the_run_and_it_resumes_to_the_same_bits(
    ranked: Outcomes, nano: Path, run: Path
) -> None:
    straight, broken = run / "straight", run / "broken"
    first = results(train(ranked, 2, nano, straight, steps=3))
    assert first == [{"step": 3, "outcome": "finished", "resumed_from": None, "skipped": 0}] * 2
    killed = train(ranked, 2, nano, broken, steps=3, at={"1.2.1": "SIGKILL"})
    assert killed[1]["code"] == -9
    assert LOST in killed[0]["error"]
    resumed = results(train(ranked, 2, nano, broken, steps=3))
    assert [one["resumed_from"] for one in resumed] == [2, 2]
    assert saved(broken) == saved(straight)
    assert len(saved(broken)["files"]) == 4


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("optimizer", "settings"), [("adamw", {}), ("muon", {}), ("adamw", LORA)], ids=["adamw", "muon", "lora"]
)
def test_many_kills(
    ranked: Outcomes, nano: Path, run: Path, optimizer: str, settings: dict[str, Any]
) -> None:
    straight, broken = run / "straight", run / "broken"
    given = {"steps": 7, "optimizer": optimizer, "settings": settings}
    results(train(ranked, 2, nano, straight, **given))
    for at in ("0.0.0", "1.3.1", "0.3.0", "1.6.0"):
        outcomes = train(ranked, 2, nano, broken, at={at: "SIGKILL"}, **given)
        assert sorted(outcome["code"] for outcome in outcomes) == [-9, 1], outcomes
    assert [one["resumed_from"] for one in results(train(ranked, 2, nano, broken, **given))] == [6, 6]
    assert saved(broken) == saved(straight)


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_loss_that_is_not_finite_on_one_process_is_skipped_on_all(
    ranked: Outcomes, nano: Path, run: Path
) -> None:
    outcomes = results(train(ranked, 2, nano, run, steps=4, at={"1.2.0": "nan"}))
    assert [one["skipped"] for one in outcomes] == [1, 1]
    lines = read_metrics(run / METRICS_FILE)
    assert [line["loss/sft"] is None for line in lines] == [False, False, True, False]
    assert [line["step"] for line in lines] == [1, 2, 3, 4], "one process writes metrics"


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_signal_to_one_process_saves_and_ends_all(ranked: Outcomes, nano: Path, run: Path) -> None:
    stopped = results(train(ranked, 2, nano, run / "a", steps=4, at={"1.2.0": "SIGTERM"}))
    assert [(one["step"], one["outcome"]) for one in stopped] == [(3, "interrupted")] * 2
    assert [one["resumed_from"] for one in results(train(ranked, 2, nano, run / "a", steps=4))] == [3, 3]
    results(train(ranked, 2, nano, run / "b", steps=4))
    assert saved(run / "a") == saved(run / "b")


@pytest.mark.slow
@pytest.mark.multi_process
def test_ctrl_c_while_one_process_samples_ends_all_and_the_run_goes_on(
    ranked: Outcomes, nano: Path, run: Path
) -> None:
    make_world(run / "world", PRESETS["easy"], pairs=4, seed=41, workers=1)
    pairs = run / "world" / PAIRS_FILE
    out = run / "out"
    given = ["train", "rejection", "--model", "nano", "--pairs", pairs, "--out", out, "--samples", "2"]
    given += ["--set", "sampling.batch_size=2", "--steps", "1", "--batch-size", "2", "--tracker", "none"]
    moments = {"1": [moment("vrthinker.records.verdict_log:VerdictLog.append", 1, "SIGINT", after=True)]}
    command = {"given": list(map(str, given))}
    stopped = results(ranked(jobs("command", 2, **command, moments=moments), together=True))
    assert stopped == [130, 130]
    assert not (out / "model").exists()
    command = {"given": ["train", "rejection", "--resume", str(out)]}
    assert results(ranked(jobs("command", 2, **command), together=True)) == [0, 0]
    assert (out / "model").is_dir()


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("more", [{}, {"train_vision": False, "lora": {"rank": 4, "alpha": 8.0}}])
def test_grpo_by_two_processes_is_that_of_one(more: dict[str, Any], ranked: Outcomes, run: Path) -> None:
    """They sample each refresh together, and take the steps of one process; one of them may be killed."""
    make_world(run / "world", PRESETS["medium"], pairs=6, seed=43, workers=1)
    recipe = run / "recipe.yaml"
    learn = {"steps": 3, "groups_per_step": 1, "steps_per_refresh": 2, "max_pack_tokens": 1500}
    values = {
        "model": "nano",
        "seed": 5,
        "tracker": "none",
        "checkpoint_every": 1,
        "items": {"kind": "file", "path": str(run / "world" / PAIRS_FILE)},
        "rollouts": {"group_size": 3, "batch_size": 12, "temperature": 1.5},
        "learn": {**learn, "learning_rate": {"peak": 1e-4}},
    }
    recipe.write_text(yaml.safe_dump({**values, **more}))

    def given(out: Path) -> list[str]:
        return list(map(str, ["train", "grpo", "--recipe", recipe, "--out", out]))

    assert results(ranked(jobs("command", 1, given=given(run / "one")), together=True)) == [0]
    assert results(ranked(jobs("command", 2, given=given(run / "two")), together=True)) == [0, 0]
    one, two = (load_file(run / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    names = ("reward/total", "rollouts/groups_drawn", "batch/tokens", "loss/grpo", "policy/entropy", "kl/ref")
    lines = [[line for line in read_metrics(run / n / METRICS_FILE) if line["step"]] for n in ("one", "two")]
    for alone, together in zip(*lines, strict=True):
        assert [name for name in names if name in together] == [name for name in names if name in alone]
        for name in set(names) & set(alone):
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.multi_process
def test_clips_that_one_machine_lacks_end_all_with_the_reason(ranked: Outcomes, run: Path) -> None:
    make_world(run / "world", PRESETS["easy"], pairs=2, seed=41, workers=1)
    given = ["--oracle", run / "world", "--like", "nano", "--out", run / "traces"]
    command = {"given": list(map(str, ["train", "traces", *given]))}
    assert results(ranked(jobs("command", 1, **command), together=True)) == [0]
    given = ["--model", "nano", "--traces", run / "traces" / "traces.jsonl", "--out", run / "out"]
    command = {"given": list(map(str, ["train", "cold-start", *given, "--steps", 1, "--tracker", "none"]))}
    ended = results(ranked(jobs("command", 2, **command, lacks_clips=1), together=True))
    assert ended == [2, 2], "the first knows why, too, and does not say that it lost the other"


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_run_goes_on_with_another_number_of_processes(ranked: Outcomes, nano: Path, run: Path) -> None:
    for size, steps in ((2, 2), (3, 4), (1, 6), (2, 8)):
        outcomes = results(train(ranked, size, nano, run / "mixed", steps=steps))
        assert [one["resumed_from"] for one in outcomes] == [steps - 2 or None] * size
    results(train(ranked, 1, nano, run / "alone", steps=8))
    alone, mixed = (read_metrics(run / name / METRICS_FILE) for name in ("alone", "mixed"))
    assert [line["loss/sft"] for line in mixed] == pytest.approx(
        [line["loss/sft"] for line in alone], rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_full_disk_of_one_process_saves_on_none(ranked: Outcomes, nano: Path, run: Path) -> None:
    results(train(ranked, 2, nano, run, steps=2))
    before = saved(run)
    full = train(ranked, 2, nano, run, steps=4, limit=200_000)
    assert "cannot be written" in full[1]["error"]
    assert full[0]["text"] == "1", "the other ends with its exit code and without a line of its own"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert saved(run) == before
    assert [one["resumed_from"] for one in results(train(ranked, 2, nano, run, steps=4))] == [2, 2]


# The command


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.multi_process
def test_torchrun_trains_what_one_process_trains(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    phase = {
        "batch_size": 3,
        "learning_rate": {"peak": 1e-3},
        "traces": {"kind": "world", "pairs": 5, "seed": 11, "calls": 1, "filter": False},
    }
    values = {"model": "nano-from-nothing", "tracker": "none", "checkpoint_every": 1, "phases": [phase]}
    recipe.write_text(yaml.safe_dump({**values, "precision": "float32"}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for name, start in (("alone", [sys.executable, "-m"]), ("two", torchrun)):
        command = [*start, "vrthinker", "train", "cold-start", "--recipe", recipe, "--out", tmp_path / name]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path / name / 'model'}\n", "one process writes the result"
        assert done.stderr.count("kept 5 of 5 traces") == 1
    alone, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("alone", "two"))
    assert alone.keys() == two.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)
