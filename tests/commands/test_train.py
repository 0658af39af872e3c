"""`vrthinker train` and `vrthinker eval` as a user gives them, from nothing to a table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest
import yaml
from cli_run import Done, vrthinker
from clips import make_clip
from command_worker import at, command
from forks import Outcome, Outcomes

from vrthinker.episode.settings import SETTINGS_FILE
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.judge_items import FOREIGN_NOTE
from vrthinker.records.verdict_log import VerdictRecord
from vrthinker.world.files import make_world
from vrthinker.world.world import PRESETS

RECIPE: dict[str, Any] = {
    "model": "nano-from-nothing",
    "note": "a small one",
    "clips": "synthetic",
    "checkpoint_every": 2,
    "phases": [
        {
            "steps": 4,
            "batch_size": 2,
            "learning_rate": {"peak": 2e-3},
            "traces": {"kind": "world", "pairs": 4, "seed": 5, "calls": 1, "filter": False},
        }
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    make_world(folder, PRESETS["easy"], pairs=3, seed=33, workers=1)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run of the recipe, and how its command ended."""
    run = tmp_path_factory.mktemp("trained") / "run"
    return run, vrthinker("train", "cold-start", "--recipe", recipe, "--out", run, "--seed", 3)


@pytest.fixture(scope="module")
def brief(trained: tuple[Path, Done]) -> Path:
    """Its judge, which knows nothing yet, with little room to say so."""
    run, _ = trained
    folder = run.with_name("brief")
    shutil.copytree(run / "model", folder)
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    settings["episode"]["max_round_tokens"] = 8
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    return folder


# From nothing to a table


def test_from_nothing_to_a_judge(trained: tuple[Path, Done], recipe: Path, tmp_path: Path) -> None:
    run, done = trained
    assert (done.code, done.out) == (0, f"{run / 'model'}\n"), done.err
    assert "cold start: step 4 of 4, loss " in done.err
    assert json.loads((run / "config.json").read_text())["seed"] == 3

    again = vrthinker("train", "cold-start", "--resume", run)
    assert (again.code, again.out) == (0, done.out)
    other = vrthinker("train", "cold-start", "--recipe", recipe, "--out", run, "--seed", 4)
    assert other.code == 2
    assert "was made with seed=3; this run has seed=4" in other.last_line

    shown = vrthinker("train", "show", run, "--json")
    assert shown.code == 0
    summary = json.loads(shown.out)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (summary["step"], summary["steps"], summary["mean_over_steps"]) == (4, 4, 4)
    assert summary["last"]["loss/sft"] == lines[-1]["loss/sft"]
    assert summary["means"]["loss/sft"] == pytest.approx(sum(line["loss/sft"] for line in lines) / 4)
    shown = vrthinker("train", "show", run)
    assert shown.code == 0
    first, heads, *rows = shown.out.splitlines()
    assert first.startswith("step 4 of 4, ")
    assert heads.split("   ")[-1] == "mean of the last 4 steps"
    (loss,) = [row.split() for row in rows if row.startswith("loss/sft ")]
    assert loss[1:] == [f"{summary[part]['loss/sft']:.6g}" for part in ("last", "means")]
    assert vrthinker("train", "show", tmp_path).code == 2


def test_the_last_step_and_the_means_of_ten(tmp_path: Path) -> None:
    lines = [
        {
            "step": step,
            "time_seconds": 3600.0 * step,
            "loss/sft": None if step == 12 else float(step),
            "late": 1,
        }
        for step in range(1, 16)
    ]
    lines[14]["late"] = None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = vrthinker("train", "show", tmp_path)
    assert shown.out.splitlines() == [
        "step 15, 14.00 hours after the run's first step",
        f"{'':24} {'last step':>12}   mean of the last 10 steps",
        f"{'loss/sft':24} {'15':>12}   {(6 + 7 + 8 + 9 + 10 + 11 + 13 + 14 + 15) / 9:.6g}",
        f"{'late':24} {'-':>12}   1",
    ]
    for phases, steps in (
        ([{"steps": 20}, {"steps": 11}], 31),
        ([{"steps": 20}, {}], None),
        ([{"steps": 20}, 3], None),
        (None, None),
    ):
        (tmp_path / "traces.json").write_text(json.dumps({"phases": phases}))
        assert json.loads(vrthinker("train", "show", tmp_path, "--json").out)["steps"] == steps
    (tmp_path / "traces.json").write_text("[]")
    assert json.loads(vrthinker("train", "show", tmp_path, "--json").out)["steps"] is None
    for broken in ("[" * 100_000, "{"):
        (tmp_path / "traces.json").write_text(broken)
        assert vrthinker("train", "show", tmp_path).code == 2
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0] | {"loss/sft": "low"}) + "\n")
    refused = vrthinker("train", "show", tmp_path)
    assert refused.code == 2
    assert "line 1 has loss/sft: 'low', wanted: a number" in refused.line


def test_what_was_trained_judges(trained: tuple[Path, Done], world: Path, tmp_path: Path) -> None:
    clips = sorted((world / "clips").iterdir())[:2]
    options = ("--model", trained[0] / "model", "--json", "--max-round-tokens", 20)
    judged = vrthinker("judge", *clips, "--prompt", "A red circle moves right.", *options)
    printed = json.loads(judged.out)
    del printed["explain"]
    record = VerdictRecord.model_validate(printed)
    assert judged.code == (0 if record.judgment is not None else 1)
    assert record.notes == ["a small one"]
    foreign = make_clip(tmp_path / "foreign.mp4", 20, size=(112, 112))
    judged = vrthinker("judge", clips[0], foreign, "--prompt", "x", *options)
    assert FOREIGN_NOTE in json.loads(judged.out)["notes"]


def test_evaluating_a_judge_without_verdicts(brief: Path, tmp_path: Path) -> None:
    row, out = tmp_path / "rows" / "rows.jsonl", tmp_path / "eval"
    evaluate = ("eval", "world", "--model", brief, "--limit", 2, "--out", out, "--seed")
    done = vrthinker(*evaluate, 6, "--row", row)
    assert done.code == 0, "a judge without verdicts is a result, no failure: " + done.err
    for words in (
        "on the synthetic world, easy",
        "oa/tau",
        "a perfect reader",
        "OA tau, own minus random:",
        "random",
        "without a verdict: 6 of 6 episodes (100%); they count as wrong:",
    ):
        assert words in done.out
    assert "uniform frames: 2 of 2 episodes" in done.err
    (line,) = row.read_text().splitlines()
    found = json.loads(line)
    assert (found["pairs"], found["seed"], found["difficulty"], found["temperature"]) == (2, 6, "easy", 0.0)
    assert {"date", "command", "commit", "dirty", "machine", "versions"} <= found.keys()
    assert set(found["judged"]["own"]["oa/tau"]) == {"value", "low", "high", "n"}
    tables = vrthinker(*evaluate, 6, "--json")
    assert tables.code == 0
    table = json.loads(tables.out)
    assert table["failures"]
    assert table == json.loads((out / "table.json").read_text())
    assert {key: found[key] for key in table} == table
    shown = vrthinker("eval", "show", out, "--json")
    assert (shown.code, json.loads(shown.out)) == (0, table)
    refused = vrthinker(*evaluate, 7)
    assert refused.code == 2
    assert "seed=6; this run has seed=7" in refused.last_line


def test_from_a_teachers_file_to_a_judge(tiny: Path, world: Path, tmp_path: Path) -> None:
    """The teacher is a guided random one: of the right form, and hardly ever right."""
    record, run = tmp_path / "traces.jsonl", tmp_path / "run"
    taught = vrthinker(
        *("judge", "--pairs", world / "pairs.jsonl", "--out", tmp_path / "verdicts.jsonl", "--model", tiny),
        *("--trajectories", record, "--rounds", 2, "--temperature", 1),
    )
    assert taught.code == 0, taught.err
    assert all(trace.well_formed for trace in load_trajectories(record))
    begin = ("train", "cold-start", "--model", tiny, "--traces", record, "--out", run)
    refused = vrthinker(*begin, "--pairs", world / "pairs.jsonl", "--learning-rate", 1e-3)
    assert refused.code == 2
    assert "kept 0 of 3 traces (1 wrong in " in refused.last_line
    trained = vrthinker(*begin, "--steps", 3, "--batch-size", 2, "--learning-rate", 1e-3)
    assert trained.code == 0, trained.err
    (phase,) = json.loads((run / "config.json").read_text())["phases"]
    assert (phase["steps"], phase["batch_size"], phase["learning_rate"]["peak"]) == (3, 2, 1e-3)
    for name in ("vrthinker.json", "vrthinker_prompts/system.jinja", "tokenizer.json"):
        assert (run / "model" / name).read_bytes() == (tiny / name).read_bytes(), name
    losses = [json.loads(line)["loss/sft"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    clips = sorted((world / "clips").iterdir())[:2]
    judged = vrthinker(*("judge", *clips, "--prompt", "x", "--model", run / "model", "--json"))
    assert judged.code == 0, judged.err
    assert json.loads(judged.out)["judgment"] is not None


def test_evaluating_a_judge_that_always_has_a_verdict(tiny: Path, tmp_path: Path) -> None:
    done = vrthinker(
        *("eval", "world", "--model", tiny, "--limit", 2, "--out", tmp_path / "eval", "--retrieval", "own"),
        *("--temperature", 1, "--difficulty", "medium", "--batch-size", 2),
    )
    assert done.code == 0, done.err
    assert "medium" in done.out
    assert "without a verdict" not in done.out
    assert set(json.loads((tmp_path / "eval" / "table.json").read_text())["judged"]) == {"own", "none"}
    assert not (tmp_path / "eval" / "random.jsonl").exists()


# What is refused


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "--out: missing; name the run's folder, or --resume one"),
        (["--out", "RUN"], "got nothing to learn from; give --traces or --recipe"),
        (["--out", "RUN", "--traces", "NONE"], "--model: missing"),
        (["--out", "RUN", "--model", "TINY", "--traces", "NONE"], "none.jsonl: not a file"),
        (
            ["--out", "RUN", "--model", "TINY", "--traces", "FILE", "--pairs", "NONE"],
            "none.jsonl: not a file",
        ),
        (["--out", "RUN", "--model", "NONE", "--recipe", "RECIPE"], "none.jsonl"),
        (["--out", "RUN", "--recipe", "RECIPE", "--pairs", "NONE"], "--pairs: goes with --traces"),
        (["--out", "RUN", "--recipe", "RECIPE", "--batch-size", "0"], "--batch-size: got 0"),
        (["--out", "RUN", "--model", "TINY", "--traces", "NONE", "--steps", "0"], "--steps: got 0"),
        (["--out", "RUN", "--recipe", "RECIPE", "--seed", "-1"], "--seed: got -1"),
        (["--resume", "RUN"], "no run to resume"),
        (["--resume", "RUN", "--out", "RUN"], "--resume: got --out, --resume; it goes alone"),
        (["--resume", "RUN", "--recipe", "nano", "--seed", "0"], "--resume: got --resume, --recipe, --seed"),
        (["--resume", "RUN", "--steps", "9"], "--resume: got --resume, --steps"),
    ],
)
def test_train_refuses_bad_options_before_torch_loads(
    given: list[str], words: str, tiny: Path, recipe: Path, tmp_path: Path
) -> None:
    run, file = tmp_path / "run", tmp_path / "file.jsonl"
    file.touch()
    places = {"RUN": run, "NONE": tmp_path / "none.jsonl", "TINY": tiny, "RECIPE": recipe, "FILE": file}
    done = vrthinker("train", "cold-start", *[places.get(arg, arg) for arg in given])
    assert (done.code, done.out) == (2, "")
    assert words in done.line
    assert not run.exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--out", "RUN", "--recipe", "nanno"], "recipe 'nanno'"),
        (["--out", "RUN", "--recipe", "nano", "--steps", "3"], "--steps: the recipe has 7 phases; name one"),
        (
            ["--out", "RUN", "--recipe", "nano", "--learning-rate", "1"],
            "--set phases.6.learning_rate.peak=...",
        ),
        (["--out", "RUN", "--recipe", "RECIPE", "--set", "phases.0.stepz=3"], "cold start: phases.0.stepz: "),
        (["--out", "RUN", "--recipe", "RECIPE", "--set", "phases.1.steps=3"], "got 1, allowed: 0 to 0"),
        (["--out", "RUN", "--recipe", "RECIPE", "--set", "phases.x.steps=3"], "got x, allowed: 0 to 0"),
        (
            ["--out", "RUN", "--recipe", "RECIPE", "--set", "phases.0000000001.steps=3"],
            "got 0000000001, allow",
        ),
        (
            ["--out", "RUN", "--recipe", "RECIPE", "--set", "note.a=3"],
            "a stands below a value that has no keys",
        ),
        (["--out", "RUN", "--recipe", "RECIPE", "--set", "seed"], "--set: got 'seed', allowed: key=value"),
        (["--out", "RUN", "--recipe", "RECIPE", "--set", "seed=[1]"], "cold start: seed: "),
        (["--out", "RUN", "--recipe", "BAD"], "cold start: phases.0.traces.world.pairs: "),
        (["--out", "BAD", "--recipe", "RECIPE"], "cannot be used as a run folder"),
        (["--out", "RUN", "--model", "TINY", "--traces", "FILE"], "kept 0 of 0 traces"),
        (["--resume", "OTHER"], "no run to resume"),
        (["--out", "RUN", "--recipe", "RECIPE", "--set", "lora=null", "--set", "lora.rank=0"], "lora.rank: "),
        (
            [
                "--out",
                "RUN",
                "--recipe",
                "RECIPE",
                "--set",
                "seed=-1",
                "--set",
                "evaluation.pairs=~nobody-x/p",
            ],
            "cold start: seed: ",
        ),
    ],
)
def test_train_refuses_with_one_line_and_leaves_no_folder(
    given: list[str], words: str, tiny: Path, recipe: Path, tmp_path: Path
) -> None:
    bad, run, file, other = (tmp_path / name for name in ("bad.yaml", "run", "file.jsonl", "other"))
    bad.write_text(yaml.safe_dump({**RECIPE, "phases": [{"traces": {"kind": "world", "pairs": "some"}}]}))
    file.touch()
    other.mkdir()
    places = {"RUN": run, "TINY": tiny, "RECIPE": recipe, "BAD": bad, "FILE": file, "OTHER": other}
    done = vrthinker("train", "cold-start", *[places.get(arg, arg) for arg in given])
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[:-1] == ["starting to train: torch is loading"]
    assert words in done.last_line
    assert not run.exists(), "it may be named again"
    assert bad.is_file()


@pytest.mark.parametrize(
    ("name", "words"),
    [("asked.jsonl", "holds the pairs that are sampled"), ("gone/hard.jsonl", "its folder is not there")],
)
def test_pairs_for_the_next_stage_replace_nothing(name: str, words: str, world: Path, tmp_path: Path) -> None:
    row = json.loads((world / "pairs.jsonl").read_text().splitlines()[0])
    row |= {clip: str(world / row[clip]) for clip in ("video_1", "video_2")}
    (pairs := tmp_path / "asked.jsonl").write_text(json.dumps(row))
    given = ["--model", "nano", "--pairs", pairs, "--out", tmp_path / "run", "--for-grpo", tmp_path / name]
    done = vrthinker("train", "rejection", *given)
    assert (done.code, done.out) == (2, "")
    assert f"for_grpo: {tmp_path / name}: {words}" in done.last_line
    assert json.loads(pairs.read_text()) == row
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--limit", "0"], "--limit: got 0"),
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--retrieval", "random"], "--retrieval: got random, wanted own among them"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--device", "gpu"], "--device: got 'gpu'"),
        (["--row", "FOLDER"], "--row: "),
        (["--out", "FILE"], "got a file, allowed: a folder"),
        (["--model", "FOLDER"], "config.json"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_eval_refuses_with_one_line(given: list[str], words: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = {"FOLDER": tmp_path, "FILE": tmp_path / "file"}
    options = {"--model": tiny, "--out": tmp_path / "eval", "--limit": 2}
    options |= {given[0]: places.get(given[1], given[1])}
    done = vrthinker("eval", "world", *[word for option in options.items() for word in option])
    assert (done.code, done.out) == (2, "")
    assert words in done.line
    assert not (tmp_path / "eval").exists()
    assert vrthinker("eval", "show", tmp_path).code == 2


# Processes that die or are told to stop

BACKWARD = "torch:Tensor.backward"


def ended(commands: Outcomes, *jobs: dict[str, Any]) -> list[Outcome]:
    """The last one must have come to its end; those before it must have been killed."""
    *killed, last = commands(jobs)
    assert [outcome["code"] for outcome in killed] == [-9] * len(killed), killed
    assert "result" in last, last
    return [*killed, last]


@pytest.mark.slow
@pytest.mark.multi_process
def test_training_killed_at_any_moment_goes_on_to_the_same_judge(
    recipe: Path, commands: Outcomes, tmp_path: Path
) -> None:
    """Killed while it writes the first weights, makes clips, begins to train, trains, and exports."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    begin = ("train", "cold-start", "--recipe", recipe, "--out")
    ended(commands, command(*begin, straight))
    moments = [
        at("vrthinker.train.sft:write_nano", 1, "SIGKILL", after=True),
        at("vrthinker.world.files:write_clip", 3, "SIGKILL"),
        at(BACKWARD, 1, "SIGKILL"),
        at(BACKWARD, 6, "SIGKILL"),
        at("transformers:PreTrainedModel.save_pretrained", 1, "SIGKILL", after=True),
    ]
    resume = ("train", "cold-start", "--resume", broken)
    first, *others = moments
    *_, done = ended(
        commands,
        command(*begin, broken, moments=[first]),
        *(command(*resume, moments=[moment]) for moment in others),
        command(*resume),
    )
    assert (done["result"], done["stdout"]) == (0, f"{broken / 'model'}\n")
    for folder in ("initial", "model"):
        names = sorted(f.name for f in (straight / folder).iterdir())
        assert names == sorted(f.name for f in (broken / folder).iterdir())
        weights = [run / folder / "model.safetensors" for run in (straight, broken)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not [f.name for f in broken.iterdir() if f.name.startswith((".model", ".initial"))]


def _with_signals() -> None:
    """Whoever runs the tests in the background may have left SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.multi_process
def test_ctrl_c_ends_training_with_130_and_the_way_on(tmp_path: Path) -> None:
    """As a user's shell does it, with all that a process does when it ends."""
    run = tmp_path / "run"
    values = {**RECIPE, "checkpoint_every": 100_000, "phases": [{**RECIPE["phases"][0], "steps": 100_000}]}
    long = tmp_path / "long.yaml"
    long.write_text(yaml.safe_dump(values))
    process = subprocess.Popen(
        [sys.executable, "-m", "vrthinker", "train", "cold-start", "--recipe", long, "--out", run],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_with_signals,
    )
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "got SIGINT, stopped after step" in err
    assert f"vrthinker train cold-start --resume {run} goes on" in err
    assert list((run / "checkpoints").iterdir())
    assert not (run / "model").exists()


@pytest.mark.slow
@pytest.mark.multi_process
def test_evaluating_killed_at_any_moment_goes_on_to_the_same_table(
    tiny: Path, commands: Outcomes, tmp_path: Path
) -> None:
    def job(out: str, *moments: dict[str, Any]) -> dict[str, Any]:
        given = ("eval", "world", "--model", tiny, "--limit", 8, "--seed", 4, "--out", tmp_path / out)
        return command(*given, "--json", "--batch-size", 3, moments=moments)

    (wanted,) = ended(commands, job("straight"))
    assert wanted["result"] == 0, wanted
    record = "vrthinker.evals.world:dump_line"
    kills = [
        job("broken", at("vrthinker.world.files:write_clip", 4, "SIGKILL")),
        *(job("broken", at(record, call, "SIGKILL", after=True)) for call in (1, 4, 7, 6)),
        job("broken", at("vrthinker.evals.world:report_of", 1, "SIGKILL")),
    ]
    *_, found = ended(commands, *kills, job("broken"))
    assert json.loads(found["stdout"]) == json.loads(wanted["stdout"]), found
    for way in ("own", "random", "uniform"):
        ids = [trajectory.id for trajectory in load_trajectories(tmp_path / "broken" / f"{way}.jsonl")]
        assert len(ids) == len(set(ids)) == 8


@pytest.mark.parametrize("stage", ["grpo", "rejection"])
def test_an_engine_is_taken_as_it_is_named(stage: str, tmp_path: Path) -> None:
    """Settings are checked in their order: the first that is refused stands behind the engine."""
    given = ["--recipe", f"nano-{stage}", "--engine", "vllm", "--out", tmp_path / "run"]
    done = vrthinker("train", stage, *given, "--set", "learn.nothing=1")
    assert done.code == 2
    assert "learn.nothing" in done.last_line
