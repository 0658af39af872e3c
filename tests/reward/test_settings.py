"""The settings: the paper's defaults, how they are written, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from vrthinker.errors import first_problem
from vrthinker.kernels.group_advantage.reference import METHODS, default_eps
from vrthinker.reward.settings import AdvantageSettings, AnyTerm, RewardSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rewards.md"
ADVANTAGE: TypeAdapter[AdvantageSettings] = TypeAdapter(AdvantageSettings)


def test_the_default_is_the_papers_reward() -> None:
    assert RewardSettings().model_dump(mode="json") == {
        "terms": [
            {"kind": "format", "weight": 1.0},
            {"kind": "accuracy", "alpha": 0.5},
            {"kind": "cot_gain", "k": 0.2},
            {"kind": "exploration", "omega": 0.2, "eta": 0.5},
        ]
    }


def test_settings_that_are_written_are_read_again() -> None:
    settings = RewardSettings.model_validate(
        {
            "terms": [
                {"kind": "accuracy", "alpha": 0.75},
                {"kind": "call_cost"},
                {"kind": "agreement", "weight": 0},
                {"kind": "evidence"},
                {"kind": "necessity"},
            ]
        }
    )
    assert settings.alpha == 0.75
    assert RewardSettings.model_validate_json(settings.model_dump_json()) == settings


def test_every_method_of_the_op_has_settings_with_its_defaults() -> None:
    for method in METHODS:
        settings = ADVANTAGE.validate_python({"kind": method})
        assert settings.kind == method
        scaled = {"ddof": 1, "eps": default_eps(method)} if method not in ("dr_grpo", "rloo") else {}
        assert settings.model_dump() == {"kind": method, **scaled}
        assert ADVANTAGE.validate_json(ADVANTAGE.dump_json(settings)) == settings


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "terms: Value error, got no terms, wanted at least one"),
        ([{"kind": "accuracy"}, {"kind": "accuracy"}], "terms: Value error, got kind accuracy twice"),
        ([{"kind": "speed"}], "terms.0: Input tag 'speed' found using 'kind' does not match any of the"),
        ([{"alpha": 0.5}], "terms.0: Unable to extract tag using discriminator 'kind'"),
        ([{"kind": "format", "alpha": 0.5}], "terms.0.format.alpha: Extra inputs are not permitted"),
        (
            [{"kind": "accuracy", "alpha": 1.5}],
            "terms.0.accuracy.alpha: Input should be less than or equal to 1",
        ),
        ([{"kind": "cot_gain", "k": -1}], "terms.0.cot_gain.k: Input should be greater than or equal to 0"),
        ([{"kind": "cot_gain", "k": float("nan")}], "terms.0.cot_gain.k: Input should be a finite number"),
        ([{"kind": "call_cost", "cost": 1e7}], "terms.0.call_cost.cost: Input should be less than or equal"),
    ],
)
def test_terms_that_are_refused(terms: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RewardSettings(terms=terms)
    assert first_problem(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "ppo"}, "(file): Input tag 'ppo' found using 'kind' does not match any of the"),
        ({"kind": "rloo", "eps": 1e-6}, "rloo.eps: Extra inputs are not permitted"),
        ({"kind": "dr_grpo", "ddof": 1}, "dr_grpo.ddof: Extra inputs are not permitted"),
        ({"kind": "grpo", "ddof": 2}, "grpo.ddof: Input should be 0 or 1"),
        ({"kind": "batch_std", "eps": 0}, "batch_std.eps: Input should be greater than or equal to 0.0"),
    ],
)
def test_advantages_that_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ADVANTAGE.validate_python(values)
    assert first_problem(caught.value).startswith(message)


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_the_page_lists_every_kind_with_its_settings_and_defaults() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE))
    union, _ = get_args(AnyTerm)
    terms = [kind().model_dump() for kind in get_args(union)]
    defaults = RewardSettings().model_dump()["terms"]
    assert rows.keys() - {"kind"} == {term["kind"] for term in terms} | set(METHODS)
    for of_kind in (
        *terms,
        *(ADVANTAGE.validate_python({"kind": method}).model_dump() for method in METHODS),
    ):
        row = rows[of_kind["kind"]]
        for name in of_kind.keys() - {"kind"}:
            (told,) = re.findall(rf"`{name}` ([\d.e-]+\d|\d)", row)
            assert float(told) == of_kind[name]
    for term in terms:
        assert ("| yes |" in rows[term["kind"]]) == (term in list(defaults))


def test_rewards_need_no_tensor_library() -> None:
    code = "import sys, vrthinker.reward.scoring; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout.lower()) is False
