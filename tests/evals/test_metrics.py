"""The measures: by hand, against a naive loop, and on episodes that really ran."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import make_clip
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vrthinker.engine.base import FinishReason
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.trajectory import StopReason, Trajectory
from vrthinker.errors import InputError
from vrthinker.evals.intervals import Estimate
from vrthinker.evals.metrics import (
    MEASURES,
    NO_GROUP,
    ScoredPair,
    as_json,
    by_group,
    difference,
    from_trajectory,
    measure,
    table,
)
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace

TEMPLATES = PromptTemplates.load()
CODES = ("TA", "VQ", "MQ", "OA")


def four(ta: int, vq: int, mq: int, oa: int) -> dict[str, int]:
    return dict(zip(CODES, (ta, vq, mq, oa), strict=True))


HAND = [
    # all right
    ScoredPair("a", four(1, 2, 0, 1), four(1, 2, 0, 1), True, 2, 3, 2, "3"),
    # overall right, VQ wrong
    ScoredPair("b", four(1, 2, 0, 2), four(1, 1, 0, 2), True, 0, 0, 0, "0"),
    # a tie that was seen as one
    ScoredPair("c", four(0, 0, 0, 0), four(0, 0, 0, 0), False, 1, 1, 0, "1"),
    # a tie that was not
    ScoredPair("d", four(1, 1, 2, 0), four(1, 1, 2, 1), True, 1, 1, 1, "1", 8),
    # no tie, and a predicted one
    ScoredPair("e", four(1, 0, 2, 1), four(1, 0, 1, 0), True, 2, 2, 0, None, 5),
    # no verdict
    ScoredPair("f", four(2, 2, 2, 2), None, False, 0, 1, 1, "1"),
    # only an overall label
    ScoredPair("g", {"OA": 1}, four(0, 0, 0, 1), None, None, 0, 0, None),
    # no overall label, and a prediction without MQ
    ScoredPair("h", {"TA": 1, "MQ": 2}, {"TA": 1, "OA": 2}, None, None, 0, 0, None),
    # no label at all
    ScoredPair("i", {}, four(1, 1, 1, 1), True, 3, 0, 0, None),
]
BY_HAND = {
    "oa/tau": (4, 7),  # a b c g of a b c d e f g
    "oa/diff": (3, 5),  # a b g of a b e f g
    "all_four": (2, 6),  # a c of a b c d e f
    "ta/accuracy": (6, 7),  # a b c d e h, not f
    "vq/accuracy": (4, 6),  # a c d e
    "mq/accuracy": (4, 7),  # a b c d, not e f h
    "hidden_events/seen": (4, 8),
    "tool_calls/mean": (9, 7),
    "retrieved_frames/mean": (13, 2),
    "format/well_formed": (5, 7),
    "verdicts/share": (8, 9),
}


def test_measures_by_hand() -> None:
    found = measure(HAND)
    assert list(found) == list(MEASURES) == list(BY_HAND)
    for name, (above, below) in BY_HAND.items():
        assert found[name].value == above / below, name
        n = 5 if name == "hidden_events/seen" else below
        assert found[name].n == n, name
        numerators, denominators = MEASURES[name].arrays(HAND)
        assert numerators.shape == denominators.shape == (len(HAND),)
        assert (numerators.sum(), denominators.sum()) == (above, below)
        assert MEASURES[name].description


def test_a_failed_episode_counts_as_wrong_and_is_never_dropped() -> None:
    right = [ScoredPair(str(i), four(1, 1, 1, 1), four(1, 1, 1, 1)) for i in range(3)]
    found = measure([*right, ScoredPair("failed", four(1, 1, 1, 1), None)])
    for name in ("oa/tau", "oa/diff", "all_four", "ta/accuracy", "vq/accuracy", "mq/accuracy"):
        assert (found[name].value, found[name].n) == (0.75, 4), name
    assert found["verdicts/share"].value == 0.75
    tie = measure([ScoredPair("failed", four(0, 0, 0, 0), None)])
    assert tie["oa/tau"].value == 0, "no verdict is not a tie"
    assert tie["oa/diff"].value is None


def test_leaving_a_dimension_out_is_wrong_not_absent() -> None:
    label, said = four(0, 0, 0, 0), {"OA": 0}
    found = measure([ScoredPair("a", label, said)])
    assert {name: found[name].value for name in ("oa/tau", "ta/accuracy", "all_four")} == {
        "oa/tau": 1,
        "ta/accuracy": 0,
        "all_four": 0,
    }


def test_what_nothing_measures_is_none() -> None:
    assert set(measure([]).values()) == {Estimate(None, None, None, 0)}
    found = measure([ScoredPair("a", {"OA": 0}, {"OA": 0})])
    assert found["oa/tau"] == Estimate(1.0, 1.0, 1.0, 1)
    assert found["verdicts/share"] == Estimate(1.0, 1.0, 1.0, 1)
    nothing = {name for name, estimate in found.items() if estimate == Estimate(None, None, None, 0)}
    assert nothing == set(MEASURES) - {"oa/tau", "verdicts/share"}


preferences = st.integers(0, 2)
judgments = st.dictionaries(st.sampled_from(CODES), preferences)


@st.composite
def scored(draw: st.DrawFn) -> list[ScoredPair]:
    pairs = []
    for index in range(draw(st.integers(0, 12))):
        hidden = draw(st.integers(0, 3))
        pair = ScoredPair(
            id=f"p{index}",
            label=draw(judgments),
            prediction=draw(st.none() | judgments.filter(bool)),
            well_formed=draw(st.none() | st.booleans()),
            tool_calls=draw(st.none() | st.integers(0, 5)),
            hidden_events=hidden,
            hidden_events_seen=draw(st.integers(0, hidden)),
        )
        pairs.append(pair)
    return pairs


def naive_accuracy(pairs: Sequence[ScoredPair], code: str, ties: bool) -> float | None:
    right = counted = 0
    for pair in pairs:
        if code in pair.label and (ties or pair.label[code] != 0):
            counted += 1
            if pair.prediction is not None and code in pair.prediction:
                right += pair.prediction[code] == pair.label[code]
    return right / counted if counted else None


@given(pairs=scored())
def test_accuracies_are_those_of_a_naive_loop(pairs: list[ScoredPair]) -> None:
    found = measure(pairs, resamples=20)
    assert found["oa/tau"].value == naive_accuracy(pairs, "OA", ties=True)
    assert found["oa/diff"].value == naive_accuracy(pairs, "OA", ties=False)
    for code in ("TA", "VQ", "MQ"):
        assert found[f"{code.lower()}/accuracy"].value == naive_accuracy(pairs, code, ties=True)
    full = [pair for pair in pairs if len(pair.label) == 4]
    wanted = sum(pair.prediction == pair.label for pair in full) / len(full) if full else None
    assert found["all_four"].value == wanted


@given(pairs=scored())
def test_swapping_the_two_videos_changes_nothing(pairs: list[ScoredPair]) -> None:
    def swap(said: Any) -> Any:
        return said and {code: (0, 2, 1)[value] for code, value in said.items()}

    swapped = [replace(pair, label=swap(pair.label), prediction=swap(pair.prediction)) for pair in pairs]
    assert measure(swapped, resamples=50) == measure(pairs, resamples=50)


@given(pairs=scored(), seed=st.integers(0, 1000))
def test_the_interval_holds_the_value(pairs: list[ScoredPair], seed: int) -> None:
    for name, estimate in measure(pairs, resamples=400, seed=seed).items():
        if estimate.value is None:
            assert (estimate.low, estimate.high, estimate.n) == (None, None, 0), name
        else:
            assert estimate.low is not None
            assert estimate.high is not None
            assert estimate.low <= estimate.value <= estimate.high, name
            assert 1 <= estimate.n <= len(pairs), name


def simulated(n: int, accuracy: float, seed: int, prefix: str = "p") -> list[ScoredPair]:
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(n):
        label = {code: int(rng.integers(3)) for code in CODES}
        said = {code: v if rng.random() < accuracy else (v + 1) % 3 for code, v in label.items()}
        hidden = int(rng.integers(3))
        seen = int(rng.integers(hidden + 1))
        pairs.append(ScoredPair(f"{prefix}{index}", label, said, True, int(rng.integers(3)), hidden, seen))
    return pairs


def test_the_same_seed_gives_the_same_intervals() -> None:
    pairs = simulated(100, 0.7, seed=1)
    assert measure(pairs, seed=3) == measure(iter(pairs), seed=3)
    first, second = measure(pairs, seed=3)["oa/tau"], measure(pairs, seed=4)["oa/tau"]
    assert first.value == second.value
    narrow = measure(pairs, seed=3, confidence=0.5)["oa/tau"]
    assert first.low is not None
    assert first.high is not None
    assert first.low < narrow.low < narrow.high < first.high  # type: ignore[operator]
    assert any(measure(pairs, seed=3)[name] != measure(pairs, seed=4)[name] for name in MEASURES)


def test_resamples_are_drawn_by_the_array_not_one_by_one() -> None:
    """2000 resamples of 512 pairs are a million draws: none of them is a call of its own."""
    pairs, calls = simulated(512, 0.8, seed=2), 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        measure(pairs, resamples=2000)
    finally:
        sys.setprofile(before)
    assert calls < 100 * len(pairs)


def test_a_difference_is_paired() -> None:
    better = simulated(300, 0.9, seed=3)
    # Wrong where the better one is wrong, and on every thirtieth pair besides.
    worse = [
        replace(pair, prediction=None if index % 30 == 0 else pair.prediction)
        for index, pair in enumerate(better)
    ]
    gain = difference(better, worse[::-1], "oa/tau")
    a, b = measure(better)["oa/tau"], measure(worse)["oa/tau"]
    assert a.value is not None
    assert b.value is not None
    assert gain.value == pytest.approx(a.value - b.value)
    assert gain.n == 300
    assert gain.low is not None
    assert gain.high is not None
    assert 0 < gain.low < gain.value < gain.high
    assert a.low < b.high, "one by one, the two intervals overlap"  # type: ignore[operator]
    assert difference(better, worse[::-1], "oa/tau") == gain
    other_way = difference(worse, better, "oa/tau")
    assert (other_way.value, other_way.low) == pytest.approx((-gain.value, -gain.high))


@pytest.mark.parametrize("name", MEASURES)
def test_a_judge_does_not_differ_from_itself(name: str) -> None:
    estimate = difference(HAND, HAND[::-1], name, resamples=200)
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
    assert estimate.n == measure(HAND)[name].n
    assert difference([], [], name) == Estimate(None, None, None, 0)


def test_pairs_that_differ_are_named() -> None:
    def pairs(*ids: str) -> list[ScoredPair]:
        return [ScoredPair(name, {"OA": 1}, {"OA": 1}) for name in ids]

    with pytest.raises(InputError, match=r"only in the first: 'b'; only in the second: 'c'\)") as caught:
        difference(pairs("a", "b"), pairs("a", "c"), "oa/tau")
    assert "allowed: the same ids on both sides" in str(caught.value)
    with pytest.raises(InputError, match=r"\(only in the second: 'b', 'c', 'd' and 2 more\)"):
        difference(pairs("a"), pairs(*"abcdef"), "oa/tau")
    with pytest.raises(InputError, match="measure: got 'oa', allowed: oa/tau, oa/diff"):
        difference(pairs("a"), pairs("a"), "oa")
    twice = pairs("a", "b")
    for again in (twice[0], replace(twice[0])):
        with pytest.raises(InputError, match=r"got ids more than once \('a'\), allowed: each id once"):
            measure([*twice, again])
    with pytest.raises(InputError, match="the second pairs: got ids more than once"):
        difference(pairs("a"), pairs("a", "a"), "oa/tau")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": {"OA": 3}}, r"pair 'x': label: got OA=3, allowed: 0 \(tie\), 1 or 2"),
        ({"label": {"OA": None}}, "label: got OA=None"),
        ({"label": {"CF": 1}}, "label: got the code 'CF', allowed: TA, VQ, MQ, OA"),
        ({"prediction": {"OA": "1"}}, "prediction: got OA='1'"),
        ({"prediction": {}}, "prediction: got no judgment, allowed: at least one, or None"),
        ({"tool_calls": -1}, "tool_calls: got -1"),
        ({"retrieved_frames": -8}, "retrieved_frames: got -8"),
        ({"hidden_events": 1, "hidden_events_seen": 2}, "hidden_events_seen: got 2, allowed: 0 to 1"),
        ({"hidden_events": -1, "hidden_events_seen": -1}, "hidden_events_seen: got -1"),
    ],
)
def test_a_pair_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScoredPair(**{"id": "x", "label": {"OA": 1}, "prediction": {"OA": 1}, **changes})


def test_groups_keep_every_pair_in_order() -> None:
    pairs = [
        ScoredPair(str(index), {}, None, group=group)
        for index, group in enumerate(["10", "easy", None, "2", "10", "2", None, "0"])
    ]
    groups = by_group(iter(pairs))
    assert {name: [pair.id for pair in found] for name, found in groups.items()} == {
        "0": ["7"],
        "2": ["3", "5"],
        "10": ["0", "4"],
        "easy": ["1"],
        NO_GROUP: ["2", "6"],
    }
    assert list(groups) == ["0", "2", "10", "easy", NO_GROUP]
    assert by_group([]) == {}


def rendered(columns: dict[str, dict[str, Estimate]]) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True, color_system=None).print(table(columns))
    return [line.rstrip().replace("┃", "│") for line in out.getvalue().splitlines()]


def test_the_table_has_measures_down_and_columns_across() -> None:
    columns = {
        "own": {"oa/diff": Estimate(0.9119, 0.886, 0.9351, 512), "mine": Estimate(1.0, None, None, 1)},
        "none": {"oa/tau": Estimate(0.25, 0.0, 0.5, 4), "oa/diff": Estimate(None, None, None, 0)},
    }
    lines = rendered(columns)
    assert [line.split() for line in (lines[0], *lines[2:])] == [
        ["│", "own", "│", "none"],
        ["oa/tau", "│", "-", "│", "0.250", "[0.000,", "0.500]"],
        ["oa/diff", "│", "0.912", "[0.886,", "0.935]", "│", "-"],
        ["mine", "│", "1.000", "│", "-"],
    ]
    full = rendered({"own": measure(HAND)})
    assert [line.split()[0] for line in full[2:]] == list(MEASURES)


def test_names_are_shown_as_text() -> None:
    lines = "\n".join(rendered({"[red]x[/red]\x1b[2J": {"[b]m[/b]\x1b[3J": Estimate(1.0, 1.0, 1.0, 1)}}))
    assert "[red]x[/red]" in lines
    assert "[b]m[/b]" in lines
    assert "\x1b" not in lines


def test_json_holds_the_same() -> None:
    found = as_json({"own": measure(HAND), "none": measure([])})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found["own"]) == list(MEASURES)
    assert found["own"]["oa/diff"]["value"] == 0.6
    assert found["own"]["oa/diff"]["n"] == 5
    assert found["none"]["oa/diff"] == {"value": None, "low": None, "high": None, "n": 0}


def test_evaluation_loads_no_tensor_library() -> None:
    code = (
        "import sys, vrthinker.evals.metrics as m; m.measure([]);"
        "sys.exit(','.join({'torch', 'av', 'scipy', 'transformers'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Episodes

HEAD = "<snapshot>s</snapshot><think>t</think>"
SAYS = "<recommend answer>TA=1, VQ=0, MQ=2, OA=2, CF=1</recommend answer>"
DONE = HEAD + "<answer>TA=1, VQ=1, MQ=0, OA=1</answer>"
EARLY, FINAL = four(1, 0, 2, 2), four(1, 1, 0, 1)


def asks(*numbers: int, recommend: str = SAYS, head: str = HEAD) -> str:
    frames = ", ".join(map(str, numbers))
    call = f'<tool_call>{{"name": "select_frames", "arguments": {{"target_frames": [{frames}]}}}}</tool_call>'
    return head + recommend + call


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    first, second = folder / "first.mp4", folder / "second.mp4"
    make_clip(first, 16, size=(64, 64), fps=8)
    make_clip(second, 8, size=(64, 64), fps=8)
    return first, second


def episode(clips: tuple[Path, Path], *texts: str, **changes: Any) -> Trajectory:
    """Frames 1 to 16 and 17 to 24; the first input shows 1, 5, 9, 13 and 17, 19, 21, 23."""

    def workspace() -> Workspace:
        reader, cache = open_reader(), FrameCache(8 << 20)
        return Workspace.open(*clips, reader=reader, resize=ResizeSettings(), cache=cache)

    runner = EpisodeRunner(ScriptedEngine([texts]), EpisodeSettings(**changes), templates=TEMPLATES)
    return runner.run_one(EpisodeItem("pair", "a dog", workspace))


def test_an_episode_becomes_a_scored_pair(clips: tuple[Path, Path]) -> None:
    trajectory = episode(clips, asks(3, 20), asks(99), asks(12), DONE)
    assert sorted(shown.frame_number for shown in trajectory.rounds[0].live) == [1, 5, 9, 13, 17, 19, 21, 23]
    hidden = [range(2, 5), range(10, 13), range(14, 17), {24}, (20, 21)]
    pair = from_trajectory(trajectory, {"OA": 1}, hidden_frames=hidden, group="5")
    assert pair == ScoredPair(
        id="pair",
        label={"OA": 1},
        prediction=FINAL,
        well_formed=True,
        tool_calls=2,
        hidden_events=5,
        hidden_events_seen=3,
        group="5",
        retrieved_frames=3,
    )
    first = from_trajectory(trajectory, None, first_round=True, hidden_frames=hidden[:4])
    assert first == ScoredPair("pair", {}, EARLY, True, 0, hidden_events=4, retrieved_frames=0)


def test_frames_that_no_round_could_see_are_not_seen(clips: tuple[Path, Path]) -> None:
    blind = episode(clips, asks(3), DONE, window=0)
    assert from_trajectory(blind, None, hidden_frames=[range(2, 5)]).hidden_events_seen == 0
    sighted = episode(clips, asks(3), DONE)
    assert from_trajectory(sighted, None, hidden_frames=[range(2, 5)]).hidden_events_seen == 1


def test_an_episode_of_one_round_is_its_own_first_round(clips: tuple[Path, Path]) -> None:
    trajectory = episode(clips, DONE)
    pair = from_trajectory(trajectory, {"OA": 1}, first_round=True)
    assert pair.prediction == FINAL
    assert pair == from_trajectory(trajectory, {"OA": 1})
    assert pair.tool_calls == 0


def test_a_first_round_that_recommends_nothing_is_no_verdict(clips: tuple[Path, Path]) -> None:
    trajectory = episode(clips, asks(3, recommend=""), DONE)
    assert from_trajectory(trajectory, {"OA": 1}).prediction == FINAL
    first = from_trajectory(trajectory, {"OA": 1}, first_round=True)
    assert first.prediction is None
    assert first.well_formed is False


def test_form_is_that_of_the_rounds_that_are_scored(clips: tuple[Path, Path]) -> None:
    trajectory = episode(clips, asks(3), DONE.replace(HEAD, ""))
    assert from_trajectory(trajectory, None).well_formed is False
    assert from_trajectory(trajectory, None, first_round=True).well_formed is True


def test_an_episode_without_a_verdict_keeps_its_first_answer(clips: tuple[Path, Path]) -> None:
    trajectory = episode(clips, asks(3), asks(4), max_rounds=2)
    assert trajectory.outcome.stop_reason is StopReason.ROUND_LIMIT
    failed = from_trajectory(trajectory, FINAL)
    assert failed.prediction is None
    assert measure([failed])["oa/tau"].value == 0
    assert from_trajectory(trajectory, FINAL, first_round=True).prediction == EARLY
    unreadable = episode(clips, "no idea")
    for first_round in (False, True):
        pair = from_trajectory(unreadable, FINAL, first_round=first_round)
        assert (pair.prediction, pair.well_formed, pair.tool_calls) == (None, False, 0)


def test_a_first_round_that_the_engine_broke_off_is_no_verdict(clips: tuple[Path, Path]) -> None:
    trajectory = episode(clips, asks(3), DONE)
    broken = trajectory.rounds[0].model_copy(update={"finish_reason": FinishReason.ERROR})
    assert from_trajectory(
        trajectory.model_copy(update={"rounds": (broken,)}), None, first_round=True
    ) == ScoredPair("pair", {}, None, True, 0, retrieved_frames=0)
    nothing = from_trajectory(trajectory.model_copy(update={"rounds": ()}), None, first_round=True)
    assert (nothing.prediction, nothing.well_formed) == (None, False)


def test_events_outside_the_workspace_are_refused(clips: tuple[Path, Path]) -> None:
    trajectory = episode(clips, DONE)
    for frames in (range(0, 3), range(20, 26), range(5, 5)):
        with pytest.raises(InputError, match=r"pair 'pair': hidden_frames: got \[.*each from 1 to 24"):
            from_trajectory(trajectory, None, hidden_frames=[frames])
    assert from_trajectory(trajectory, None, hidden_frames=[range(22, 25)]).hidden_events_seen == 1
    with pytest.raises(InputError, match="label: got OA=4"):
        from_trajectory(trajectory, {"OA": 4})


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    alone = [ScoredPair(str(n), {"OA": 1}, {"OA": 1 + n % 2}) for n in range(20)]
    repeated = [replace(pair, id=f"{pair.id}-{copy}", cluster=pair.id) for pair in alone for copy in range(8)]
    wanted, found = measure(alone)["oa/tau"], measure(repeated)["oa/tau"]
    assert (found.value, found.low, found.high) == (wanted.value, wanted.low, wanted.high)
    assert found.n == 8 * wanted.n
    other = [replace(pair, prediction={"OA": 2}) for pair in repeated]
    assert difference(repeated, other, "oa/tau").high == wanted.high
    only = measure(repeated, measures={"oa/tau": MEASURES["oa/tau"]})
    assert only == {"oa/tau": found}
