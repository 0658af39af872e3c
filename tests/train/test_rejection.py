"""Rejection sampling fine-tuning: what is kept, that it replays, and how killed runs go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest
from cli_run import vrthinker
from command_worker import at, command
from forks import Outcomes
from full_disk import full_at

from vrthinker.data.pairs import load_pairs
from vrthinker.engine.hf.checkpoint import resolve_checkpoint
from vrthinker.episode.trajectory import Trajectory, load_trajectories
from vrthinker.errors import VRThinkerError
from vrthinker.judge import Judge
from vrthinker.train.rejection import rejection_settings, resume_settings, run_rejection
from vrthinker.train.settings import load_recipe
from vrthinker.train.teacher import BEYOND_CAP
from vrthinker.train.traces import why_dropped
from vrthinker.world.files import PAIRS_FILE, make_world
from vrthinker.world.world import PRESETS

SAMPLES, N_PAIRS, SEED = 4, 3, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose last pair has labels that nobody can guess: OA contradicts the others."""
    folder = tmp_path_factory.mktemp("world") / "world"
    make_world(folder, PRESETS["easy"], pairs=N_PAIRS, seed=41, workers=1)
    rows = [json.loads(line) for line in (folder / PAIRS_FILE).read_text().splitlines()]
    rows[-1]["labels"] = {"TA": 1, "VQ": 1, "MQ": 1, "OA": 2}
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def values(world: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": "nano",
        "seed": SEED,
        "tracker": "none",
        "items": {"kind": "file", "path": str(world / "asked.jsonl")},
        "sampling": {"samples": SAMPLES, "keep_per_item": 2, "batch_size": 8},
        "learn": {"steps": 2, "batch_size": 2, "learning_rate": {"peak": 1e-4}},
        **more,
    }


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rejection") / "run"
    settings = rejection_settings(values(world, for_grpo=str(out.parent / "hard.jsonl")))
    assert run_rejection(settings, out) == out / "model"
    return out


def kept(run: Path) -> list[Trajectory]:
    return list(load_trajectories(run / "samples" / "traces.jsonl"))


def selection(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "samples" / "selection.json").read_text())
    return found


def test_what_is_learned_is_right_well_formed_capped_and_free(run: Path, world: Path) -> None:
    traces = kept(run)
    trials = {trial["id"]: trial for trial in selection(run)["trials"]}
    assert len(trials) == N_PAIRS * SAMPLES
    labels = {pair.id: pair.labels for pair in load_pairs(run / "samples" / "pairs.jsonl")}
    per_pair: dict[str, int] = {}
    for trace in traces:
        assert why_dropped(trace, labels[trace.id]) is None
        assert (trace.settings.guided, trace.settings.temperature) == (False, 1.0)
        assert all(record.token_ids for record in trace.rounds)
        per_pair[trials[trace.id]["pair"]] = per_pair.get(trials[trace.id]["pair"], 0) + 1
    assert traces
    assert max(per_pair.values()) <= 2
    for pair, count in per_pair.items():
        beyond = [t for t in trials.values() if t["pair"] == pair and t["reason"] == BEYOND_CAP]
        assert not beyond or count == 2
    assert {trial["swapped"] for trial in trials.values()} == {True, False}
    record = json.loads((run / "traces.json").read_text())["phases"][0]
    assert record["kept_sha256"] == selection(run)["kept_sha256"]
    assert (record["kept"], record["read"], record["steps"]) == (len(traces), N_PAIRS * SAMPLES, 2)


def test_pairs_without_a_right_episode_go_to_the_next_stage_as_they_were(run: Path, world: Path) -> None:
    hard = {pair.id: pair for pair in load_pairs(run.parent / "hard.jsonl")}
    asked = {pair.id: pair for pair in load_pairs(world / "asked.jsonl")}
    right = {trial["pair"] for trial in selection(run)["trials"] if trial["reason"] in (None, BEYOND_CAP)}
    assert list(asked)[-1] in hard
    assert hard == {name: pair for name, pair in asked.items() if name not in right}


def test_a_kept_episode_replays_from_its_seed_alone(run: Path) -> None:
    """One after another instead of in groups: the same frames, the same tokens, the same verdict."""
    settings = resume_settings(run)
    pairs = {pair.id: pair for pair in load_pairs(run / "samples" / "pairs.jsonl")}
    options = {"temperature": settings.sampling.temperature, "top_p": 1.0, "guided": False}
    with Judge.from_pretrained(settings.model, batch_size=1, **options) as judge:
        for trace in kept(run):
            pair = pairs[trace.id]
            verdict = judge(pair.prompt, pair.video_1, pair.video_2, dataset=pair.dataset, seed=trace.seed)
            again = verdict.trajectory
            assert [r.token_ids for r in again.rounds] == [r.token_ids for r in trace.rounds]
            assert [r.live for r in again.rounds] == [r.live for r in trace.rounds]
            # Probabilities round differently in another batch.
            rounded = {"probabilities": None, "probabilities_reason": None}
            assert again.outcome.model_copy(update=rounded) == trace.outcome.model_copy(update=rounded)
            assert again.videos == trace.videos


def test_a_finished_run_is_found_finished_without_loading_the_sampler(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> Judge:
        raise AssertionError("nothing is left to sample")

    before = kept(run)
    monkeypatch.setattr(Judge, "from_pretrained", never)
    assert run_rejection(resume_settings(run), run) == run / "model"
    assert kept(run) == before


def test_nothing_right_is_one_line_and_the_samples_stay(world: Path, tmp_path: Path) -> None:
    rows = (world / "asked.jsonl").read_text().splitlines()[-1:]
    pairs = world / "hopeless.jsonl"
    pairs.write_text(rows[0])
    out = tmp_path / "run"
    settings = values(world, sampling={"samples": 2}, items={"kind": "file", "path": str(pairs)})
    with pytest.raises(VRThinkerError, match=r"kept 0 of 2 episodes .*; nothing to learn from") as caught:
        run_rejection(rejection_settings(settings), out)
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (1, False)
    assert len(list(load_trajectories(out / "samples" / "episodes.jsonl"))) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "got nothing to sample; give --pairs or --recipe"),
        (["--pairs", "PAIRS"], "--model: missing"),
        (["--pairs", "NONE", "--model", "nano"], "none.jsonl: not a file"),
        (["--pairs", "PAIRS", "--model", "nano", "--samples", "0"], "rejection sampling: sampling.samples: "),
        (["--pairs", "PAIRS", "--model", "nano", "--set", "sampling.sample=3"], "sampling.sample: "),
        (["--pairs", "PAIRS", "--model", "nano", "--set", "learn.step=3"], "learn.step: "),
        (["--pairs", "PAIRS", "--model", "nano", "--steps", "0"], "--steps: got 0"),
        (["--pairs", "BAD", "--model", "nano"], "labels.OA: got 3, allowed: 0 (tie)"),
        (["--pairs", "GONE", "--model", "nano"], "clips that are not there: "),
        (["--pairs", "EMPTY", "--model", "nano"], "got no pairs"),
        (["--resume", "OUT"], "no run to resume"),
        (["--recipe", "nano-rejection", "--temperature", "0"], "sampling.temperature: "),
    ],
)
def test_refused_with_one_line_and_no_folder(
    given: list[str], words: str, world: Path, tmp_path: Path
) -> None:
    row = json.loads((world / PAIRS_FILE).read_text().splitlines()[0])
    (tmp_path / "bad.jsonl").write_text(json.dumps(row | {"labels": {"OA": 3}}))
    (tmp_path / "gone.jsonl").write_text(json.dumps(row))
    (tmp_path / "empty.jsonl").touch()
    places = {"PAIRS": world / PAIRS_FILE, "OUT": tmp_path / "out"}
    places |= {name: tmp_path / f"{name.lower()}.jsonl" for name in ("BAD", "GONE", "EMPTY", "NONE")}
    out = [] if "--resume" in given else ["--out", tmp_path / "out"]
    done = vrthinker("train", "rejection", *out, *[places.get(arg, arg) for arg in given])
    assert (done.code, done.out) == (2, "")
    assert words in done.last_line
    assert len(done.err.splitlines()) <= 2, "one line after that torch is loading"
    assert not (tmp_path / "out").exists()


def test_the_shipped_recipes_hold_what_they_say() -> None:
    settings = rejection_settings(load_recipe("nano-rejection"))
    assert settings.items.kind == "world"
    assert settings.items.seed >= 1000, "small seeds are for evaluations"
    more = load_recipe("nano-more")["phases"][0]
    for name in ("steps", "batch_size", "learning_rate"):
        found = settings.learn.model_dump(exclude_unset=True)[name]
        assert found == more[name], f"{name}: the control trains as long and as fast"


# Killed, and without room


def job(world: Path, out: Path, *moments: dict[str, Any]) -> dict[str, Any]:
    given = ("train", "rejection", "--model", "nano", "--pairs", world / "asked.jsonl", "--out", out)
    more = ("--samples", SAMPLES, "--keep-per-item", 2, "--steps", 3, "--batch-size", 2, "--seed", SEED)
    return command(*given, *more, "--tracker", "none", "--learning-rate", 1e-4, moments=moments)


@pytest.mark.slow
@pytest.mark.multi_process
def test_killed_while_sampling_and_while_training_a_run_ends_in_the_same_bits(
    world: Path, commands: Outcomes, tmp_path: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    (wanted,) = commands([job(world, straight)])
    assert wanted["result"] == 0, wanted
    moments = [
        at("vrthinker.judge_file:append_trajectory", 3, "SIGKILL", after=True),
        at("vrthinker.records.verdict_log:VerdictLog.append", 4, "SIGKILL"),
        at("vrthinker.train.rejection:write_selection", 1, "SIGKILL"),
        at("torch:Tensor.backward", 3, "SIGKILL"),
        at("transformers:PreTrainedModel.save_pretrained", 1, "SIGKILL", after=True),
    ]
    resume = command("train", "rejection", "--resume", broken)
    first, *others = moments
    jobs = [job(world, broken, first)]
    jobs += [command("train", "rejection", "--resume", broken, moments=[moment]) for moment in others]
    *killed, done = commands([*jobs, resume])
    assert [outcome["code"] for outcome in killed] == [-9] * len(moments), killed
    assert (done["result"], done["stdout"]) == (0, f"{broken / 'model'}\n")
    assert selection(straight) == selection(broken)
    weights = [run / "model" / "model.safetensors" for run in (straight, broken)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_full_disk_while_sampling_is_one_line_and_loses_nothing(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = rejection_settings(values(world))
    episode_bytes = 20_000
    with full_at(4 * episode_bytes), pytest.raises(VRThinkerError) as caught:
        run_rejection(settings, out)
    assert "\n" not in str(caught.value)
    assert out.exists(), "what was sampled stays"
    recorded = (out / "samples" / "verdicts.jsonl").read_bytes()
    assert run_rejection(settings, out) == out / "model"
    assert (out / "samples" / "verdicts.jsonl").read_bytes().startswith(recorded)
    assert resolve_checkpoint(str(out / "model"))
