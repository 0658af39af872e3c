"""The policy in training: adapters, precision, recomputed layers, exports, and the recipes that say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_worker import write_base
from safetensors.torch import load_file, save_file

from vrthinker.engine.hf.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from vrthinker.engine.hf.checkpoint import weights_fingerprint
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.errors import InputError
from vrthinker.judge import Judge
from vrthinker.train.cold_start import cold_start_settings
from vrthinker.train.model import LoraSettings, PolicySettings, TrainedPolicy, export, load_policy
from vrthinker.train.settings import load_recipe
from vrthinker.world.nano import nano_settings, nano_templates

IDS = torch.arange(20, 44)[None]


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "nano", "nano")


def logits(policy: VisionLanguageModel) -> torch.Tensor:
    with torch.no_grad():
        positions = torch.arange(IDS.shape[1]).expand(3, 1, -1)
        hidden = policy.model.model.language_model(
            input_ids=IDS, position_ids=positions, use_cache=False
        ).last_hidden_state
        found: torch.Tensor = policy.model.lm_head(hidden)
    return found


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> VisionLanguageModel:
    return VisionLanguageModel(folder, device=torch.device("cpu"), dtype=dtype)


def written(trained: TrainedPolicy, base: Path, target: Path) -> Path:
    return export(trained, base, target, nano_settings(), nano_templates())


def adapted(nano: Path, **lora: Any) -> TrainedPolicy:
    """Adapters that change the model, as trained ones do."""
    pytest.importorskip("peft")
    settings = PolicySettings(lora=LoraSettings(rank=3, alpha=6.0, **lora), train_vision=False)
    trained = load_policy(nano, settings, seed=1)
    for name, parameter in trained.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return trained


def test_only_adapters_are_trained_and_both_exports_judge_alike(nano: Path, tmp_path: Path) -> None:
    trained = adapted(nano)
    names = [name for name, parameter in trained.model.named_parameters() if parameter.requires_grad]
    assert len(names) == 4 * 7 * 2, "four layers, seven linear layers each, two matrices"
    assert all(".language_model.layers." in name and ".lora_" in name for name in names)
    wanted = logits(trained.policy)
    assert not torch.allclose(wanted, logits(loaded(nano)), atol=1e-3)
    merged = written(trained, nano, tmp_path / "merged")
    torch.testing.assert_close(logits(loaded(merged)), wanted, atol=1e-4, rtol=1e-4)
    assert load_file(merged / "model.safetensors").keys() == load_file(nano / "model.safetensors").keys()

    folder = written(adapted(nano, export="adapter"), nano, tmp_path / "adapter")
    assert [path.name for path in folder.glob("*.safetensors")] == [ADAPTER_WEIGHTS]
    torch.testing.assert_close(logits(loaded(folder)), logits(loaded(merged)), atol=1e-5, rtol=1e-5)
    with Judge.from_pretrained(folder) as judge:
        assert judge.settings.resize == nano_settings().resize
    moved = shutil.copytree(nano, tmp_path / "base")
    change_config(folder, base_model_name_or_path=str(moved))
    before = weights_fingerprint(folder)
    weights = load_file(moved / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, moved / "model.safetensors")
    assert weights_fingerprint(folder) != before, "another base is another judge"


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, **values}))


def change_tensor(folder: Path, ending: str, change: Any) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    changed = change(name, tensors.pop(name))
    save_file({**tensors, **changed}, folder / ADAPTER_WEIGHTS)


def test_adapters_that_do_not_fit_are_refused(nano: Path, tmp_path: Path) -> None:
    good = written(adapted(nano, export="adapter"), nano, tmp_path / "good")
    cases: list[tuple[Any, str]] = [
        (lambda f: change_config(f, peft_type="LOHA"), "peft_type: got 'LOHA', allowed: LORA"),
        (lambda f: change_config(f, use_dora=True), "use_dora: got True"),
        (lambda f: change_config(f, rank_pattern={"q_proj": 9}), "rank_pattern: got"),
        (lambda f: change_config(f, r=1 << 40), "r: got 1099511627776, allowed: a whole number"),
        (lambda f: change_config(f, r=True), "r: got True"),
        (lambda f: change_config(f, r=4), "wanted floats"),
        (lambda f: change_config(f, lora_alpha="x"), "lora_alpha: got 'x'"),
        (lambda f: change_config(f, base_model_name_or_path=7), "base_model_name_or_path: got 7"),
        (
            lambda f: change_config(f, base_model_name_or_path="/gone"),
            "base_model_name_or_path: /gone: not a checkpoint folder",
        ),
        (lambda f: change_config(f, base_model_name_or_path=str(f)), "an adapter too"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("[1]"), "got no JSON object"),
        (lambda f: (f / ADAPTER_WEIGHTS).rename(f / "adapter_model.bin"), "no .*safetensors"),
        (
            lambda f: change_tensor(f, "lora_A.weight", lambda name, t: {name.replace("_A", "_C"): t}),
            "allowed: base_model.model.LAYER.lora_A.weight",
        ),
        (
            lambda f: change_tensor(f, "lora_A.weight", lambda name, t: {name.replace("layers", "lair"): t}),
            "the base has no such linear layer",
        ),
        (lambda f: change_tensor(f, "lora_B.weight", lambda name, t: {}), "lora_B.weight: missing"),
        (
            lambda f: change_tensor(f, "lora_B.weight", lambda name, t: {name: t.T.contiguous()}),
            "wanted floats",
        ),
        (lambda f: change_tensor(f, "lora_B.weight", lambda name, t: {name: t.int()}), "wanted floats"),
        (lambda f: change_tensor(f, "lora_A.weight", lambda name, t: {name: t / 0}), "are not finite"),
        (lambda f: change_config(f, init_lora_weights="pissa_niter_4"), "init_lora_weights: got 'pissa_nit"),
        (lambda f: change_config(f, alora_invocation_tokens=[1]), "alora_invocation_tokens: got"),
    ]
    for number, (damage, message) in enumerate(cases):
        folder = shutil.copytree(good, tmp_path / str(number))
        damage(folder)
        with pytest.raises(InputError, match=message) as caught:
            loaded(folder)
        assert "\n" not in str(caught.value)


def test_an_adapter_of_a_tied_head_is_refused(tmp_path: Path) -> None:
    """Merging it would change the embedding too, which the adapter says nothing about."""
    tied = write_base(tmp_path / "tied", "nano")
    folder = written(adapted(tied, export="adapter"), tied, tmp_path / "adapter")
    base = loaded(tied)
    assert base.model.lm_head.weight is base.model.model.language_model.embed_tokens.weight
    width, height = base.hidden_size, base.vocabulary_size
    head = {"lora_A": torch.ones(3, width), "lora_B": torch.ones(height, 3)}
    save_file({f"base_model.model.lm_head.{k}.weight": v for k, v in head.items()}, folder / ADAPTER_WEIGHTS)
    with pytest.raises(InputError, match="lm_head: the base ties this weight"):
        loaded(folder)


def test_bfloat16_trains_float32_weights_and_exports_bfloat16(nano: Path, tmp_path: Path) -> None:
    trained = load_policy(nano, PolicySettings(precision="bfloat16"))
    head = trained.model.lm_head
    products: list[torch.dtype] = []
    head.register_forward_hook(lambda module, given, output: products.append(output.dtype))
    hidden = torch.randn(3, head.in_features)
    trained.forward(head, hidden).float().sum().backward()
    assert products == [torch.bfloat16]
    assert head.weight.dtype == head.weight.grad.dtype == torch.float32
    folder = written(trained, nano, tmp_path / "model")
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded(folder, torch.bfloat16).model.dtype == torch.bfloat16


@pytest.mark.parametrize("recomputed", [False, True])
def test_layers_are_computed_again_only_if_asked(nano: Path, recomputed: bool) -> None:
    trained = load_policy(nano, PolicySettings(gradient_checkpointing=recomputed))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    trained.model.model.language_model.layers[1].mlp.register_forward_pre_hook(count)
    embeds = torch.randn(1, 6, trained.policy.hidden_size)
    positions = torch.arange(6).expand(3, 1, -1)
    output = trained.model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    output.last_hidden_state.sum().backward()
    assert calls == (2 if recomputed else 1)


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "qwen3-vl"])
@pytest.mark.slow
def test_an_export_spells_its_rotary_base_for_transformers_4_too(kind: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", kind)
    trained = load_policy(base, PolicySettings())
    given = trained.model.config.text_config.rope_parameters
    folder = written(trained, base, tmp_path / "model")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert text["rope_parameters"] == dict(given)
    assert text["rope_theta"] == given["rope_theta"]
    assert text["rope_scaling"]["mrope_section"] == given["mrope_section"]
    assert text["rope_scaling"]["rope_type"] == text["rope_scaling"]["type"] == "default"
    again = loaded(folder)
    assert dict(again.model.config.text_config.rope_parameters) == dict(given) | {
        key: value for key, value in again.model.config.text_config.rope_parameters.items() if key == "type"
    }
    torch.testing.assert_close(logits(again), logits(trained.policy), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen2.5-vl-7b-32"])
def test_recipes_for_real_checkpoints_are_the_papers(name: str) -> None:
    settings = cold_start_settings(load_recipe(name))
    (phase,) = settings.phases
    assert (phase.batch_size, phase.micro_batch_size) == (32, 1)
    assert phase.learning_rate.warmup_ratio == 0.2
    assert settings.precision == "bfloat16"
    if settings.lora is None:
        assert phase.learning_rate.peak == 1.5e-6


@pytest.mark.parametrize(
    "values",
    [{"precision": "float16"}, {"lora": {"rank": 0}}, {"lora": {"targets": []}}, {"lora": {"ranks": 4}}],
)
def test_settings_that_are_none(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cold start: "):
        cold_start_settings({**load_recipe("qwen2.5-vl-3b"), **values})


def test_targets_that_are_none(nano: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(InputError, match=r"lora.targets: got c_attn, allowed: some of down_proj, gate_proj"):
        load_policy(nano, PolicySettings(lora=LoraSettings(targets=("c_attn",))))
