"""Rollouts: what is drawn, kept and counted, with judges that are always right, never look, or fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest

from vrthinker.data.pairs import Pair, load_pairs
from vrthinker.engine.base import RoundRequest
from vrthinker.episode.settings import EpisodeSettings, JudgeSettings
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.errors import EngineError, InputError
from vrthinker.judge import Judge
from vrthinker.reward.group import EpisodeTruth, is_failed
from vrthinker.reward.settings import RewardSettings
from vrthinker.train.loop.ranks import ALONE
from vrthinker.train.rollouts import Rollouts, RolloutSettings, iter_valid
from vrthinker.train.trials import Trial
from vrthinker.world.files import PAIRS_FILE, load_truths, make_world
from vrthinker.world.oracle import BehaviorMix, OracleEngine, truths_by_clip
from vrthinker.world.world import PRESETS

N_PAIRS = 8
RIGHT = BehaviorMix(oracle=1)
NEVER_LOOKS = BehaviorMix(oracle=0, immediate=1)
MIXED = BehaviorMix(oracle=1, immediate=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    make_world(folder, PRESETS["easy"], pairs=N_PAIRS, seed=47, workers=1)
    return folder


class FailsOneInTen(OracleEngine):
    """Fails on the first round of every tenth session."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._seen: set[int] = set()

    def submit(self, request: RoundRequest) -> None:
        if request.session.id not in self._seen:
            self._seen.add(request.session.id)
            if len(self._seen) % 10 == 0:
                raise EngineError("the engine failed")
        super().submit(request)


Make = Callable[..., tuple[Rollouts, Judge]]


@pytest.fixture
def make(world: Path, tmp_path: Path) -> Make:
    pairs = load_pairs(world / PAIRS_FILE)
    truths = load_truths(world)

    def made(
        mix: BehaviorMix,
        *,
        engine: type[OracleEngine] = OracleEngine,
        settings: Mapping[str, Any] | None = None,
        episode: Mapping[str, Any] | None = None,
        seed: int = 3,
    ) -> tuple[Rollouts, Judge]:
        chosen = EpisodeSettings.model_validate({"guided": False, "temperature": 1.0, **(episode or {})})
        judge = Judge(engine(truths_by_clip(world, truths), mix), JudgeSettings(episode=chosen))
        rollouts = Rollouts(
            RolloutSettings.model_validate({"group_size": 4, **(settings or {})}),
            RewardSettings(),
            pairs,
            truth_of=lambda trial: EpisodeTruth(trial.pair.labels or {}),
            seed=seed,
            folder=tmp_path / "rollouts",
            ranks=ALONE,
        )
        return rollouts, judge

    return made


def test_a_judge_that_is_always_right_ends_at_the_bound(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts, judge = make(RIGHT)
    refresh = rollouts.sample(0, judge, wanted=2, weights="w")
    assert (len(refresh.groups), len(refresh.drawn)) == (0, 6), "three times as many as were wanted"
    assert refresh.metrics["reward/accuracy"] == refresh.metrics["rollouts/oa_tau"] == 1.0
    assert refresh.metrics["rollouts/telling_share"] == 0.0
    assert "6 groups drawn, 0 of 2 wanted can be learned from" in capsys.readouterr().err


def test_a_judge_that_never_looks_is_counted_so(make: Make) -> None:
    rollouts, judge = make(NEVER_LOOKS)
    refresh = rollouts.sample(0, judge, wanted=2, weights="w")
    assert refresh.groups == ()
    assert refresh.metrics["rollouts/tool_calls"] == 0.0
    assert refresh.metrics["rollouts/rounds"] == 1.0
    assert refresh.metrics["reward/exploration"] == 0.0
    assert 0 < refresh.metrics["reward/accuracy"] < 1


def test_an_engine_that_fails_one_episode_in_ten(make: Make) -> None:
    rollouts, judge = make(MIXED, engine=FailsOneInTen)
    refresh = rollouts.sample(0, judge, wanted=5, weights="w")
    episodes = [t for group in refresh.drawn for t in group.trajectories]
    failed = [t for t in episodes if t is None or is_failed(t)]
    assert 0 < len(failed) == len(episodes) // 10
    assert refresh.metrics["reward/failed"] == pytest.approx(len(failed) / len(episodes))
    for group in refresh.drawn:
        for trajectory, reward in zip(group.trajectories, group.rewards.totals, strict=True):
            assert (reward is None) == (trajectory is None or is_failed(trajectory))
        assert [place for place, _ in iter_valid(group)] == [
            place for place, reward in enumerate(group.rewards.totals) if reward is not None
        ]


def test_a_failed_episode_stays_failed_when_the_run_goes_on(make: Make, tmp_path: Path) -> None:
    """Others would be sampled by other weights, and the packs would no longer be those that were begun."""
    rollouts, judge = make(MIXED, engine=FailsOneInTen)
    first = rollouts.sample(0, judge, wanted=5, weights="w")
    assert any(reward is None for group in first.drawn for reward in group.rewards.totals)
    healthy, other = make(MIXED)
    for again in (other, None):
        second = healthy.sample(0, again, wanted=5, weights="w")
        assert [g.rewards for g in second.drawn] == [g.rewards for g in first.drawn]
    draw = tmp_path / "rollouts" / "refresh-00000" / "draw-00000"
    lines = (draw / "verdicts.jsonl").read_text().splitlines(keepends=True)
    (draw / "verdicts.jsonl").write_text("".join(lines[:-2]))
    with pytest.raises(InputError, match=r"lacks 2 of 20 episodes, and the weights that sampled it are gone"):
        healthy.sample(0, None, wanted=5, weights="w")


def test_a_group_that_failed_as_a_whole_is_left_out_without_dynamic_sampling(make: Make) -> None:
    class Fails(OracleEngine):
        def submit(self, request: RoundRequest) -> None:
            raise EngineError("the engine failed")

    rollouts, judge = make(MIXED, engine=Fails, settings={"dynamic": False, "group_size": 2})
    refresh = rollouts.sample(0, judge, wanted=2, weights="w")
    assert (len(refresh.drawn), refresh.groups) == (2, ())
    assert refresh.metrics["rollouts/short_groups"] == 1.0


def test_dynamic_sampling_keeps_what_tells_and_draws_others_in_its_place(make: Make, world: Path) -> None:
    rollouts, judge = make(MIXED)
    refresh = rollouts.sample(0, judge, wanted=3, weights="w")
    labels = {pair.id: pair.labels for pair in load_pairs(world / PAIRS_FILE)}
    assert len(refresh.drawn) > len(refresh.groups) > 0
    for group in refresh.drawn:
        found = {accuracy for accuracy in group.rewards.accuracy if accuracy is not None}
        assert (group in refresh.groups) == (len(found) > 1)
        assert len({trial.swapped for trial in group.trials}) == 1
        for trial, trajectory in zip(group.trials, group.trajectories, strict=True):
            assert trajectory is not None
            shown = [Path(video.path) for video in trajectory.videos]
            source = [trial.source.video_1, trial.source.video_2]
            assert [p.name for p in shown] == [p.name for p in source[:: -1 if trial.swapped else 1]]
            turned = {0: 0, 1: 2, 2: 1} if trial.swapped else {0: 0, 1: 1, 2: 2}
            assert trial.pair.labels == {k: turned[v] for k, v in (labels[trial.source.id] or {}).items()}
    assert {trial.swapped for group in refresh.drawn for trial in group.trials} == {True, False}
    kept, _ = make(MIXED, settings={"dynamic": False})
    everything = kept.sample(1, judge, wanted=3, weights="w")
    assert everything.groups == everything.drawn
    assert len(everything.groups) == 3


def test_the_next_refresh_goes_on_with_other_pairs_and_comes_back_to_them_as_other_groups(make: Make) -> None:
    rollouts, judge = make(MIXED, settings={"dynamic": False})
    names = [[g.id for g in rollouts.sample(n, judge, wanted=5, weights=f"w{n}").drawn] for n in range(2)]
    told = [name for some in names for name in some]
    assert len(set(told)) == 10
    pairs = [name.split(",")[0] for name in told]
    assert len(set(pairs[:N_PAIRS])) == N_PAIRS, "every pair once before one comes again"
    assert {name.split(", ")[1] for name in told[N_PAIRS:]} == {"pass 2"}


def test_what_was_sampled_is_not_sampled_again(make: Make, tmp_path: Path) -> None:
    rollouts, judge = make(MIXED)
    first = rollouts.sample(0, judge, wanted=3, weights="w")

    class Never(OracleEngine):
        def submit(self, request: RoundRequest) -> None:
            raise AssertionError("nothing is left to sample")

    again, idle = make(MIXED, engine=Never)
    second = again.sample(0, idle, wanted=3, weights="w")
    assert second.groups == first.groups
    assert second.metrics == first.metrics
    # Half of a draw is there: only the other half is sampled.
    draw = tmp_path / "rollouts" / "refresh-00000" / "draw-00000"
    lines = (draw / "verdicts.jsonl").read_text().splitlines(keepends=True)
    (draw / "verdicts.jsonl").write_text("".join(lines[:5]))
    third = rollouts.sample(0, judge, wanted=3, weights="w")
    assert [g.rewards for g in third.drawn] == [g.rewards for g in first.drawn]
    assert len(list(load_trajectories(draw / "episodes.jsonl"))) > len(lines)
    with pytest.raises(InputError, match="weights"):
        rollouts.sample(0, judge, wanted=3, weights="others")


@pytest.mark.parametrize(
    ("episode", "words"),
    [
        ({"guided": True}, "guided: got True, allowed: False"),
        ({"top_p": 0.9}, "top_p: got 0.9, allowed: 1.0"),
        ({"memory": "renumber"}, "memory: got 'renumber'"),
    ],
)
def test_what_cannot_be_trained_is_not_sampled(episode: dict[str, Any], words: str, make: Make) -> None:
    rollouts, judge = make(MIXED, episode=episode)
    with pytest.raises(InputError, match=words):
        rollouts.sample(0, judge, wanted=1, weights="w")


def test_pairs_with_one_caption_are_groups_of_their_own(world: Path, tmp_path: Path) -> None:
    truths = load_truths(world)
    pairs: list[Pair] = load_pairs(world / PAIRS_FILE)
    caption = pairs[0].prompt
    two = [pair.model_copy(update={"prompt": caption}) for pair in pairs[:2]]
    judge = Judge(
        OracleEngine(truths_by_clip(world, truths), MIXED),
        JudgeSettings(episode=EpisodeSettings(guided=False, temperature=1.0)),
    )

    def truth_of(trial: Trial) -> EpisodeTruth:
        return EpisodeTruth(trial.pair.labels or {})

    rollouts = Rollouts(
        RolloutSettings(group_size=4, dynamic=False),
        RewardSettings(),
        two,
        truth_of=truth_of,
        seed=1,
        folder=tmp_path / "rollouts",
        ranks=ALONE,
    )
    refresh = rollouts.sample(0, judge, wanted=2, weights="w")
    clips = [{t.videos[0].path for t in group.trajectories if t is not None} for group in refresh.drawn]
    assert all(len(found) == 1 for found in clips)
    assert clips[0] != clips[1]
    record = json.loads((tmp_path / "rollouts" / "refresh-00000" / "refresh.json").read_text())
    assert len(record["rewards"]) == 2
