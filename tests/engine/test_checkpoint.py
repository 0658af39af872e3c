"""What a checkpoint's folder may hold: every bad file is one line, before weights are loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vrthinker.engine.hf import checkpoint
from vrthinker.engine.hf.checkpoint import check_size, grid, load_config, resolve_checkpoint
from vrthinker.engine.hf.tiny import make_tiny
from vrthinker.errors import InputError
from vrthinker.judge import Judge

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", "qwen2.5-vl")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def edit_json(name: str, *keys: str, **changes: object) -> Edit:
    """Changes values of a JSON file, those inside the object that `keys` lead to."""

    def edit(folder: Path) -> None:
        whole = json.loads((folder / name).read_text("utf-8"))
        inner = whole
        for key in keys:
            inner = inner[key]
        inner.update(changes)
        (folder / name).write_text(json.dumps(whole))

    return edit


def write(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text)


def remove(*names: str) -> Edit:
    return lambda folder: [(folder / name).unlink() for name in names]


def pipe(name: str) -> Edit:
    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return replace


def link(name: str, target: str) -> Edit:
    return lambda folder: ((folder / name).unlink(), (folder / name).symlink_to(target))


GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TEMPLATE: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
CATASTROPHIC = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (
            edit_json("config.json", "vision_config", depth=1_000_000),
            "depth: got 1000000.*MAX_CHECKPOINT_LAYERS",
        ),
        (
            edit_json("config.json", "text_config", num_hidden_layers=10**9),
            "num_hidden_layers: got 1000000000",
        ),
        (
            edit_json("config.json", "text_config", hidden_size=1 << 40),
            "hidden_size: got .*MAX_CHECKPOINT_WIDTH",
        ),
        (edit_json("config.json", "text_config", num_attention_heads=0), "num_attention_heads: got 0"),
        (edit_json("config.json", "text_config", vocab_size=True), "vocab_size: got True"),
        (edit_json("config.json", "vision_config", patch_size=10**6), "patch_size: got 1000000"),
        (edit_json("config.json", "vision_config", window_size=0), "window_size: got 0"),
        (
            edit_json("config.json", "vision_config", window_size=27),
            "window_size: got 27, allowed: at least 28",
        ),
        (
            edit_json("config.json", "text_config", max_position_embeddings=1),
            "max_position_embeddings: got 1",
        ),
        (
            edit_json("config.json", "text_config", max_position_embeddings=-4),
            "max_position_embeddings: got -4",
        ),
        (write("config.json", '{"a":' * 5000 + "1" + "}" * 5000), "config.json: not JSON that can be used"),
        (write("config.json", "[]"), "config.json: got no JSON object"),
        (write("config.json", '{"model_type": "qwen2_5_vl", "x": 1' + "0" * 5000 + "}"), "a number of 5001"),
        (pipe("config.json"), "no config.json|not a regular file"),
        (pipe("generation_config.json"), "generation_config.json: not a regular file"),
        (link("tokenizer_config.json", "/dev/zero"), "tokenizer_config.json: not a regular file"),
        (edit_json("tokenizer.json", normalizer=GROWS), "normalizer: got 'Replace', allowed: NFC"),
        (
            edit_json(
                "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 5}
            ),
            "normalizer: allowed: a step, or a sequence of up to 4",
        ),
        (
            edit_json("tokenizer.json", normalizer={"type": "Sequence", "normalizers": [GROWS]}),
            "normalizer: got 'Replace'",
        ),
        (edit_json("tokenizer.json", normalizer=[]), "normalizer: allowed: a step"),
        (edit_json("tokenizer.json", pre_tokenizer=CATASTROPHIC), "got the pattern .*allowed: Qwen's"),
        (
            edit_json("tokenizer.json", pre_tokenizer={"type": "Whitespace"}),
            "pre_tokenizer: got 'Whitespace'",
        ),
        (edit_json("tokenizer.json", decoder={"type": "Fuse"}), "decoder: got 'Fuse'"),
        (edit_json("tokenizer.json", model={"type": "WordLevel", "vocab": {}}), "model: got 'WordLevel'"),
        (write("tokenizer.json", "[]"), "tokenizer.json: got no JSON object"),
        (
            edit_json("tokenizer.json", normalizer={"type": "Sequence", "x": [], "normalizers": [GROWS]}),
            "normalizer: a sequence has the keys type and normalizers",
        ),
        (
            edit_json(
                "tokenizer.json", post_processor=TEMPLATE | {"single": [{"Sequence": {"id": "A"}}] * 2}
            ),
            "post_processor: allowed: each text once",
        ),
        (edit_json("tokenizer.json", post_processor=TEMPLATE | {"pair": 7}), "each text once"),
        (edit_json("tokenizer.json", post_processor=TEMPLATE | {"single": [[]]}), "each text once"),
        (edit_json("tokenizer.json", "model", dropout=0.5), "model: dropout: allowed: none"),
        (edit_json("config.json", "text_config", num_labels=10**7), "num_labels: got 10000000"),
        (edit_json("config.json", transformers_weights="x.bin"), "transformers_weights: allowed"),
        (write("model.safetensors.index.json", "[]"), "got no weight_map"),
        (
            write("model.safetensors.index.json", '{"weight_map": {"a": "../b/model.safetensors"}}'),
            "index.json: got '../b/model.safetensors', allowed: .*same folder",
        ),
        (remove("tokenizer.json"), "no tokenizer.json in it; copy it"),
        (remove("preprocessor_config.json"), "no preprocessor_config.json in it; copy it"),
    ],
)
def test_a_bad_file_is_one_line_before_anything_is_loaded(folder: Path, break_it: Edit, match: str) -> None:
    break_it(folder)
    with pytest.raises(InputError, match=match) as caught:
        load_config(resolve_checkpoint(folder))
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_sound_folders_pass(sound: Path, tmp_path: Path) -> None:
    assert grid(load_config(sound)) == {"patch_size": 14, "merge_size": 2}
    assert grid(load_config(checkpoint.NANO_FOLDER)) == grid(load_config(resolve_checkpoint("nano")))
    # The tokenizer as Qwen ships it: with NFC, and files for processors instead of preprocessors.
    other = Path(shutil.copytree(sound, tmp_path / "other"))
    edit_json("tokenizer.json", normalizer={"type": "NFC"})(other)
    edit_json("tokenizer.json", post_processor={"type": "ByteLevel", "trim_offsets": False})(other)
    edit_json("config.json", "text_config", _attn_implementation_autoset=True)(other)
    index = {"weight_map": {"lm_head.weight": "model.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    (other / "optimizer.pt").touch()  # what a trainer leaves is not opened, whatever its size
    os.truncate(other / "optimizer.pt", 1 << 30)
    (other / "preprocessor_config.json").rename(other / "processor_config.json")
    assert load_config(resolve_checkpoint(other)).model_type == "qwen2_5_vl"


def test_a_limit_can_be_raised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_json("config.json", "vision_config", depth=2000)(folder)
    with pytest.raises(InputError, match="VRTHINKER_MAX_CHECKPOINT_LAYERS"):
        load_config(folder)
    monkeypatch.setenv("VRTHINKER_MAX_CHECKPOINT_LAYERS", "2000")
    assert load_config(folder).vision_config.depth == 2000


def test_a_large_file_beside_the_weights_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRTHINKER_MAX_TOKENIZER_BYTES", "10000000")
    (folder / "vocab.json").touch()
    os.truncate(folder / "vocab.json", 10_000_001)
    with pytest.raises(InputError, match=r"vocab\.json: got 10000001 bytes"):
        load_config(folder)


def test_a_model_that_its_weights_do_not_fill_is_not_built(folder: Path) -> None:
    edit_json("config.json", "text_config", intermediate_size=1 << 18)(folder)
    config = load_config(folder)
    with pytest.raises(InputError, match=r"a model of \d{9} parameters, the weights have \d{6,7};"):
        check_size(config, folder)


def test_the_grid_is_checked_before_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)  # loading would complain about these
    (folder / "vrthinker.json").write_text('{"resize": {"patch_size": 16}}')
    with pytest.raises(InputError, match=r"resize\.patch_size: got 16, the model has 14"):
        Judge.from_pretrained(folder)


def test_a_checkpoint_without_settings_keeps_what_the_caller_sets(sound: Path) -> None:
    assert not (sound / "vrthinker.json").exists()
    with Judge.from_pretrained(sound, tolerate_truncation=True, window=2, max_pixels=28 * 28 * 9) as judge:
        assert judge.settings.episode.tolerate_truncation
        assert judge.settings.episode.window == 2
        assert (judge.settings.resize.max_pixels, judge.settings.resize.patch_size) == (28 * 28 * 9, 14)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"resize": {"min_pixels": 10**18, "max_pixels": 10**18}},
            "max_pixels: got 10{18}.*MAX_FRAME_PIXELS",
        ),
        ({"resize": {"patch_size": 10**6}}, "patch_size"),
        ({"note": "x" * 2000}, "note"),
    ],
)
def test_settings_of_a_checkpoint_have_limits(folder: Path, settings: dict[str, Any], match: str) -> None:
    (folder / "vrthinker.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=match):
        Judge.from_pretrained(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "/" + "x" * 5000])
def test_a_name_that_no_folder_can_have_is_one_short_line(name: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_checkpoint(name)
    assert len(str(caught.value)) < 700


def test_a_tokenizer_that_fails_when_it_is_used_is_one_line(folder: Path) -> None:
    edit_json("tokenizer_config.json", model_max_length="x")(folder)
    with pytest.raises(InputError, match=r"not a loadable checkpoint \(TypeError: ") as caught:
        Judge.from_pretrained(folder)
    assert str(caught.value).startswith(str(folder))


def test_a_tokenizer_that_swallows_text_is_refused(folder: Path) -> None:
    whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    del whole["model"]["vocab"]["Ċ"]  # the line end's token
    whole["model"]["merges"] = [merge for merge in whole["model"]["merges"] if "Ċ" not in "".join(merge)]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match="comes back as"):
        Judge.from_pretrained(folder)
