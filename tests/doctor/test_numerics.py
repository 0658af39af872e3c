"""The drift report: small for what is the same, and large for what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest
import torch
from cli_run import vrthinker

from vrthinker.data.pairs import Pair
from vrthinker.doctor import numerics as drift
from vrthinker.engine.hf import model as hf_model
from vrthinker.engine.hf.checkpoint import NANO_FOLDER
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.settings import SETTINGS_FILE
from vrthinker.errors import InputError
from vrthinker.judge import Judge
from vrthinker.policy.packing import Pack, pack_group


@pytest.fixture
def pairs(clip_pair: tuple[Path, Path]) -> list[Pair]:
    return [
        Pair(id=f"p{number}", prompt=f"a dog {number}", video_1=clip_pair[0], video_2=clip_pair[1])
        for number in range(3)
    ]


def nano_judge(**episode: Any) -> Judge:
    """The judge that ships: it looks again, so that frames expire."""
    return Judge.from_pretrained("nano", device="cpu", **{"max_rounds": 3, **episode})


BRIEF = {"max_rounds": 1, "max_round_tokens": 8}
"""For tests of what does not depend on what is written."""


# A decode step takes 7 ms here, and three rounds in three modes are a thousand of them.
@pytest.mark.slow
@pytest.mark.guard
def test_the_packed_forward_gives_what_was_sampled(tmp_path: Path) -> None:
    """On two pairs at which nano looks twice, so that frames expire."""
    with nano_judge() as judge:
        report = drift.measure_numerics(judge, drift.default_pairs(tmp_path, 2, seed=18))
    assert [mode.memory for mode in report.modes] == ["rerender", "evict", "renumber"]
    for mode in report.modes[:2]:
        assert mode.episodes == 2
        assert mode.tokens > 100
        assert mode.largest is not None
        assert mode.mean is not None
        assert 0 < mode.mean <= mode.largest < 1e-3
        assert 0 <= mode.features_reused < 1
    rerender, evict, renumber = report.modes
    assert renumber.largest is None
    assert "inference only" in (renumber.reason or "")
    assert evict.prefilled_share < rerender.prefilled_share < 1
    assert set(report.disagreements) == {"rerender/evict", "rerender/renumber", "evict/renumber"}
    assert json.loads(report.as_json())["modes"][1]["memory"] == "evict"


def test_a_wrong_forward_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*arguments: object, **options: object) -> list[Pack]:
        packs = pack_group(*arguments, **options)  # type: ignore[arg-type]
        return [Pack(**{**vars(p), "positions": p.positions + (p.positions > 60)}) for p in packs]

    monkeypatch.setattr(drift, "pack_group", late)
    monkeypatch.setattr(drift, "MODES", ("rerender",))
    with nano_judge(max_rounds=1) as judge:
        report = drift.measure_numerics(judge, drift.default_pairs(tmp_path, 1, seed=5))
    assert report.modes[0].largest is not None
    assert report.modes[0].largest > 1e-3


def test_modes_that_a_model_does_not_allow_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_model.VisionLanguageModel, "renumber_obstacle", "its frequencies change")
    with nano_judge(**BRIEF) as judge:
        report = drift.measure_numerics(judge, drift.default_pairs(tmp_path, 1, seed=5))
    assert [mode.memory for mode in report.modes] == ["rerender", "evict"]


def test_what_cannot_be_measured_is_refused(pairs: list[Pair]) -> None:
    with pytest.raises(
        InputError, match=r"numerics: got scripted.*, wanted a judge that runs its model here"
    ):
        drift.measure_numerics(Judge(ScriptedEngine([])), pairs)
    with nano_judge() as judge, pytest.raises(InputError, match="got no pairs"):
        drift.measure_numerics(judge, [])


def test_the_command(tmp_path: Path) -> None:
    brief = tmp_path / "brief"
    shutil.copytree(NANO_FOLDER, brief)
    settings = json.loads((brief / SETTINGS_FILE).read_text())
    settings["episode"] |= BRIEF
    (brief / SETTINGS_FILE).write_text(json.dumps(settings))
    done = vrthinker("doctor", "--numerics", brief, "--limit", 2, "--device", "cpu")
    assert done.code == 0, done.err
    for words in ("evict", "largest", "greedy judgments differ between rerender and evict"):
        assert words in done.out
    refused = vrthinker("doctor", "--numerics", "nano", "--limit", 0)
    assert refused.code == 2
    assert "--limit: got 0" in refused.line


def test_the_weights_are_left_as_they_were(tmp_path: Path) -> None:
    with nano_judge(max_rounds=1) as judge:
        model = judge.engine.model.model  # type: ignore[attr-defined]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = drift.measure_numerics(judge, drift.default_pairs(tmp_path, 1, seed=5))
        for mode in report.modes[:2]:
            assert mode.largest is not None
            assert mode.largest < 1e-3
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(value.grad is None for value in model.parameters())
