"""Finding a checkpoint's folder, and checking what is in it before anything of it is loaded.

A checkpoint comes from anywhere. Its configuration decides how large a model is built and how long an encode
takes, and its tokenizer is a small program of its own. For that reason the files are checked first, with
limits (docs/limits.md): no code, no weights in another format or from elsewhere, no model that is larger than
its weights, and no tokenizer that could make text grow or take for ever. Anything else that is wrong with a
checkpoint ends in one line while it is loaded (`model.py`).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vrthinker.bounded_files import read_json
from vrthinker.engine.hf.adapters import ADAPTER_CONFIG, read_adapter
from vrthinker.errors import InputError, one_line
from vrthinker.limits import MAX_CHECKPOINT_LAYERS, MAX_CHECKPOINT_WIDTH, MAX_TOKENIZER_BYTES, Limit

FAMILIES = {"qwen2_5_vl": "qwen2.5-vl", "qwen3_vl": "qwen3-vl"}
NANO = "nano"
"""The name of the judge that ships with the package."""
NANO_FOLDER = Path(__file__).parents[2] / "checkpoints" / "nano"
CONFIG = "config.json"
_MAX_CONFIG_BYTES = 4 << 20
_HASHED_BYTES = 64 << 20
_ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
_PLAIN = (None, "eager", "sdpa", "flash_attention_2")
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "vrthinker_prompts/*"]
_COPY_IT = "copy it from the model that this one was made from"
_TEXTS = (".json", ".txt", ".jinja", ".model")
_INDEX = "model.safetensors.index.json"
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")

_MOST: dict[str, int | Limit] = {
    **dict.fromkeys(("depth", "num_hidden_layers"), MAX_CHECKPOINT_LAYERS),
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "out_hidden_size", "head_dim", "embed_dim"), MAX_CHECKPOINT_WIDTH
    ),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads"), 4096),
    "vocab_size": 1 << 24,
    "num_position_embeddings": 1 << 24,
    "patch_size": 256,
    "spatial_merge_size": 16,
    "temporal_patch_size": 16,
    "in_channels": 16,
    "window_size": 1 << 16,
    "max_position_embeddings": 1 << 31,
    "num_labels": 4096,
}
"""The largest values of the configuration's sizes. The smallest is 1."""
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
_MAX_STEPS = 4
_SPLIT_PATTERNS = (
    # Qwen's split: letters with their leading mark, single digits, punctuation, line ends, blanks.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # The same with combining marks as parts of words.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""The patterns that a tokenizer may split text by. Another pattern could take exponential time."""


def resolve_checkpoint(model: str | Path) -> Path:
    """The folder of a checkpoint.

    Args:
        model: A local folder, which is returned as it is; `nano`, the judge that ships with the package; or a
            hub id, which is fetched.

    Raises:
        InputError: `model` is neither a folder with safetensors weights nor a hub id that can be fetched.
    """
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"model: got {type(model).__name__}, allowed: a folder or a hub id")
    name = one_line(str(model))
    folder = Path(os.path.expanduser(model))  # an unknown user's folder is just not there
    if str(model) == NANO and not _exists(folder):
        folder = NANO_FOLDER
    if _exists(folder) or str(model).startswith((".", "/", "~")):
        if not _exists(folder) or not folder.is_dir():
            raise InputError(f"{name}: not a checkpoint folder; give a folder or a hub id")
    else:
        folder = _fetch(str(model))
    if not (folder / CONFIG).is_file():
        raise InputError(f"{name}: no config.json in it; give the folder of a transformers checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{name}: no *.safetensors weights in it; other formats are not loaded")
    if not any((folder / file).is_file() for file in _PREPROCESSORS):
        raise InputError(f"{name}: no {_PREPROCESSORS[0]} in it; {_COPY_IT}")
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise InputError(f"{name}: no tokenizer.json in it; {_COPY_IT}")
    return folder


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_CHECKPOINT_FILES))
    except HFValidationError:
        raise InputError(f"{one_line(name)}: neither a folder nor a hub id") from None
    except Exception as error:
        cause = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{one_line(name)}: not a folder here, and the hub did not give it ({cause})"
        ) from None


def weights_fingerprint(folder: Path) -> str:
    """A SHA-256 to tell checkpoints of one name apart: of the weights; of size and time for large ones.

    Raises:
        InputError: The folder holds an adapter whose base cannot be found.
    """
    digest = hashlib.sha256()
    base = base_of_adapter(folder)
    for path in sorted((*folder.glob("*.safetensors"), *(base.glob("*.safetensors") if base else ()))):
        status = path.stat()
        digest.update(f"{path.name}:{status.st_size}:".encode())
        if status.st_size <= _HASHED_BYTES:
            digest.update(path.read_bytes())
        else:
            digest.update(str(status.st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def load_config(folder: Path) -> Any:
    """Checks a folder's files (not its weights) and returns the transformers configuration of its model.

    Raises:
        InputError: A file would load code or other weights, a size is out of range, the family is not
            supported, or the tokenizer has parts that are not allowed.
    """
    try:
        _check_files(folder)
        _check_config(read_json(folder / CONFIG, _MAX_CONFIG_BYTES))
        read_adapter(folder)
        if (folder / _INDEX).is_file():
            _check_index(folder, read_json(folder / _INDEX, MAX_TOKENIZER_BYTES.value))
        if (folder / "tokenizer.json").is_file():
            _check_tokenizer(read_json(folder / "tokenizer.json", MAX_TOKENIZER_BYTES.value))
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_family(config)
        return config
    except Exception as error:
        raise unloadable(folder, error) from None


def base_of_adapter(folder: Path) -> Path | None:
    """The folder of the checkpoint that an adapter belongs to; None if there is no adapter in `folder`.

    Raises:
        InputError: The adapter or its base cannot be used.
    """
    adapter = read_adapter(folder)
    if adapter is None:
        return None
    try:
        base = resolve_checkpoint(adapter.base)
    except InputError as error:
        raise InputError(f"{ADAPTER_CONFIG}: base_model_name_or_path: {error}") from None
    if (base / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{ADAPTER_CONFIG}: {one_line(adapter.base)}: an adapter too; allowed: whole weights"
        )
    return base


def unloadable(folder: Path, error: BaseException) -> InputError:
    """The error of a checkpoint whose files provoke any error, since nobody vouches for them."""
    if isinstance(error, InputError):
        said = str(error)
        return InputError(said if said.startswith(str(folder)) else f"{folder}: {said}")
    cause = one_line(str(error).strip().partition("\n")[0]) or "no message"
    return InputError(f"{folder}: not a loadable checkpoint ({type(error).__name__}: {cause})")


def grid(config: Any) -> dict[str, int]:
    """The sizes that frames must fit: `patch_size` in pixels, and `merge_size` in patches."""
    vision = config.vision_config
    return {"patch_size": int(vision.patch_size), "merge_size": int(vision.spatial_merge_size)}


def check_size(config: Any, folder: Path) -> None:
    """Refuses a configuration that describes a far larger model than the weights hold.

    Such a model would be built, and filled with random numbers, before its missing weights are noticed.

    Raises:
        InputError: The model has more than twice the parameters of the weights.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForImageTextToText

    stored = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dict)
                count = 1
                for size in weights.get_slice(name).get_shape():
                    count *= size
                stored += count
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > 2 * stored:
        raise InputError(
            f"config.json: describes a model of {wanted} parameters, the weights have {stored}; "
            "give the configuration that belongs to the weights"
        )


def _check_files(folder: Path) -> None:
    """Refuses what would block its reader or fill the memory: pipes, devices, and large files of text."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.suffix not in (".safetensors", *_TEXTS):
            continue  # not opened
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{one_line(path.name)}: not a regular file")
        if path.suffix != ".safetensors" and status.st_size > MAX_TOKENIZER_BYTES.value:
            raise InputError(
                f"{one_line(path.name)}: got {status.st_size} bytes, allowed beside the weights: up to "
                f"{MAX_TOKENIZER_BYTES.value}; {MAX_TOKENIZER_BYTES.how_to_raise}"
            )


def _check_config(config: object) -> None:
    """Refuses settings that load code or other weights, and sizes that are out of range."""
    if not isinstance(config, dict):
        raise InputError("config.json: got no JSON object")
    for key, value in _items(config):
        if key in _ATTENTION and value not in _PLAIN:
            raise InputError(f"config.json: {key}: got {value!r}, allowed: {_PLAIN}")
        if key == "quantization_config" and value is not None:
            raise InputError("config.json: quantization_config: quantised weights are not supported")
        if key == "transformers_weights" and value is not None:
            raise InputError("config.json: transformers_weights: allowed: weights named *.safetensors")
        limit = _MOST.get(key)
        if limit is None or value is None:
            continue
        most = limit.value if isinstance(limit, Limit) else limit
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            more = f"; {limit.how_to_raise}" if isinstance(limit, Limit) else ""
            got = one_line(repr(value))[:80]
            raise InputError(f"config.json: {key}: got {got}, allowed: a whole number from 1 to {most}{more}")


def _items(value: object) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON."""
    pending = [value]
    while pending:
        inner = pending.pop()
        if isinstance(inner, dict):
            yield from inner.items()
            pending += inner.values()
        elif isinstance(inner, list):
            pending += inner


def _check_index(folder: Path, index: object) -> None:
    """Refuses an index of weights that names files elsewhere."""
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise InputError(f"{_INDEX}: got no weight_map")
    here = {path.name for path in folder.glob("*.safetensors")}
    for name in names.values():
        if name not in here:
            got = one_line(repr(name))[:80]
            raise InputError(f"{_INDEX}: got {got}, allowed: *.safetensors files of the same folder")


def _check_family(config: Any) -> None:
    if config.model_type not in FAMILIES:
        allowed = ", ".join(FAMILIES)
        raise InputError(f"model_type: got {config.model_type!r}, allowed: {allowed}")
    text, vision = config.text_config, config.vision_config
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise InputError("config: sliding-window attention layers are not supported; allowed: full attention")
    if int(text.max_position_embeddings) < 2:
        raise InputError(f"max_position_embeddings: got {text.max_position_embeddings}, allowed: 2 and above")
    window, smallest = getattr(vision, "window_size", None), vision.patch_size * vision.spatial_merge_size
    if window is not None and window < smallest:
        raise InputError(f"window_size: got {window}, allowed: at least {smallest}, one merged patch")


def _check_tokenizer(tokenizer: object) -> None:
    """Refuses everything but byte-level BPE with Qwen's split, which never grows text or takes for ever."""
    if not isinstance(tokenizer, dict):
        raise InputError("tokenizer.json: got no JSON object")
    for part, (members, allowed) in _COMPONENTS.items():
        for step in _steps(tokenizer.get(part), part, members):
            kind = step.get("type", "BPE" if part == "model" else None)
            if kind not in allowed:
                raise InputError(
                    f"tokenizer.json: {part}: got {one_line(repr(kind))[:80]}, allowed: {', '.join(allowed)}"
                )
            if kind == "Split" and step.get("pattern") not in [{"Regex": p} for p in _SPLIT_PATTERNS]:
                got = one_line(repr(step.get("pattern")))[:80]
                raise InputError(f"tokenizer.json: pre_tokenizer: got the pattern {got}, allowed: Qwen's")
            if kind == "BPE" and step.get("dropout"):
                raise InputError(
                    "tokenizer.json: model: dropout: allowed: none; it would draw tokens at random"
                )
            if kind == "TemplateProcessing" and not _is_plain_template(step):
                raise InputError("tokenizer.json: post_processor: allowed: each text once, and a few markers")


_COMPONENTS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "model": (None, ("BPE",)),
    "normalizer": ("normalizers", _NORMALIZERS),
    "pre_tokenizer": ("pretokenizers", ("ByteLevel", "Split")),
    "post_processor": ("processors", ("ByteLevel", "TemplateProcessing")),
    "decoder": ("decoders", ("ByteLevel",)),
}
"""The components of a tokenizer, each with the key of a sequence's members, and with the allowed types."""


def _steps(component: object, name: str, members: str | None) -> list[dict[str, Any]]:
    """The steps of a tokenizer's component: of a sequence its members, otherwise itself."""
    if component is None:
        return []
    steps: object = [component]
    if isinstance(component, dict) and component.get("type") == "Sequence":
        if set(component) != {"type", members}:
            raise InputError(f"tokenizer.json: {name}: a sequence has the keys type and {members}")
        steps = component[members]
    if not isinstance(steps, list) or len(steps) > _MAX_STEPS or not all(isinstance(s, dict) for s in steps):
        raise InputError(f"tokenizer.json: {name}: allowed: a step, or a sequence of up to {_MAX_STEPS}")
    return steps


def _is_plain_template(step: dict[str, Any]) -> bool:
    """Whether a template has each text once, and only a few special tokens besides."""
    for name, texts in (("single", ["A"]), ("pair", ["A", "B"])):
        pieces = step.get(name)
        if not isinstance(pieces, list) or len(pieces) > 8:
            return False
        if not all(isinstance(piece, dict) and len(piece) == 1 for piece in pieces):
            return False
        found = [piece["Sequence"] for piece in pieces if "Sequence" in piece]
        if [one.get("id") if isinstance(one, dict) else None for one in found] != texts:
            return False
    special = step.get("special_tokens")
    return isinstance(special, dict) and len(str(special)) < 2000
