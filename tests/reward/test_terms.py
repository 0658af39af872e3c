"""Every term against a slow loop written from its equation, over groups that are played on real clips."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest
from reward.plays import HEAD, N_FRAMES, Ending, Four, Look, Play, Stage, random_play

from vrthinker.episode.trajectory import Trajectory
from vrthinker.reward.group import EpisodeTruth, JudgedGroup, answer_accuracy
from vrthinker.reward.scoring import GroupRewards, score_group
from vrthinker.reward.settings import (
    AccuracyTerm,
    AgreementTerm,
    AnyTerm,
    CallCostTerm,
    CotGainTerm,
    EvidenceTerm,
    ExplorationTerm,
    FormatTerm,
    NecessityTerm,
    RewardSettings,
)
from vrthinker.reward.terms import TERMS, TermScores

CODES = ("TA", "VQ", "MQ", "OA")
LABELS = {"TA": 1, "VQ": 0, "MQ": 2, "OA": 1}
TRUTH = EpisodeTruth(LABELS)
ALL_TERMS: tuple[AnyTerm, ...] = (
    FormatTerm(weight=0.75),
    AccuracyTerm(alpha=0.3),
    CotGainTerm(k=0.4),
    ExplorationTerm(omega=0.7, eta=0.6),
    CallCostTerm(cost=0.07),
    AgreementTerm(weight=0.11),
    EvidenceTerm(weight=0.23),
    NecessityTerm(weight=0.13),
)


def reward_of(
    stage: Stage, term: AnyTerm, plays: Sequence[Play], truth: EpisodeTruth = TRUTH
) -> GroupRewards:
    return score_group(RewardSettings(terms=(term,)), stage.play(plays), [truth] * len(plays))


# The loop. It knows plays only, and none of the package's functions.


def slow_accuracy(answer: Four, labels: Mapping[str, int], alpha: float) -> float:
    said = dict(zip(CODES, answer, strict=True))
    right = [1.0 if said[code] == labels[code] else 0.0 for code in ("TA", "VQ", "MQ") if code in labels]
    if "OA" not in labels:
        return sum(right) / len(right)
    overall = 1.0 if said["OA"] == labels["OA"] else 0.0
    if not right:
        return overall
    return alpha * overall + (1 - alpha) * (1 / len(right)) * sum(right)


def slow_terms(play: Play, group: Sequence[Play], truth: EpisodeTruth) -> dict[str, float]:
    """The terms of `ALL_TERMS` for one episode that is not failed."""
    alpha, k, omega, eta = 0.3, 0.4, 0.7, 0.6
    judged = [other for other in group if not other.failed]
    found = dict.fromkeys(TERMS, 0.0)

    unformed = any(look.answer is None for look in play.looks) or play.spoiled or play.ending != "answer"
    found["format"] = 0.75 * (0 if unformed else 1)

    if play.final is not None:
        found["accuracy"] = slow_accuracy(play.final, truth.labels, alpha)

    answers = [look.answer for look in play.looks if look.answer is not None]
    if answers and play.final is not None:
        answers.append(play.final)
    for before, after in itertools.pairwise(answers):
        gain = slow_accuracy(after, truth.labels, alpha) - slow_accuracy(before, truth.labels, alpha)
        found["cot_gain"] += k * gain

    share = sum(1 for other in judged if other.calls > 0) / len(judged)
    if play.calls > 0:
        found["exploration"] = eta * max(omega - share, 0)

    found["call_cost"] = -0.07 * play.calls

    if play.final is not None:
        sign = sum({0: 0, 1: 1, 2: -1}[value] for value in play.final[:3])
        together = 0 if sign == 0 else 1 if sign > 0 else 2
        found["agreement"] = 0.11 if together == play.final[3] else 0.0

    if truth.evidence:
        executed = play.looks[:-1] if play.ending == "round_limit" else play.looks
        asked = [n for look in executed for n in look.frames or ()]
        hit = sum(1 for first, end in truth.evidence if any(n in range(first, end) for n in asked))
        found["evidence"] = 0.23 * hit / len(truth.evidence)

    without = [other.final[3] for other in judged if other.final is not None and other.calls == 0]
    for verdict in (0, 1, 2):
        is_majority = without.count(verdict) > len(without) / 2
        if is_majority and play.calls > 0 and play.final is not None and play.final[3] == verdict:
            found["necessity"] = -0.13
    return found


SOME_LABELS: list[dict[str, int]] = [
    LABELS,
    {"TA": 2, "OA": 0},
    {"VQ": 1, "MQ": 1},
    {"OA": 2},
    {"MQ": 0},
]


@pytest.mark.parametrize("size", [8, 7, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_every_term_is_what_a_slow_loop_says(stage: Stage, size: int, fails: bool) -> None:
    settings = RewardSettings(terms=ALL_TERMS)
    earned = dict.fromkeys(TERMS, 0.0)
    for seed, labels in enumerate(SOME_LABELS * 3):
        draw = random.Random(f"{size} {fails} {seed}")
        plays = [random_play(draw) for _ in range(size)]
        if fails:
            plays[draw.randrange(size)] = random_play(draw, "error")
        starts = [draw.randint(1, N_FRAMES) for _ in range(draw.randrange(4))]
        ranges = tuple((first, draw.randint(first + 1, N_FRAMES + 1)) for first in starts)
        truth = EpisodeTruth(labels, ranges if seed % 4 else None)
        scored = score_group(settings, stage.play(plays), [truth] * size)
        assert list(scored.terms) == list(TERMS)
        for i, play in enumerate(plays):
            if play.failed:
                assert scored.totals[i] is None
                assert scored.accuracy[i] is None
                assert all(of_term[i] is None for of_term in scored.terms.values())
                continue
            wanted = slow_terms(play, plays, truth)
            got = {kind: of_term[i] for kind, of_term in scored.terms.items()}
            assert got == pytest.approx(wanted, abs=1e-12)
            assert scored.totals[i] == pytest.approx(sum(wanted.values()), abs=1e-12)
            assert scored.accuracy[i] == pytest.approx(wanted["accuracy"], abs=1e-12)
            earned = {kind: earned[kind] + abs(value) for kind, value in wanted.items()}
    assert size == 1 or all(earned.values()), "chance left a term untested"


# By hand, with the paper's numbers.


def test_the_papers_reward_by_hand(stage: Stage) -> None:
    """d = 3, alpha = .5, k = .2, omega = .2, eta = .5, in a group of 8 of which one looks."""
    wrong, half = (2, 2, 0, 2), (1, 2, 0, 1)
    looks = Play((Look(wrong), Look(half, None)), (1, 0, 0, 1))
    plays = [looks, Play(final=(1, 0, 2, 1)), Play(final=(2, 0, 2, 2)), *[Play(final=wrong)] * 5]
    scored = score_group(RewardSettings(), stage.play(plays), [TRUTH] * 8)
    assert list(scored.terms) == ["format", "accuracy", "cot_gain", "exploration"]
    # r_acc: 0, then .5 + .5/3, then .5 + .5 * 2/3; R(X) = 1/8.
    final = 0.5 + 0.5 * 2 / 3
    assert scored.terms["accuracy"][:3] == pytest.approx((final, 1.0, 1 / 3))
    assert scored.terms["cot_gain"][:3] == pytest.approx((0.2 * final, 0.0, 0.0))
    assert scored.terms["exploration"][:3] == pytest.approx((0.5 * (0.2 - 1 / 8), 0.0, 0.0))
    assert scored.terms["format"] == (1.0,) * 8
    assert scored.totals[:3] == pytest.approx((1 + final + 0.2 * final + 0.0375, 2.0, 1 + 1 / 3))
    assert scored.metrics["reward/visual_share"] == 1 / 8


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 0.75, 1])
def test_accuracy_of_every_answer_under_every_alpha(stage: Stage, alpha: float) -> None:
    (trajectory,) = stage.play([Play(final=(0, 0, 0, 0))])
    judgments = trajectory.outcome.judgments
    assert judgments is not None
    for answer in itertools.product(range(3), repeat=4):
        said = type(judgments)(**dict(zip(CODES, answer, strict=True)))
        for labels in SOME_LABELS:
            assert answer_accuracy(said, labels, alpha) == pytest.approx(slow_accuracy(answer, labels, alpha))


def test_a_part_without_labels_leaves_all_weight_to_the_other(stage: Stage) -> None:
    plays = [Play(final=(1, 0, 2, 2)), Play(final=(1, 1, 1, 1))]
    for labels, wanted in [
        ({"TA": 1, "VQ": 0, "MQ": 2}, (1.0, 1 / 3)),
        ({"OA": 1}, (0.0, 1.0)),
        ({"TA": 1, "MQ": 1, "OA": 1}, (0.25, 1.0)),
    ]:
        scored = reward_of(stage, AccuracyTerm(), plays, EpisodeTruth(labels))
        assert scored.terms["accuracy"] == pytest.approx(wanted)


# Cases that a loop over chance plays may miss.


@pytest.mark.parametrize("ending", ["token_limit", "unparseable", "round_limit"])
def test_an_episode_that_the_model_ended_without_a_verdict_is_not_failed(
    stage: Stage, ending: Ending
) -> None:
    looks = (Look((1, 0, 2, 1)),) * (4 if ending == "round_limit" else 1)
    plays = [Play(looks, ending=ending), Play(final=(1, 0, 2, 1))]
    trajectories = stage.play(plays)
    assert trajectories[0].well_formed == (ending == "round_limit"), "the form alone does not tell"
    scored = score_group(RewardSettings(), trajectories, [TRUTH] * 2)
    assert scored.totals == (0.0, 2.0)  # one of two looks: R(X) is above omega
    assert scored.accuracy == (0.0, 1.0)


def test_a_repaired_round_does_not_earn_the_format_reward(stage: Stage) -> None:
    plays = [Play(final=(1, 0, 2, 1), spoiled=s) for s in ("", "failure", "repair")]  # type: ignore[arg-type]
    assert reward_of(stage, FormatTerm(), plays).totals == (1.0, 0.0, 0.0)


def test_the_gain_needs_a_recommended_answer_and_skips_unreadable_ones(stage: Stage) -> None:
    right, wrong = (1, 0, 2, 1), (2, 2, 0, 2)
    plays = [
        Play(final=right),
        Play((Look(None),), right),
        Play((Look(wrong), Look(None)), right),
        Play((Look(right),), wrong),
        Play((Look(wrong), Look(right)), ending="unparseable"),
        Play((Look(right),), ending="unparseable"),
    ]
    assert reward_of(stage, CotGainTerm(), plays).totals == pytest.approx((0, 0, 0.2, -0.2, 0.2, 0))


def test_equal_gains_are_equal_to_the_bit(stage: Stage) -> None:
    """The sum telescopes: what lies between the first and the last answer must not leave rounding behind."""
    first, last = (1, 2, 0, 2), (1, 0, 0, 1)
    between = [(), ((2, 0, 2, 2),), ((1, 0, 2, 1), (2, 0, 0, 2))]
    plays = [Play((Look(first), *map(Look, middle)), last) for middle in between]
    assert len(set(reward_of(stage, CotGainTerm(), plays).totals)) == 1


@pytest.mark.parametrize(("looking", "bonus"), [(0, None), (1, 0.0375), (2, 0.0), (8, 0.0)])
def test_exploration_pays_while_few_look(stage: Stage, looking: int, bonus: float | None) -> None:
    plays = [Play((Look((1, 1, 1, 1)),) if i < looking else (), (1, 0, 2, 1)) for i in range(8)]
    got = reward_of(stage, ExplorationTerm(), plays).totals
    assert got == pytest.approx((*[bonus] * looking, *[0.0] * (8 - looking)))


def test_a_failed_episode_is_not_in_the_share_of_those_that_look(stage: Stage) -> None:
    """Two of nine look, or one of eight, if the one that failed does not count."""
    look, still = Play((Look((1, 1, 1, 1)),), (1, 0, 2, 1)), Play(final=(1, 0, 2, 1))
    failed = Play((Look((1, 1, 1, 1)),), ending="error")
    got = reward_of(stage, ExplorationTerm(), [failed, look, *[still] * 7]).totals
    assert got == pytest.approx((None, 0.0375, *[0.0] * 7))


def test_a_bad_call_neither_costs_nor_explores(stage: Stage) -> None:
    plays = [Play((Look((1, 1, 1, 1), None), Look((1, 1, 1, 1), (4, 5))), (1, 0, 2, 1))]
    plays += [Play((Look((1, 1, 1, 1), None),), (1, 0, 2, 1))] * 7
    assert reward_of(stage, CallCostTerm(), plays).totals == pytest.approx((-0.05, *[0.0] * 7))
    assert reward_of(stage, ExplorationTerm(), plays).totals == pytest.approx((0.0375, *[0.0] * 7))


@pytest.mark.parametrize(
    ("answer", "agrees"),
    [
        ((1, 1, 2, 1), True),
        ((1, 1, 2, 2), False),
        ((1, 2, 0, 0), True),
        ((0, 0, 0, 0), True),
        ((0, 0, 2, 2), True),
        ((0, 0, 2, 0), False),
        ((2, 2, 1, 1), False),
    ],
)
def test_an_overall_judgment_agrees_with_the_sign_of_the_dimensions(
    stage: Stage, answer: Four, agrees: bool
) -> None:
    assert reward_of(stage, AgreementTerm(), [Play(final=answer)]).totals == (0.1 * agrees,)


def test_evidence_is_the_share_of_ranges_that_calls_hit(stage: Stage) -> None:
    """Ranges are half-open. What the first input shows, frame 1 among others, does not count."""
    truth = EpisodeTruth(LABELS, ((1, 3), (5, 8), (20, 23)))
    right = (1, 0, 2, 1)
    plays = [
        Play(final=right),
        Play((Look(right, (3, 4, 8, 19)),), right),
        Play((Look(right, (5,)), Look(right, (6, 7))), right),
        Play((Look(right, (2, 7)), Look(right, None), Look(right, (22,))), right),
    ]
    scored = reward_of(stage, EvidenceTerm(weight=0.3), plays, truth)
    assert scored.totals == pytest.approx((0, 0, 0.1, 0.3))
    assert scored.metrics["reward/evidence"] == pytest.approx(0.1)
    assert scored.metrics["reward/evidence_seen"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("evidence", [None, ()])
def test_without_ranges_evidence_earns_nothing_and_has_no_metric(
    stage: Stage, evidence: tuple[tuple[int, int], ...] | None
) -> None:
    plays = [Play((Look((1, 0, 2, 1)),), (1, 0, 2, 1))]
    scored = reward_of(stage, EvidenceTerm(), plays, EpisodeTruth(LABELS, evidence))
    assert scored.totals == (0.0,)
    assert not [name for name in scored.metrics if "evidence" in name]


def test_every_call_of_a_round_counts(stage: Stage) -> None:
    class Twice(Look):
        @property
        def text(self) -> str:
            return super().text + Look(None, (7,)).text.removeprefix(HEAD)

    truth = EpisodeTruth(LABELS, ((7, 8),))
    (trajectory,) = stage.play([Play((Twice((1, 0, 2, 1), (3,)),), (1, 0, 2, 1))])
    assert [tool.frame_numbers for tool in trajectory.rounds[0].tools] == [(3,), (7,)]
    scored = score_group(RewardSettings(terms=(EvidenceTerm(), CallCostTerm())), [trajectory], [truth])
    assert scored.terms["evidence"] == (0.2,)
    assert scored.terms["call_cost"] == (-0.1,)


def calling(overall: int) -> Play:
    return Play((Look((1, 1, 1, 1)),), (1, 0, 2, overall))


def still(overall: int) -> Play:
    return Play(final=(1, 0, 2, overall))


@pytest.mark.parametrize(
    ("plays", "wanted"),
    [
        ([calling(1), calling(2), still(1)], (-0.1, 0, 0)),
        ([calling(1), calling(2)], (0, 0)),
        ([calling(1), calling(2), still(1), still(2)], (0, 0, 0, 0)),
        ([calling(1), still(1), still(1), still(0), still(2)], (0, 0, 0, 0, 0)),
        ([calling(0), still(0), still(0), still(2)], (-0.1, 0, 0, 0)),
        ([calling(1), Play(ending="unparseable"), still(1)], (-0.1, 0, 0)),
        ([calling(1), Play(ending="unparseable")], (0, 0)),
        ([calling(1), Play((Look(None, None),), (1, 1, 1, 1))], (-0.1, 0)),
        ([Play((Look((1, 1, 1, 1)),), ending="unparseable"), still(1)], (0, 0)),
        ([calling(1), Play(ending="error"), still(2)], (0, None, 0)),
    ],
)
def test_needless_calls(stage: Stage, plays: list[Play], wanted: tuple[float | None, ...]) -> None:
    assert reward_of(stage, NecessityTerm(), plays).totals == wanted


def test_needless_calls_are_seen_in_any_order_of_the_clips(stage: Stage) -> None:
    """Video 1 of some episodes is video 2 of the others, so 1 and 2 are the same verdict there."""
    swapped_labels = {"TA": 2, "VQ": 0, "MQ": 1, "OA": 2}
    truths = [TRUTH] * 2 + [EpisodeTruth(swapped_labels)] * 2
    episodes = stage.play([calling(1), calling(2)]) + stage.play([still(2), still(2)], swapped=True)
    settings = RewardSettings(terms=(NecessityTerm(), AccuracyTerm()))
    scored = score_group(settings, episodes, truths)
    assert scored.terms["necessity"] == (-0.1, 0, 0, 0)
    assert scored.metrics["reward/needless_calls"] == 0.5
    assert scored.accuracy == pytest.approx((1, 0.5, 2 / 3, 2 / 3))  # of the last two, OA and VQ are right


def test_every_kind_has_a_function_and_takes_its_own_settings_only(stage: Stage) -> None:
    assert set(TERMS) == {term.kind for term in ALL_TERMS}
    group = JudgedGroup.of(stage.play([still(1)]), [TRUTH], 0.5)
    for term in ALL_TERMS:
        assert isinstance(TERMS[term.kind](term, group), TermScores)
        for other in ALL_TERMS:
            if other is not term:
                with pytest.raises(AssertionError):
                    TERMS[term.kind](other, group)


def test_terms_leave_the_episodes_as_they_are(stage: Stage) -> None:
    episodes = stage.play([calling(1), still(1)])
    copies = [Trajectory.model_validate_json(episode.model_dump_json()) for episode in episodes]
    settings = RewardSettings(terms=ALL_TERMS)
    first = score_group(settings, episodes, [TRUTH] * 2)
    assert first == score_group(settings, copies, [TRUTH] * 2)
    assert episodes == copies
