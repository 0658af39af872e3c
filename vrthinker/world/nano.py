"""The nano judge before training: a Qwen2.5-VL model of about 1 M parameters, and its tokenizer.

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
_OWN_SHARE = 0.5
"""The share of a number's initial embedding that no other number has a part in."""
_COPYING = 0.9
"""How close the initial output projections are to the transposed value projections."""


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
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
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
        _spell_numbers(model, tokenizer)
        _begin_by_copying(model)
    model.generation_config = GenerationConfig(
        eos_token_id=known["<|im_end|>"], pad_token_id=known["<|endoftext|>"], do_sample=False
    )
    return model


def _spell_numbers(model: Any, tokenizer: Any) -> None:
    """Starts the embedding of every number as the sum of its digits' embeddings.

    Numbers are copied all the time, from a frame's label into the snapshot and from there into the thinking.
    What is learned about one number then helps with all others that share a digit.
    """
    import torch

    table = model.get_input_embeddings().weight
    digits = torch.randn(3, 10, table.shape[1]) * _DEVIATION / 3**0.5
    for number in range(_NUMBERS):
        row = table[tokenizer.convert_tokens_to_ids(str(number))]
        row.mul_(_OWN_SHARE).add_(digits[0, number // 100] + digits[1, number // 10 % 10])
        row.add_(digits[2, number % 10])


def _begin_by_copying(model: Any) -> None:
    """Starts every attention layer so that it adds what it attends to, as seen through its values.

    The output projection is nearly the transpose of the value projection. Attention to a token then makes the
    same token likelier from the first step on, and what to attend to can be learned before anything else.
    (Mimetic initialization, Trockman and Kolter 2023, has the same product in other proportions.)
    """
    import torch

    config = model.config.text_config
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.language_model.layers:
        values = layer.self_attn.v_proj.weight.unflatten(0, (config.num_key_value_heads, -1))
        copied = values.repeat_interleave(groups, dim=0).flatten(0, 1).T
        torch.lerp(layer.self_attn.o_proj.weight, copied, _COPYING, out=layer.self_attn.o_proj.weight)
