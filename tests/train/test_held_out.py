"""Judging held-out pairs during a run: it changes nothing, is resumed with the run, and keeps the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest
import torch
from quick_judge import make_quick_judge
from safetensors.torch import load_file

from vrthinker.data.pairs import dump_pair, load_pairs
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.evals.pairs import PairsReport, labelled, report_of
from vrthinker.judge import Judge
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.records.verdicts import read_verdicts
from vrthinker.train.cold_start import cold_start_settings, run_cold_start
from vrthinker.train.held_out import BEST_FOLDER, EVALUATIONS_FOLDER, SCORE, best_score, load_held_out
from vrthinker.train.loop import loop as loop_module
from vrthinker.train.settings import HeldOutSettings
from vrthinker.world.files import PAIRS_FILE, make_world
from vrthinker.world.world import PRESETS

STEPS, EVERY = 5, 2


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out") / "world"
    make_world(folder, PRESETS["easy"], pairs=3, seed=71, workers=1)
    return folder / PAIRS_FILE


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """It moves the weights of a guided random judge so far that its judgments change."""
    base = make_quick_judge(tmp_path_factory.mktemp("base") / "base")
    return {
        "model": str(base),
        "seed": 2,
        "checkpoint_every": 3,
        "tracker": "none",
        "phases": [
            {
                "steps": STEPS,
                "batch_size": 2,
                "learning_rate": {"peak": 3e-3, "shape": "constant", "warmup_ratio": 0.0},
                "traces": {"kind": "world", "pairs": 3, "seed": 5, "calls": 1, "filter": False},
            }
        ],
    }


def trained(recipe: dict[str, Any], out: Path, pairs: Path | None, **evaluation: Any) -> Path:
    values = dict(recipe)
    if pairs is not None:
        values["evaluation"] = {"pairs": pairs, "every": EVERY, **evaluation}
    model = run_cold_start(cold_start_settings(values), out)
    assert model is not None
    return out


@pytest.fixture(scope="module")
def watched(recipe: dict[str, Any], pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(recipe, tmp_path_factory.mktemp("watched") / "run", pairs)


@pytest.fixture(scope="module")
def alone(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(recipe, tmp_path_factory.mktemp("alone") / "run", None)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def evaluations(run: Path) -> dict[int, dict[str, Any]]:
    """Step -> what its evaluation wrote."""
    found = {}
    for folder in sorted((run / EVALUATIONS_FOLDER).iterdir()):
        written = json.loads((folder / "eval.json").read_text())
        assert folder.name == f"step-{written['step']:08d}"
        found[written["step"]] = written
    return found


def test_a_run_that_is_watched_ends_in_the_same_bits(watched: Path, alone: Path) -> None:
    for name, tensor in weights(alone / "model").items():
        assert torch.equal(tensor, weights(watched / "model")[name]), name
    own = ("step", "loss/sft", "sft/token_accuracy", "optim/grad_norm", "optim/learning_rate")
    lines = [[line[name] for name in own] for line in read_metrics(alone / METRICS_FILE)]
    with_eval = [line for line in read_metrics(watched / METRICS_FILE) if line["step"] > 0]
    assert [[line[name] for name in own] for line in with_eval] == lines
    assert not (alone / EVALUATIONS_FOLDER).exists()
    assert not (alone / BEST_FOLDER).exists()


def test_every_evaluation_is_in_the_metrics_and_in_a_folder(watched: Path, pairs: Path) -> None:
    lines = {line["step"]: line for line in read_metrics(watched / METRICS_FILE)}
    due = [0, 2, 4, 5]
    assert [step for step, line in lines.items() if SCORE in line] == due
    assert "loss/sft" not in lines[0]
    written = evaluations(watched)
    assert list(written) == due
    labels = labelled(load_pairs(pairs))
    for step, evaluation in written.items():
        report = PairsReport.from_json(evaluation)
        folder = watched / EVALUATIONS_FOLDER / f"step-{step:08d}"
        assert report == report_of(labels, read_verdicts(folder / "verdicts.jsonl"))
        judged = report.judged["all"]
        assert judged["verdicts/share"].value == 1.0, "a guided judge always answers"
        assert lines[step][SCORE] == lines[step]["eval/oa_tau"] == judged["oa/tau"].value
        assert lines[step]["eval/ta_accuracy"] == judged["ta/accuracy"].value
        assert lines[step]["eval/sampled_tokens_per_round"] > 0
        episodes = list(load_trajectories(folder / "trajectories.jsonl"))
        assert [episode.id for episode in episodes] == [pair.id for pair in labels]
        assert all(episode.settings.temperature == 0 for episode in episodes)
        assert lines[step]["eval/seconds"] > 0


def test_the_last_evaluation_is_the_trained_judges_own(watched: Path, pairs: Path) -> None:
    """The policy judged itself as its checkpoint judges afterwards, in another process or on another day."""
    folder = watched / EVALUATIONS_FOLDER / f"step-{STEPS:08d}"
    written = {e.id: e for e in load_trajectories(folder / "trajectories.jsonl")}
    with Judge.from_pretrained(watched / "model", temperature=0.0) as judge:
        for finished in judge.judge_pairs(load_pairs(pairs)):
            assert finished.trajectory is not None
            mine = [r.token_ids for r in finished.trajectory.rounds]
            assert mine == [r.token_ids for r in written[finished.item.id].rounds]


def test_the_best_judge_is_kept(watched: Path, recipe: dict[str, Any], alone: Path) -> None:
    scores = {line["step"]: line[SCORE] for line in read_metrics(watched / METRICS_FILE) if SCORE in line}
    assert len(set(scores.values())) > 1, "the judgments change, so that there is a best step"
    step = max(scores, key=lambda step: (scores[step], -step))
    assert best_score(watched / METRICS_FILE, before=STEPS + 1) == (step, scores[step])
    kept = weights(watched / BEST_FOLDER)
    if step == STEPS:
        assert all(torch.equal(kept[name], tensor) for name, tensor in weights(alone / "model").items())
    elif step == 0:
        initial = weights(Path(recipe["model"]))
        assert all(torch.equal(kept[name], tensor) for name, tensor in initial.items())
    for name in ("vrthinker.json", "tokenizer.json", "vrthinker_prompts/system.jinja"):
        assert (watched / BEST_FOLDER / name).read_bytes() == (watched / "model" / name).read_bytes()


@pytest.mark.slow
def test_a_resumed_run_evaluates_what_is_left(
    watched: Path, recipe: dict[str, Any], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails after step 4 was evaluated; the last checkpoint is that of step 3."""
    out = tmp_path / "run"

    def broken(*_: object) -> None:
        raise VRThinkerError("no room")

    with monkeypatch.context() as patch:
        usual = loop_module._Loop._log

        def log(self: Any, logged: Any) -> None:
            usual(self, logged)
            if self.step == 4:
                broken()

        patch.setattr(loop_module._Loop, "_log", log)
        with pytest.raises(VRThinkerError, match="no room"):
            trained(recipe, out, pairs)
    stale = out / EVALUATIONS_FOLDER / "step-00000004" / "eval.json"
    stale.write_text("{}")
    trained(recipe, out, pairs)
    names = [name for name in ("step", SCORE, "eval/oa_diff", "eval/tool_calls_mean", "loss/sft")]
    lines = [[line.get(name) for name in names] for line in read_metrics(out / METRICS_FILE)]
    assert lines == [[line.get(name) for name in names] for line in read_metrics(watched / METRICS_FILE)]
    for folder in ("model", BEST_FOLDER):
        one, other = weights(out / folder), weights(watched / folder)
        assert all(torch.equal(one[name], other[name]) for name in one), folder
    mine, theirs = evaluations(out), evaluations(watched)
    assert {step: one["judged"] for step, one in mine.items()} == {
        step: one["judged"] for step, one in theirs.items()
    }


def test_the_best_step_is_the_earliest_of_equals(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    assert best_score(path, before=9) is None
    scores = {0: 0.25, 10: 0.5, 20: None, 30: 0.5, 40: 0.75}
    rows = [{"step": step, "time_seconds": 0.0, SCORE: score} for step, score in scores.items()]
    rows.insert(1, {"step": 5, "time_seconds": 0.0, "loss/sft": 9.0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert best_score(path, before=40) == (10, 0.5)
    assert best_score(path, before=41) == (40, 0.75)
    assert best_score(path, before=0) is None


def test_pairs_that_are_learned_from_are_said(
    recipe: dict[str, Any], watched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**recipe, "phases": [{**recipe["phases"][0], "steps": 1}]}
    data = watched / "data"
    (learned,) = list(data.glob("**/" + PAIRS_FILE))
    trained(values, tmp_path / "run", learned, limit=2)
    said = capsys.readouterr().err
    assert "held-out pairs: 2 of 2 pairs are learned from too" in said
    assert "held-out pairs after step 1: score " in said


def test_a_pair_that_is_learned_from_is_known_in_either_order(
    watched: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = load_pairs(pairs)[0]
    turned = pair.model_copy(update={"video_1": pair.video_2, "video_2": pair.video_1})
    (tmp_path / "turned.jsonl").write_text(dump_pair(turned, tmp_path))
    traces = load_trajectories(watched / EVALUATIONS_FOLDER / "step-00000000" / "trajectories.jsonl")
    load_held_out(HeldOutSettings(pairs=tmp_path / "turned.jsonl"), traces, seed=0)
    assert "1 of 1 pair are learned from too" in capsys.readouterr().err


def test_pairs_without_labels_are_refused_and_leave_no_folder(
    recipe: dict[str, Any], pairs: Path, tmp_path: Path
) -> None:
    rows = [{**json.loads(line), "labels": None} for line in pairs.read_text().splitlines()]
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"held-out pairs: .*bare\.jsonl: pairs: got none with a label"):
        trained(recipe, out, bare)
    assert not out.exists()


def test_an_engine_over_a_model_that_is_trained_leaves_it_as_it_is(recipe: dict[str, Any]) -> None:
    policy = VisionLanguageModel(Path(recipe["model"]), device=torch.device("cpu"), dtype=torch.float32)
    policy.model.requires_grad_(True).train()
    engine = HFEngine(policy)
    assert engine.model is policy
    engine.shutdown()
    assert policy.model.training
    assert all(parameter.requires_grad for parameter in policy.model.parameters())
    with pytest.raises(InputError, match="allowed for a loaded model: None"):
        HFEngine(policy, device="cpu")
