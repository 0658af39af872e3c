"""The demo, the nano judge that ships, and what is said when it meets other video."""

from __future__ import annotations

import json
from pathlib import Path

import heavy  # noqa: F401
import pytest
from cli_run import vrthinker
from clips import make_clip

from vrthinker.commands.demo import demo_pair
from vrthinker.engine.hf.checkpoint import NANO_FOLDER
from vrthinker.episode.dimensions import Preference
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.judge import Judge
from vrthinker.judge_items import FOREIGN_NOTE
from vrthinker.world.files import clip_paths, load_pairs_of, write_pairs
from vrthinker.world.truth_reader import count, first_seen, hidden_events_seen, look_at_hints
from vrthinker.world.world import PRESETS, Difficulty


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the test's folder."""
    monkeypatch.chdir(tmp_path)


def test_the_demo_is_right_by_looking_and_leaves_one_page(tmp_path: Path) -> None:
    done = vrthinker("demo")
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["vrthinker-demo.html"]
    assert "vrthinker-demo.html" in done.err
    assert "select_frames: shows frames" in done.out
    assert "none of the first frames shows it" in done.out
    verdict_line = next(line for line in done.out.splitlines()[::-1] if line.startswith("OA"))
    assert verdict_line.rstrip().endswith("right"), done.out
    page = (tmp_path / "vrthinker-demo.html").read_text("utf-8")
    assert page.count("data:video/mp4;base64,") == 2


def test_the_demo_as_json_and_kept(tmp_path: Path) -> None:
    done = vrthinker("demo", "--seed", 3, "--json", "--out", tmp_path / "kept")
    found = json.loads(done.out)
    assert done.code == (0 if found["right"] else 1), done.err
    assert found["verdict"]["judgment"].keys() == found["truth"].keys() == {"TA", "VQ", "MQ", "OA"}
    assert Path(tmp_path / found["page"]).is_file()
    (trajectory,) = load_trajectories(tmp_path / "kept" / "trajectories.jsonl")
    (pair,) = load_pairs_of(tmp_path / "kept")
    assert trajectory.prompt == pair.prompt == demo_pair(3).caption
    assert trajectory.tool_calls == found["verdict"]["tool_calls"]


def test_demo_pairs_mislead_whoever_does_not_look() -> None:
    for seed in range(20):
        pair = demo_pair(seed)
        assert pair == demo_pair(seed)
        assert pair.judgments.OA is not Preference.TIE
        assert count(pair, first_seen(pair)).OA != pair.judgments.OA
        assert pair.hidden_events > 0
    assert len({demo_pair(seed).id for seed in range(20)}) == 20


@pytest.mark.parametrize("difficulty", ["medium", "hard"])
def test_one_look_is_not_enough_in_harder_demos(difficulty: Difficulty) -> None:
    config = PRESETS[difficulty]
    for seed in range(10):
        pair = demo_pair(seed, difficulty)
        overall = pair.judgments.OA
        assert overall is not Preference.TIE
        for calls, right in ((0, False), (1, False), (3, True)):
            assert (overall == count(pair, look_at_hints(pair, config, calls)).OA) is right
        if difficulty == "hard":
            assert sum(clip.n_frames for clip in pair.clips) >= 400


def test_the_hard_demo_shows_400_frames_and_is_right_by_its_second_or_third_call(tmp_path: Path) -> None:
    done = vrthinker("demo", "--difficulty", "hard", "--json", "--out", "kept")
    found = json.loads(done.out)
    assert done.code == 0, done.err
    assert found["right"]
    assert found["by_looking"]
    (trajectory,) = load_trajectories(tmp_path / "kept" / "trajectories.jsonl")
    assert trajectory.n_frames >= 400
    assert trajectory.tool_calls in (2, 3)
    assert found["truth"] == demo_pair(0, "hard").judgments.as_dict()


@pytest.mark.slow
@pytest.mark.guard
def test_the_demo_is_right_on_at_least_18_of_20_seeds(tmp_path: Path) -> None:
    pairs = [demo_pair(seed) for seed in range(20)]
    write_pairs(tmp_path, pairs)
    truths = {pair.id: pair for pair in pairs}
    with Judge.from_pretrained("nano", device="cpu", batch_size=20) as judge:
        finished = list(judge.judge_pairs(load_pairs_of(tmp_path)))
    right = looked = 0
    for done in finished:
        assert done.trajectory is not None, done.error
        truth = truths[done.item.id]
        judgments = done.trajectory.outcome.judgments
        right += judgments is not None and judgments.OA == truth.judgments.OA
        looked += hidden_events_seen(truth, done.trajectory.frames_seen) > 0
    assert right >= 18
    assert looked >= 18


def test_nano_says_so_when_it_meets_other_video(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_clip(tmp_path / f"{name}.mp4", 32, size=(112, 112), fps=8)
    # What it says of other video is of no interest, and would be long.
    short = ("--rounds", 1, "--max-round-tokens", 8)
    done = vrthinker("judge", "a.mp4", "b.mp4", "--prompt", "a dog", "--model", "nano", *short)
    assert "synthetic world only" in done.out.replace("\n", " "), done.err
    assert "".join(FOREIGN_NOTE.split()) in "".join(done.out.split())
    write_pairs(tmp_path / "world", [demo_pair(0)])
    (pair,) = load_pairs_of(tmp_path / "world")
    with Judge.from_pretrained("nano", device="cpu", max_rounds=1, max_round_tokens=8) as judge:
        own = judge(pair.prompt, pair.video_1, pair.video_2)
        mixed = judge(pair.prompt, pair.video_1, tmp_path / "b.mp4")
    assert FOREIGN_NOTE not in own.notes
    assert FOREIGN_NOTE in mixed.notes


def test_a_world_clip_judged_by_hand_finds_its_truth_for_the_page(tmp_path: Path) -> None:
    pair = demo_pair(1)
    write_pairs(tmp_path / "world", [pair])
    first, second = clip_paths(tmp_path / "world", pair)
    args = ("judge", first, second, "--prompt", pair.caption, "--model", "nano", "--report", "page.html")
    done = vrthinker(*args)
    assert done.code == 0, done.err
    page = (tmp_path / "page.html").read_text("utf-8")
    defects = {defect for clip in pair.clips for event in clip.events for defect in event.defects}
    words = {"color": "wrong color", "noise": "noise", "jump": "off lane"}
    assert all(words[defect] in page for defect in defects)


def test_nano_is_small_and_has_a_card() -> None:
    size = sum(path.stat().st_size for path in NANO_FOLDER.rglob("*") if path.is_file())
    assert size < 6_000_000
    card = (NANO_FOLDER / "README.md").read_text("utf-8")
    assert "synthetic world" in card


@pytest.mark.slow
def test_nano_holds_its_card_on_held_out_pairs(tmp_path: Path) -> None:
    args = ("--difficulty", "easy", "--limit", "128", "--seed", "31", "--out", "run", "--json")
    done = vrthinker("eval", "world", "--model", "nano", *args, "--retrieval", "own", "random")
    found = json.loads(done.out)
    own = found["judged"]["own"]["oa/tau"]["value"]
    # The card's numbers, less what 128 pairs may scatter.
    assert own > 0.87
    assert own - found["judged"]["random"]["oa/tau"]["value"] > 0.1
    assert own - found["judged"]["none"]["oa/tau"]["value"] > 0.2
    for way in ("random", "none"):
        judged, reader = (found[part][way]["oa/tau"]["value"] for part in ("judged", "perfect_reader"))
        assert abs(judged - reader) < 0.11
