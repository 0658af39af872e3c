"""Advantages of every kind against a float64 loop over episodes, and what counts as a group."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from reward.plays import Look, Play, Stage, close

from vrthinker.errors import InputError
from vrthinker.reward.advantages import advantages
from vrthinker.reward.group import EpisodeTruth
from vrthinker.reward.scoring import score_group
from vrthinker.reward.settings import (
    AdvantageSettings,
    BatchStdAdvantage,
    DrGrpoAdvantage,
    GrpoAdvantage,
    ReinforcePlusPlusAdvantage,
    RewardSettings,
    RlooAdvantage,
)

Rewards = Mapping[str, Sequence[float | None]]
KINDS = ("grpo", "dr_grpo", "rloo", "batch_std", "reinforce_plus_plus")
SCALED = ("grpo", "batch_std", "reinforce_plus_plus")


def made(kind: str, **options: Any) -> AdvantageSettings:
    adapter: TypeAdapter[AdvantageSettings] = TypeAdapter(AdvantageSettings)
    return adapter.validate_python({"kind": kind, **options})


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], ddof: int) -> float:
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - ddof))


def looped(kind: str, rewards: Rewards, ddof: int, eps: float) -> dict[str, list[float | None]]:
    """One episode at a time, in double precision, from the definitions."""
    valid = {group: [r for r in of if r is not None] for group, of in rewards.items()}
    everything = [r for of in valid.values() for r in of]
    centred = [r - mean(of) for of in valid.values() for r in of]
    found: dict[str, list[float | None]] = {}
    for group, of_group in rewards.items():
        found[group] = []
        for place, reward in enumerate(of_group):
            if reward is None:
                found[group].append(None)
                continue
            if len(set(valid[group])) < 2:
                found[group].append(0.0)
                continue
            baseline, scale = mean(valid[group]), 1.0
            if kind == "rloo":
                baseline = mean([r for i, r in enumerate(of_group) if r is not None and i != place])
            elif kind == "grpo":
                scale = spread(valid[group], ddof) + eps
            elif kind == "batch_std":
                scale = spread(everything, ddof) + eps
            elif kind == "reinforce_plus_plus":
                scale = math.sqrt(spread(centred, ddof) ** 2 + eps)
            found[group].append((reward - baseline) / scale)
    return found


def drawn(seed: int) -> dict[str, list[float | None]]:
    """Groups of 8, 7, 1, 0 and others, some flat, with failed episodes."""
    draw = random.Random(seed)
    rewards: dict[str, list[float | None]] = {}
    for number, size in enumerate([8, 8, 7, 1, 8, 0, 2, 5]):
        levels = [0.0, 1 / 3, 1.2, 2.0, 2.2375] if number != 4 else [1 / 3]
        rewards[f"pair {number}"] = [
            None if draw.random() < 0.15 else draw.choice(levels) for _ in range(size)
        ]
    return rewards


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in KINDS] + [(kind, o) for kind in SCALED for o in ({"ddof": 0}, {"eps": 0.1})],
)
def test_every_kind_is_what_a_loop_over_episodes_says(kind: str, options: dict[str, Any]) -> None:
    eps = options.get("eps", 1e-8 if kind == "reinforce_plus_plus" else 1e-6)
    for seed in range(10):
        rewards = drawn(seed)
        got = advantages(made(kind, **options), rewards)
        wanted = looped(kind, rewards, options.get("ddof", 1), eps)
        assert list(got.values) == list(rewards)
        for group, of_group in wanted.items():
            assert list(got.values[group]) == close(of_group)
        valid = {group: [r for r in of if r is not None] for group, of in rewards.items()}
        assert got.short == {group for group, of in valid.items() if len(of) < 2}
        assert got.dead == {group for group, of in valid.items() if len(set(of)) < 2}
        assert got.short <= got.dead
        assert all(value in (0.0, None) for group in got.dead for value in got.values[group])


def test_the_papers_advantage_by_hand() -> None:
    got = advantages(
        GrpoAdvantage(), {"a": [1.0, 2.0, None, 3.0], "b": [5.0, 5.0], "c": [7.0], "d": [None, None]}
    )
    exact = 1 / (1 + 1e-6)  # the sample standard deviation of 1, 2, 3 is 1
    assert got.values == {"a": (-exact, 0.0, None, exact), "b": (0.0, 0.0), "c": (0.0,), "d": (None, None)}
    assert got.dead == {"b", "c", "d"}
    assert got.short == {"c", "d"}
    assert got.metrics == pytest.approx(
        {
            "advantage/dead_groups": 0.75,
            "advantage/short_groups": 0.5,
            "reward/mean": 23 / 6,
            "reward/group_std": 0.5,
        }
    )


def test_two_groups_with_one_caption_stay_two(stage: Stage) -> None:
    """Only their ids tell them apart: the episodes have one caption and one pair of clips."""
    right, wrong = (1, 0, 2, 1), (2, 2, 0, 2)
    truth = EpisodeTruth({"TA": 1, "VQ": 0, "MQ": 2, "OA": 1})
    groups = {
        "first": [Play(final=right), Play(final=right), Play(final=wrong)],
        "second": [Play(final=wrong), Play((Look(wrong),), wrong), Play(ending="error"), Play(final=right)],
    }
    rewards = {
        name: score_group(RewardSettings(), stage.play(plays, caption="one"), [truth] * len(plays)).totals
        for name, plays in groups.items()
    }
    assert rewards == {"first": (2.0, 2.0, 1.0), "second": (1.0, 1.0, None, 2.0)}
    got = advantages(DrGrpoAdvantage(), rewards).values
    assert got["first"] == pytest.approx((1 / 3, 1 / 3, -2 / 3))
    assert list(got["second"]) == close((-1 / 3, -1 / 3, None, 2 / 3))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_groups_does_not_matter(kind: str) -> None:
    rewards = drawn(3)
    forward = advantages(made(kind), rewards)
    backward = advantages(made(kind), dict(reversed(rewards.items())))
    assert forward.dead == backward.dead
    for group, of_group in forward.values.items():
        assert list(backward.values[group]) == close(of_group)


def test_a_batch_without_episodes_has_no_metrics() -> None:
    assert advantages(GrpoAdvantage(), {}).metrics == {}
    empty = advantages(BatchStdAdvantage(), {"a": [], "b": [None]})
    assert empty.values == {"a": (), "b": (None,)}
    assert empty.metrics == {"advantage/dead_groups": 1.0, "advantage/short_groups": 1.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e39])
def test_a_reward_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match=r"rewards of group 'q\\n': episode 3: got .*, allowed: a number"):
        advantages(RlooAdvantage(), {"p": [1.0], "q\n": [0.0, None, bad]})


def test_a_version_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = drawn(1)
    settings = ReinforcePlusPlusAdvantage()
    default = advantages(settings, rewards)
    monkeypatch.setenv("VRTHINKER_KERNELS", "reference")
    reference = advantages(settings, rewards)
    for group, of_group in default.values.items():
        assert list(reference.values[group]) == close(of_group)
    monkeypatch.setenv("VRTHINKER_KERNELS", "cuda")
    with pytest.raises(InputError, match="VRTHINKER_KERNELS=cuda, but it cannot run"):
        advantages(settings, rewards)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_says_the_same(kind: str) -> None:
    rewards = drawn(2)
    here, there = (
        advantages(made(kind), rewards),
        advantages(made(kind), rewards, device=torch.device("cuda")),
    )
    assert here.dead == there.dead
    for group, of_group in here.values.items():
        assert list(there.values[group]) == close(of_group)
