"""The world evaluation: a judge that knows the truth, one that knows nothing, and runs that broke off."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import numpy as np
import pytest
from quick_judge import make_quick_judge

from vrthinker import judge as judge_module
from vrthinker.commands.make_tiny import make_tiny_judge
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.evals.intervals import Estimate
from vrthinker.evals.metrics import measure
from vrthinker.evals.retrieval import Retrieval
from vrthinker.evals.world import WorldReport, evaluate_world, load_report, load_scores, report_of
from vrthinker.judge import Judge
from vrthinker.world.files import sample_world
from vrthinker.world.nano import nano_settings, nano_templates
from vrthinker.world.oracle import BehaviorMix, OracleEngine, truths_by_clip
from vrthinker.world.truth_reader import count, first_seen, hidden_events_seen
from vrthinker.world.world import PRESETS, Difficulty, PairTruth

LIMIT, SEED = 24, 77
WAYS = ("own", "random", "uniform")
ACCURACIES = ("oa/tau", "oa/diff", "all_four", "ta/accuracy", "vq/accuracy", "mq/accuracy")


def truths_of(difficulty: Difficulty = "easy", limit: int = LIMIT, seed: int = SEED) -> list[PairTruth]:
    return sample_world(PRESETS[difficulty], limit, seed, difficulty)


def oracle(
    out: Path,
    difficulty: Difficulty = "easy",
    limit: int = LIMIT,
    mix: BehaviorMix | None = None,
    **episode: Any,
) -> Judge:
    """A judge that knows the truth about the frames that it is shown, and about no others."""
    truths = truths_by_clip(out / "world", truths_of(difficulty, limit))
    engine = OracleEngine(truths, mix, calls=6, span=PRESETS[difficulty].span[0])
    rounds = nano_settings().episode.model_copy(update={"max_rounds": 8, **episode})
    return Judge(engine, nano_settings().model_copy(update={"episode": rounds}), templates=nano_templates())


@pytest.fixture(scope="module", autouse=True)
def no_decoding_ahead() -> Iterator[None]:
    """The oracle looks at no pixel, and decoding costs more than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_module, "EpisodeRunner", partial(EpisodeRunner, decode_ahead=False))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WorldReport]:
    out = tmp_path_factory.mktemp("eval") / "run"
    return out, evaluate_world(oracle(out), out, limit=LIMIT, seed=SEED)


@pytest.fixture
def copy(run: tuple[Path, WorldReport], tmp_path: Path) -> Path:
    """The run again, where the oracle finds it: a run's episodes name their clips by absolute paths."""
    out = run[0].with_name(tmp_path.name)
    shutil.copytree(run[0], out)
    return out


# What is measured


def test_who_knows_the_truth_and_looks_is_always_right(run: tuple[Path, WorldReport]) -> None:
    _, report = run
    for name in (*ACCURACIES, "hidden_events/seen", "format/well_formed", "verdicts/share"):
        n = report.judged["own"][name].n
        assert report.judged["own"][name] == Estimate(1.0, 1.0, 1.0, n), name
        assert n > 5
    assert report.judged["own"]["oa/tau"].n == LIMIT
    assert report.failures == ()


def test_the_perfect_reader_of_an_oracles_frames_says_what_the_oracle_says(
    run: tuple[Path, WorldReport],
) -> None:
    """The oracle misreads nothing either: whatever frames it was shown, both say the same."""
    _, report = run
    assert set(report.judged) == set(report.perfect) == {*WAYS, "none"}
    for column, measures in report.judged.items():
        for name in (*ACCURACIES, "hidden_events/seen", "tool_calls/mean"):
            assert report.perfect[column][name] == measures[name], (column, name)


def test_without_looking_it_is_the_reader_of_the_first_frames(run: tuple[Path, WorldReport]) -> None:
    _, report = run
    truths = truths_of()
    right = [count(truth, first_seen(truth)).OA == truth.judgments.OA for truth in truths]
    assert report.judged["none"]["oa/tau"].value == np.mean(right)
    assert 0 < np.mean(right) < 1, "the first frames mislead"
    for name in ("tool_calls/mean", "retrieved_frames/mean"):
        assert report.judged["none"][name] == Estimate(0.0, 0.0, 0.0, LIMIT)
    assert report.judged["none"]["hidden_events/seen"].value == 0


def test_other_frames_of_the_same_budget_are_worth_less(run: tuple[Path, WorldReport]) -> None:
    out, report = run
    for way in ("random", "uniform", "none"):
        gain = report.gains[way]
        assert gain.value == pytest.approx(1 - (report.judged[way]["oa/tau"].value or 0))
        assert gain.value is not None
        assert gain.low is not None
        assert gain.high is not None
        assert gain.low <= gain.value <= gain.high
        assert gain.value > 0
        assert gain.n == LIMIT
    assert set(report.gains) == {"random", "uniform", "none"}
    budgets: dict[str, set[tuple[int, ...]]] = {}
    for way in WAYS:
        for trajectory in load_trajectories(out / f"{way}.jsonl"):
            tools = [r.tool for r in trajectory.rounds if r.tool is not None]
            assert all(tool.error_kind is None for tool in tools)
            budgets.setdefault(way, set()).update(tool.frame_numbers for tool in tools)
            for tool in tools:
                assert len(tool.frame_numbers) in (4, 8), "as many as the oracle asked for"
                if way != "own" and len(tool.frame_numbers) == 8:
                    assert sum(n <= trajectory.n_frames_1 for n in tool.frame_numbers) == 4
    assert len(budgets["uniform"]) < len(budgets["random"])


def test_hidden_events_that_a_frame_fell_into(run: tuple[Path, WorldReport]) -> None:
    out, report = run
    truths = {truth.id: truth for truth in truths_of()}
    hidden = sum(truth.hidden_events for truth in truths.values())
    for way in WAYS:
        seen = sum(
            hidden_events_seen(truths[trajectory.id], trajectory.frames_seen)
            for trajectory in load_trajectories(out / f"{way}.jsonl")
        )
        assert report.judged[way]["hidden_events/seen"].value == seen / hidden
        assert (seen < hidden) == (way != "own")


def test_calls_by_hidden_events(run: tuple[Path, WorldReport]) -> None:
    _, report = run
    assert list(report.calls) == ["0", "1", "2"]
    assert [report.calls[group].value for group in ("0", "1", "2")] == [0.0, 1.0, 2.0]
    assert sum(estimate.n for estimate in report.calls.values()) == LIMIT


def test_intervals_are_there_and_hold_their_values(run: tuple[Path, WorldReport]) -> None:
    _, report = run
    wide = 0
    for columns in (report.judged, report.perfect):
        for measures in columns.values():
            for estimate in measures.values():
                if estimate.value is not None:
                    assert estimate.low is not None
                    assert estimate.high is not None
                    assert estimate.low <= estimate.value <= estimate.high
                    wide += estimate.low < estimate.high
    assert wide > 10


@pytest.mark.parametrize("difficulty", ["medium", "hard"])
def test_harder_worlds(difficulty: Difficulty, tmp_path: Path) -> None:
    """Clips of different lengths, more hints than a call can look into."""
    report = evaluate_world(
        oracle(tmp_path, difficulty, 6), tmp_path, difficulty=difficulty, limit=6, seed=SEED
    )
    assert report.failures == ()
    assert report.judged["own"]["all_four"] == Estimate(1.0, 1.0, 1.0, 6)
    for column, measures in report.judged.items():
        assert report.perfect[column]["all_four"] == measures["all_four"], column


def test_a_judge_that_never_looks_gains_nothing(tmp_path: Path) -> None:
    mix = BehaviorMix(oracle=0, immediate=1)
    report = evaluate_world(oracle(tmp_path, limit=8, mix=mix), tmp_path, limit=8, seed=SEED)
    for way in ("random", "uniform", "none"):
        assert report.gains[way] == Estimate(0.0, 0.0, 0.0, 8)
        assert report.judged[way]["oa/tau"] == report.judged["own"]["oa/tau"]


def test_the_table_is_written_and_read_again(run: tuple[Path, WorldReport]) -> None:
    out, report = run
    table = json.loads((out / "table.json").read_text())
    assert table == json.loads(json.dumps(report.as_json()))
    assert table["judged"]["own"]["oa/tau"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": LIMIT}
    assert set(table) == {
        "judged", "perfect_reader", "oa_tau_gain_of_own_over", "tool_calls_by_hidden_events", "failures",
        "errors", "episodes"
    }  # fmt: skip
    shown, about = load_report(out)
    assert shown == report
    assert (about["difficulty"], about["limit"], about["seed"]) == ("easy", LIMIT, SEED)
    assert measure(load_scores(out)) == report.judged["own"]


# Runs that broke off


class Counting:
    """Progress, and which episodes were run."""

    def __init__(self) -> None:
        self.begun: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def __call__(self, retrieval: str, done: int, total: int) -> None:
        assert total == LIMIT
        self.begun.setdefault(retrieval, done)
        self.done[retrieval] = done


def test_a_killed_run_goes_on_and_ends_in_the_same_table(run: tuple[Path, WorldReport], copy: Path) -> None:
    """Killed while it wrote an episode of the second way: its line is torn, the third has not begun."""
    own, random = (copy / "own.jsonl").read_bytes(), (copy / "random.jsonl").read_bytes()
    lines = random.splitlines(keepends=True)
    (copy / "random.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][: len(lines[9]) // 2])
    (copy / "uniform.jsonl").unlink()
    (copy / "table.json").unlink()
    counting = Counting()
    report = evaluate_world(oracle(copy), copy, limit=LIMIT, seed=SEED, on_episode=counting)
    assert counting.begun == {"own": LIMIT, "random": 9, "uniform": 0}
    assert set(counting.done.values()) == {LIMIT}
    assert report == run[1]
    assert (copy / "own.jsonl").read_bytes() == own, "what is on record is not run again"
    after = (copy / "random.jsonl").read_bytes()
    assert after.startswith(b"".join(lines[:9]))
    assert len({t.id for t in load_trajectories(copy / "random.jsonl")}) == after.count(b"\n") == LIMIT
    assert json.loads((copy / "table.json").read_text()) == json.loads((run[0] / "table.json").read_text())


def test_showing_a_run_changes_nothing_and_says_what_is_missing(
    run: tuple[Path, WorldReport], copy: Path
) -> None:
    """It may still be under way: the line that is being written counts for nothing and stays."""
    lines = (copy / "own.jsonl").read_bytes().splitlines(keepends=True)
    torn = b"".join(lines[:20]) + b"\n" + lines[20][:50]
    (copy / "own.jsonl").write_bytes(torn)
    report, _ = load_report(copy)
    assert (copy / "own.jsonl").read_bytes() == torn
    assert report.judged["own"]["verdicts/share"].value == 20 / LIMIT
    assert report.judged["own"]["oa/tau"].value == 20 / LIMIT, "what is missing is wrong, never absent"
    assert len(report.failures) == LIMIT - 20
    assert report.errors == report.failures
    with pytest.raises(InputError, match=f": {LIMIT - 20} of {LIMIT} pairs are not judged yet; run it again"):
        load_scores(copy)
    assert all(
        line.startswith("own/easy-77-") and line.endswith(": not judged yet") for line in report.failures
    )
    for way in WAYS:
        (copy / f"{way}.jsonl").unlink()
    with pytest.raises(InputError, match="has no episode yet"):
        load_report(copy)
    for content in ("{", "[]", '{"world": {}}'):
        (copy / "run.json").write_text(content)
        with pytest.raises(InputError, match="no run of"):
            load_report(copy)
    with pytest.raises(InputError, match="no run of"):
        load_report(copy / "nowhere")


def test_a_record_that_is_damaged_in_the_middle_is_one_line(copy: Path) -> None:
    lines = (copy / "own.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "own.jsonl").write_bytes(lines[0] + lines[1][:60] + b"\n" + b"".join(lines[2:]))
    with pytest.raises(InputError, match=r"own\.jsonl:2: "):
        evaluate_world(oracle(copy), copy, limit=LIMIT, seed=SEED)


def test_another_run_in_the_folder_is_refused(copy: Path) -> None:
    for change, words in (
        ({"seed": SEED + 1}, f"seed={SEED}; this run has seed={SEED + 1}"),
        ({"limit": LIMIT + 1}, f"limit={LIMIT}; this run has limit={LIMIT + 1}"),
        ({"difficulty": "medium"}, 'difficulty="easy"'),
    ):
        with pytest.raises(InputError) as caught:
            evaluate_world(oracle(copy), copy, **{"limit": LIMIT, "seed": SEED, **change})  # type: ignore[arg-type]
        assert words in str(caught.value)
    for episode, words in (({"temperature": 0.5}, "temperature"), ({"window": 2}, "window")):
        with pytest.raises(InputError, match=f"settings.episode.{words}"):
            evaluate_world(oracle(copy, **episode), copy, limit=LIMIT, seed=SEED)
    other = oracle(copy)
    other.templates.sources["outcome"] += " "
    with pytest.raises(InputError, match="prompts"):
        evaluate_world(other, copy, limit=LIMIT, seed=SEED)


def test_other_weights_of_the_same_name_are_refused(tmp_path: Path) -> None:
    folders = [make_tiny_judge(tmp_path / str(seed) / "tiny", "qwen2.5-vl", seed) for seed in (0, 1)]
    run = tmp_path / "run"

    def evaluate(folder: Path) -> WorldReport:
        with Judge.from_pretrained(folder, device="cpu", max_rounds=1, max_round_tokens=20) as judge:
            return evaluate_world(judge, run, limit=1, seed=SEED, retrievals=[Retrieval.OWN])

    report = evaluate(folders[0])
    assert set(report.judged) == {"own", "none"}
    with pytest.raises(InputError, match="weights="):
        evaluate(folders[1])
    assert evaluate(folders[0]) == report


def test_what_cannot_be_evaluated_binds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    wrong: list[dict[str, Any]] = [{"limit": 0}, {"seed": -1}, {"retrievals": [Retrieval.RANDOM]}]
    for arguments in (*wrong, {"retrievals": []}):
        with pytest.raises(InputError):
            evaluate_world(oracle(out), out, **arguments)
    with pytest.raises(InputError, match=r"max_fps: got 4\.0"):
        evaluate_world(oracle(out, max_fps=4.0), out, limit=2)
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(InputError, match="the folder cannot be made"):
        evaluate_world(oracle(out), out, limit=2)


# Episodes without a verdict


def test_a_judge_without_verdicts_is_wrong_and_listed(tmp_path: Path) -> None:
    folder = make_quick_judge(tmp_path / "tiny")
    with Judge.from_pretrained(
        folder, device="cpu", guided=False, temperature=1.0, max_round_tokens=6
    ) as judge:
        report = evaluate_world(judge, tmp_path / "run", limit=3, seed=SEED)
    for column in ("own", "random", "uniform", "none"):
        assert report.judged[column]["oa/tau"] == Estimate(0.0, 0.0, 0.0, 3)
        assert report.judged[column]["verdicts/share"].value == 0
        assert report.perfect[column]["verdicts/share"].value == 1, "the reader of its frames has one"
    assert (len(report.failures), report.errors, report.episodes) == (9, (), 9), "its words are to blame"
    assert all("round 1" in line for line in report.failures)
    assert load_report(tmp_path / "run")[0] == report


def test_a_clip_that_cannot_be_read_is_a_failure_that_is_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    evaluate_world(oracle(out, limit=4), out, limit=4, seed=SEED)
    victim = sorted((out / "world" / "clips").iterdir())[3]
    whole = victim.read_bytes()
    victim.write_text("this is no video\n" * 40)
    (out / "own.jsonl").unlink()
    report = evaluate_world(oracle(out, limit=4), out, limit=4, seed=SEED)
    (failure,) = report.failures
    assert report.errors == report.failures
    assert failure.startswith(f"own/easy-{SEED}-000001: ")
    assert victim.name in failure
    assert report.judged["own"]["oa/tau"] == Estimate(0.75, report.judged["own"]["oa/tau"].low, 1.0, 4)
    assert report.perfect["own"]["verdicts/share"].value == 0.75
    assert report.judged["random"]["verdicts/share"].value == 1.0
    victim.write_bytes(whole)
    mended = evaluate_world(oracle(out, limit=4), out, limit=4, seed=SEED)
    assert mended.failures == ()
    assert mended.judged["own"]["oa/tau"].value == 1.0


def test_a_disk_that_is_full_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "own.jsonl").symlink_to("/dev/full")
    with pytest.raises(VRThinkerError, match=r"own\.jsonl: cannot be written \(No space left on device\)"):
        evaluate_world(oracle(out, limit=2), out, limit=2, seed=SEED, retrievals=[Retrieval.OWN])


def test_a_report_without_an_episode(run: tuple[Path, WorldReport]) -> None:
    truths = truths_of()[:2]
    report = report_of(truths, {Retrieval.OWN: {}}, {f"own/{truths[0].id}": "why"})
    assert report.failures == (f"own/{truths[0].id}: why", f"own/{truths[1].id}: not judged yet")
    assert report.judged["own"]["oa/tau"] == report.perfect["own"]["oa/tau"] == Estimate(0.0, 0.0, 0.0, 2)
    assert report.judged["own"]["hidden_events/seen"].n == sum(bool(t.hidden_events) for t in truths)


def test_a_pipe_for_the_episodes_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    os.mkfifo(out / "own.jsonl")
    with pytest.raises(InputError, match=r"own\.jsonl: got a pipe"):
        evaluate_world(oracle(out, limit=2), out, limit=2, seed=SEED, retrievals=[Retrieval.OWN])
