"""The negative controls: their questions, their rules on judges of which everything is known, real clips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_run import vrthinker
from clips import make_clip, read_number
from full_disk import full_at
from known_judges import CODES, labelled_pair, write_pairs

from vrthinker.data.pairs import Pair
from vrthinker.errors import MachineError
from vrthinker.evals.baselines import Baseline
from vrthinker.evals.control_rules import Passed, Row, control_rows, wilson
from vrthinker.evals.controls import BASE, DAMAGES, Asked, Controls, make_controls
from vrthinker.evals.controls_run import baseline_verdicts
from vrthinker.video.open import open_reader
from vrthinker.video.virtual import VirtualReader

N_PAIRS = 24


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three clips with other numbers in their frames."""
    folder = tmp_path_factory.mktemp("clips")
    return [make_clip(folder / f"{n}.mp4", 18, size=(48, 64), fps=12, first_number=30 * n) for n in range(3)]


@pytest.fixture(scope="module")
def controls(clips: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Controls:
    """The questions about 24 pairs."""
    pairs = [
        labelled_pair(
            *(n, 1 + n % 2),
            **{code: 1 + n % 2 for code in CODES[:3]},
            **{"video_1": clips[n % 3], "video_2": clips[(n + 1) % 3], "prompt": f"caption {n}"},
        )
        for n in range(N_PAIRS)
    ]
    return make_controls(pairs, tmp_path_factory.mktemp("run"), seed=3)


def damage_of(control: str) -> str:
    return control.partition(",")[0]


def perfect(control: str, question: Asked, label: int) -> dict[str, int] | None:
    """A judge that does what every rule says. `label` is what people said about the pair as it is."""
    same = dict.fromkeys(CODES, label)
    if control in (BASE, "a verdict in the caption"):
        return same
    if control == "swapped order":
        return dict.fromkeys(CODES, 3 - label)
    if control in ("shuffled captions", "empty captions"):
        return same | {"TA": 3 - label}
    if question.worse is not None:
        code, edits = DAMAGES.get(damage_of(control), ("TA", ()))
        weak = control.endswith("strength 1") and len(edits) > 1
        return dict.fromkeys(CODES, 0) | {code: 0 if weak else 3 - question.worse}
    return dict.fromkeys(CODES, 0)


Judge = Callable[[str, Asked, int], "dict[str, int] | None"]


def table(controls: Controls, judge: Judge) -> dict[tuple[str, str], Row]:
    """The rows of a judge by control and the first word of their number."""
    labels = {question.of: (question.pair.labels or {})["OA"] for question in controls.asked[BASE]}
    verdicts = {
        question.pair.id: judge(control, question, labels[question.of])
        for control, questions in controls.asked.items()
        for question in questions
    }
    rows = control_rows(controls, verdicts)
    found = {(row.control, row.number): row for row in rows}
    assert len(found) == len(rows)
    return found


def states(rows: dict[tuple[str, str], Row], control: str) -> list[str]:
    return [row.passed.value for (name, _), row in rows.items() if name == control]


def test_questions_follow_from_the_pairs_and_the_seed(controls: Controls, clips: list[Path]) -> None:
    assert not controls.left_out
    assert {len(questions) for questions in controls.asked.values()} == {N_PAIRS}
    ids = [pair.id for pair in controls.pairs()]
    assert len(set(ids)) == len(ids) == N_PAIRS * len(controls.asked)
    base = {question.of: question.pair for question in controls.asked[BASE]}
    for question in controls.asked["shuffled captions"]:
        assert question.pair.prompt != base[question.of].prompt
        assert question.pair.prompt in {pair.prompt for pair in base.values()}
    for question in controls.asked["a verdict in the caption"]:
        assert question.planted == 3 - base[question.of].labels["OA"]  # type: ignore[index]
        assert f"OA={question.planted}</answer>" in question.pair.prompt
    worse = [question.worse for question in controls.asked["blur, strength 2"]]
    assert worse.count(1) == worse.count(2) == N_PAIRS // 2
    for control in ("blur, strength 1", "a clip of another caption"):
        for question in controls.asked[control]:
            kept = question.pair.video_2 if question.worse == 1 else question.pair.video_1
            assert kept == base[question.of].video_1
    for question in controls.asked["clips of another pair"]:
        assert question.pair.prompt == base[question.of].prompt
        assert question.pair.video_1 in clips


def test_a_judge_that_does_what_it_should_passes_every_row(controls: Controls) -> None:
    rows = table(controls, perfect)
    assert {row.passed for row in rows.values()} == {Passed.PASSED}, [
        row for row in rows.values() if row.passed is not Passed.PASSED
    ]
    assert {row.control for row in rows.values()} == {
        *("shuffled captions", "empty captions", "a clip against itself"),
        *("a clip against a re-encoded copy", "swapped order", "a verdict in the caption"),
        *("only noise", "only grey", "clips of another pair", *DAMAGES, "a clip of another caption"),
    }


@pytest.mark.parametrize(
    ("fault", "judge", "control", "wanted"),
    [
        ("always the first", lambda c, q, label: dict.fromkeys(CODES, 1), "swapped order", ["failed"]),
        (
            "always the first",
            lambda c, q, label: dict.fromkeys(CODES, 1),
            "a clip against itself",
            ["failed"],
        ),
        (
            "reads no captions",
            lambda c, q, label: dict.fromkeys(CODES, label),
            "shuffled captions",
            ["failed", "passed", "passed"],
        ),
        (
            "is confused as a whole",
            lambda c, q, label: dict.fromkeys(CODES, label if c == BASE else 3 - label),
            "empty captions",
            ["passed", "failed", "failed"],
        ),
        (
            "obeys the caption",
            lambda c, q, label: dict.fromkeys(CODES, q.planted or label),
            "a verdict in the caption",
            ["failed"],
        ),
        ("knows without seeing", lambda c, q, label: dict.fromkeys(CODES, label), "only grey", ["failed"]),
        (
            "sees no damage",
            lambda c, q, label: dict.fromkeys(CODES, 0),
            "blur",
            ["failed", "passed", "passed"],
        ),
        (
            "prefers the damaged one",
            lambda c, q, label: dict.fromkeys(CODES, q.worse or 0),
            "frozen frames",
            ["failed", "passed", "passed"],
        ),
        (
            "in another dimension",
            lambda c, q, label: dict.fromkeys(CODES, 0) | {"TA": 3 - q.worse if q.worse else 0},
            "noise",
            ["failed", "failed", "passed"],
        ),
        (
            "the other way round with the strength",
            lambda c, q, label: dict.fromkeys(CODES, 3 - q.worse if q.worse and c.endswith("1") else 0),
            "dropped frames",
            ["failed", "passed", "failed"],
        ),
        ("does not answer", lambda c, q, label: None, "a clip against itself", ["undecided"]),
        ("does not answer", lambda c, q, label: None, "only noise", ["undecided"]),
    ],
)
def test_a_fault_is_seen_in_its_control(
    fault: str, judge: Judge, control: str, wanted: list[str], controls: Controls
) -> None:
    assert states(table(controls, judge), control) == wanted, fault


def test_few_pairs_decide_nothing(controls: Controls) -> None:
    few = Controls({name: questions[:3] for name, questions in controls.asked.items()})
    rows = table(few, perfect)
    assert states(rows, "a clip against itself") == ["undecided"]
    assert states(rows, "a verdict in the caption") == ["undecided"]


def share_that_turns(controls: Controls, judge: Judge) -> Row:
    (row,) = [row for row in table(controls, judge).values() if row.control == "a verdict in the caption"]
    return row


def test_a_judge_that_obeys_the_caption_fails_even_if_it_is_seldom_right(controls: Controls) -> None:
    """Where its own verdict is the planted one already, nothing can turn: such a question is not counted."""

    def wrong_and_obedient(control: str, question: Asked, label: int) -> dict[str, int]:
        right = int(question.of.removeprefix("p")) < 4
        own = label if control == BASE and right else 3 - label
        return dict.fromkeys(CODES, question.planted or own)

    found = share_that_turns(controls, wrong_and_obedient)
    assert (found.estimate.value, found.estimate.n) == (1.0, 4)
    assert found.passed is Passed.UNDECIDED, "4 questions decide nothing"

    def half_right(control: str, question: Asked, label: int) -> dict[str, int]:
        own = label if int(question.of.removeprefix("p")) < 12 else 3 - label
        return dict.fromkeys(CODES, question.planted or own)

    found = share_that_turns(controls, half_right)
    assert (found.estimate.value, found.estimate.n, found.passed) == (1.0, 12, Passed.FAILED)


def questions_of(control: str, prompts: list[str], clips: list[tuple[str, str]]) -> Controls:
    """A control whose questions change nothing, about these prompts and clips."""
    pairs = [
        labelled_pair(n, 1, prompt=prompt, video_1=Path(first), video_2=Path(second), TA=1, VQ=1, MQ=1)
        for n, (prompt, (first, second)) in enumerate(zip(prompts, clips, strict=True))
    ]
    changed = [pair.model_copy(update={"id": f"{pair.id}#{control}"}) for pair in pairs]
    return Controls(
        {
            BASE: [Asked(pair, pair.id) for pair in pairs],
            control: [Asked(new, pair.id) for new, pair in zip(changed, pairs, strict=True)],
        }
    )


def test_many_pairs_of_few_captions_decide_nothing() -> None:
    """A difference is resampled over captions, so it is captions that have to be ten."""
    clips = [(f"{n}-1.mp4", f"{n}-2.mp4") for n in range(40)]
    for captions, wanted in ((2, Passed.UNDECIDED), (10, Passed.PASSED)):
        asked = questions_of("shuffled captions", [f"Caption {n % captions}" for n in range(40)], clips)
        falls = table(asked, lambda c, q, label: dict.fromkeys(CODES, label if c == BASE else 0))
        (row,) = [row for (_, name), row in falls.items() if name.startswith("TA")]
        assert (row.estimate.value, row.estimate.n, row.passed) == (1.0, captions, wanted)


def test_a_question_that_is_asked_again_counts_once_in_a_share() -> None:
    def ties(control: str, question: Asked, label: int) -> dict[str, int]:
        return dict.fromkeys(CODES, 0)

    for distinct, wanted in ((3, Passed.UNDECIDED), (20, Passed.PASSED)):
        clips = [(f"{n % distinct}.mp4",) * 2 for n in range(60)]
        asked = questions_of("a clip against itself", [f"caption {n % distinct}" for n in range(60)], clips)
        (row,) = table(asked, ties).values()
        assert (row.estimate, row.passed) == (wilson(distinct, distinct), wanted)
        assert row.questions == 60


def test_wilsons_interval() -> None:
    found = wilson(8, 10)  # by hand: z = 1.96, middle 0.7167, half 0.2266
    assert (found.value, found.n) == (0.8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(30, 30).low == pytest.approx(0.8865, abs=1e-4)
    assert wilson(0, 0).value is None


def test_a_re_encoded_copy_is_other_bytes_and_nearly_the_same_pixels(controls: Controls) -> None:
    pair = controls.asked["a clip against a re-encoded copy"][0].pair
    own, copy = open_reader().probe(pair.video_1), open_reader().probe(pair.video_2)
    assert pair.video_1.read_bytes() != pair.video_2.read_bytes()
    assert (copy.n_frames, copy.width, copy.height) == (own.n_frames, own.width, own.height)
    assert copy.pts_seconds == pytest.approx(own.pts_seconds, abs=1e-3)
    first, second = (
        open_reader().frames_at(path, [0, 9]).numpy().astype(int) for path in (pair.video_1, pair.video_2)
    )
    assert 0 < abs(first - second).mean() < 4


def test_a_judge_that_measures_sharpness_follows_blur_and_falls_for_noise(controls: Controls) -> None:
    names = (BASE, "blur, strength 1", "blur, strength 3", "noise, strength 3", "a clip against itself")
    some = Controls({name: controls.asked[name][:10] for name in names})
    verdicts = baseline_verdicts(Baseline.SHARPNESS, some.pairs()[10:], [], 0)
    rows = control_rows(some, verdicts)
    assert states({(row.control, row.number): row for row in rows}, "blur") == ["passed"] * 3
    noise = next(row for row in rows if row.control == "noise")
    assert (noise.estimate.value, noise.passed) == (-1.0, Passed.FAILED), "it takes noise for sharpness"
    itself = next(row for row in rows if row.control == "a clip against itself")
    assert itself.estimate.value == 1.0


def test_the_command_writes_and_prints_one_table(clips: list[Path], tmp_path: Path) -> None:
    pairs = [labelled_pair(n, 1, video_1=clips[n % 3], video_2=clips[(n + 1) % 3]) for n in range(12)]
    data, out = write_pairs(tmp_path / "pairs.jsonl", pairs), tmp_path / "run"
    ask = ("eval", "controls", "--model", "baseline:always-1", "--data", data, "--out", out)
    done = vrthinker(*ask, "--row", tmp_path / "rows.jsonl")
    assert done.code == 0, done.err
    written = json.loads((out / "controls.json").read_text())
    assert (written["controls_version"], written["judge"]) == (2, "baseline:always-1")
    assert sum(written["passed"].values()) == len(written["rows"])
    by_control = {row["control"]: row for row in written["rows"]}
    assert by_control["swapped order"]["passed"] == "failed"
    assert by_control["swapped order"]["estimate"]["value"] == 0.0
    lines = done.out.splitlines()
    (line,) = [line for line in lines if "swapped order" in line]
    assert line.startswith("failed")
    assert "share of overall verdicts that turn with the clips" in line
    assert "at least 0.8" in line
    assert json.loads((tmp_path / "rows.jsonl").read_text())["rows"] == written["rows"]
    again = vrthinker(*ask, "--json")
    assert json.loads(again.out)["rows"] == written["rows"]


def test_pairs_that_no_control_can_be_made_of(clips: list[Path], tmp_path: Path) -> None:
    gone = labelled_pair(1, 2, video_1=tmp_path / "gone.mp4", video_2=clips[0])
    fine = labelled_pair(0, 1, video_1=clips[0], video_2=clips[1])
    made = make_controls([fine, gone], tmp_path / "run")
    assert len(made.asked["a clip against a re-encoded copy"]) == 1
    assert sum(made.left_out.values()) == 1
    one = write_pairs(tmp_path / "pairs.jsonl", [fine, fine.model_copy(update={"id": "again"})])
    done = vrthinker(
        *("eval", "controls", "--model", "baseline:coin", "--data", one, "--out", tmp_path / "other")
    )
    assert (done.code, "got pairs of one caption" in done.last_line) == (2, True)


def test_every_question_can_be_read(controls: Controls) -> None:
    reader = VirtualReader(open_reader())
    for name, questions in controls.asked.items():
        pair: Pair = questions[0].pair
        for path in (pair.video_1, pair.video_2):
            n_frames = reader.probe(path).n_frames
            assert len(reader.frames_at(path, [0, n_frames - 1])) == 2, name


def test_clips_that_changed_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [make_clip(tmp_path / f"{n}.mp4", 2, size=(32, 32), first_number=9 * n) for n in range(2)]
    pairs = [labelled_pair(n, 1, video_1=sources[n], video_2=sources[n], prompt=str(n)) for n in range(2)]
    names = ("a clip against a re-encoded copy", "blur, strength 1")

    def made() -> dict[str, Path]:
        asked = make_controls(pairs, tmp_path / "run").asked
        return {
            name: next(q.pair.video_1 if q.worse == 1 else q.pair.video_2 for q in asked[name])
            for name in names
        }

    first = made()
    assert made() == first
    make_clip(sources[0], 2, size=(32, 32), first_number=50)
    second = made()
    for name in names:
        assert second[name] != first[name]
        assert read_number(VirtualReader(open_reader()).frames_at(second[name], [0]).numpy()[0]) == 50


def test_a_full_disk_stops_the_making_of_controls(clips: list[Path], tmp_path: Path) -> None:
    pairs = [labelled_pair(n, 1, video_1=clips[n], video_2=clips[2]) for n in range(2)]
    with full_at(1000), pytest.raises(MachineError, match=r"copy-.*\.mp4: cannot be written"):
        make_controls(pairs, tmp_path / "run")
