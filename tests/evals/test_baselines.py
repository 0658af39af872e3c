"""Judges that are no models, through the commands: on the world, on clips, in the layouts of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_run import Done, vrthinker
from clips import make_clip
from known_judges import labelled_pair, ten_pairs, write_pairs
from published import mj_row, write_json
from world_play import Stage

from vrthinker.data.pairs import load_pairs
from vrthinker.episode.dimensions import Confidence
from vrthinker.episode.trajectory import dump_line
from vrthinker.evals.baselines import Baseline, record_of_baseline, verdicts_of
from vrthinker.evals.labelled_data import LabelledData
from vrthinker.evals.labelled_run import judged_by_model, lengths_of, redundant_pairs
from vrthinker.evals.pixel_statistics import clip_scores
from vrthinker.evals.protocols import Protocol, first_answer
from vrthinker.evals.published import published
from vrthinker.evals.retrieval import Retrieval
from vrthinker.records.eval_items import read_items
from vrthinker.verdict import Verdict
from vrthinker.video.open import open_reader
from vrthinker.video.virtual import Blur, Frozen, VirtualReader, virtual_clip
from vrthinker.world.files import load_truths, sample_world
from vrthinker.world.files import write_pairs as write_world
from vrthinker.world.world import PRESETS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs of the world, with their truth."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, sample_world(PRESETS["easy"], 6, 5, "easy"))
    return folder


def evaluate(pairs: Path, model: str, out: Path, *more: object) -> tuple[Done, dict[str, Any]]:
    done = vrthinker("eval", "pairs", "--pairs", pairs, "--model", f"baseline:{model}", "--out", out, *more)
    assert done.code == 0, done.err
    return done, json.loads((out / "eval.json").read_text())


def test_the_oracle_is_right_in_both_orders_and_with_repeated_frames(world: Path, tmp_path: Path) -> None:
    pairs = world / "pairs.jsonl"
    _, plain = evaluate(pairs, "oracle", tmp_path / "plain", "--both-orders")
    assert plain["summary"]["measures"]["all"]["all_four"]["value"] == 1.0
    assert plain["summary"]["orders"]["consistent"] == 1.0
    done, redundant = evaluate(
        pairs, "oracle", tmp_path / "redundant", "--both-orders", "--redundant", "--subsets"
    )
    assert redundant["summary"]["measures"]["all"]["all_four"]["value"] == 1.0
    before, after = (read_items(tmp_path / name) for name in ("plain", "redundant"))
    assert [item.judgment for item in before] == [item.judgment for item in after]
    lengths = lengths_of(load_pairs(pairs))
    for item in after:
        assert item.frames == tuple(2 * count for count in lengths[item.id][0])
        assert Path(item.video_1).name.startswith("redundant-")
    assert "protocol: both_orders True, redundant True" in done.out
    assert "long clips (top 10%)" in done.out
    _, first = evaluate(pairs, "always-1", tmp_path / "first", "--both-orders")
    orders = first["summary"]["orders"]
    assert (orders["consistent"], orders["always_first"]) == (0.0, 1.0)


def test_a_verdict_on_fewer_frames_differs_so_the_oracle_does_look(world: Path, tmp_path: Path) -> None:
    """If the duplication lost frames, the oracle's verdicts would change, as they do for a frozen clip."""
    pairs = load_pairs(world / "pairs.jsonl")
    oracle = verdicts_of(Baseline.ORACLE, pairs, 0)
    differing = 0
    for pair in pairs:
        frozen = tmp_path / f"{pair.id}.clip.json"
        frozen.write_bytes(virtual_clip(pair.video_1, Frozen(share=1.0)))
        differing += oracle(pair.model_copy(update={"video_1": frozen})) != oracle(pair)
        same = oracle(pair.model_copy(update={"video_2": pair.video_1}))
        assert set(same.values()) == {0}, "a clip against itself"
    assert differing
    assert [oracle(p) for p in redundant_pairs(pairs, tmp_path, 1)] == [p.labels for p in pairs]


def test_an_episode_that_ends_with_its_first_round_has_its_recommended_answer(world: Path) -> None:
    """An episode of the oracle engine, which looks into hints: its first answer is less sure."""
    episodes = [Stage(world).oracle(truth) for truth in load_truths(world)]
    trajectory = next(one for one in episodes if len(one.rounds) > 1)
    whole = Verdict.of(trajectory).record(trajectory.id)
    recommended = trajectory.rounds[0].recommendation
    assert recommended is not None
    assert recommended.confidence is not None
    first = first_answer(whole, trajectory, Protocol(retrieval=Retrieval.NONE))
    assert first.judgment == recommended.judgments.as_dict()
    assert (first.rounds, first.tool_calls, first.confidence) == (1, 0, int(recommended.confidence))
    assert set(first.frames_seen) < set(whole.frames_seen)
    assert first_answer(whole, trajectory, Protocol()) == whole
    levels = ("high", "middle", "low")
    stated = int(recommended.confidence)
    assert stated > 1, "something is left to look into"
    for level, name in enumerate(levels, start=1):
        found = first_answer(whole, trajectory, Protocol(first_answer_from=name))  # type: ignore[arg-type]
        assert found == (first if stated <= level else whole)


def test_coin_and_commonest(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", ten_pairs())
    _, coin = evaluate(data, "coin", tmp_path / "coin")
    items = read_items(tmp_path / "coin")
    sides = [item.judgment["OA"] for item in items if item.judgment]
    assert set(sides) == {1, 2}
    again = tmp_path / "again"
    evaluate(data, "coin", again)
    assert (again / "items.jsonl").read_bytes() == (tmp_path / "coin" / "items.jsonl").read_bytes()
    evaluate(data, "coin", tmp_path / "other", "--seed", 1)
    assert [i.judgment for i in read_items(tmp_path / "other")] != [i.judgment for i in items]
    _, commonest = evaluate(data, "commonest", tmp_path / "commonest")
    assert commonest["summary"]["measures"]["all"]["oa/tau"]["value"] == 0.4
    assert commonest["benchmark"] is None
    assert coin["judge"] == "baseline:coin"


def test_what_keeps_a_baseline_from_judging_is_a_failure(tmp_path: Path) -> None:
    oracle = verdicts_of(Baseline.ORACLE, [], 0)
    record = record_of_baseline(Baseline.ORACLE, labelled_pair(0, 1), oracle, 0)
    assert record.judgment is None
    assert "0-1.mp4" in str(record.reason)
    data = write_pairs(tmp_path / "pairs.jsonl", ten_pairs()[:2])
    done = vrthinker(
        *("eval", "pairs", "--pairs", data, "--model", "baseline:sharpness", "--out", tmp_path / "run")
    )
    assert done.code == 1
    assert "without a verdict: 2 of 2 (100%): 2 failed; they count as wrong" in done.out


def test_scorers_prefer_what_they_measure_and_measure_each_clip_once(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", 24, size=(64, 96), fps=12)
    blurred, frozen = tmp_path / "blurred.clip.json", tmp_path / "frozen.clip.json"
    blurred.write_bytes(virtual_clip(clip, Blur(radius=0.05)))
    frozen.write_bytes(virtual_clip(clip, Frozen(share=1.0)))
    reader = VirtualReader(open_reader())
    plain, soft, still = (clip_scores(path, reader) for path in (clip, blurred, frozen))
    assert plain["sharpness"] > soft["sharpness"]
    assert plain["motion"] > still["motion"] == 0.0
    assert plain["steadiness"] < still["steadiness"] == 0.0

    rows = [
        labelled_pair(0, 1, video_1=clip, video_2=blurred),
        labelled_pair(1, 2, video_1=blurred, video_2=clip),
        labelled_pair(2, 0, video_1=clip, video_2=clip),
    ]
    data, out = write_pairs(tmp_path / "pairs.jsonl", rows), tmp_path / "run"
    _, found = evaluate(data, "sharpness", out)
    assert found["summary"]["measures"]["all"]["oa/tau"]["value"] == 1.0
    assert found["summary"]["scores"]["OA"]["items"] == 3
    scores = out / "clip_scores.jsonl"
    assert len(scores.read_text().splitlines()) == 2
    scores.write_text(scores.read_text() + '{"clip": "half')
    _, again = evaluate(data, "sharpness", out)
    assert again["summary"] == found["summary"]
    assert len(scores.read_text().splitlines()) == 3, "nothing is measured again"
    blurred.write_bytes(virtual_clip(clip, Blur(radius=0.1)))
    evaluate(data, "sharpness", out)
    difference = read_items(out)[0].scores["OA"]  # type: ignore[index]
    assert difference == pytest.approx(plain["sharpness"] - clip_scores(blurred, reader)["sharpness"])
    clip.write_bytes(make_clip(tmp_path / "new.mp4", 24, size=(64, 96), fps=12, first_number=50).read_bytes())
    blurred.write_bytes(virtual_clip(clip, Blur(radius=0.1)))  # as it is, its source is no longer what it was
    evaluate(data, "sharpness", out)
    measured = [json.loads(line) for line in scores.read_text().splitlines()][-2:]
    assert [row["clip"] for row in measured] == [str(clip), str(blurred)], "the source of both is another"
    for given in (["--votes", 3], ["--both-orders"], ["--retrieval", "random"]):
        refused = vrthinker(
            *("eval", "pairs", "--pairs", data, "--model", "baseline:sharpness", "--out", out, *given)
        )
        assert (refused.code, "goes with a model" in refused.line) == (2, True)


def test_files_of_repeated_frames_are_named_by_what_they_show(tmp_path: Path) -> None:
    """Named by position, the file of one pair would become that of another in the same folder."""
    first, second = (labelled_pair(n, 1) for n in range(2))
    (before,) = redundant_pairs([first], tmp_path, 0)
    shown = before.video_1.read_bytes()
    (after,) = redundant_pairs([second], tmp_path, 0)
    assert before.video_1 != after.video_1
    assert before.video_1.read_bytes() == shown


def test_the_first_answer_is_that_of_the_last_episode(world: Path, tmp_path: Path) -> None:
    """An older episode of the same pair was sure at once; the one that is recorded was not."""
    (pair, *_) = load_pairs(world / "pairs.jsonl")
    played = (Stage(world).oracle(truth) for truth in load_truths(world))
    episode = next(one for one in played if len(one.rounds) > 1).model_copy(update={"id": pair.id})
    first, *others = episode.rounds
    assert first.recommendation is not None

    def stating(confidence: int) -> str:
        said = first.recommendation.model_copy(update={"confidence": Confidence(confidence)})  # type: ignore[union-attr]
        rounds = (first.model_copy(update={"recommendation": said}), *others)
        return dump_line(episode.model_copy(update={"rounds": rounds}))

    lines = tmp_path / "trajectories.jsonl"
    lines.write_text("".join(stating(confidence).rstrip("\n") + "\n" for confidence in (1, 3)))
    whole = Verdict.of(episode).record(pair.id)
    data = LabelledData([pair], "world", {}, world / "pairs.jsonl")
    found = judged_by_model(data, Protocol(first_answer_from="high"), [whole], lines)
    assert found.items[0].cost.rounds == whole.rounds == len(episode.rounds) > 1


def test_a_model_s_run_is_not_overwritten_by_another_judge(tmp_path: Path) -> None:
    data, out = write_pairs(tmp_path / "pairs.jsonl", ten_pairs()), tmp_path / "run"
    out.mkdir()
    (out / "verdicts.jsonl").write_text("")
    (out / "eval.json").write_text("the model's")
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "p0", "verdict": 1}\n')
    for given in (
        ("eval", "pairs", "--pairs", data, "--model", "baseline:always-1", "--out", out),
        ("eval", "score", answers, "--data", data, "--out", out),
    ):
        done = vrthinker(*given)
        assert (done.code, "the folder of a model's run" in done.last_line) == (2, True)
        assert (out / "eval.json").read_text() == "the model's"


def test_a_benchmark_from_its_own_layout_with_its_traps_and_the_published_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["Same", "Video 1 better", "Video 1 Better", "Video 2 better", "Hard to judge"]
    rows = [mj_row(caption=f"c{n}", overall_preference=word) for n, word in enumerate(words)]
    rows += [mj_row(caption="discarded", discard=True), dict(rows[0])]
    bench = tmp_path / "bench"
    bench.mkdir()
    write_json(bench / "annotations.json", rows)
    evaluate_bench = ("eval", "mj-bench-video", "--data", bench, "--model", "baseline:always-1")
    cut = vrthinker(*evaluate_bench, "--out", tmp_path / "cut")
    assert (cut.code, "published" in cut.out) == (0, False), "7 rows are not the whole benchmark"
    monkeypatch.setitem(published()["rows"], "mj-bench-video", [7, 7])
    done = vrthinker(*evaluate_bench, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    tau = found["summary"]["measures"]["all"]["oa/tau"]
    assert (tau["value"], tau["n"]) == (0.5, 4), "both spellings are video 1, and nobody judged the last"
    for words_shown in (
        "left out: 1 rows that the import dropped: its annotators discarded it",
        "left out: 1 rows that the import dropped: the same row again",
        "beside oa/tau: always video 1 0.500, always video 2 0.250, always tie 0.250",
        "published about mj-bench-video (arXiv 2510.10518",
    ):
        assert words_shown in done.out, words_shown
    assert "67.3" in done.out
    part = vrthinker(*evaluate_bench, "--out", tmp_path / "part", "--limit", 3)
    assert "published" not in part.out, "a part of it cannot be compared"
    assert "left out: 2 labelled pairs that --limit 3 did not draw" in part.out
    (bench / "second.json").write_text("[]")
    refused = vrthinker(*evaluate_bench, "--out", tmp_path / "run2")
    assert (refused.code, "name it with --annotations" in refused.line) == (2, True)


def test_published_tables_are_never_shown_beside_the_world(world: Path, tmp_path: Path) -> None:
    done, found = evaluate(world / "pairs.jsonl", "always-tie", tmp_path / "run")
    assert found["benchmark"] is None
    assert "published" not in done.out
    assert "always tie" in done.out
