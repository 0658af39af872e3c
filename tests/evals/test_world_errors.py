"""What was lost per cause: counts, the files beside a run, the printed table, and the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import heavy  # noqa: F401
import pytest
from cli_run import vrthinker
from quick_judge import make_quick_judge
from world_play import SPAN, Stage, checked, known_pair

from vrthinker import judge as judge_module
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.trajectory import StopReason, Trajectory, dump_line
from vrthinker.errors import InputError
from vrthinker.evals.retrieval import Retrieval
from vrthinker.evals.world import evaluate_world
from vrthinker.evals.world_errors import EpisodeSlips, KindCount, diagnose, errors_of, slip_lines
from vrthinker.evals.world_errors_table import print_errors
from vrthinker.evals.world_slip_kinds import Slip, SlipKind
from vrthinker.judge import Judge
from vrthinker.world.files import sample_world, write_pairs
from vrthinker.world.nano import nano_settings, nano_templates
from vrthinker.world.oracle import BehaviorMix, OracleEngine, truths_by_clip
from vrthinker.world.world import PRESETS, PairTruth

K = SlipKind
LIMIT, SEED = 5, 12


@pytest.fixture(scope="module", autouse=True)
def no_decoding_ahead() -> Iterator[None]:
    """The oracle looks at no pixel, and decoding costs more than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_module, "EpisodeRunner", partial(EpisodeRunner, decode_ahead=False))
        yield


def truths() -> list[PairTruth]:
    return sample_world(PRESETS["medium"], LIMIT, SEED, "medium")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a judge that reads all it sees and never looks where a hint is."""
    out = tmp_path_factory.mktemp("errors") / "run"
    engine = OracleEngine(
        truths_by_clip(out / "world", truths()), BehaviorMix(oracle=0, immediate=1), span=SPAN
    )
    judge = Judge(engine, nano_settings(), templates=nano_templates())
    evaluate_world(judge, out, difficulty="medium", limit=LIMIT, seed=SEED, retrievals=[Retrieval.OWN])
    return out


@pytest.fixture
def shared(run: Path) -> Iterator[Path]:
    """The same run, whose episodes a test may change: their clips are named by absolute paths."""
    before = (run / "own.jsonl").read_bytes()
    yield run
    (run / "own.jsonl").write_bytes(before)


def episode(number: int, *slips: Slip, wrong: bool = True) -> EpisodeSlips:
    return EpisodeSlips(f"pair-{number}", wrong, 8, 2, 0, slips)


def test_the_cause_is_the_first_slip_that_matters() -> None:
    place, noise = Slip(1, K.PLACE, "a", matters=False), Slip(1, K.NOISE_MISSED, "b")
    total = Slip(2, K.SUM, "c")
    assert episode(1, place, noise, total).cause is K.NOISE_MISSED
    assert episode(1, place).cause is None
    assert episode(1).cause is None
    assert episode(1, noise, wrong=False).cause is None
    assert slip_lines(episode(1, place, noise, total)) == (
        "round 1, place misread: a",
        "round 1, noise missed: b (the first slip that matters)",
        "round 2, sum wrong: c",
    )
    assert slip_lines(episode(1, noise, wrong=False)) == ("round 1, noise missed: b",)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trajectory]:
    """Three pairs alike: one is judged right, one with a misread frame, one with a wrong sum and answer."""
    pairs = three_pairs()
    folder = tmp_path_factory.mktemp("three")
    write_pairs(folder, pairs)
    stage = Stage(folder)
    found = {pairs[0].id: stage.oracle(pairs[0])}
    texts = [record.text for record in found[pairs[0].id].rounds]
    misread = texts[2].replace("4 yellow", "4 yellow noise")
    summed = texts[2].replace("sums 4 to 5", "sums 5 to 4").replace("OA=1", "OA=2")
    assert texts[2] not in (misread, summed)
    found[pairs[1].id] = stage.texts([*texts[:2], misread], pairs[1])
    found[pairs[2].id] = stage.texts([*texts[:2], summed], pairs[2])
    return found


def three_pairs() -> list[PairTruth]:
    return [checked(known_pair().model_copy(update={"id": f"known-{i}"})) for i in range(4)][:3]


def test_counts(played: dict[str, Trajectory]) -> None:
    errors = errors_of(three_pairs(), played, span=SPAN)
    assert (len(errors.episodes), errors.not_judged, errors.unexplained) == (3, 0, 0)
    assert (errors.rounds, errors.frames, errors.broken_rounds) == (9, 3 * 24, 0)
    assert [e.id for e in errors.wrong] == ["known-2"]
    counts = errors.counts()
    assert counts[K.NOISE_INVENTED] == KindCount(1, 100 / 72, "100 frames", 1, 0), "the verdict is right"
    assert counts[K.SUM] == KindCount(1, 100 / 9, "100 rounds", 1, 1)
    assert sum(count.slips for count in counts.values()) == 2
    assert list(counts) == list(SlipKind)
    json.dumps(errors.as_json(), allow_nan=False)


def test_what_was_not_judged_is_not_counted(played: dict[str, Trajectory]) -> None:
    broken = dict(played)
    del broken["known-0"]
    outcome = played["known-1"].outcome.model_copy(
        update={"judgments": None, "stop_reason": StopReason.ENGINE_ERROR, "reason": "the engine failed"}
    )
    broken["known-1"] = played["known-1"].model_copy(update={"outcome": outcome})
    errors = errors_of(three_pairs(), broken, span=SPAN)
    assert (len(errors.episodes), errors.not_judged) == (1, 2)
    nothing = errors_of(three_pairs(), {}, span=SPAN)
    assert (len(nothing.episodes), nothing.not_judged, nothing.rounds) == (0, 3, 0)
    assert all(count.rate is None for count in nothing.counts().values())


def test_a_wrong_verdict_without_a_slip_has_a_row_of_its_own(
    played: dict[str, Trajectory], capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge that makes no slip is wrong where it has too few calls. Here the label is changed instead."""
    errors = errors_of(three_pairs()[:1], played, span=SPAN)
    assert errors.unexplained == 0
    wrong = replace(errors, episodes=(replace(errors.episodes[0], wrong=True),))
    assert wrong.unexplained == 1
    print_errors(errors, {})
    assert capsys.readouterr().out.endswith("no slip was found\n")
    print_errors(wrong, {})
    assert ["none", "found", "1"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_files_beside_a_run(run: Path) -> None:
    judged = (run / "own.jsonl").read_bytes()
    steps: list[tuple[int, int]] = []
    diagnosis = diagnose(run, pages=2, on_page=lambda done, total: steps.append((done, total)))
    assert (run / "own.jsonl").read_bytes() == judged
    wrong = [e.id for e in diagnosis.errors.wrong]
    assert len(wrong) > 2, "there is something to choose from"
    slips = {e.id: len(e.slips) for e in diagnosis.errors.episodes}
    assert [slips[name] for name in wrong] == sorted((slips[name] for name in wrong), reverse=True)
    assert list(diagnosis.pages) == wrong[:2]
    assert steps == [(1, 2), (2, 2)]
    index = (run / "errors" / "index.txt").read_text()
    for name in wrong[:2]:
        page = diagnosis.pages[name].read_text()
        assert page.startswith("<!doctype html>")
        assert "marked gap never asked for: read a hint to the gap behind" in page
        assert f"{name}.html\n  round 1, marked gap never asked for" in index
    assert {path.name for path in (run / "errors").iterdir()} == {
        "index.txt", *(f"{name}.html" for name in wrong[:2])
    }  # fmt: skip
    written = json.loads((run / "errors.json").read_text())
    assert (written["difficulty"], written["limit"], written["seed"]) == ("medium", LIMIT, SEED)
    assert written["episodes"] == LIMIT
    assert written["wrong_verdicts"] == len(wrong) == written["kinds"]["marked_gap_never_asked_for"]["causes"]
    by_id = {line["id"]: line for line in written["by_episode"]}
    assert by_id[wrong[0]]["page"] == f"errors/{wrong[0]}.html"
    assert by_id[wrong[2]]["page"] is None
    assert by_id[wrong[0]]["cause"] == "marked_gap_never_asked_for"
    assert by_id[wrong[0]]["slips"][0]["detail"].startswith("read a hint to the gap behind")

    assert list(diagnose(run, pages=1).pages) == wrong[:1]
    assert {path.name for path in (run / "errors").iterdir()} == {"index.txt", f"{wrong[0]}.html"}
    assert diagnose(run, pages=0).pages == {}
    assert list((run / "errors").iterdir()) == []


def test_a_folder_that_cannot_hold_pages(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run of"):
        diagnose(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("run.json", "own.jsonl"):
        (copy / name).write_bytes((run / name).read_bytes())
    (copy / "errors").write_text("a file")
    with pytest.raises(InputError, match="errors: "):
        diagnose(copy)


def test_the_command_shows_the_causes_of_a_finished_run(shared: Path) -> None:
    """No model is loaded, and the planted slip stands first on its page."""
    lines = (shared / "own.jsonl").read_text().splitlines()
    trajectory = Trajectory.model_validate_json(lines[0])
    (record,) = trajectory.rounds
    text = record.text.replace("sums ", "sums 1", 1)
    planted = trajectory.model_copy(update={"rounds": (record.model_copy(update={"text": text}),)})
    (shared / "own.jsonl").write_text(dump_line(planted) + "\n".join(lines[1:]) + "\n")
    done = vrthinker("eval", "show", shared, "--errors", "--error-pages", 1)
    assert done.code == 0, done.err
    assert f"errors with own frames ({LIMIT * 8} frames, {LIMIT} rounds, {LIMIT} episodes; " in done.out
    table = [line.split() for line in done.out.splitlines()]
    assert ["sum", "wrong", "1", "20.00", "per", "100", "rounds", "1"] in [line[:8] for line in table]
    assert "marked gap never asked for" in done.out
    assert "noise missed" not in done.out, "kinds without a slip are left out"
    (page,) = (shared / "errors").glob("*.html")
    assert f"{page}: " in done.out
    assert "  round 1, marked gap never asked for: read a hint to the gap behind " in done.out
    shown = json.loads(vrthinker("eval", "show", shared, "--errors", "--json").out)
    assert shown["errors_by_cause"]["kinds"]["sum_wrong"]["slips"] == 1
    assert set(shown["error_pages"]) == {path.stem for path in (shared / "errors").glob("*.html")}
    plain = vrthinker("eval", "show", shared)
    assert "what went wrong" not in plain.out
    assert "errors_by_cause" not in json.loads(vrthinker("eval", "show", shared, "--json").out)
    assert "--error-pages: got -1" in vrthinker("eval", "show", shared, "--error-pages", -1).line


def test_the_command_says_if_a_model_does_not_write_these_words(tmp_path: Path) -> None:
    """A tiny model of random weights, in the command itself, which judges nothing twice."""
    out = tmp_path / "run"
    evaluate = (
        *("eval", "world", "--model", make_quick_judge(tmp_path / "tiny"), "--out", out, "--device", "cpu"),
        *("--limit", 2, "--retrieval", "own"),
    )
    assert vrthinker(*evaluate).code == 0
    judged = (out / "own.jsonl").read_bytes()
    assert not (out / "errors.json").exists()
    done = vrthinker(*evaluate, "--errors")
    assert done.code == 0, done.err
    assert (out / "own.jsonl").read_bytes() == judged
    written = json.loads((out / "errors.json").read_text())
    assert written["broken_rounds"] == written["rounds"] >= 2
    kinds = {name for name, count in written["kinds"].items() if count["slips"]}
    assert "form_broken" in kinds
    share = f"{written['rounds']} of {written['rounds']} rounds"
    assert f"{share} are not in the world's words: this model does not write them" in done.out
    assert "--error-pages: got -1" in vrthinker(*evaluate, "--error-pages", -1).line
