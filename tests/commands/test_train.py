"""`vrthinker train` and `vrthinker eval` as a user gives them, from nothing to a table."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from clips import make_clip

from vrthinker import cli
from vrthinker.commands.make_tiny import make_tiny_judge
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.judge import FOREIGN_NOTE
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


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The only line of stderr."""
        (line,) = self.err.strip().splitlines()
        return line


@pytest.fixture
def vrthinker(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process."""

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main(list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert isinstance(left.value.code, int)
        return Done(left.value.code, out, err)

    return run


def _with_signals() -> None:
    """Whoever runs the tests in the background may have left SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vrthinker", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_with_signals
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_judge(tmp_path_factory.mktemp("model") / "tiny", "qwen2.5-vl")


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


# From nothing to a table


def test_from_nothing_to_a_judge_that_is_evaluated(
    vrthinker: Any, recipe: Path, world: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained = vrthinker("train", "cold-start", "--recipe", recipe, "--out", run, "--seed", 3)
    assert (trained.code, trained.out) == (0, f"{run / 'model'}\n"), trained.err
    assert "cold start: step 4 of 4, loss " in trained.err
    assert json.loads((run / "config.json").read_text())["seed"] == 3

    again = vrthinker("train", "cold-start", "--resume", run)
    assert (again.code, again.out) == (0, trained.out)
    other = vrthinker("train", "cold-start", "--recipe", recipe, "--out", run, "--seed", 4)
    assert other.code == 2
    assert "was made with seed=3; this run has seed=4" in other.line

    shown = vrthinker("train", "show", run, "--json")
    assert shown.code == 0
    assert json.loads(shown.out)["step"] == 4
    assert vrthinker("train", "show", tmp_path).code == 2

    clips = sorted((world / "clips").iterdir())[:2]
    judged = vrthinker(
        "judge", *clips, "--prompt", "A red circle moves right.", "--model", run / "model", "--json"
    )
    record = VerdictRecord.model_validate_json(judged.out)
    assert judged.code == (0 if record.judgment is not None else 1)
    assert record.notes == ["a small one"]
    foreign = make_clip(tmp_path / "foreign.mp4", 20, size=(112, 112))
    judged = vrthinker("judge", clips[0], foreign, "--prompt", "x", "--model", run / "model", "--json")
    assert FOREIGN_NOTE in json.loads(judged.out)["notes"]

    row = tmp_path / "rows" / "rows.jsonl"
    evaluate = (
        "eval",
        "world",
        "--model",
        run / "model",
        "--limit",
        2,
        "--seed",
        6,
        "--out",
        tmp_path / "eval",
    )
    done = vrthinker(*evaluate, "--row", row)
    assert done.code in (0, 1)
    for words in (
        "on the synthetic world, easy",
        "oa/tau",
        "a perfect reader",
        "OA tau, own minus random:",
        "random",
    ):
        assert words in done.out
    assert "uniform frames: 2 of 2 episodes" in done.err
    (line,) = row.read_text().splitlines()
    found = json.loads(line)
    assert (found["pairs"], found["seed"], found["difficulty"], found["temperature"]) == (2, 6, "easy", 0.0)
    assert {"date", "command", "commit", "dirty", "machine", "versions"} <= found.keys()
    assert set(found["judged"]["own"]["oa/tau"]) == {"value", "low", "high", "n"}
    tables = vrthinker(*evaluate, "--json")
    assert tables.code == done.code
    table = json.loads(tables.out)
    assert table == json.loads((tmp_path / "eval" / "table.json").read_text())
    assert {key: found[key] for key in table} == table
    assert (done.code == 1) == bool(table["failures"])
    assert "episodes without a verdict (they count as wrong)" in done.out or done.code == 0
    shown = vrthinker("eval", "show", tmp_path / "eval", "--json")
    assert (shown.code, json.loads(shown.out)) == (done.code, table)
    refused = vrthinker(*evaluate[:-3], 7, *evaluate[-2:])
    assert refused.code == 2
    assert "seed=6; this run has seed=7" in refused.line


def test_from_a_teachers_file_to_a_judge(vrthinker: Any, tiny: Path, world: Path, tmp_path: Path) -> None:
    """The teacher is a guided random one: of the right form, and hardly ever right."""
    record, run = tmp_path / "traces.jsonl", tmp_path / "run"
    taught = vrthinker(
        *("judge", "--pairs", world / "pairs.jsonl", "--out", tmp_path / "verdicts.jsonl", "--model", tiny),
        *("--trajectories", record, "--max-round-tokens", 190, "--rounds", 2, "--temperature", 1),
    )
    assert taught.code == 0, taught.err
    assert all(trace.well_formed for trace in load_trajectories(record))
    begin = ("train", "cold-start", "--model", tiny, "--traces", record, "--out", run)
    refused = vrthinker(*begin, "--pairs", world / "pairs.jsonl", "--learning-rate", 1e-3)
    assert refused.code == 2
    assert "none of its 3 traces is well formed and right" in refused.line
    trained = vrthinker(*begin, "--steps", 3, "--batch-size", 2, "--learning-rate", 1e-3)
    assert trained.code == 0, trained.err
    (phase,) = json.loads((run / "config.json").read_text())["phases"]
    assert (phase["steps"], phase["batch_size"], phase["learning_rate"]["peak"]) == (3, 2, 1e-3)
    for name in ("vrthinker.json", "vrthinker_prompts/system.jinja", "tokenizer.json"):
        assert (run / "model" / name).read_bytes() == (tiny / name).read_bytes(), name
    losses = [json.loads(line)["loss/sft"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    clips = sorted((world / "clips").iterdir())[:2]
    judged = vrthinker(
        *("judge", *clips, "--prompt", "x", "--model", run / "model", "--json", "--max-round-tokens", 190)
    )
    assert judged.code == 0, judged.err
    assert json.loads(judged.out)["judgment"] is not None


def test_evaluating_a_judge_that_always_has_a_verdict(vrthinker: Any, tiny: Path, tmp_path: Path) -> None:
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
        (["--out", "RUN", "--traces", "NONE"], "cold start: model: Field required"),
        (["--out", "RUN", "--model", "TINY", "--traces", "NONE"], "none.jsonl: No such file"),
        (["--out", "RUN", "--model", "NONE", "--recipe", "RECIPE"], "none.jsonl"),
        (["--out", "RUN", "--recipe", "nanno"], "recipe 'nanno'"),
        (["--out", "RUN", "--recipe", "BAD"], "cold start: phases.0.traces.world.pairs: "),
        (["--out", "RUN", "--recipe", "RECIPE", "--steps", "3"], "--steps: goes with --traces"),
        (["--out", "RUN", "--recipe", "RECIPE", "--pairs", "NONE"], "--pairs: goes with --traces"),
        (["--out", "RUN", "--recipe", "RECIPE", "--batch-size", "3"], "--batch-size: goes with --traces"),
        (["--out", "RUN", "--model", "TINY", "--learning-rate", "1"], "--learning-rate: goes with --traces"),
        (["--out", "RUN", "--model", "TINY", "--traces", "NONE", "--steps", "0"], "phases.0.steps"),
        (["--out", "RUN", "--recipe", "RECIPE", "--seed", "-1"], "cold start: seed"),
        (["--out", "BAD", "--recipe", "RECIPE"], "cannot be used as a run folder"),
        (["--resume", "RUN"], "no run to resume"),
        (["--resume", "RUN", "--out", "RUN"], "--resume: got --out, --resume; it goes alone"),
        (["--resume", "RUN", "--recipe", "nano", "--seed", "0"], "--resume: got --resume, --recipe, --seed"),
        (["--resume", "RUN", "--steps", "9"], "--resume: got --resume, --steps"),
    ],
)
def test_train_refuses_with_one_line(
    given: list[str], words: str, vrthinker: Any, tiny: Path, recipe: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({**RECIPE, "phases": [{"traces": {"kind": "world", "pairs": "some"}}]}))
    run = tmp_path / "run"
    places = {"RUN": run, "NONE": tmp_path / "none.jsonl", "TINY": tiny, "RECIPE": recipe, "BAD": bad}
    done = vrthinker("train", "cold-start", *[places.get(arg, arg) for arg in given])
    assert (done.code, done.out) == (2, "")
    assert words in done.line
    assert not (run / "config.json").exists(), "the folder belongs to nobody yet"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--limit", "0"], "--limit: got 0"),
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--retrieval", "random"], "--retrieval: got random, wanted own among them"),
        (["--seed", "-1"], "seed -1"),
        (["--row", "FOLDER"], "--row: "),
        (["--out", "FILE"], "the folder cannot be made"),
        (["--model", "FOLDER"], "config.json"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_eval_refuses_with_one_line(
    given: list[str], words: str, vrthinker: Any, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    places = {"FOLDER": tmp_path, "FILE": tmp_path / "file"}
    options = {"--model": tiny, "--out": tmp_path / "eval", "--limit": 2}
    options |= {given[0]: places.get(given[1], given[1])}
    done = vrthinker("eval", "world", *[word for option in options.items() for word in option])
    assert (done.code, done.out) == (2, "")
    assert words in done.line
    assert not (tmp_path / "eval").exists()
    assert vrthinker("eval", "show", tmp_path).code == 2


# As a user's shell does it: real processes, real signals


@pytest.mark.slow
@pytest.mark.multi_process
def test_training_killed_at_any_moment_goes_on_to_the_same_judge(recipe: Path, tmp_path: Path) -> None:
    """Killed while it writes the first weights, makes clips, has begun to train, trains, and exports."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    whole = start("train", "cold-start", "--recipe", recipe, "--out", straight)
    _, err = whole.communicate(timeout=200)
    assert whole.returncode == 0, err

    def steps() -> int:
        metrics = broken / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    moments: list[Callable[[], bool]] = [
        lambda: any(broken.glob("*initial*")),
        lambda: len(list(broken.glob("data/*/clips/*.mp4"))) > 2,
        lambda: steps() >= 1,
        lambda: steps() >= 3,
        lambda: any(broken.glob(".model.*")),
    ]
    kills = 0
    for moment in moments:
        begun = (broken / "config.json").exists()
        process = start(
            "train", "cold-start", *(["--resume", broken] if begun else ["--recipe", recipe, "--out", broken])
        )
        while process.poll() is None and not moment():
            time.sleep(0.001)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills >= 3, "some moments may be missed, not most"
    done = start("train", "cold-start", "--resume", broken)
    assert done.communicate(timeout=200)[0] == f"{broken / 'model'}\n"
    for folder in ("initial", "model"):
        names = sorted(f.name for f in (straight / folder).iterdir())
        assert names == sorted(f.name for f in (broken / folder).iterdir())
        weights = [run / folder / "model.safetensors" for run in (straight, broken)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not [f.name for f in broken.iterdir() if f.name.startswith((".model", ".initial"))]


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_training_with_130_and_the_way_on(name: str, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = {**RECIPE, "checkpoint_every": 1000, "phases": [{**RECIPE["phases"][0], "steps": 4000}]}
    long = tmp_path / "long.yaml"
    long.write_text(yaml.safe_dump(values))
    process = start("train", "cold-start", "--recipe", long, "--out", run)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert f"got {name}, stopped after step" in err
    assert f"vrthinker train cold-start --resume {run} goes on" in err
    assert list((run / "checkpoints").iterdir())
    assert not (run / "model").exists()


@pytest.mark.slow
@pytest.mark.multi_process
def test_evaluating_killed_at_any_moment_goes_on_to_the_same_table(tiny: Path, tmp_path: Path) -> None:
    chance = random.Random(20261121)

    def command(out: Path) -> subprocess.Popen[str]:
        return start(
            *("eval", "world", "--model", tiny, "--limit", 12, "--seed", 4, "--out", out, "--json"),
            *("--batch-size", 3),
        )

    whole = command(tmp_path / "straight")
    wanted, err = whole.communicate(timeout=280)
    assert whole.returncode == 0, err
    kills = 0
    while kills < 4:
        process = command(tmp_path / "broken")
        try:
            process.communicate(timeout=chance.uniform(4.0, 12.0))
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    assert kills > 0
    found, err = command(tmp_path / "broken").communicate(timeout=280)
    assert json.loads(found) == json.loads(wanted), err
    for way in ("own", "random", "uniform"):
        ids = [trajectory.id for trajectory in load_trajectories(tmp_path / "broken" / f"{way}.jsonl")]
        assert len(ids) == len(set(ids)) == 12
