"""GRPO that samples through vLLM: the same policy samples and learns, before and after a refresh."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpo_runs import episodes, metrics, values
from grpo_runs import world as world

from vrthinker.errors import InputError
from vrthinker.train.grpo import run_grpo
from vrthinker.train.grpo_settings import grpo_settings


@pytest.mark.vllm
@pytest.mark.slow
def test_what_vllm_samples_is_what_the_training_forward_computes(world: Path, tmp_path: Path) -> None:
    given = values(world)
    given["rollouts"] = {**given["rollouts"], "engine": "vllm"}
    out = tmp_path / "run"
    assert run_grpo(grpo_settings(given), out) == out / "model"
    found = episodes(out)
    assert {trajectory.engine for trajectory in found} == {"vllm:nano"}
    assert {trajectory.policy_version for trajectory in found} == {0, 2}, "refreshed after 2 steps"
    lines = metrics(out)
    assert len(lines) == 3
    for line in lines:
        assert line["drift/mean"] < 1e-5, "with anything of the old weights it would be more"
        assert line["drift/max"] < 1e-3
    assert lines[2]["kl/ref"] > 0


def test_what_vllm_cannot_sample_is_refused(tmp_path: Path) -> None:
    from vrthinker.episode.settings import EpisodeSettings
    from vrthinker.train.grpo import _refuse_engine
    from vrthinker.train.loop.ranks import current_ranks

    given = values(tmp_path)
    given["rollouts"] = {**given["rollouts"], "engine": "vllm"}
    with pytest.raises(InputError, match=r"memory: got 'evict', allowed with vLLM: rerender.*--engine hf"):
        _refuse_engine(grpo_settings(given), EpisodeSettings(memory="evict"), current_ranks())
