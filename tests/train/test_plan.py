"""Plans of runs against what torch really keeps, counts and computes on small models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import numpy as np
import pytest
import torch
from cli_run import vrthinker
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from vrthinker.engine.hf.checkpoint import NANO_FOLDER
from vrthinker.engine.hf.patch_embed import use_patch_product
from vrthinker.engine.hf.vision_attention import use_batched_attention
from vrthinker.errors import InputError
from vrthinker.policy.prefix_tree import PrefixTree, Stretch
from vrthinker.train.loop.optimizer import AdamWSettings, MuonSettings, make_optimizer
from vrthinker.train.plan.memory import (
    Load,
    Training,
    memory_bytes,
    step_flops,
    text_forward_flops,
    text_layer_bytes,
    vision_forward_flops,
    vision_layer_bytes,
)
from vrthinker.train.plan.plan import A100_TFLOPS, GIB, Assumptions, plan_recipe
from vrthinker.train.plan.sizes import count, known_models, sizes_of
from vrthinker.train.settings import RECIPES, load_recipe

TOKENS, FRAMES, GRID = 640, 3, (8, 12)
PATCHES = GRID[0] * GRID[1]


def build(layers: int = 3) -> Any:
    """A small model whose sizes are all different, so that no two can be mistaken for each other."""
    text = {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 704,
        "vocab_size": 300,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": layers,
        "hidden_size": 160,
        "intermediate_size": 432,
        "num_heads": 4,
        "out_hidden_size": 256,
        "fullatt_block_indexes": [layers - 1],
        "window_size": 112,
    }
    config = AutoConfig.for_model(
        "qwen2_5_vl", tie_word_embeddings=False, text_config=text, vision_config=vision
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").train()
    use_batched_attention(model.model.visual)
    use_patch_product(model.model.visual)
    return model


def text_of(model: Any) -> torch.Tensor:
    ids = torch.arange(TOKENS)[None] % 300
    positions = torch.arange(TOKENS).expand(3, 1, TOKENS)
    inner = model.model.language_model
    hidden: torch.Tensor = inner(
        inputs_embeds=inner.embed_tokens(ids), position_ids=positions, attention_mask=None, use_cache=False
    ).last_hidden_state
    return hidden


def vision_of(model: Any) -> torch.Tensor:
    patches = torch.zeros(FRAMES * PATCHES, 1176, dtype=model.dtype)
    grid = torch.tensor([[1, *GRID]] * FRAMES)
    features: torch.Tensor = model.model.visual(patches, grid_thw=grid).pooler_output
    return features


def kept_bytes(model: Any, forward: Callable[[Any], torch.Tensor], *, autocast: bool) -> int:
    """What autograd keeps of a forward besides the parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or its address could be given to another one
        return tensor

    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False)
    with saved_tensors_hooks(keep, lambda tensor: tensor), half:
        forward(model)
    return sum(kept.values())


def of_a_layer(forward: Callable[[Any], torch.Tensor], count: int, *, half: str | None = None) -> float:
    """What one layer keeps per token: the difference between a model of four layers and one of two."""
    models = [build(2), build(4)]
    if half == "weights":
        models = [model.bfloat16() for model in models]
    two, four = (kept_bytes(model, forward, autocast=half is not None) for model in models)
    return (four - two) / 2 / count


# What is counted


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen2.5-vl-3b", 3_754_622_976), ("qwen2.5-vl-7b", 8_292_166_656), ("qwen2.5-vl-72b", 73_406_351_360)],
)
def test_known_models_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    """A published checkpoint's `total_size` is two bytes for each of them."""
    assert set(known_models()) == {"qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen2.5-vl-72b"}
    sizes = sizes_of(name)
    assert sizes.parameters == parameters
    assert sizes.tied == (name == "qwen2.5-vl-3b")
    assert sizes.text.linear < sizes.text.parameters < sizes.parameters - sizes.vision_parameters
    hub = f"Qwen/{name.replace('qwen2.5-vl', 'Qwen2.5-VL').replace('b', 'B')}-Instruct"
    assert sizes_of(hub) == sizes


@pytest.mark.parametrize("train_vision", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_take_the_bytes_that_torch_holds(
    kind: str, train_vision: bool
) -> None:
    model = build()
    if not train_vision:
        model.model.visual.requires_grad_(False)
    optimizer = make_optimizer(model, MuonSettings() if kind == "muon" else AdamWSettings())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()  # Muon lets go of gradients as it uses them
    state = sum(
        value.nbytes
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    )
    training = Training(train_vision=train_vision, orthogonal=kind == "muon")
    planned = memory_bytes(count(model), training, Load(1, TOKENS, FRAMES, PATCHES, 10, 1))
    assert [*planned.values()][:3] == [weights, gradients, state]
    four = memory_bytes(
        count(model), Training(gpus=4, train_vision=train_vision), Load(1, TOKENS, FRAMES, PATCHES, 10, 1)
    )
    assert four["weights, float32"] == -(-weights // 4)


def test_a_layer_keeps_what_autograd_keeps() -> None:
    """To the byte, for float32, autocast, and weights in bfloat16 as FSDP gathers them."""
    sizes = count(build())
    patches = FRAMES * PATCHES
    assert of_a_layer(text_of, TOKENS) == text_layer_bytes(sizes.text, "float32")
    assert of_a_layer(vision_of, patches) == vision_layer_bytes(sizes.vision, "float32")
    assert of_a_layer(text_of, TOKENS, half="weights") == text_layer_bytes(sizes.text, "bfloat16")
    assert of_a_layer(vision_of, patches, half="weights") == vision_layer_bytes(sizes.vision, "bfloat16")
    # Under autocast, a layer also keeps its weights in bfloat16.
    linear = 2 * sizes.text.linear / sizes.text.layers / TOKENS
    assert of_a_layer(text_of, TOKENS, half="autocast") == pytest.approx(
        text_layer_bytes(sizes.text, "autocast") + linear
    )
    linear = 2 * sizes.vision.linear / sizes.vision.layers / patches
    assert of_a_layer(vision_of, patches, half="autocast") == pytest.approx(
        vision_layer_bytes(sizes.vision, "autocast") + linear
    )


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_forward_are_planned_within_five_percent(
    bfloat16: bool, checkpointing: bool
) -> None:
    model = build()
    sizes = count(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kept = sum(kept_bytes(model, forward, autocast=bfloat16) for forward in (text_of, vision_of))
    training = Training(bfloat16=bfloat16, checkpointing=checkpointing)
    planned = memory_bytes(sizes, training, Load(1, TOKENS, FRAMES, PATCHES, 10, 1))
    total = planned["activations of the text layers"] + planned["activations of the vision tower"]
    if checkpointing:  # what the layer at work needs in the backward pass is not kept by the forward
        total -= TOKENS * text_layer_bytes(sizes.text, training.arithmetic)
        total -= FRAMES * PATCHES * vision_layer_bytes(sizes.vision, training.arithmetic)
        total += 2 * sizes.merger if bfloat16 else 0
    elif bfloat16:
        total += planned["working copies of weights"]
    assert total == pytest.approx(kept, rel=0.05)


def test_flops_of_linear_layers_are_those_that_torch_counts() -> None:
    """torch counts no attention on a CPU, so that ours is taken out; it is tested by its definition below."""
    model = build()
    sizes = count(model)

    def counted(forward: Callable[[Any], torch.Tensor], *, backward: bool = False) -> int:
        with FlopCounterMode(display=False) as counter:
            result = forward(model)
            if backward:
                result.float().sum().backward()
        return int(sum(counter.get_flop_counts()["Global"].values()))

    attention = 2 * sizes.text.layers * sizes.text.query * TOKENS * (TOKENS + 1)
    assert counted(text_of) == text_forward_flops(sizes, TOKENS) - attention
    windowed = 2 * 64 + PATCHES  # two layers attend in windows of 8 x 8 patches, one to the whole frame
    seen = 4 * sizes.vision.hidden * windowed * PATCHES * FRAMES
    assert counted(vision_of) == vision_forward_flops(sizes, FRAMES, PATCHES) - seen
    assert counted(text_of, backward=True) == 3 * (text_forward_flops(sizes, TOKENS) - attention)
    load = Load(2, TOKENS, FRAMES, PATCHES, 10, 5)
    forward = text_forward_flops(sizes, TOKENS) + vision_forward_flops(sizes, FRAMES, PATCHES)
    head = 4 * 2 * 10 * sizes.text.hidden * sizes.vocabulary
    assert step_flops(sizes, Training(), load) == 5 * 2 * (3 * forward + head)
    assert step_flops(sizes, Training(checkpointing=True), load) == 5 * 2 * (4 * forward + head)


# Recipes


def test_a_sequence_is_as_long_as_what_is_visible() -> None:
    """Method section 3: about (first + window * retrieved) frames, however many rounds there are."""
    usual = Assumptions()
    assert (usual.live_frames, usual.sequence_tokens) == (16, 600 + 16 * 512 + 2 * 400)
    assert Assumptions(rounds=5).live_frames == 16
    assert Assumptions(rounds=5, window=2).live_frames == 24
    assert Assumptions(rounds=5, window=None).live_frames == 40
    assert Assumptions(rounds=5, window=0).live_frames == 8
    assert Assumptions(rounds=1).sequence_tokens == 600 + 8 * 512 + 400
    assert Assumptions(context=1000).sequence_tokens == 1000


@pytest.mark.parametrize("window", [0, 1, 2, 3, None])
@pytest.mark.parametrize("rounds", [1, 2, 3, 6])
def test_a_pack_has_as_many_tokens_as_the_prefix_tree_of_its_contexts(
    window: int | None, rounds: int
) -> None:
    assumed = Assumptions(
        window=window, rounds=rounds, retrieved_frames=3, frame_tokens=10, round_tokens=7, text_tokens=50
    )
    first, shown = 50 + 8 * 10, 3 * 10
    tree = PrefixTree()
    for number in range(1, rounds + 1):
        context, start = [], 0
        pieces = [(0, first)]
        for earlier in range(1, number):
            is_live = window is None or earlier >= number - window
            pieces += [(1000 * earlier, 7), *([(1000 * earlier + 500, shown)] if is_live else [])]
        for name, length in [*pieces, (1000 * number, 7)]:
            context.append(Stretch(np.arange(name, name + length), start))
            start += length
        tree.add(context)
    assert assumed.trace_tokens == sum(len(node.stretch) for node in tree.nodes())
    assert assumed.trace_frames == 8 + (rounds - 1) * 3


def test_a_pack_is_split_but_no_context_is() -> None:
    phase = {"steps": 10, "batch_size": 4}
    assumed = Assumptions(rounds=8)
    (whole,) = plan_recipe({"phases": [phase]}, assumed, model="qwen2.5-vl-7b")
    assert whole.load.tokens == assumed.trace_tokens > 3 * assumed.sequence_tokens
    for limit in (30_000, 2000):
        split = {"phases": [{**phase, "max_pack_tokens": limit}]}
        (plan,) = plan_recipe(split, assumed, model="qwen2.5-vl-7b")
        parts = -(-assumed.trace_tokens // limit)
        assert plan.load.forwards == 4 * parts
        assert plan.load.tokens == max(-(-assumed.trace_tokens // parts), assumed.sequence_tokens)
        assert plan.load.learned == -(-whole.load.learned // parts)
    (padded,) = plan_recipe({"phases": [{**phase, "packed": False}]}, assumed, model="qwen2.5-vl-7b")
    assert padded.load.tokens == assumed.sequence_tokens


def test_a_recipe_is_planned_without_its_data() -> None:
    recipe = {"precision": "bfloat16", "phases": [{"steps": 10, "batch_size": 32, "traces": "anything"}]}
    (plan,) = plan_recipe(recipe, Assumptions(), model="qwen2.5-vl-7b")
    assert not plan.fits
    assert plan.total_bytes > 16 * plan.model.parameters
    assert plan.step_tokens == 32 * 9592
    assert plan.load.forwards == 32
    (way,) = plan.ways_to_fit()
    assert way.startswith("4 GPUs and gradient_checkpointing: true (")
    changed = {**recipe, "gradient_checkpointing": True}
    (four,) = plan_recipe(changed, Assumptions(gpus=4), model="qwen2.5-vl-7b")
    assert four.fits
    assert f"({four.total_bytes / GIB:.1f} GiB each)" in way, "the advice is what the plan says"
    assert four.load.forwards == 8
    assert four.step_tokens == plan.step_tokens
    assert four.step_seconds == pytest.approx(plan.step_seconds * four.flops / plan.flops / 4)
    (odd,) = plan_recipe(changed, Assumptions(gpus=3), model="qwen2.5-vl-7b")
    assert odd.load.forwards == 11, "32 sequences over 3 processes"
    (short,) = plan_recipe(changed, Assumptions(context=500), model="qwen2.5-vl-7b")
    assert short.load.learned == 500, "no more than there are tokens"
    lora = {**changed, "train_vision": False, "lora": {"rank": 8, "targets": ["q_proj", "o_proj"]}}
    (small,) = plan_recipe(lora, Assumptions(), model="qwen2.5-vl-7b")
    assert small.training.adapters == 28 * 2 * 8 * (3584 + 3584)
    assert small.fits


def test_a_phase_of_frames_costs_the_tower_alone_and_a_phase_may_freeze_it() -> None:
    world = {"pairs": 3}
    phases = [
        {"steps": 5, "batch_size": 4, "micro_batch_size": 4},
        {"steps": 5, "batch_size": 4, "micro_batch_size": 4, "freeze_vision": True},
        {"kind": "frames", "steps": 7, "clips_per_step": 6, "frames_per_clip": 5, "worlds": [world],
         "learning_rate": {"peak": 0.1}},
    ]  # fmt: skip
    assumptions = Assumptions(frame_tokens=4)
    both, text, vision = plan_recipe({"phases": phases}, assumptions, model="nano")
    sizes = both.model
    gradients = [plan.memory["gradients, float32"] // 4 for plan in (both, text, vision)]
    assert gradients == [
        sizes.parameters, sizes.parameters - sizes.vision_parameters, sizes.vision_parameters
    ]  # fmt: skip
    state = {plan.memory["optimizer state, float32"] for plan in (both, text, vision)}
    assert len(state) == 1, "it stays from phase to phase"
    forward = vision_forward_flops(sizes, 1, 16)
    assert both.flops - text.flops == 2 * 4 * both.load.frames * forward, "the backward pass of the tower"
    assert vision.flops == 3 * 30 * forward, "and nothing of the text"
    assert vision.memory["activations of the text layers"] == vision.memory["one chunk of logits"] == 0
    kept = "activations of the vision tower"
    assert vision.memory[kept] * 4 * both.load.frames == both.memory[kept] * 30
    assert text.memory[kept] < both.memory[kept] / 2
    assert (vision.phase, vision.steps, vision.step_tokens) == ("frames", 7, 30 * 4)
    (shared,) = plan_recipe({"phases": phases[2:]}, Assumptions(gpus=4), model="nano")
    assert shared.load.frames == 10, "the process with the most clips has two"
    with pytest.raises(InputError, match=r"recipe: phases\.0: frames_per_clip"):
        plan_recipe({"phases": [{**phases[2], "frames_per_clip": 0}]}, assumptions, model="nano")


def test_adapters_have_as_many_parameters_as_the_policys() -> None:
    pytest.importorskip("peft")
    from vrthinker.engine.hf.model import VisionLanguageModel
    from vrthinker.train.model import LoraSettings, PolicySettings, TrainedPolicy

    for train_vision in (False, True):
        settings = PolicySettings(lora=LoraSettings(rank=4), train_vision=train_vision)
        loaded = VisionLanguageModel(NANO_FOLDER, device=torch.device("cpu"), dtype=torch.float32)
        policy = TrainedPolicy(loaded, settings)
        real = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
        recipe = {**settings.model_dump(), "phases": [{}]}
        (plan,) = plan_recipe(recipe, Assumptions(), model="nano")
        assert plan.training.adapters == real


def test_every_recipe_of_the_package_can_be_planned() -> None:
    for path in RECIPES.glob("*.yaml"):
        plans = plan_recipe(load_recipe(path.stem), Assumptions())
        assert plans
        assert all(plan.as_json()["total_bytes"] > 0 for plan in plans), path.stem


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ({"phases": [{}]}, {}, "--model: missing"),
        ({"phases": [{}]}, {"model": "gpt-9"}, "model: got 'gpt-9', allowed: a checkpoint's folder, or qwen"),
        ({"phases": [3]}, {"model": "nano"}, "got no phase to plan"),
        ({}, {"model": "nano"}, "got no phase to plan"),
        ({"phases": []}, {"model": "nano"}, "got no phase to plan"),
        ({"phases": [{"batch_size": 0}]}, {"model": "nano"}, "recipe: phases.0: batch_size"),
        ({"phases": [{}], "precision": "int4"}, {"model": "nano"}, "recipe: precision"),
        ({"phases": [{}], "optimizer": {"kind": "sgd"}}, {"model": "nano"}, "recipe: optimizer"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    recipe: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as refused:
        plan_recipe(recipe, Assumptions(), **options)
    assert words in str(refused.value)


def test_another_family_is_refused(checkpoint_of: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="qwen3_vl, allowed for a plan: qwen2_5_vl"):
        sizes_of(str(checkpoint_of("qwen3-vl")))


@pytest.mark.parametrize(
    "changes",
    [{"gpus": 0}, {"rounds": 0}, {"utilisation": 0.0}, {"utilisation": 1.5}, {"context": 0}, {"window": -1}],
)
def test_impossible_assumptions_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(changes))}: got"):
        Assumptions(**changes)


def test_recipes_quote_what_the_plan_prints() -> None:
    """`# Planned for A100s …: 35.02 GiB on each GPU, 22.8 s a step`, and the command below it."""
    quoted = r"(\S+) GiB on each GPU, (\S+) s a step:\n#   vrthinker train plan (\S+) --gpus (\d+)\n"
    found = 0
    for path in RECIPES.glob("qwen*.yaml"):
        (line,) = re.findall(quoted, path.read_text())
        gib, seconds, name, gpus = line
        assert name == path.stem
        assumptions = Assumptions(gpus=int(gpus), gpu_tflops=A100_TFLOPS["bfloat16"])
        (plan,) = plan_recipe(load_recipe(name), assumptions)
        assert (gib, seconds) == (f"{plan.total_bytes / GIB:.2f}", f"{plan.step_seconds:.3g}"), path.name
        assert plan.fits
        found += 1
    assert found >= 3


def test_the_command_prints_a_plan(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: Qwen/Qwen2.5-VL-7B-Instruct\nprecision: bfloat16\nphases: [{steps: 37}]\n")
    done = vrthinker("train", "plan", recipe)
    assert done.code == 1, "it does not fit"
    assert "8,292,166,656 of them trained" in done.out
    assert "does not fit; it would with 4 GPUs and gradient_checkpointing: true (" in done.out
    options = ("--gpus", 8, "--set", "gradient_checkpointing=true")
    fits = vrthinker("train", "plan", recipe, *options)
    assert (fits.code, "\nfits: " in fits.out) == (0, True)
    assert "37 steps: " in fits.out
    (spelled,) = json.loads(vrthinker("train", "plan", recipe, *options, "--json").out)
    assert f"{spelled['total_bytes'] / GIB:8.2f} GiB" in fits.out
    assert f"{spelled['step_tokens']:,} tokens" in fits.out
    recipe.write_text(
        "model: nano\nphases: [{kind: frames, steps: 3, learning_rate: {peak: 1}, worlds: [{pairs: 2}]}]\n"
    )
    frames = vrthinker("train", "plan", recipe, "--frame-tokens", 4)
    assert (frames.code, "vision tower alone" in frames.out) == (0, True)
    assert "a step of one process: 128 frames of 4 tokens\na step: 512 tokens, " in frames.out
    for given, words in (
        (["nanno"], "recipe 'nanno'"),
        ([recipe, "--gpus", "0"], "gpus: got 0"),
        ([recipe, "--model", "x"], "model: got 'x'"),
        ([recipe, "--set", "precision=int4"], "recipe: precision"),
    ):
        refused = vrthinker("train", "plan", *given)
        assert (refused.code, refused.out) == (2, "")
        assert words in refused.last_line
