"""docs/rewards_for_generators.md is true: its code runs, and the better clip gets the higher reward."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest
import torch
from clips import make_clip

from vrthinker import Dimension, Judge
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.verdict import Verdict

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rewards_for_generators.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's code defines."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    return names


def videos(number: int) -> torch.Tensor:
    """A batch of clips of whole bytes, `[batch, 3, 6, 56, 56]` in -1..1."""
    shape, generator = (number, 3, 6, 56, 56), torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator) / 127.5 - 1


def test_every_consumer_gets_a_reward_a_clip_and_dimension(
    page: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Noise is nothing that nano has seen. In a guided round it answers all the same, but it asks for frames
    # in as many rounds as it is given.
    monkeypatch.setitem(page, "judge", Judge.from_pretrained("nano", guided=True, max_rounds=2))
    batch, prompts = videos(3), ["A red circle moves.", "A red circle moves.", "alone"]
    scores = page["rewards"](page["judge"], batch, prompts)
    assert list(scores) == list(Dimension)
    for score in scores.values():
        assert score.shape == (3,)
        assert math.isnan(score[2]), "a clip that nothing can be compared with"
        assert score[0] + score[1] == pytest.approx(1)
        assert 0 <= score[0] <= 1
    first = page["fastvideo_reward"](batch, prompts)
    assert first[:2].tolist() == pytest.approx(scores[Dimension.OA][:2].tolist(), abs=1e-4)
    named, more = page["flow_grpo_reward"](batch.permute(0, 2, 1, 3, 4) / 2 + 0.5, prompts, [{}] * 3)
    assert more == {}
    assert set(named) == {"TA", "VQ", "MQ", "OA"}
    assert named["OA"][:2] == pytest.approx(scores[Dimension.OA][:2].tolist(), abs=1e-4)


def test_clips_in_files_and_failures_are_rewarded_as_the_page_says(
    page: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "<snapshot>x</snapshot><think>y</think><answer>TA=1, VQ=0, MQ=2, OA=1</answer>"
    paths = [make_clip(tmp_path / f"{name}.mp4", 5, size=(56, 84)) for name in "ab"]
    paths.append(tmp_path / "missing.mp4")
    monkeypatch.setitem(page, "judge", Judge(ScriptedEngine(lambda *_: answer)))
    rewarded = page["DanceGRPOReward"]().reward(paths, ["a dog"] * 3)
    assert rewarded[0] == {"TA": 1.0, "VQ": 0.5, "MQ": 0.0, "OA": 1.0}
    assert rewarded[1] == {"TA": 0.0, "VQ": 0.5, "MQ": 1.0, "OA": 0.0}
    assert all(math.isnan(score) for score in rewarded[2].values())
    unread = Judge(ScriptedEngine(lambda *_: "nothing"))
    scores = page["rewards"](unread, videos(2), ["a dog"] * 2)
    assert all(torch.isnan(score).all() for score in scores.values()), "no verdict is no zero"


def test_a_score_is_half_for_a_tie_and_none_without_a_verdict(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", 5, size=(56, 84))
    answer = "<snapshot>x</snapshot><think>y</think><answer>TA=1, VQ=0, MQ=2, OA=1</answer>"
    verdict: Verdict = Judge(ScriptedEngine([[answer]]))("a dog", clip, clip)
    assert [verdict.score(d) for d in Dimension] == [1.0, 0.5, 0.0, 1.0]
    assert verdict.score() == 1.0
    assert Judge(ScriptedEngine([["nothing"]]))("a dog", clip, clip).score() is None
