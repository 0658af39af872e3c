"""The probabilities of labels, on models whose distribution is known, and where there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import heavy  # noqa: F401
import pytest
import torch
from clips import make_clip
from hypothesis import given
from hypothesis import strategies as st
from quick_judge import make_quick_judge

from vrthinker import Dimension, Judge, Judgments, LabelProbabilities, Preference, Probabilities
from vrthinker.engine.base import FinishReason, RoundResult, Session, WatchedToken
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.grammar import FinalAnswer, parse_round
from vrthinker.episode.probabilities import (
    LABELS,
    answer_probabilities,
    from_samples,
    likeliest,
    merge_orders,
)
from vrthinker.episode.trajectory import Trajectory
from vrthinker.records.verdicts import VerdictRecord

ANSWER = "<snapshot>x 2</snapshot><think>y 1</think><answer>TA=1, VQ=0, MQ=2, OA=0, CF=1</answer>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick_judge(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return make_clip(folder / "a.mp4", 9, size=(64, 96)), make_clip(folder / "b.mp4", 7, size=(64, 96))


def judge_that_keeps_logits(model: Path, **settings: object) -> tuple[Judge, list[RoundResult]]:
    """A judge of real rounds, and the results that its engine gave, with the logits of every step."""
    with Judge.from_pretrained(model, max_rounds=1, **settings) as plain:
        configuration = plain.settings, plain.templates
    results: list[RoundResult] = []

    class Keeping(HFEngine):
        def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
            collected = super().collect(timeout_seconds)
            results.extend(collected)
            return collected

    engine = Keeping(model, max_sessions=1, keep_logits=True)
    return Judge(engine, configuration[0], templates=configuration[1]), results


def test_they_are_the_softmax_of_the_labels_logits_whatever_the_temperature(
    model: Path, clips: tuple[Path, Path]
) -> None:
    judge, results = judge_that_keeps_logits(model, temperature=1.7)
    verdict = judge("a dog", *clips)
    assert verdict.judgments is not None
    assert verdict.probabilities is not None, verdict.probabilities_reason
    assert verdict.probabilities_reason is None
    (result,) = results
    markup = judge.engine.markup  # type: ignore[attr-defined]
    labels = [markup.encode(label)[0] for label in LABELS]
    assert result.token_ids is not None
    # The last four labels that were written are the answer's: the tiny judge's answers have no CF.
    steps = [step for step, token in enumerate(result.token_ids) if token in labels][-4:]
    distinct = set()
    for dimension, step in zip(Dimension, steps, strict=True):
        wanted = torch.softmax(result.logits[step][labels], dim=-1).tolist()
        got = verdict.probabilities[dimension]
        assert got is not None
        assert [got[preference] for preference in Preference] == pytest.approx(wanted, abs=1e-6)
        assert got.video_1 + got.tie + got.video_2 == pytest.approx(1)
        distinct.add(round(got.tie, 6))
    assert len(distinct) == 4, "each dimension has its own place"
    line = verdict.record("p").model_dump_json()
    assert VerdictRecord.model_validate_json(line).probabilities == verdict.probabilities
    again = Trajectory.model_validate_json(verdict.trajectory.model_dump_json())
    assert again.outcome.probabilities == verdict.probabilities
    assert verdict.to_dict()["probabilities"]["OA"]["tie"] == verdict.probabilities["OA"].tie  # type: ignore[union-attr]


def test_a_model_without_an_opinion_gives_thirds(model: Path, clips: tuple[Path, Path]) -> None:
    judge, _ = judge_that_keeps_logits(model)
    engine = judge.engine
    assert isinstance(engine, HFEngine)
    weights = dict(engine.model.model.state_dict())
    norm = "model.language_model.norm.weight"
    engine.update_weights({**weights, norm: torch.zeros_like(weights[norm])}, 1)  # every logit is 0
    verdict = judge("a dog", *clips)
    assert verdict.probabilities is not None
    for dimension in Dimension:
        known = verdict.probabilities[dimension]
        assert known is not None
        assert (known.video_1, known.tie, known.video_2) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_greedy_labels_are_the_likeliest(model: Path, clips: tuple[Path, Path]) -> None:
    verdict = Judge.from_pretrained(model)("a dog", *clips)
    assert verdict.probabilities is not None
    assert likeliest(verdict.probabilities) == verdict.judgments


class TellingEngine(ScriptedEngine):
    """Says what a test wants about the labels."""

    def __init__(self, text: str, watched: Sequence[WatchedToken] | None, unwatched: str | None) -> None:
        super().__init__([[text]])
        self._told = watched, unwatched

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        watched, unwatched = self._told
        known = None if watched is None else tuple(watched)
        return [
            RoundResult(r.session, r.text, r.finish_reason, watched=known, unwatched=unwatched)
            for r in super().collect(timeout_seconds)
        ]


@pytest.mark.parametrize(
    ("text", "watched", "unwatched", "reason"),
    [
        (ANSWER, None, None, "the engine gives no probabilities"),
        (ANSWER, None, "'0' is two tokens", "'0' is two tokens"),
        (ANSWER.replace(", VQ", "; VQ"), (), None, "was repaired"),
        (ANSWER, (), None, "did not say how likely each label of TA, VQ, MQ, OA is"),
        (ANSWER, [WatchedToken(ANSWER.index("1, VQ"), (0.0, None, 0.0))], None, "label of TA, VQ, MQ, OA is"),
    ],
)
def test_without_probabilities_there_is_a_reason_and_still_a_verdict(
    clips: tuple[Path, Path],
    text: str,
    watched: Sequence[WatchedToken] | None,
    unwatched: str | None,
    reason: str,
) -> None:
    verdict = Judge(TellingEngine(text, watched, unwatched))("a dog", *clips)
    assert verdict.judgments is not None
    assert verdict.probabilities is None
    assert reason in str(verdict.probabilities_reason)
    assert verdict.record("p").probabilities_reason == verdict.probabilities_reason


def test_what_is_known_of_some_dimensions_is_kept(clips: tuple[Path, Path]) -> None:
    place = ANSWER.index("0, CF")
    told = [WatchedToken(place, (math.log(2), math.log(1), -math.inf)), WatchedToken(0, (0.0, 0.0, 0.0))]
    verdict = Judge(TellingEngine(ANSWER, told, None))("a dog", *clips)
    assert verdict.probabilities is not None
    assert verdict.probabilities.TA is None
    assert verdict.probabilities.OA is not None
    assert verdict.probabilities.OA.tie == pytest.approx(2 / 3)
    assert verdict.probabilities.OA.video_2 == 0
    assert "TA, VQ, MQ" in str(verdict.probabilities_reason)


def test_places_behind_a_character_that_the_grammar_does_not_read_are_not_trusted() -> None:
    text = ANSWER.replace("y 1", "y\0 1")
    parsed = parse_round(text.replace("\0", ""))
    assert isinstance(parsed.ending, FinalAnswer)
    tokens = tuple(WatchedToken(i, (0.0, 0.0, 0.0)) for i, c in enumerate(text) if c in "012")
    result = RoundResult(Session(0), text, FinishReason.STOP, watched=tokens)
    assert answer_probabilities(parsed.ending.answer, result)[0] is None


def test_a_label_that_is_no_token_of_its_own_is_named(model: Path) -> None:
    engine = HFEngine(model)
    assert engine.markup.single_tokens(LABELS)[1] is None
    ids, reason = engine.markup.single_tokens(("0", "12"))
    assert ids == ()
    assert reason is not None
    assert "'12' is no single token" in reason


LABEL = st.sampled_from(list(Preference))
JUDGMENTS = st.builds(Judgments, TA=LABEL, VQ=LABEL, MQ=LABEL, OA=LABEL)
ONE = st.tuples(*[st.floats(0.0, 1.0)] * 3).filter(lambda w: sum(w) > 1e-3)
PROBABILITIES = st.builds(
    lambda ws: Probabilities(
        **{
            d.value: LabelProbabilities.of(dict(zip(Preference, w, strict=True)))
            for d, w in zip(Dimension, ws, strict=True)
        }
    ),
    st.tuples(*[ONE] * 4),
)


@given(JUDGMENTS, JUDGMENTS, st.none() | PROBABILITIES, st.none() | PROBABILITIES)
def test_two_orders_merge_to_the_mirror_of_the_swapped_pair(
    a: Judgments, b: Judgments, p: Probabilities | None, q: Probabilities | None
) -> None:
    merged, mean = merge_orders(a, b, p, q)
    turned = [None if x is None else x.swapped() for x in (q, p)]
    mirrored, mirrored_mean = merge_orders(b.swapped(), a.swapped(), *turned)
    assert mirrored == merged.swapped()
    assert (mean is None) == (p is None or q is None)
    if mean is not None and mirrored_mean is not None:
        for dimension in Dimension:
            one, other = mean[dimension], mirrored_mean.swapped()[dimension]
            assert one is not None
            assert other is not None
            assert [one[x] for x in Preference] == pytest.approx([other[x] for x in Preference])
    for d in Dimension:
        label, other_label, got = (getattr(x, d.value) for x in (a, b, merged))
        if label == other_label:
            assert got is label
        elif mean is None:
            assert got is Preference.TIE
        else:
            assert got is mean[d].likeliest  # type: ignore[union-attr]


def test_samples_become_frequencies_and_equal_ones_a_tie() -> None:
    votes = [Judgments(TA=1, VQ=0, MQ=2, OA=oa) for oa in (1, 1, 2, 2)]  # type: ignore[arg-type]
    frequencies = from_samples(votes)
    assert frequencies["TA"] == LabelProbabilities(video_1=1, tie=0, video_2=0)
    assert frequencies["OA"] == LabelProbabilities(video_1=0.5, tie=0, video_2=0.5)
    assert likeliest(frequencies) == Judgments(TA=1, VQ=0, MQ=2, OA=0)  # type: ignore[arg-type]
    assert likeliest(from_samples([*votes, votes[-1]])).OA is Preference.VIDEO_2
