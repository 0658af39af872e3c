"""The nano judge before training: a Qwen2.5-VL model of about 1.2 M parameters, and its tokenizer.

The nano judge is made for the synthetic world and small enough to train on two CPU cores. Its tokenizer has
the world's phrases and the whole numbers up to 512 as single tokens, which are all frame numbers of the
presets. It spells everything else byte by byte, and longer numbers digit by digit, so that any text encodes
and decodes to itself. With single digits only, a model of this size took several times as long to learn which
frame a remark is about. With weights of the
class's default standard deviation, 0.02 instead of 0.06, it did not learn this at all (docs/log.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import PROMPTS_FOLDER, SETTINGS_FILE, EpisodeSettings, JudgeSettings
from vrthinker.video.resize import ResizeSettings
from vrthinker.world.words import PHRASES

NANO_PROMPTS = Path(__file__).parent / "nano_prompts"
NANO_NOTE = "nano judges the synthetic world only"
SIDE = 56
"""The judge sees frames at 56 x 56 pixels, which are 4 tokens."""
_CONTEXT_TOKENS = 8192
_NUMBERS = 513
"""Whole numbers below this are single tokens."""
_DEVIATION = 0.06
"""Standard deviation of initial weights."""
_SMALL = 0.1
"""What output projections begin with, as a share of the transposed value projections."""
_LOOKING, _MATCHING = 5.0, 2.2
"""The size of the biases and of the weights by which heads begin to find what they copy."""
_VALUES, _SLOT, _COPY = 0.3, 0.4, 0.8
"""The weights by which those heads read and write. What they write is about as long as an embedding (`_SLOT`)
or twice as long (`_COPY`)."""
_PROMPT_TOKENS = 400
"""About the distance over which they have to find something."""


def nano_settings() -> JudgeSettings:
    """The settings of the nano judge's episodes."""
    return JudgeSettings(
        resize=ResizeSettings(patch_size=14, merge_size=2, min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE),
        episode=EpisodeSettings(max_rounds=8, max_round_tokens=256),
    )


def nano_templates() -> PromptTemplates:
    """The nano judge's prompts."""
    return PromptTemplates.load(NANO_PROMPTS)


def write_nano(folder: Path, *, seed: int) -> Path:
    """Writes an untrained nano judge as a checkpoint folder.

    Args:
        folder: The folder to write, which is made if it is missing.
        seed: The seed of the random weights. Torch's own generators are not changed.

    Returns:
        `folder`.
    """
    import torch
    import transformers

    library: Any = transformers
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(tokenizer)
    bars = library.utils.logging.is_progress_bar_enabled()
    library.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
    finally:
        if bars:
            library.utils.logging.enable_progress_bar()
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "merge_size": 2,
        "patch_size": 14,
        "processor_class": "Qwen2_5_VLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
        "temporal_patch_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n", "utf-8")
    write_judge_settings(folder, nano_settings(), nano_templates())
    return folder


def write_judge_settings(folder: Path, settings: JudgeSettings, templates: PromptTemplates) -> None:
    """Writes the settings and prompts that a checkpoint folder is to be used with."""
    templates.save(folder / PROMPTS_FOLDER)
    (folder / SETTINGS_FILE).write_text(settings.model_dump_json(indent=2) + "\n", "utf-8")


def _tokenizer() -> Any:
    """A tokenizer of bytes and the world's phrases."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from vrthinker.engine.hf.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    known = set(alphabet)
    core.add_tokens([AddedToken(p, special=False, normalized=False) for p in PHRASES if p not in known])
    # Only whole numbers are tokens: the 27 in 278 stays two digits.
    numbers = [
        AddedToken(str(n), special=False, normalized=False, single_word=True) for n in range(10, _NUMBERS)
    ]
    core.add_tokens(numbers)
    wrapper: Any = transformers.PreTrainedTokenizerFast
    return wrapper(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=_CONTEXT_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def _model(tokenizer: Any) -> Any:
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    known = tokenizer.get_vocab()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": _CONTEXT_TOKENS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "initializer_range": _DEVIATION,
        "eos_token_id": known["<|im_end|>"],
        "pad_token_id": known["<|endoftext|>"],
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": SIDE,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 128,
        "initializer_range": _DEVIATION,
    }
    config: Any = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=known["<|image_pad|>"],
        video_token_id=known["<|video_pad|>"],
        vision_start_token_id=known["<|vision_start|>"],
        vision_end_token_id=known["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    config.initializer_range = _DEVIATION
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    model = model.to(torch.float32).eval()
    with torch.no_grad():
        _begin_by_copying(model)
    model.generation_config = GenerationConfig(
        eos_token_id=known["<|im_end|>"], pad_token_id=known["<|endoftext|>"], do_sample=False
    )
    return model


def _begin_by_copying(model: Any) -> None:
    """Starts a model so that it copies what stands behind an earlier mention, before it has learned anything.

    Most of what the judge writes stands in its context already: the list of gaps, the frame numbers of a gap,
    the counts of the round before. From usual weights, finding and copying took most of the training. Here
    the first two layers begin with what training makes of them in models that copy (induction heads, Olsson
    et al. 2022); every weight of it is trained like all others.

    - Layers add little at first: an output projection is a tenth of the transposed value projection (mimetic
      initialization, Trockman and Kolter 2023, has the same product), and the MLPs add nothing.
    - Layer 0: heads 0 and 1 look at the token before and at the one before that, and write what they see into
      subspaces of their own (`_look_back`).
    - Layer 1: head 0 looks for a place where the same token stands two before, as one before here (behind
      `43, ` it finds the 48 of `43, 48`). Head 1 looks for a place where the token before is this token.
      Both copy the token that they find.
    """
    import torch

    text = model.model.language_model
    heads = text.config.num_attention_heads
    size = text.config.hidden_size // heads
    for layer in text.layers:
        layer.self_attn.o_proj.weight.copy_(_SMALL * layer.self_attn.v_proj.weight.T)
        layer.mlp.down_proj.weight.zero_()
    look, match = (layer.self_attn for layer in text.layers[:2])
    token = torch.linalg.qr(torch.randn(text.config.hidden_size, size))[0].T
    slots = torch.linalg.qr(torch.randn(text.config.hidden_size, 2 * size))[0].T.split(size)
    rates = text.rotary_emb.inv_freq
    for head, slot in enumerate(slots):
        rows = slice(head * size, (head + 1) * size)
        _look_back(look, rows, rates, distance=head + 1)
        look.v_proj.weight[rows] = token * _VALUES
        look.o_proj.weight[:, rows] = slot.T * _SLOT
    # Only those parts of queries and keys are used that turn little over a prompt's length.
    slow = (rates * _PROMPT_TOKENS < 2.0).repeat(2)[:, None]
    for head, (here, there) in enumerate(((slots[0], slots[1]), (token, slots[0]))):
        rows = slice(head * size, (head + 1) * size)
        match.q_proj.weight[rows] = here * slow * _MATCHING
        match.k_proj.weight[rows] = there * slow * _MATCHING
        copied = torch.linalg.qr(torch.randn(text.config.hidden_size, size))[0].T
        match.v_proj.weight[rows] = copied * _VALUES
        match.o_proj.weight[:, rows] = copied.T * _COPY


def _look_back(attention: Any, rows: slice, rates: Any, *, distance: int) -> None:
    """Makes a head look `distance` positions back, whatever the tokens are, by the biases of its projections.

    Rotary positions turn the key by its distance more than the query. A key's bias that is turned back by
    `distance` matches the query's best there.
    """
    import torch

    attention.q_proj.weight[rows] = 0.0
    attention.k_proj.weight[rows] = 0.0
    attention.q_proj.bias[rows] = _LOOKING * torch.cat([torch.ones_like(rates), torch.zeros_like(rates)])
    attention.k_proj.bias[rows] = _LOOKING * torch.cat([(rates * distance).cos(), (rates * distance).sin()])
