"""The phase in which the tower alone learns frames: batches, loss, what it changes, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import numpy as np
import pytest
import torch
import yaml
from forks import Outcomes
from ranks_worker import jobs
from safetensors.torch import load_file
from world_eyes import color_name

from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.errors import InputError, VideoError
from vrthinker.policy.batches import FrameLoader
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.train.cold_start import cold_start_settings, run_cold_start
from vrthinker.train.frame_phase import (
    FrameLessons,
    FramePhase,
    _FrameRun,
    answer_directions,
    frame_loss,
    make_frame_lessons,
)
from vrthinker.train.loop.ranks import Ranks
from vrthinker.train.model import LoraSettings, PolicySettings, TrainedPolicy
from vrthinker.train.sft import TRACES_FILE
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.world.frame_questions import QUESTIONS
from vrthinker.world.nano import nano_settings
from vrthinker.world.words import PLACES
from vrthinker.world.world import COLORS

MakeCheckpoint = Callable[[str], Path]
Begin = Callable[..., _FrameRun]
SMALL = {"size": 56, "frames": [16, 24]}
"""A picture of 56 pixels a side, so that a pixel is a unit, and few frames."""
PHASE: dict[str, Any] = {
    "kind": "frames",
    "name": "towers",
    "steps": 8,
    "clips_per_step": 5,
    "frames_per_clip": 6,
    "learning_rate": {"peak": 4e-3, "warmup_ratio": 0.2},
    "worlds": [
        {
            "pairs": 3,
            "seed": 1000,
            "world": {**SMALL, "colors": 8, "directions": 4, "hints": ["bars", "fade"]},
        },
        {"pairs": 2, "seed": 2000, "world": {**SMALL, "objects": 2}},
    ],
}
RECIPE: dict[str, Any] = {
    "model": "nano-from-nothing",
    "optimizer": {"kind": "muon", "matrix_rate": 0.9},
    "tracker": "none",
    "checkpoint_every": 3,
    "phases": [PHASE],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def lessons(folder: Path) -> FrameLessons:
    return make_frame_lessons(FramePhase.model_validate(PHASE), folder, seed=0)


@pytest.fixture(scope="module")
def policy(checkpoint_of: MakeCheckpoint) -> VisionLanguageModel:
    return VisionLanguageModel(checkpoint_of("nano"), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def begin(lessons: FrameLessons, policy: VisionLanguageModel) -> Begin:
    def begin(*, seed: int = 7, ranks: Ranks | None = None, changed: FrameLessons | None = None) -> _FrameRun:
        trained = TrainedPolicy(policy, PolicySettings())
        loader = FrameLoader(open_reader(), FrameCache(64 << 20))
        run = (changed or lessons).begin(trained, loader, nano_settings().resize, seed)
        assert isinstance(run, _FrameRun)
        run._ranks = ranks or run._ranks
        return run

    return begin


# Batches


def test_a_batch_is_a_function_of_the_seed_and_the_step(begin: Begin) -> None:
    run, again, other = begin(), begin(), begin(seed=8)
    found = [run._batch(step) for step in range(3)]
    for step in (2, 0, 1):  # in any order, as after a resumption
        frames, answers = again._batch(step)
        assert np.array_equal(answers, found[step][1])
        assert all(np.array_equal(a, b) for a, b in zip(frames, found[step][0], strict=True))
    assert answers.shape == (5 * 6, len(QUESTIONS))
    assert answers.dtype == np.int64
    different = [*(batch[1] for batch in found), other._batch(0)[1]]
    assert len({array.tobytes() for array in different}) == 4
    for one in (run, again, other):
        one.close()


def test_processes_share_a_batch_clip_by_clip(begin: Begin) -> None:
    whole_frames, whole_answers = begin()._read(4)
    for size in (2, 5):
        shares = [begin(ranks=Ranks(rank, size))._read(4) for rank in range(size)]
        places = [np.arange(30).reshape(5, 6)[rank::size].ravel() for rank in range(size)]
        assert sorted(np.concatenate(places)) == list(range(30))
        for (frames, answers), own in zip(shares, places, strict=True):
            assert np.array_equal(answers, whole_answers[own])
            assert len(frames) == len(own) > 0
            assert all(np.array_equal(frames[i], whole_frames[place]) for i, place in enumerate(own))


def test_answers_are_those_of_the_pixels_that_are_learned(begin: Begin) -> None:
    """Told by the answers alone where to look, one sees what the other answers say."""
    run = begin()
    names = [question.name for question in QUESTIONS]
    colors = noisy = barred = 0
    for step in range(6):
        for frame, numbers in zip(*run._batch(step), strict=True):
            assert frame.shape == (56, 56, 3)
            said = dict(zip(names, numbers.tolist(), strict=True))
            grey = frame.mean(-1) / 255
            rough = float(np.median(np.abs(np.diff(grey[6:50], axis=1))))
            assert (rough > 0.05) == bool(said["noise"])
            noisy += said["noise"]
            edges, middle = grey[[0, 1, -2, -1]].mean(), np.median(grey[6:50])
            assert (edges > middle + 0.2) == bool(said["bars"])
            barred += said["bars"]
            if said["noise"] or said["fade"]:
                continue
            # The place is that of the last object, which is the only one in the first world.
            two = said["second_color"] < len(COLORS)
            wanted = COLORS[said["second_color" if two else "first_color"]]
            letter = "".join(PLACES)[said["place"]]
            vertical = letter.isupper()
            along = int(9 + 2 * PLACES[vertical].index(letter) + 1)
            # Somewhere across the way, there is the object.
            line = frame[along] if vertical else frame[:, along]
            assert wanted in {color_name(pixel / 255) for pixel in line}
            colors += 1
    assert min(colors, noisy, barred) > 3


def test_frames_that_show_something_come_more_often_than_others(begin: Begin, lessons: FrameLessons) -> None:
    run = begin()
    telling = chances = total = 0
    for step in range(40):
        _, answers = run._batch(step)
        names = [question.name for question in QUESTIONS]
        telling += int(answers[:, [names.index("noise"), names.index("bars")]].any(1).sum())
        total += len(answers)
    for _, _, clip in lessons.clips:
        shown = [
            any(d == "noise" for d in clip.defects_at(i)) or "bars" in clip.hints_at(i)
            for i in range(clip.n_frames)
        ]
        chances += sum(shown) / clip.n_frames / len(lessons.clips)
    assert telling / total > 1.2 * chances


def test_lessons_are_the_clips_of_all_worlds_in_order(lessons: FrameLessons, folder: Path) -> None:
    assert len(lessons.clips) == 2 * (3 + 2)
    assert [len(pair.objects) for _, pair, _ in lessons.clips] == [1] * 6 + [2] * 4
    reader = open_reader()
    for path, pair, clip in lessons.clips:
        assert reader.probe(path).n_frames == clip.n_frames
        assert clip in pair.clips
        assert path.stem.endswith(str(1 + pair.clips.index(clip)))
    assert lessons.traces == ()
    assert make_frame_lessons(lessons.phase, folder, seed=0) == lessons, "what is there is kept"
    other = make_frame_lessons(lessons.phase, folder, seed=1)
    assert other.digest != lessons.digest
    swapped = lessons.phase.model_copy(update={"worlds": lessons.phase.worlds[::-1]})
    assert make_frame_lessons(swapped, folder, seed=0).digest != lessons.digest


def test_a_clip_that_is_gone_is_named_in_one_line(
    begin: Begin, lessons: FrameLessons, tmp_path: Path
) -> None:
    copies = tuple(
        (tmp_path / path.name, pair, clip)
        for path, pair, clip in lessons.clips
        if shutil.copyfile(path, tmp_path / path.name)
    )
    moved = FrameLessons(lessons.phase, copies, lessons.digest)
    victim = copies[3][0]
    victim.unlink()
    run = begin(changed=moved)
    with pytest.raises(VideoError, match=victim.name) as caught:
        _ = [run._batch(step) for step in range(20)]
    assert "\n" not in str(caught.value)
    run.close()


# The loss


def test_directions_are_the_embeddings_of_phrases(policy: VisionLanguageModel) -> None:
    directions = answer_directions(policy)
    answers = [answer for question in QUESTIONS for answer in question.answers]
    assert directions.shape == (len(answers), 128)
    assert torch.allclose(directions.norm(dim=1), torch.tensor(4.0))
    assert torch.equal(directions, answer_directions(policy)), "also those of answers that no phrase says"
    table = policy.model.get_input_embeddings().weight.detach()
    for direction, answer in zip(directions, answers, strict=True):
        if answer is not None:
            (token,) = policy.tokenizer.encode(answer, add_special_tokens=False)
            assert float(torch.nn.functional.cosine_similarity(direction, table[token], dim=0)) > 0.9999
    alike = torch.nn.functional.cosine_similarity(directions[:, None], directions[None], dim=-1)
    assert float((alike - torch.eye(len(answers))).max()) < 0.6, "no two answers have one direction"


def test_the_loss_is_the_cross_entropy_of_each_question(policy: VisionLanguageModel) -> None:
    rng = np.random.default_rng(3)
    frames = [rng.integers(0, 256, (56, 56, 3), np.uint8) for _ in range(4)]
    answers = np.array([[rng.integers(len(q.answers)) for q in QUESTIONS] for _ in frames])
    directions = answer_directions(policy)
    with torch.no_grad():
        loss, right = frame_loss(policy, frames, answers, directions)
        wanted, correct = 0.0, [0] * len(frames)
        for number, frame in enumerate(frames):
            (encoded,) = policy.encode([frame])
            feature = encoded.embeds.mean(0)
            start = 0
            for question, answer in zip(QUESTIONS, answers[number], strict=True):
                scores = directions[start : start + len(question.answers)] @ feature
                start += len(question.answers)
                wanted -= float(torch.log_softmax(scores, 0)[answer])
                correct[number] += int(scores.argmax()) == answer
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert right.tolist() == correct


# Runs


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("learned") / "run"
    assert run_cold_start(cold_start_settings(RECIPE), out) == out / "model"
    return out


def test_the_loss_falls_and_nothing_but_the_tower_changes(learned: Path) -> None:
    lines = read_metrics(learned / METRICS_FILE)
    assert len(lines) == 8
    assert lines[-1]["loss/sft"] < 0.75 * lines[0]["loss/sft"]
    assert lines[-1]["frames/accuracy"] > lines[0]["frames/accuracy"] + 0.1
    assert all(0 <= line["frames/all_right"] <= line["frames/accuracy"] <= 1 for line in lines)
    assert "sft/tokens" not in lines[0]
    before, after = (load_file(learned / name / "model.safetensors") for name in ("initial", "model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    tower = {name for name in before if ".visual." in name or name.startswith("visual.")}
    assert changed == tower
    assert 10 < len(tower) < len(before)


def test_a_run_says_what_frames_it_learns(learned: Path, lessons: FrameLessons) -> None:
    (phase,) = json.loads((learned / TRACES_FILE).read_text())["phases"]
    assert phase == {
        "phase": "towers",
        "steps": 8,
        "traces": {"kind": "frames"},
        "checked": "nothing",
        "read": 10,
        "kept": 10,
        "kept_sha256": lessons.digest,
        "dropped": {},
        "dropped_traces": [],
    }
    assert run_cold_start(cold_start_settings(RECIPE), learned) == learned / "model", "it is finished"


def test_a_run_whose_world_was_changed_is_not_resumed(learned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(learned, run)
    record = json.loads((run / TRACES_FILE).read_text())
    record["phases"][0]["kept_sha256"] = "0" * 64
    (run / TRACES_FILE).write_text(json.dumps(record))
    with pytest.raises(InputError, match="phase towers: its traces are not those that this run began with"):
        run_cold_start(cold_start_settings(RECIPE), run)


@pytest.mark.multi_process
def test_two_processes_learn_what_one_learns(ranked: Outcomes, learned: Path, run: Path) -> None:
    recipe = run.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    given = ["train", "cold-start", "--recipe", str(recipe), "--out", str(run)]
    outcomes = ranked(jobs("command", 2, given=given), together=True)
    assert [outcome.get("result") for outcome in outcomes] == [0, 0], outcomes
    alone, two = (read_metrics(path / METRICS_FILE) for path in (learned, run))
    for name in ("loss/sft", "optim/grad_norm", "frames/accuracy", "frames/all_right"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in alone], rel=1e-3), name
    weights = [load_file(path / "model" / "model.safetensors") for path in (learned, run)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


# Refusals


def test_a_tower_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    values = {**RECIPE, "train_vision": False}
    with pytest.raises(InputError, match="phase towers: trains the vision tower, allowed: with train_vision"):
        run_cold_start(cold_start_settings(values), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "it may be named again"


def test_adapters_are_refused(lessons: FrameLessons, checkpoint_of: MakeCheckpoint) -> None:
    pytest.importorskip("peft")
    loaded = VisionLanguageModel(checkpoint_of("nano"), device=torch.device("cpu"), dtype=torch.float32)
    trained = TrainedPolicy(loaded, PolicySettings(lora=LoraSettings(rank=2)))
    loader = FrameLoader(open_reader(), FrameCache(1 << 20))
    with pytest.raises(InputError, match=r"phase towers: .* without lora"):
        lessons.begin(trained, loader, nano_settings().resize, 0)


def test_more_processes_than_clips_are_refused(lessons: FrameLessons, policy: VisionLanguageModel) -> None:
    trained = TrainedPolicy(policy, PolicySettings())
    trained.ranks = Ranks(0, 6)
    loader = FrameLoader(open_reader(), FrameCache(1 << 20))
    with pytest.raises(InputError, match="clips_per_step: got 5, wanted at least one for each of 6"):
        lessons.begin(trained, loader, nano_settings().resize, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "frame"}, "phases.0: Value error, kind: got 'frame', allowed: traces or frames"),
        ({"kind": ["frames"]}, "kind: got ['frames'], allowed: traces or frames"),
        ({"kind": None}, "kind: got None, allowed: traces or frames"),
        ({"traces": {"kind": "world", "pairs": 2}}, "phases.0.traces: Extra inputs"),
        ({"steps": None}, "phases.0.steps: "),
        ({"steps": 0}, "phases.0.steps: "),
        ({"clips_per_step": 0}, "phases.0.clips_per_step: "),
        ({"frames_per_clip": 65}, "phases.0.frames_per_clip: "),
        ({"worlds": []}, "phases.0.worlds: "),
        ({"worlds": [{"pairs": 0}]}, "phases.0.worlds.0.pairs: "),
        ({"worlds": [{"pairs": 1, "world": {"size": 3}}]}, "phases.0.worlds.0.world.size: "),
        ({"batch_size": 3}, "phases.0.batch_size: Extra inputs"),
        ({"name": "A b"}, "phases.0.name: "),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        cold_start_settings({**RECIPE, "phases": [{**PHASE, **changes}]})
    assert str(caught.value).startswith("cold start: phases.0")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("phase", ["frames", None, 3, ["kind"]])
def test_a_phase_that_is_no_mapping_is_one_line(phase: Any) -> None:
    with pytest.raises(InputError, match=r"phases\.0: .*allowed: a mapping of settings"):
        cold_start_settings({**RECIPE, "phases": [phase]})


def test_settings_come_back_from_a_runs_file() -> None:
    settings = cold_start_settings({**RECIPE, "phases": [PHASE, {"traces": {"kind": "world", "pairs": 1}}]})
    assert isinstance(settings.phases[0], FramePhase)
    assert [phase.kind for phase in settings.phases] == ["frames", "traces"]
    stored = json.loads(settings.model_dump_json())
    assert [phase["kind"] for phase in stored["phases"]] == ["frames", "traces"]
    assert cold_start_settings(stored) == settings
