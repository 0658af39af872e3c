"""The rewards of groups: failed episodes, verdicts copied from the caption, metrics, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from clips import make_clip
from reward.plays import N_FRAMES, Four, Look, Play, Stage, values

from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.reward.group import EpisodeTruth, is_failed
from vrthinker.reward.scoring import GroupRewards, mean_metrics, score_group
from vrthinker.reward.settings import (
    AccuracyTerm,
    AgreementTerm,
    CotGainTerm,
    EvidenceTerm,
    FormatTerm,
    NecessityTerm,
    RewardSettings,
)

RIGHT: Four = (1, 0, 2, 1)
WRONG: Four = (2, 2, 0, 2)
TRUTH = EpisodeTruth({"TA": 1, "VQ": 0, "MQ": 2, "OA": 1})
PAPER = RewardSettings()


def score(trajectories: Sequence[Trajectory | None], settings: RewardSettings = PAPER) -> GroupRewards:
    return score_group(settings, trajectories, [TRUTH] * len(trajectories))


def test_a_failed_episode_leaves_its_group(stage: Stage) -> None:
    """The others are scored as if it had never been there, whether it failed early, late or at the start."""
    plays = [Play((Look(WRONG),), RIGHT), *[Play(final=RIGHT)] * 5, Play(final=WRONG)]
    alone = score(stage.play(plays))
    failed = stage.play([Play((Look(RIGHT),) * 2, ending="error")])
    assert is_failed(failed[0])
    assert len(failed[0].rounds) == 2
    for extra in (failed[0], None):
        for place in (0, 3, 7):
            episodes: list[Trajectory | None] = list(stage.play(plays))
            episodes.insert(place, extra)
            scored = score(episodes)
            for got, wanted in (
                (scored.totals, alone.totals),
                (scored.accuracy, alone.accuracy),
                *((scored.terms[kind], alone.terms[kind]) for kind in alone.terms),
            ):
                assert got[place] is None
                assert got[:place] + got[place + 1 :] == wanted
            assert scored.metrics == {**alone.metrics, "reward/failed": 1 / 8}


def test_a_group_of_failed_episodes_and_a_group_of_none(stage: Stage) -> None:
    failed = stage.play([Play(ending="error")] * 2)
    scored = score(failed)
    assert scored.totals == scored.accuracy == scored.terms["format"] == (None, None)
    assert scored.metrics == {"reward/failed": 1.0}
    assert score([]).totals == ()
    assert score([]).metrics == {}


@pytest.mark.parametrize(
    "caption", [f"a dog <answer>{values(RIGHT)}</answer>", f"Answer {values(RIGHT)}, CF=1!"]
)
def test_a_verdict_that_repeats_the_caption_earns_nothing(stage: Stage, caption: str) -> None:
    other: Four = (1, 0, 2, 2)
    plays = [Play((Look(WRONG),), RIGHT), Play((Look(WRONG),), other), Play(ending="unparseable")]
    settings = RewardSettings(terms=(FormatTerm(), AccuracyTerm(), CotGainTerm(), AgreementTerm()))
    plain, repeated = (score(stage.play(plays, caption=c), settings) for c in ("a dog", caption))
    assert plain.totals == pytest.approx((1 + 1 + 0.2, 1 + 0.5 + 0.1, 0))
    assert repeated.terms["format"] == (1, 1, 0)
    assert repeated.terms["accuracy"] == repeated.accuracy == (0, 0.5, 0)
    assert repeated.terms["cot_gain"] == pytest.approx((0, 0.1, 0))
    assert plain.metrics["reward/caption_repeated"] == 0
    assert repeated.metrics["reward/caption_repeated"] == 1 / 3
    agreeing: Four = (1, 1, 2, 1)
    for words, earns in (("a dog", 0.1), (values(agreeing), 0)):
        assert score(stage.play([Play(final=agreeing)], caption=words), settings).terms["agreement"] == (
            earns,
        )


def test_a_caption_counts_for_its_own_episode_only(stage: Stage) -> None:
    episodes = stage.play([Play(final=RIGHT)], caption=values(RIGHT)) + stage.play([Play(final=RIGHT)])
    assert score(episodes).accuracy == (0.0, 1.0)


def test_terms_sum_up_to_the_total(stage: Stage) -> None:
    scored = score(stage.play([Play((Look(WRONG),), RIGHT)] + [Play(final=RIGHT)] * 7))
    for i, total in enumerate(scored.totals):
        assert total == pytest.approx(sum(of_term[i] or 0.0 for of_term in scored.terms.values()))


def test_accuracy_is_there_without_its_term_and_not_weighted(stage: Stage) -> None:
    """Dynamic sampling needs it; alpha is then the default."""
    plays = [Play((Look(WRONG),), (1, 2, 0, 1))]
    scored = score(stage.play(plays), RewardSettings(terms=(CotGainTerm(k=1.0),)))
    assert scored.accuracy == scored.totals == pytest.approx((0.5 + 0.5 / 3,))
    assert scored.metrics["reward/accuracy"] == pytest.approx(0.5 + 0.5 / 3)
    alpha = RewardSettings(terms=(AccuracyTerm(alpha=0.75), CotGainTerm(k=1.0)))
    assert score(stage.play(plays), alpha).terms["cot_gain"] == pytest.approx((0.75 + 0.25 / 3,))


def test_metrics_of_several_groups_count_every_episode_once(stage: Stage) -> None:
    """Not every group once: a group of one weighs an eighth of a group of eight."""
    ranges = EpisodeTruth(TRUTH.labels, ((3, 4),))
    settings = RewardSettings(terms=(FormatTerm(), EvidenceTerm(), NecessityTerm()))
    looks = Play((Look(RIGHT, (3,)),), RIGHT)
    plays = [looks, *[Play(ending="unparseable")] * 6, Play(ending="error")]
    groups = [
        score_group(settings, stage.play(plays), [TRUTH] * 8),
        score_group(settings, stage.play([looks, Play(final=RIGHT)]), [ranges] * 2),
    ]
    together = mean_metrics(iter(groups))
    assert together == pytest.approx(
        {
            "reward/total": (1 + 1 - 0.1 + 0.2 + 1) / 9,
            "reward/accuracy": 3 / 9,
            "reward/caption_repeated": 0,
            "reward/failed": 1 / 10,
            "reward/format": 3 / 9,
            "reward/evidence": 0.1,
            "reward/evidence_seen": 0.5,
            "reward/necessity": -0.1 / 9,
            "reward/needless_calls": 1.0,
        }
    )
    assert "reward/evidence" not in groups[0].metrics
    assert mean_metrics(groups[:1]) == groups[0].metrics
    assert mean_metrics([]) == {}


@pytest.mark.parametrize(
    ("labels", "evidence", "message"),
    [
        ({}, None, "labels: got none, wanted at least one of TA"),
        ({"QQ": 1}, None, "labels: got QQ=1, allowed: TA, VQ, MQ and OA with 0, 1 or 2"),
        ({"TA": 3}, None, "labels: got TA=3, allowed"),
        ({"TA": None}, None, "labels: got TA=None, allowed"),
        ({"TA": 1}, ((0, 4),), "evidence: got frames 0 to 4"),
        ({"TA": 1}, ((2, 3), (4, 4)), "evidence: got frames 4 to 4"),
    ],
)
def test_truths_that_are_refused(
    labels: dict[str, int], evidence: tuple[tuple[int, int], ...] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        EpisodeTruth(labels, evidence)


def test_groups_that_are_refused(stage: Stage, clip_pair: tuple[Path, Path], tmp_path: Path) -> None:
    episodes = stage.play([Play(final=RIGHT)] * 2)
    with pytest.raises(InputError, match="truths: got 1, wanted one per episode, 2"):
        score_group(PAPER, episodes, [TRUTH])
    outside = EpisodeTruth(TRUTH.labels, ((N_FRAMES, N_FRAMES + 2),))
    with pytest.raises(InputError, match=r"got frames 22 to 24 \(half-open\), allowed: frames 1 to 22"):
        score_group(PAPER, episodes, [TRUTH, outside])
    score_group(PAPER, episodes, [EpisodeTruth(TRUTH.labels, ((N_FRAMES, N_FRAMES + 1),))] * 2)
    other = Stage((clip_pair[0], make_clip(tmp_path / "other.mp4", 10)))
    with pytest.raises(InputError, match="got episode 'pair' of other clips than episode 'pair'"):
        score(episodes + other.play([Play(final=RIGHT)]))
