"""How runs of GRPO end whatever the judge does, and what they do not depend on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest
import torch
from forks import Outcomes
from grpo_runs import episodes, metrics, values
from grpo_runs import world as world
from ranks_worker import jobs
from safetensors.torch import load_file

from vrthinker.data.pairs import load_pairs
from vrthinker.engine.hf.checkpoint import resolve_checkpoint
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.dimensions import Dimension
from vrthinker.errors import VRThinkerError
from vrthinker.train.grpo import run_grpo
from vrthinker.train.grpo_settings import grpo_settings
from vrthinker.world.files import PAIRS_FILE

SURE = {"group_size": 2, "batch_size": 12, "temperature": 1e-3, "most_draws": 2, "swap": False}
"""Almost without chance, all episodes of a group are the same."""
SAME = 1e-5
"""Absolute and relative, of losses, metrics and weights."""
EXTREMES = {"drift/max", "ratio/max", "optim/grad_norm"}
"""What follows the single tokens that rounding moves most: by up to 6e-5 with nano, whose heads are steep."""


# Judges


def what_it_says(run: Path) -> dict[str, dict[str, int]]:
    """The judgments of a sure judge by the first clip's path."""
    said = {}
    for trajectory in episodes(run):
        judgments = trajectory.outcome.judgments
        assert judgments is not None
        labels = {dimension.value: int(getattr(judgments, dimension.value)) for dimension in Dimension}
        assert said.setdefault(str(trajectory.videos[0].path), labels) == labels, "it is sure"
    return said


def relabelled(world: Path, out: Path, label: Callable[[str], Mapping[str, int] | None]) -> Path:
    """A pairs file with other labels; pairs without any are left out."""
    rows = []
    for pair in load_pairs(world / PAIRS_FILE):
        labels = label(str(pair.video_1))
        if labels is not None:
            clips = {"video_1": str(pair.video_1), "video_2": str(pair.video_2)}
            rows.append({"id": pair.id, "prompt": pair.prompt, **clips, "labels": dict(labels)})
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def nothing_to_learn(world: Path, pairs: Path, out: Path) -> tuple[str, dict[str, Any]]:
    """Runs a sure judge until it gives up. Returns its line, and what it recorded of its refresh."""
    items = {"kind": "file", "path": str(pairs)}
    with pytest.raises(VRThinkerError, match="step 0: nothing to learn from: none of 4 groups") as caught:
        run_grpo(grpo_settings(values(world, items=items, rollouts=SURE)), out)
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (1, False)
    assert len(episodes(out)) == 8, "the episodes stay"
    assert metrics(out) == []
    return str(caught.value), json.loads((out / "rollouts/refresh-00000/refresh.json").read_text())


@pytest.mark.slow
def test_nothing_to_learn_is_one_line_and_the_episodes_stay(world: Path, tmp_path: Path) -> None:
    line, record = nothing_to_learn(world, world / PAIRS_FILE, tmp_path / "run")
    assert f"(mean accuracy {record['metrics']['reward/accuracy']:.3f}, failed episodes 0%)" in line
    assert record["kept"] == []
    assert record["metrics"]["rollouts/groups_drawn"] == 4


@pytest.mark.slow
def test_judges_that_are_always_right_or_wrong_end_at_the_bound_with_a_line(
    world: Path, tmp_path: Path
) -> None:
    """The labels are first the world's, then the judge's own answers, then others than these."""
    nothing_to_learn(world, world / PAIRS_FILE, tmp_path / "first")
    said = what_it_says(tmp_path / "first")
    assert len(said) == 4

    def other(clip: str) -> Mapping[str, int] | None:
        found = said.get(clip)
        return None if found is None else {name: (value + 1) % 3 for name, value in found.items()}

    right = relabelled(world, tmp_path / "right.jsonl", said.get)
    wrong = relabelled(world, tmp_path / "wrong.jsonl", other)
    for pairs, accuracy in ((right, 1), (wrong, 0)):
        line, record = nothing_to_learn(world, pairs, tmp_path / pairs.stem)
        assert f"(mean accuracy {accuracy:.3f}, failed episodes 0%)" in line
        told = record["metrics"]
        assert told["rollouts/oa_tau"] == told["reward/accuracy"] == accuracy
        assert (told["rollouts/telling_share"], told["rollouts/groups_kept"]) == (0, 0)

    # Without dynamic sampling it takes its steps, and learns nothing.
    more = {
        "items": {"kind": "file", "path": str(wrong)},
        "rollouts": {**SURE, "dynamic": False},
        "learn": {**values(world)["learn"], "steps": 1, "steps_per_refresh": 1},
        "optimizer": {"kind": "adamw", "weight_decay": 0.0},
    }
    out = tmp_path / "learns"
    assert run_grpo(grpo_settings(values(world, **more)), out) == out / "model"
    (line,) = metrics(out)
    assert line["rollouts/dead_groups"] == 1
    assert line["rollouts/oa_tau"] == line["reward/accuracy"] == 0
    assert line["optim/grad_norm"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_a_judge_that_never_calls_is_trained_and_counted_so(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(resolve_checkpoint("nano"), base)
    stored = json.loads((base / "vrthinker.json").read_text())
    stored["episode"]["max_rounds"] = 1
    (base / "vrthinker.json").write_text(json.dumps(stored))
    learn = {**values(world)["learn"], "steps": 1, "steps_per_refresh": 1}
    out = tmp_path / "run"
    assert run_grpo(grpo_settings(values(world, model=str(base), learn=learn)), out) == out / "model"
    (line,) = metrics(out)
    assert (line["rollouts/tool_calls"], line["rollouts/rounds"]) == (0, 1)
    assert line["reward/exploration"] == line["reward/cot_gain"] == 0
    assert line["drift/mean"] < 1e-5
    assert {len(trajectory.rounds) for trajectory in episodes(out)} == {1}


@pytest.mark.slow
def test_training_that_differs_from_sampling_ends_before_the_first_step(world: Path, tmp_path: Path) -> None:
    """Sampling in half precision differs, if only by a little."""
    more = {"loss": {"most_drift": 1e-6}, "rollouts": {**values(world)["rollouts"], "dtype": "bfloat16"}}
    out = tmp_path / "run"
    with pytest.raises(VRThinkerError, match=r"step 0: the training forward and the sampler differ by 0\.0"):
        run_grpo(grpo_settings(values(world, **more)), out)
    assert metrics(out) == []
    assert not any((out / "checkpoints").glob("step-*"))


# The reference of adapters


@pytest.mark.slow
def test_the_reference_of_adapters_is_the_base_without_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    real = VisionLanguageModel.__init__

    def counted(self: VisionLanguageModel, folder: Path, **options: Any) -> None:
        loaded.append(folder)
        real(self, folder, **options)

    monkeypatch.setattr(VisionLanguageModel, "__init__", counted)
    learn = {**values(world)["learn"], "steps_per_refresh": 1, "learning_rate": {"peak": 1e-2}}
    more = {"lora": {"rank": 4, "alpha": 8.0}, "train_vision": False, "learn": learn}
    run_grpo(grpo_settings(values(world, **more)), tmp_path / "run")
    kl = [line["kl/ref"] for line in metrics(tmp_path / "run")]
    assert kl[0] == pytest.approx(0.0, abs=1e-9), "adapters begin as nothing"
    assert kl[1] > 1e-8
    assert kl[2] > 1e-8
    assert len(loaded) == 2, "the policy and the sampler, and no reference"


# Kernels


@pytest.mark.slow
def test_with_and_without_kernels_twenty_steps_are_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = {**values(world)["learn"], "steps": 20}
    rollouts = {**values(world)["rollouts"], "dynamic": False}
    # The gradient of a key's bias is next to nothing, and AdamW makes whole steps of next to nothing.
    given = {"learn": learn, "rollouts": rollouts, "checkpoint_every": 20, "optimizer": {"eps": 1e-5}}
    settings = grpo_settings(values(world, **given))
    for version in ("cpu", "reference"):
        monkeypatch.setenv("VRTHINKER_KERNELS", version)
        run_grpo(settings, tmp_path / version)
    native, plain = (metrics(tmp_path / version) for version in ("cpu", "reference"))
    assert len(native) == len(plain) == 20
    for line, wanted in zip(native, plain, strict=True):
        assert line.keys() == wanted.keys()
        for name in line.keys() - {name for name in line if name.startswith("perf/")}:
            same = 1e-4 if name in EXTREMES else SAME
            assert line[name] == pytest.approx(wanted[name], rel=same, abs=same), (line["step"], name)
    texts = [[[r.text for r in t.rounds] for t in episodes(tmp_path / v)] for v in ("cpu", "reference")]
    assert sorted(texts[0]) == sorted(texts[1])
    found, wanted_weights = (
        load_file(tmp_path / version / "model" / "model.safetensors") for version in ("cpu", "reference")
    )
    base = load_file(resolve_checkpoint("nano") / "model.safetensors")
    for name, weights in wanted_weights.items():
        torch.testing.assert_close(found[name], weights, rtol=SAME, atol=SAME)
    moved = max(float((wanted_weights[name] - base[name].float()).abs().max()) for name in base)
    assert moved > 20 * SAME, "the runs went somewhere"


# Several processes


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rollouts": SURE}, "nothing to learn from: none of 4 groups"),
        ({"loss": {"most_drift": 1e-12}}, "the training forward and the sampler differ by"),
    ],
)
def test_what_all_processes_find_is_told_once(
    more: dict[str, Any], words: str, world: Path, ranked: Outcomes, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values(world, **more)))
    given = list(map(str, ["train", "grpo", "--recipe", recipe, "--out", tmp_path / "run"]))
    ended = ranked(jobs("command", 2, given=given), together=True)
    assert [outcome.get("result") for outcome in ended] == [1, 1], ended
    assert [outcome["stderr"].count(words) for outcome in ended] == [1, 0]
    assert "ended early" not in ended[0]["stderr"] + ended[1]["stderr"]
    assert metrics(tmp_path / "run") == [] or not (tmp_path / "run" / "metrics.jsonl").exists()
