"""Tiny random checkpoints of the real model classes, for tests and for trying the machinery.

`make_tiny` writes a folder that every loader accepts as a Qwen2.5-VL or Qwen3-VL checkpoint. The classes, the
file names, the special tokens and the chat template are those of the family. Only the sizes are small: about
1 M parameters, built in seconds without a download. Such a model writes random text.

Invariants: equal arguments write a byte-equal `model.safetensors` and `tokenizer.json` under one version of
the libraries. The tokenizer is lossless: any text without lone surrogates encodes and decodes to itself.
Every id below the vocabulary size is a token, so whatever is sampled can be decoded. The parts of the vision
tower that are easily switched off by accident do run (Qwen2.5-VL: a window-attention block before the full
one; Qwen3-VL: deepstack maps from blocks that exist).

Departures from the real checkpoints: the tokenizer applies no NFC normalisation (real Qwen tokenizers do,
which makes them lossy for some texts), and Qwen3-VL's smallest picture is 64 by 64 instead of 256 by 256.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Literal, get_args

from vrthinker.engine.hf.tiny_corpus import tiny_corpus
from vrthinker.errors import InputError, unwritable

TinyFamily = Literal["qwen2.5-vl", "qwen3-vl"]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""In the order of Qwen's ids. As in Qwen's tokenizer, they follow the learned vocabulary."""

_LEARNED_VOCABULARY = 760
_CONTEXT_TOKENS = 32768
_VISION_HIDDEN = 64

# Qwen's split: letters with their leading mark, single digits, punctuation, line ends, blanks.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The loop over the content is inline: servers search the template for it to learn that content may be a list.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' or part.type == 'image_url' or 'image' in part %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny(
    out: Path, family: TinyFamily, seed: int = 0, layers: int = 3, initializer_range: float = 0.06
) -> Path:
    """Writes a tiny random checkpoint folder, whole or not at all.

    Args:
        out: The folder to make; it may exist if it is empty. Missing parents are made.
        family: The model family, which decides the model classes.
        seed: The seed of the random weights. Torch's own generators are not changed.
        layers: The number of text layers, at least 1. Below 3, some of Qwen3-VL's deepstack maps have no
            effect on the text: map i is added after layer i, at the pictures' positions, and only a later
            layer reads it.
        initializer_range: The standard deviation of the weights. With 0.02, the classes' default, so small a
            model gives nearly flat logits, and rounding decides which token wins.

    Returns:
        `out`.

    Raises:
        InputError: The family is unknown, `out` is a file or a folder with something in it, or a number
            is out of range.
    """
    out = Path(out)
    if family not in get_args(TinyFamily):
        raise InputError(f"family: got {family!r}, allowed: {' or '.join(get_args(TinyFamily))}")
    if layers < 1:
        raise InputError(f"layers: got {layers}, allowed: at least 1")
    if not 0.0 < initializer_range < float("inf"):
        raise InputError(f"initializer_range: got {initializer_range}, allowed: above 0")
    target = Path(os.path.abspath(out))
    _refuse_occupied(target)
    scratch = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise unwritable(out, error, "name another", failed="the folder cannot be made") from error
    try:
        _write(scratch, family, seed, layers, initializer_range)
        try:
            os.rename(scratch, target)
        except OSError:
            _refuse_occupied(target)  # another process may have filled it meanwhile
            raise
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return out


def _refuse_occupied(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()):
            raise InputError(f"{out}: the folder is not empty; name a new one, or empty it first")
        if out == Path.cwd():  # after the rename, the process would be in a folder that no longer exists
            raise InputError(f"{out}: this is the current folder; name a new one")
    elif out.exists() or out.is_symlink():
        raise InputError(f"{out}: a file is there already; name a new folder")


def _write(folder: Path, family: TinyFamily, seed: int, layers: int, initializer_range: float) -> None:
    import torch
    import transformers

    library: Any = transformers  # parts of transformers are untyped
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    ids: dict[str, int] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    make = _qwen2_5_vl if family == "qwen2.5-vl" else _qwen3_vl
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = make(len(tokenizer), ids, layers, initializer_range)
    model = model.to(torch.float32).eval()
    model.generation_config = library.GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False
    )
    bars = library.utils.logging.is_progress_bar_enabled()
    library.utils.logging.disable_progress_bar()  # it would say "Writing model shards", for 4 MB
    try:
        model.save_pretrained(folder)
        # transformers makes the weights readable by their owner alone, but checkpoints are meant to be
        # shared.
        (folder / "model.safetensors").chmod(0o644)
    finally:
        if bars:
            library.utils.logging.enable_progress_bar()
    text = json.dumps(_preprocessor(family), indent=2)
    (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def _tokenizer() -> Any:
    """A byte-level BPE tokenizer of the tiny corpus. All 256 bytes are tokens, so no text is unknown."""
    import transformers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        tiny_corpus(),
        trainers.BpeTrainer(
            vocab_size=_LEARNED_VOCABULARY,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    wrapper: Any = transformers.PreTrainedTokenizerFast
    return wrapper(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=_CONTEXT_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def _text(vocabulary: int, ids: dict[str, int], layers: int, initializer_range: float) -> dict[str, Any]:
    """The settings that both text towers share: 4 heads of size 32, and so 16 rotary frequencies."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": _CONTEXT_TOKENS,
        "initializer_range": initializer_range,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "bos_token_id": None,
    }


def _markers(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def _qwen2_5_vl(vocabulary: int, ids: dict[str, int], layers: int, initializer_range: float) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = _text(vocabulary, ids, layers, initializer_range)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    vision = {
        "depth": 2,
        "hidden_size": _VISION_HIDDEN,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "out_hidden_size": text["hidden_size"],
        "initializer_range": initializer_range,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_markers(ids))
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(vocabulary: int, ids: dict[str, int], layers: int, initializer_range: float) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = _text(vocabulary, ids, layers, initializer_range)
    text["head_dim"] = 32
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }
    vision = {
        "depth": 3,
        "hidden_size": _VISION_HIDDEN,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 576,
        # The default (8, 16, 24) lies beyond this tower's blocks, so that no map would be made. A map needs a
        # text layer to be added after, so there are no more maps than text layers.
        "deepstack_visual_indexes": [0, 1][:layers],
        "out_hidden_size": text["hidden_size"],
        "initializer_range": initializer_range,
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_markers(ids))
    return Qwen3VLForConditionalGeneration(config)


def _preprocessor(family: TinyFamily) -> dict[str, Any]:
    """The family's image preprocessor settings, under the class name that needs no torchvision."""
    shared = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "merge_size": 2,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "temporal_patch_size": 2,
    }
    if family == "qwen2.5-vl":
        return shared | {
            "processor_class": "Qwen2_5_VLProcessor",
            "patch_size": 14,
            "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
    return shared | {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": 16,
        "size": {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 16384},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
