"""Cold start, whole: small runs from nothing and from checkpoints, stopped, resumed, and what they leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest
import torch
import yaml
from command_worker import at, command
from forks import Outcomes
from quick_judge import make_quick_judge
from safetensors.torch import load_file

from vrthinker.data.pairs import load_pairs
from vrthinker.engine.hf.tiny import make_tiny
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import PROMPTS_FOLDER, EpisodeSettings, JudgeSettings, load_judge_settings
from vrthinker.episode.trajectory import dump_line, load_trajectories
from vrthinker.errors import InputError, VideoError
from vrthinker.judge import Judge
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.records.run_lock import lock_run
from vrthinker.train.cold_start import (
    ColdStartSettings,
    cold_start_settings,
    resume_settings,
    run_cold_start,
)
from vrthinker.train.frame_phase import FramePhase, FrameWorld
from vrthinker.train.loop.checkpoint import latest_checkpoint
from vrthinker.train.loop.optimizer import AdamWSettings, MuonSettings
from vrthinker.train.loop.schedule import LearningRate
from vrthinker.train.settings import load_recipe
from vrthinker.train.sft import TRACES_FILE, Start, in_their_memory
from vrthinker.train.trace_sources import FileTraces, WorldTraces, sources_of
from vrthinker.visibility import MemoryMode
from vrthinker.world.files import PAIRS_FILE, load_truths, make_world
from vrthinker.world.nano import nano_templates
from vrthinker.world.oracle import OracleEngine, truths_by_clip
from vrthinker.world.world import PRESETS

STEPS = 42
OVERFIT: dict[str, Any] = {
    "model": "nano-from-nothing",
    "seed": 1,
    "note": "knows two pairs",
    "clips": "synthetic",
    "optimizer": {"kind": "muon", "matrix_rate": 3.0},
    "checkpoint_every": 20,
    "phases": [
        {
            "name": "episodes",
            "steps": STEPS,
            "batch_size": 2,
            "micro_batch_size": 2,
            "learning_rate": {"peak": 1e-2, "warmup_ratio": 0.05, "final_ratio": 0.2},
            "traces": {"kind": "world", "pairs": 2, "calls": 1, "seed": 3, "filter": False},
        }
    ],
}
THREE_BY_ADAMW: dict[str, Any] = {
    **OVERFIT,
    "optimizer": {"beta2": 0.98},
    "phases": [
        {
            **OVERFIT["phases"][0],
            "steps": 100,
            "batch_size": 3,
            "micro_batch_size": 3,
            "learning_rate": {"peak": 6e-3, "warmup_ratio": 0.1, "final_ratio": 0.1},
            "traces": {**OVERFIT["phases"][0]["traces"], "pairs": 3},
        }
    ],
}
SHORT: dict[str, Any] = {
    "model": "nano-from-nothing",
    "checkpoint_every": 2,
    "phases": [
        {
            "name": "lessons",
            "steps": 3,
            "batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": {"peak": 1e-3, "shape": "constant"},
            "traces": {
                "kind": "world", "pairs": 5, "seed": 11, "lesson_frames": 2, "filter": False,
                "learned": "snapshots",
                "mix": {"oracle": 0, "immediate": 1},
            },
        },
        {
            "name": "episodes",
            "batch_size": 2,
            "learning_rate": {"peak": 2e-3, "warmup_ratio": 1.0},
            "traces": {"kind": "world", "pairs": 5, "seed": 11, "calls": 1, "filter": False},
        },
    ],
}  # fmt: skip
"""Two phases that share a world; the second makes one pass over its sequences."""
THREE_KINDS: dict[str, Any] = {
    **SHORT,
    "phases": [
        {
            "kind": "frames",
            "steps": 3,
            "clips_per_step": 3,
            "frames_per_clip": 4,
            "learning_rate": {"peak": 1e-3},
            "worlds": [{"pairs": 2, "seed": 17, "world": {"frames": [16, 20]}}],
        },
        {**SHORT["phases"][0], "steps": 2, "freeze_vision": True},
        {
            "steps": 2,
            "batch_size": 2,
            "learning_rate": {"peak": 1e-3},
            "traces": {"kind": "mixed", "of": [
                {"kind": "world", "pairs": 2, "seed": 11, "calls": 1, "filter": False},
                {"kind": "world", "pairs": 2, "seed": 12, "filter": False, "world": {"frames": [16, 20]}},
            ]},
        },
    ],
}  # fmt: skip
"""A phase of each kind: frames, traces without the tower, and traces of several worlds."""


def started(values: dict[str, Any], out: Path) -> Path:
    trained = run_cold_start(cold_start_settings(values), out)
    assert trained is not None
    return trained


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / METRICS_FILE)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def overfit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned two pairs by heart."""
    out = tmp_path_factory.mktemp("overfit") / "run"
    assert started(OVERFIT, out) == out / "model"
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    make_world(folder, PRESETS["easy"], pairs=4, seed=21, workers=1)
    return folder


@pytest.fixture(scope="module")
def taught(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's trajectories, at the package's own frame sizes, in few words."""
    return teach(world, tmp_path_factory.mktemp("taught"), "rerender")


def teach(world: Path, folder: Path, memory: MemoryMode) -> Path:
    engine = OracleEngine(truths_by_clip(world, load_truths(world)), calls=2)
    record = folder / "traces.jsonl"
    judge = Judge(engine, JudgeSettings(episode=EpisodeSettings(memory=memory)), templates=nano_templates())
    with judge, record.open("w") as stream:
        for done in judge.judge_pairs(load_pairs(world / PAIRS_FILE)):
            assert done.trajectory is not None
            stream.write(dump_line(done.trajectory))
    return record


def test_a_judge_keeps_to_the_memory_mode_of_its_traces(
    taught: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = list(load_trajectories(taught))
    evicted = [
        t.model_copy(update={"settings": t.settings.model_copy(update={"memory": "evict"})}) for t in traces
    ]
    start = Start(taught.parent, nano_templates(), JudgeSettings(), None)  # type: ignore[arg-type]
    assert in_their_memory(start, traces) is start
    assert in_their_memory(start, []) is start
    assert capsys.readouterr().err == ""
    assert in_their_memory(start, evicted).judge_settings.episode.memory == "evict"
    assert "made under memory evict, so the trained judge judges under it too" in capsys.readouterr().err
    with pytest.raises(
        InputError, match=r"traces: memory: got .* under rerender and 1 under evict, allowed: all under one"
    ):
        in_their_memory(start, [*traces, evicted[0]])


# A run from nothing


def test_the_loss_falls_and_the_run_has_everything(overfit: Path) -> None:
    lines = metrics_of(overfit)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    losses = [line["loss/sft"] for line in lines]
    assert losses[0] > 4
    assert losses[-1] < 0.1
    assert lines[-1]["sft/token_accuracy"] == pytest.approx(1.0, abs=0.01)
    assert {line["sft/tokens"] for line in lines} == {lines[0]["sft/tokens"]}, "all sequences every step"
    rate = LearningRate(**OVERFIT["phases"][0]["learning_rate"])
    assert [line["optim/learning_rate"] for line in lines] == [rate.at(step, STEPS) for step in range(STEPS)]

    config = json.loads((overfit / "config.json").read_text())
    assert cold_start_settings(config) == cold_start_settings(OVERFIT) == resume_settings(overfit)
    assert config["phases"][0]["traces"]["world"]["size"] == 112, "resolved: defaults are spelled out"
    assert {"date", "command", "commit", "machine", "versions"} <= json.loads(
        (overfit / "provenance.json").read_text()
    ).keys()
    checkpoint = latest_checkpoint(overfit)
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    kept = [path.name for path in sorted((overfit / "checkpoints").iterdir())]
    assert kept == ["step-00000040", f"step-{STEPS:08d}"]
    assert not [path.name for path in overfit.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def without_dtype(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: without_dtype(value) for key, value in config.items() if key != "dtype"}


def what_configures(config: Any) -> Any:
    """Without what a version of transformers writes once and leaves out after loading, or the other way.

    That is the dtype of each part, and (5.17) `initializer_range` outside the parts, which only a model built
    from a config carries; the parts have their own.
    """
    plain = without_dtype(config)
    if "text_config" in plain:
        plain.pop("initializer_range", None)
    return plain


def test_the_exported_judge_is_a_checkpoint_with_its_prompts_and_settings(overfit: Path) -> None:
    base, model = overfit / "initial", overfit / "model"
    assert {path.name for path in model.iterdir()} == {path.name for path in base.iterdir()}
    stored, before = load_judge_settings(model), load_judge_settings(base)
    assert stored is not None
    assert before is not None
    assert (stored.note, stored.clips) == ("knows two pairs", "synthetic")
    assert stored == before.model_copy(update={"note": stored.note, "clips": stored.clips})
    prompts = [PromptTemplates.load(folder / PROMPTS_FOLDER).digest for folder in (base, model)]
    assert prompts[0] == prompts[1]
    for name in ("config.json", "generation_config.json"):
        written, given = (what_configures(json.loads((f / name).read_text())) for f in (model, base))
        if name == "config.json":  # the rotary embedding's settings, as transformers 4 reads them
            rope = dict(given["text_config"]["rope_parameters"])
            assert written["text_config"].pop("rope_theta") == rope.pop("rope_theta") == 1e6
            assert written["text_config"].pop("rope_scaling") == {**rope, "type": "default"}
        assert written == given, name
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    ):
        assert (model / name).read_bytes() == (base / name).read_bytes(), name
    assert (model / "model.safetensors").stat().st_mode & 0o777 == 0o644
    trained, fresh = weights_of(model), weights_of(base)
    assert trained.keys() == fresh.keys()
    assert all(trained[name].dtype == torch.float32 for name in trained)
    changed = {name for name in trained if not torch.equal(trained[name], fresh[name])}
    assert changed == trained.keys(), "everything is trained"


def test_an_overfit_judge_writes_its_teachers_text(overfit: Path) -> None:
    assert_writes_its_teachers_text(overfit)


@pytest.mark.slow
def test_three_pairs_are_learned_by_adamw(tmp_path: Path) -> None:
    started(THREE_BY_ADAMW, tmp_path / "run")
    assert_writes_its_teachers_text(tmp_path / "run")


def assert_writes_its_teachers_text(overfit: Path) -> None:
    """Greedily, round by round: masking, positions, frames and turns are those of the engine."""
    (record,) = (overfit / "data").glob("*/traces/*.jsonl")
    taught = {trace.id: trace for trace in load_trajectories(record)}
    assert max(len(trace.rounds) for trace in taught.values()) == 2
    pairs = load_pairs(record.parents[1] / PAIRS_FILE)
    with Judge.from_pretrained(overfit / "model", device="cpu") as judge:
        for done in judge.judge_pairs(pairs):
            assert done.trajectory is not None
            trace = taught[done.item.id]
            assert [r.text for r in done.trajectory.rounds] == [r.text for r in trace.rounds]
            told = {"probabilities": None, "probabilities_reason": None}  # the oracle has none
            assert done.trajectory.outcome.model_copy(update=told) == trace.outcome.model_copy(update=told)
            assert [r.live for r in done.trajectory.rounds] == [r.live for r in trace.rounds]
            assert all(r.finish_reason == "stop" for r in done.trajectory.rounds), "it ends its turns itself"
        verdict = judge(pairs[0].prompt, pairs[0].video_1, pairs[0].video_2)
        assert "knows two pairs" in verdict.notes
        assert verdict.judgments == taught[pairs[0].id].outcome.judgments


def test_phases_follow_each_other(tmp_path: Path) -> None:
    started(SHORT, tmp_path / "run")
    lines = metrics_of(tmp_path / "run")
    worlds = list((tmp_path / "run" / "data").iterdir())
    assert len(worlds) == 1, "sources that differ only in what is done share their world"
    assert len(list((worlds[0] / "traces").iterdir())) == 2
    rates = [line["optim/learning_rate"] for line in lines]
    first, second = LearningRate(peak=1e-3, shape="constant"), LearningRate(peak=2e-3, warmup_ratio=1.0)
    passes = len(lines) - 3
    assert rates == [first.at(i, 3) for i in range(3)] + [second.at(i, passes) for i in range(passes)]
    (episodes,) = (p for p in worlds[0].glob("traces/*") if len(p.read_bytes()) == max(
        len(other.read_bytes()) for other in worlds[0].glob("traces/*")
    ))  # fmt: skip
    # One round of a window of 1 expires nothing, so at one call a trace is one sequence.
    assert passes == len(list(load_trajectories(episodes))) // 2 == 2
    lessons, whole = (line["sft/tokens"] for line in (lines[0], lines[-1]))
    assert lessons / 4 < whole / 2, "lessons learn snapshots only"


def test_micro_batches_are_one_step(tmp_path: Path) -> None:
    """A token weighs the same, whatever its sequence's length and its micro-batch's size."""
    found = []
    for size in (1, 3):
        phase = {**SHORT["phases"][1], "steps": 1, "batch_size": 4, "micro_batch_size": size}
        values = {**SHORT, "phases": [phase]}
        started(values, tmp_path / str(size))
        found += metrics_of(tmp_path / str(size))
    for name in ("loss/sft", "optim/grad_norm", "sft/token_accuracy", "sft/tokens"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)
    assert 4 < found[0]["loss/sft"] < 9, "a mean over tokens, of which nothing is known yet"


def test_packs_padded_batches_and_short_packs_learn_the_same(tmp_path: Path) -> None:
    """All traces are one step, so that it is the same step, however their contexts are computed."""
    found = {}
    ways: dict[str, dict[str, Any]] = {
        "packs": {"micro_batch_size": 2},
        "short packs": {"micro_batch_size": 2, "max_pack_tokens": 200},
        "padded": {"packed": False, "batch_size": 64, "micro_batch_size": 64},
    }
    for name, changes in ways.items():
        phase = {**SHORT["phases"][1], "steps": 1, "batch_size": 5, **changes}
        started({**SHORT, "phases": [phase]}, tmp_path / name)
        (found[name],) = metrics_of(tmp_path / name)
        (record,) = json.loads((tmp_path / name / TRACES_FILE).read_text())["phases"]
        assert record["unit"] == ("contexts" if name == "padded" else "traces")
    for measured in ("loss/sft", "optim/grad_norm", "sft/token_accuracy", "sft/tokens"):
        values = [metrics[measured] for metrics in found.values()]
        assert values == pytest.approx([values[0]] * 3, rel=1e-4), measured


def test_a_run_that_began_with_padded_batches_is_not_resumed_with_packs(tmp_path: Path) -> None:
    phase = {**SHORT["phases"][1], "steps": 1}
    run = tmp_path / "run"
    started({**SHORT, "phases": [phase]}, run)
    traces = json.loads((run / TRACES_FILE).read_text())
    del traces["phases"][0]["unit"]  # as an older version left it
    (run / TRACES_FILE).write_text(json.dumps(traces))
    with pytest.raises(InputError, match=r"began by counting contexts; write .packed.: false into"):
        run_cold_start(resume_settings(run), run)
    config = json.loads((run / "config.json").read_text())
    config["phases"][0]["packed"] = False
    (run / "config.json").write_text(json.dumps(config))
    assert run_cold_start(resume_settings(run), run) == run / "model"


# Stopped and resumed


@pytest.mark.multi_process
def test_killed_and_resumed_it_ends_in_the_same_bits(run: Path, commands: Outcomes) -> None:
    recipe = run.parent / "short.yaml"
    recipe.write_text(yaml.safe_dump(THREE_KINDS))
    straight, broken = run / "straight", run / "broken"

    begin, resume = ("train", "cold-start", "--recipe", recipe, "--out"), ("train", "cold-start", "--resume")
    backward = "torch:Tensor.backward"  # once a step of frames, then twice: micro-batches of two, and of one
    outcomes = commands(
        [
            command(*begin, straight),
            command(*begin, broken, moments=[at(backward, 3, "SIGKILL")]),  # behind the checkpoint of step 2
            command(*resume, broken, moments=[at(backward, 3, "SIGTERM")]),
            command(*resume, broken),
        ]
    )
    whole, killed, stopped, resumed = outcomes
    assert whole["result"] == 0, whole
    assert whole["stdout"] == f"{straight / 'model'}\n"
    assert killed["code"] == -9
    assert stopped["result"] == 130, stopped
    assert stopped["stdout"] == ""
    hint = f"vrthinker train cold-start --resume {broken} goes on"
    assert stopped["stderr"].count(hint) == 1, stopped["stderr"]
    assert "step-00000002" in stopped["stderr"], "it goes on in the middle of the frames"
    assert "got SIGTERM, stopped after step 4 of 7; checkpoint" in stopped["stderr"]
    assert resumed["result"] == 0, resumed
    assert "resumed from" in resumed["stderr"]
    models = [folder / "model" / "model.safetensors" for folder in (straight, broken)]
    assert models[0].read_bytes() == models[1].read_bytes()
    names = {str(f.relative_to(straight / "model")) for f in (straight / "model").rglob("*")}
    assert names == {str(f.relative_to(broken / "model")) for f in (broken / "model").rglob("*")}
    losses = [[line["loss/sft"] for line in metrics_of(folder)] for folder in (straight, broken)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 7
    phases = json.loads((straight / TRACES_FILE).read_text())["phases"]
    assert [phase["traces"]["kind"] for phase in phases] == ["frames", "world", "mixed"]


def test_another_config_in_the_folder_is_refused_and_named(overfit: Path) -> None:
    before = (overfit / "config.json").read_bytes()
    for change, words in (
        ({"seed": 2}, "seed=1; this run has seed=2"),
        ({"train_vision": False}, "train_vision=true; this run has train_vision=false"),
        (
            {"phases": [{**OVERFIT["phases"][0], "steps": STEPS + 1}]},
            f"phases.0.steps={STEPS}; this run has phases.0.steps={STEPS + 1}",
        ),
    ):
        with pytest.raises(InputError) as caught:
            run_cold_start(cold_start_settings({**OVERFIT, **change}), overfit)
        assert f"{overfit}: was made with {words}" in str(caught.value)
        assert len(str(caught.value)) < 400
    assert (overfit / "config.json").read_bytes() == before


def test_a_run_of_an_older_version_that_lacks_a_setting_is_resumed(overfit: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(overfit, run)
    config = json.loads((run / "config.json").read_text())
    del config["train_vision"]
    (run / "config.json").write_text(json.dumps(config))
    assert run_cold_start(resume_settings(run), run) == run / "model"
    with pytest.raises(InputError, match="train_vision=nothing; this run has train_vision=false"):
        run_cold_start(cold_start_settings({**OVERFIT, "train_vision": False}), run)


def test_a_first_try_that_could_not_begin_binds_nothing(tmp_path: Path, taught: Path, world: Path) -> None:
    out = tmp_path / "run"
    phase = {"steps": 1, "batch_size": 2, "traces": {"kind": "file", "path": tmp_path / "none.jsonl"}}
    with pytest.raises(InputError, match=r"none\.jsonl"):
        run_cold_start(cold_start_settings({"model": "nano-from-nothing", "phases": [phase]}), out)
    phase["traces"] = {"kind": "file", "path": taught}
    with pytest.raises(InputError, match="no-such-model"):
        started({"model": str(tmp_path / "no-such-model"), "phases": [phase]}, out)
    started({"model": "nano-from-nothing", "phases": [phase]}, out)


def test_a_half_written_start_is_written_again(tmp_path: Path) -> None:
    """What a process that was killed while it wrote the initial weights leaves behind."""
    out = tmp_path / "run"
    (out / ".initial.new").mkdir(parents=True)
    (out / ".initial.new" / "config.json").write_text("{")
    (out / ".initial.new" / "junk.json").write_text("{")
    (out / ".model.0123").mkdir()
    values = {**SHORT, "phases": [{**SHORT["phases"][0], "steps": 1}]}
    started(values, out)
    left = [path.name for path in out.iterdir() if path.name.startswith((".initial", ".model"))]
    assert left == []
    assert not (out / "model" / "junk.json").exists()


def test_one_process_trains_into_a_folder(tmp_path: Path, commands: Outcomes) -> None:
    recipe = tmp_path / "short.yaml"
    recipe.write_text(yaml.safe_dump(SHORT))
    out = tmp_path / "run"
    with lock_run(out):
        (refused,) = commands([command("train", "cold-start", "--recipe", recipe, "--out", out)])
    assert refused["result"] == 1
    assert "another process trains into it" in refused["stderr"]
    assert not (out / "config.json").exists()


def test_resuming_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        resume_settings(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="no run to resume"):
        resume_settings(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"no run to resume \(.*more than 64 levels"):
        resume_settings(tmp_path)
    (tmp_path / "config.json").write_text('{"model": "x", "grpo": 1}')
    with pytest.raises(InputError, match="cold start: phases"):
        resume_settings(tmp_path)


# From a checkpoint


def test_a_judge_of_evict_traces_evicts(world: Path, tmp_path: Path) -> None:
    base = make_quick_judge(tmp_path / "base")
    assert load_judge_settings(base).episode.memory == "rerender"
    model = fine_tuned(base, teach(world, tmp_path, "evict"), tmp_path / "run")
    assert load_judge_settings(model).episode.memory == "evict"


def fine_tuned(base: Path, taught: Path, out: Path, steps: int = 1, **more: Any) -> Path:
    traces = {"kind": "file", "path": taught}
    phase = {"steps": steps, "batch_size": 2, "learning_rate": {"peak": 1e-3}, "traces": traces}
    return started({"model": str(base), "phases": [phase], **more}, out)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_fine_tuning_keeps_prompts_and_settings_and_the_judge_judges(
    family: Any, taught: Path, world: Path, tmp_path: Path
) -> None:
    base = make_quick_judge(tmp_path / "base", family)
    (base / PROMPTS_FOLDER / "system.jinja").write_text("You judge {{ n_frames }} frames.", "utf-8")
    (base / "pytorch_model.bin").touch()
    (base / "LICENSE").write_text("a license")
    model = fine_tuned(base, taught, tmp_path / "run", steps=2)
    lines = metrics_of(tmp_path / "run")
    assert lines[-1]["loss/sft"] < lines[0]["loss/sft"]
    assert load_judge_settings(model) == load_judge_settings(base)
    assert (model / PROMPTS_FOLDER / "system.jinja").read_text("utf-8") == "You judge {{ n_frames }} frames."
    assert (model / "LICENSE").read_text() == "a license"
    assert not (model / "pytorch_model.bin").exists()
    pair = load_pairs(world / PAIRS_FILE)[0]
    with Judge.from_pretrained(model, device="cpu") as judge:
        verdict = judge(pair.prompt, pair.video_1, pair.video_2)
    assert verdict.judgments is not None, "the base is guided, and so is what was made of it"


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_a_base_without_settings_gets_the_defaults_on_its_own_grid(
    family: Any, taught: Path, tmp_path: Path
) -> None:
    """Exported settings must be those of the model, or it could not be loaded."""
    base = make_tiny(tmp_path / "base", family)
    model = fine_tuned(base, taught, tmp_path / "run", note="x")
    with (
        Judge.from_pretrained(model, device="cpu") as judge,
        Judge.from_pretrained(base, device="cpu") as plain,
    ):
        assert judge.settings == plain.settings.model_copy(update={"note": "x"})
        assert judge.settings.resize.patch_size == (16 if family == "qwen3-vl" else 14)


def test_settings_of_another_grid_are_refused(taught: Path, tmp_path: Path) -> None:
    base = make_quick_judge(tmp_path / "base", "qwen3-vl")
    stored = json.loads((base / "vrthinker.json").read_text())
    stored["resize"]["patch_size"] = 14
    (base / "vrthinker.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"resize\.patch_size: got 14, the model has 16"):
        fine_tuned(base, taught, tmp_path / "run")


def test_a_frozen_tower_stays_as_it_was_bit_by_bit(taught: Path, tmp_path: Path) -> None:
    base = make_quick_judge(tmp_path / "base", "qwen2.5-vl")
    before = weights_of(base)
    for train_vision in (False, True):
        out = tmp_path / f"run-{train_vision}"
        model = fine_tuned(base, taught, out, train_vision=train_vision)
        after = weights_of(model)
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(after[name], before[name])}
        tower = {name for name in before if name.startswith("visual.") or ".visual." in name}
        assert 10 < len(tower) < len(before)
        assert changed & tower == (tower if train_vision else set())
        assert before.keys() - tower == changed - tower


def test_a_phase_may_leave_the_tower_as_it_is(taught: Path, tmp_path: Path) -> None:
    """The tower of a run that trains it changes in the other phases only."""
    base = make_quick_judge(tmp_path / "base", "qwen2.5-vl")
    phase = {
        "steps": 1,
        "batch_size": 2,
        "learning_rate": {"peak": 1e-3},
        "traces": {"kind": "file", "path": taught},
    }
    weights = {"base": weights_of(base)}
    for name, frozen in (("frozen", [True]), ("both", [True, False])):
        phases = [{**phase, "freeze_vision": freeze} for freeze in frozen]
        values = {"model": str(base), "optimizer": {"weight_decay": 0.1}, "phases": phases}
        weights[name] = weights_of(started(values, tmp_path / name))
    tower = {name for name in weights["base"] if name.startswith("visual.") or ".visual." in name}
    changed = [
        {name for name in weights["base"] if not torch.equal(weights[run][name], weights["base"][name])}
        for run in ("frozen", "both")
    ]
    assert changed[0] == weights["base"].keys() - tower, "not even by weight decay"
    assert changed[1] == weights["base"].keys()
    losses = [metrics_of(tmp_path / name)[0]["loss/sft"] for name in ("frozen", "both")]
    assert losses[0] == losses[1]


def test_a_phase_learns_from_a_file_and_a_world_together(
    taught: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources: list[dict[str, Any]] = [
        {"kind": "file", "path": taught},
        {"kind": "world", "pairs": 3, "seed": 12, "mix": {"oracle": 0, "immediate": 1}},
        {"kind": "file", "path": taught, "pairs": world / PAIRS_FILE},
    ]
    base = make_quick_judge(tmp_path / "base", "qwen2.5-vl")
    phase = {"name": "mixed", "steps": 1, "batch_size": 4, "traces": {"kind": "mixed", "of": sources}}
    values = {"model": str(base), "phases": [phase]}
    started(values, tmp_path / "run")
    said = capsys.readouterr().err
    (kept,) = json.loads((tmp_path / "run" / TRACES_FILE).read_text())["phases"]
    assert kept["traces"] == {
        "kind": "mixed",
        "of": [
            {"kind": "file", "path": str(taught), "pairs": None},
            {"kind": "world", "pairs": 3},
            {"kind": "file", "path": str(taught), "pairs": str(world / PAIRS_FILE)},
        ],
    }
    assert kept["checked"] == "form", "of one file nobody checked the labels"
    assert kept["read"] == 4 + 3 + 4
    assert 8 <= kept["kept"] < 11
    assert sum(kept["dropped"].values()) == 11 - kept["kept"]
    assert f"cold start: phase mixed: kept {kept['kept']} of 11 traces" in said
    assert said.count("without pairs, nobody checks") == 1
    assert resume_settings(tmp_path / "run") == cold_start_settings(values)

    exchanged = {**phase, "traces": {"kind": "mixed", "of": sources[::-1]}}
    with pytest.raises(InputError, match=r"was made with phases\.0\.traces\.of"):
        started({**values, "phases": [exchanged]}, tmp_path / "run")
    gone = {
        **phase,
        "traces": {"kind": "mixed", "of": [sources[1], {"kind": "file", "path": tmp_path / "none"}]},
    }
    with pytest.raises(InputError, match="No such file"):
        started({**values, "phases": [gone]}, tmp_path / "other")
    assert not (tmp_path / "other").exists(), "files are read before anything is made"


def test_runs_that_cannot_be(taught: Path, world: Path, tmp_path: Path) -> None:
    base = make_quick_judge(tmp_path / "base", "qwen2.5-vl")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 300
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"phase cold-start: a trace has \d+ tokens, the model allows 300"):
        fine_tuned(base, taught, tmp_path / "a")
    wrong = tmp_path / "wrong.jsonl"
    rows = [json.loads(line) for line in (world / PAIRS_FILE).read_text().splitlines()]
    for row in rows:
        row["labels"] = {code: (label + 1) % 3 for code, label in row["labels"].items()}
    wrong.write_text("".join(json.dumps(row) + "\n" for row in rows))
    phase = {"traces": {"kind": "file", "path": taught, "pairs": wrong}}
    with pytest.raises(InputError, match="kept 0 of 4 traces"):
        started({"model": "nano-from-nothing", "phases": [phase]}, tmp_path / "b")
    guess = {"kind": "world", "pairs": 2, "seed": 3, "mix": {"oracle": 0, "immediate": 1}}
    with pytest.raises(InputError, match="phase cold-start: no trace passes the filters"):
        started({"model": "nano-from-nothing", "phases": [{"traces": guess}]}, tmp_path / "c")
    with pytest.raises(InputError, match="cannot be used as a run folder"):
        started(SHORT, wrong)


def test_a_run_says_and_records_what_it_learns_from(
    taught: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, pairs, traces = (
        make_quick_judge(tmp_path / "base", "qwen2.5-vl"),
        world / "labels.jsonl",
        tmp_path / "t",
    )
    rows = [json.loads(line) for line in (world / PAIRS_FILE).read_text().splitlines()]
    rows[2]["labels"]["TA"] = (rows[2]["labels"]["TA"] + 1) % 3
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copyfile(taught, traces)
    source = {"kind": "file", "path": traces, "pairs": pairs}
    values = {"model": str(base), "phases": [{"name": "two", "steps": 1, "batch_size": 1, "traces": source}]}
    started(values, tmp_path / "run")
    said = capsys.readouterr().err
    assert "cold start: phase two: kept 3 of 4 traces (1 wrong in TA)\n" in said
    assert "without pairs" not in said
    (phase,) = json.loads((tmp_path / "run" / TRACES_FILE).read_text())["phases"]
    assert (phase["phase"], phase["steps"], phase["read"], phase["kept"]) == ("two", 1, 4, 3)
    assert (phase["checked"], phase["dropped"]) == ("form and labels", {"wrong in TA": 1})
    assert [dropped["id"] for dropped in phase["dropped_traces"]] == [rows[2]["id"]]
    assert started(values, tmp_path / "run"), "the same traces: a finished run"

    lines = taught.read_text().splitlines(keepends=True)
    old = [json.loads(line) for line in lines[:2]]
    for video in old[0]["videos"]:
        del video["size_bytes"], video["sha256"]
    traces.write_text("".join(json.dumps(line) + "\n" for line in old))
    with pytest.raises(InputError, match="phase two: its traces are not those that this run began with"):
        started(values, tmp_path / "run")
    (tmp_path / "run" / TRACES_FILE).write_text("[]")
    with pytest.raises(InputError, match="phase two: its traces are not those that this run began with"):
        started(values, tmp_path / "run")
    capsys.readouterr()
    source["pairs"] = None
    started(values, tmp_path / "other")
    said = capsys.readouterr().err
    assert "cold start: phase two: kept 2 of 2 traces\n" in said
    assert "cold start: phase two: without pairs, nobody checks whether these traces are right\n" in said
    assert "phase two: 1 of them do not say what was in their clips" in said


def test_a_clip_that_is_gone_ends_the_run_with_one_line(taught: Path, world: Path, tmp_path: Path) -> None:
    there = tmp_path / "world"
    shutil.copytree(world, there)
    moved = tmp_path / "traces.jsonl"
    moved.write_text(taught.read_text().replace(str(world), str(there)))
    base = make_quick_judge(tmp_path / "base", "qwen2.5-vl")
    victim = sorted((there / "clips").iterdir())[2]
    victim.unlink()
    with pytest.raises(VideoError, match=victim.name) as caught:
        fine_tuned(base, moved, tmp_path / "run", steps=4)
    assert "\n" not in str(caught.value)
    shutil.copyfile(sorted((world / "clips").iterdir())[3], victim)
    with pytest.raises(VideoError, match=f"{victim.name}: not the clip that trajectory '.*' was judged"):
        fine_tuned(base, moved, tmp_path / "run", steps=4)
    shutil.copyfile(world / "clips" / victim.name, victim)
    fine_tuned(base, moved, tmp_path / "run", steps=4)


def test_a_run_can_be_resumed_from_another_folder(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_quick_judge(tmp_path / "base", "qwen2.5-vl")
    monkeypatch.chdir(taught.parent)
    shutil.copytree(tmp_path / "base", "base", dirs_exist_ok=True)
    phase = {"steps": 1, "batch_size": 1, "traces": {"kind": "file", "path": "traces.jsonl"}}
    settings = cold_start_settings({"model": "base", "phases": [phase]})
    assert run_cold_start(settings, tmp_path / "run") is not None
    monkeypatch.chdir(tmp_path)
    resumed = resume_settings(tmp_path / "run")
    assert resumed == settings
    assert run_cold_start(resumed, tmp_path / "run") == tmp_path / "run" / "model"
    assert (
        cold_start_settings({"model": "Qwen/Qwen2.5-VL-7B", "phases": [phase]}).model == "Qwen/Qwen2.5-VL-7B"
    )


# Recipes and settings


def refused(values: dict[str, Any]) -> Iterator[str]:
    with pytest.raises(InputError) as caught:
        cold_start_settings(values)
    message = str(caught.value)
    assert "\n" not in message
    yield message


WORLD = {"kind": "world", "pairs": 2}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({}, "model"),
        ({"model": "m"}, "phases"),
        ({"model": "m", "phases": []}, "phases"),
        ({"model": "m", "phases": [{"traces": WORLD}], "sed": 3}, "sed"),
        ({"model": "m", "phases": [{"traces": WORLD}], "seed": -1}, "seed"),
        ({"model": "m", "phases": [{"traces": {}}]}, "phases.0.traces"),
        ({"model": "m", "phases": [{"traces": {"kind": "web"}}]}, "phases.0.traces"),
        ({"model": "m", "phases": [{"traces": {"kind": "world"}}]}, "phases.0.traces.world.pairs"),
        ({"model": "m", "phases": [{"traces": {"kind": "file"}}]}, "phases.0.traces.file.path"),
        ({"model": "m", "phases": [{"traces": {"kind": "mixed", "of": []}}]}, "phases.0.traces.mixed.of"),
        (
            {"model": "m", "phases": [{"traces": {"kind": "mixed", "of": [WORLD, {"kind": "file"}]}}]},
            "phases.0.traces.mixed.of.1.file.path",
        ),
        (
            {
                "model": "m",
                "phases": [{"traces": {"kind": "mixed", "of": [{"kind": "mixed", "of": [WORLD]}]}}],
            },
            "phases.0.traces.mixed.of.0",
        ),
        ({"model": "m", "phases": [{"traces": WORLD, "step": 3}]}, "phases.0.step"),
        ({"model": "m", "phases": [{"traces": WORLD, "freeze_vision": 3}]}, "phases.0.freeze_vision"),
        ({"model": "m", "phases": [{"traces": WORLD}, {"traces": WORLD, "steps": 0}]}, "phases.1.steps"),
        ({"model": "m", "phases": [{"traces": WORLD, "batch_size": 0}]}, "phases.0.batch_size"),
        ({"model": "m", "phases": [{"traces": WORLD, "name": "A b"}]}, "phases.0.name"),
        (
            {"model": "m", "phases": [{"traces": WORLD, "learning_rate": {"peak": "fast"}}]},
            "phases.0.learning_rate.peak",
        ),
        (
            {"model": "m", "phases": [{"traces": {**WORLD, "world": {"size": 3}}}]},
            "phases.0.traces.world.world.size",
        ),
        ({"model": "m", "phases": [{"traces": WORLD}], "optimizer": {"beta1": 1}}, "optimizer.adamw.beta1"),
        (
            {"model": "m", "phases": [{"traces": WORLD}], "optimizer": {"kind": "muon", "betas": 1}},
            "optimizer.muon.betas",
        ),
        *(
            ({"model": "m", "phases": [{"traces": WORLD}], "optimizer": wrong}, "optimizer")
            for wrong in ({"kind": "sgd"}, {"kind": ["muon"]}, "muon", None)
        ),
        *(
            ({"model": "m", "phases": [{"traces": WORLD}], "optimizer": ignored}, "optimizer.adamw")
            for ignored in ({"momentum": 0.9}, {"kind": "adamw", "matrix_rate": 1.0})
        ),
        (
            {
                "model": "m",
                "phases": [
                    {"traces": WORLD, "learning_rate": {"peak": 1, "shape": "constant", "final_ratio": 0.1}}
                ],
            },
            "phases.0.learning_rate",
        ),
        ({"model": "m", "phases": [{"traces": WORLD}], "clips": "all"}, "clips"),
    ],
)
def test_settings_errors_name_the_key(values: dict[str, Any], key: str) -> None:
    (message,) = refused(values)
    assert message.startswith(f"cold start: {key}: ")


def test_a_setting_that_an_optimizer_would_ignore_is_refused_by_name() -> None:
    values = {"model": "m", "phases": [{"traces": WORLD}], "optimizer": {"momentum": 0.9}}
    (message,) = refused(values)
    assert message.endswith("got momentum with kind adamw, allowed with kind muon only")


def test_settings_of_either_optimizer_come_back_from_a_runs_file() -> None:
    for optimizer in (AdamWSettings(beta1=0.8), MuonSettings(matrix_rate=0.9)):
        settings = cold_start_settings({"model": "m", "phases": [{"traces": WORLD}], "optimizer": optimizer})
        assert settings.optimizer == optimizer
        assert cold_start_settings(settings.model_dump(mode="json")).optimizer == optimizer
    assert settings.model_dump()["optimizer"].keys() > AdamWSettings().model_dump().keys()


def test_recipes_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe 'nanno': not known; there is nano"):
        load_recipe("nanno")
    for name, content in (
        ("list.yaml", b"- 1\n"),
        ("torn.yaml", b"model: [\n"),
        ("bytes.yml", b"model: \xff\n"),
        ("empty.yaml", b""),
        ("code.yaml", b"model: !!python/object/apply:os.system ['true']\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name) as caught:
            load_recipe(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match="not a file"):
        load_recipe(str(tmp_path / "folder.yaml"))
    with pytest.raises(InputError, match=r"gone\.yaml: cannot be read \(No such file"):
        load_recipe(str(tmp_path / "gone.yaml"))


def test_the_papers_settings_are_the_defaults(taught: Path) -> None:
    values = {"model": "m", "phases": [{"traces": {"kind": "file", "path": taught}}]}
    (phase,) = cold_start_settings(values).phases
    assert (phase.batch_size, phase.micro_batch_size, phase.steps) == (32, 1, None)
    assert (phase.learning_rate.peak, phase.learning_rate.warmup_ratio) == (1.5e-6, 0.2)


def test_the_shipped_recipe_is_valid_and_keeps_its_worlds_apart_from_evaluations() -> None:
    settings = cold_start_settings(load_recipe("nano"))
    assert isinstance(settings, ColdStartSettings)
    assert (settings.model, settings.clips) == ("nano-from-nothing", "synthetic")
    worlds: list[WorldTraces | FrameWorld] = []
    for phase in settings.phases:
        for source in phase.worlds if isinstance(phase, FramePhase) else sources_of(phase.traces):
            assert not isinstance(source, FileTraces)
            worlds.append(source)
    assert all(world.seed >= 1000 for world in worlds), "small seeds are for evaluations"
