"""Two generators: places are drawn in balance, verdicts are told of the generators, failures are apart."""

from __future__ import annotations

from pathlib import Path

from vrthinker.data.matching import Sample
from vrthinker.episode.probabilities import LabelProbabilities, Probabilities
from vrthinker.evals.generators import COLUMNS, as_json, compared, drawn_places, pairs_of, rows_of, shares
from vrthinker.records.verdicts import VerdictRecord


def record(pair_id: str, judgment: dict[str, int] | None) -> VerdictRecord:
    return VerdictRecord(
        id=pair_id,
        judgment=judgment,
        confidence=None,
        rounds=1,
        tool_calls=0,
        frames_seen=[],
        stop_reason="answered" if judgment else "video_error",
        reason=None if judgment else "broken",
        well_formed=None,
        latency_seconds=None,
        prompt_tokens=None,
        sampled_tokens=None,
        seed=0,
        model="m",
    )


SAMPLES = [Sample(f"{n:03d}", f"prompt {n}", (Path(f"a/{n}.mp4"), Path(f"b/{n}.mp4"))) for n in range(40)]
IDS = [sample.id for sample in SAMPLES]


def test_places_are_balanced_and_follow_from_the_seed() -> None:
    swapped = drawn_places(IDS, 3)
    assert len(swapped) == 20
    assert swapped == drawn_places(IDS, 3) != drawn_places(IDS, 4)
    for pair, sample in zip(pairs_of(SAMPLES, swapped), SAMPLES, strict=True):
        first = sample.clips[sample.id in swapped]
        assert pair.video_1 == first.absolute()
        assert pair.video_2 != pair.video_1


def test_a_judge_that_prefers_a_place_favours_nobody() -> None:
    swapped = drawn_places(IDS, 0)
    always = {name: record(name, {"TA": 1, "VQ": 1, "MQ": 0, "OA": 1}) for name in IDS}
    told = shares(compared(SAMPLES, swapped, always))
    assert told["OA"].win.value == told["OA"].loss.value == 0.5
    assert told["OA"].lead.value == 0
    assert told["OA"].lead.low is not None
    assert told["OA"].lead.low < 0
    assert told["MQ"].tie.value == 1


def test_the_better_generator_is_told_whatever_its_place_was() -> None:
    swapped = drawn_places(IDS, 0)
    records = {
        name: record(name, {"TA": 1, "VQ": 2, "MQ": 0, "OA": 2 if name in swapped else 1}) for name in IDS[4:]
    }
    records |= {name: record(name, None) for name in IDS[:4]}
    verdicts = compared(SAMPLES, swapped, records)
    told = shares(verdicts)
    assert (told["OA"].win.value, told["OA"].win.n) == (1, 36)
    assert all(one.dimensions_disagree for one in verdicts if one.judgment is not None)
    rows = rows_of(verdicts, ("X", "Y"))
    assert [row["OA"] for row in rows] == [None] * 4 + ["X"] * 36
    assert {row["shown_first"] for row in rows if row["id"] in swapped} == {"Y"}
    values = as_json(verdicts, ("X", "Y"), (Path("a"), Path("b")), ["prompt 9: gone"])
    assert (values["prompts"], values["judged"], len(values["failed"])) == (40, 36, 4)
    assert values["missing"] == ["prompt 9: gone"]


def test_probabilities_are_told_of_the_generators() -> None:
    sure = LabelProbabilities(video_1=0.7, tie=0.2, video_2=0.1)
    known = Probabilities(TA=sure, VQ=None, MQ=sure, OA=sure)
    given = record(IDS[0], {"TA": 1, "VQ": 2, "MQ": 0, "OA": 1}).model_copy(update={"probabilities": known})
    for swapped, ends in ((frozenset[str](), (0.7, 0.1)), (frozenset([IDS[0]]), (0.1, 0.7))):
        (one,) = compared(SAMPLES, swapped, {IDS[0]: given})
        assert one.overall_probability == 0.7, "that of the label, whichever place it was in"
        (row,) = rows_of([one], ("X", "Y"))
        assert tuple(row) == COLUMNS
        assert (row["OA_p_a"], row["OA_p_b"], row["OA_p_tie"]) == (*ends, 0.2)
        assert row["VQ_p_a"] is None


def test_nothing_judged_has_no_shares() -> None:
    told = shares(compared(SAMPLES, frozenset(), {IDS[0]: record(IDS[0], None)}))
    assert told["OA"].win.value is None
