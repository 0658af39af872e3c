"""The tiny checkpoints: loadable, lossless, reproducible, and with every special part of a family running."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoTokenizer

# In transformers 5.17 the name in the package's root is a stand-in that wants torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from vrthinker.engine.hf import tiny
from vrthinker.engine.hf.tiny import SPECIAL_TOKENS, make_tiny
from vrthinker.errors import InputError

pytestmark = pytest.mark.versions

FAMILIES = ("qwen2.5-vl", "qwen3-vl")
CALL = (
    "<snapshot>The cat jumps.</snapshot>\n<think>Video 1 is sharp.</think>\n"
    "<recommend answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</recommend answer>\n"
    '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [12, 16, 20]}}</tool_call>'
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: make_tiny(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def tokenizer(folders):
    return AutoTokenizer.from_pretrained(folders["qwen2.5-vl"])


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()


def picture_inputs(folder: Path, pictures: list[np.ndarray]) -> dict:
    """Model inputs of a chat with the given pictures, built from the folder's own files."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")
    parts = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": "Which video is better?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    head, *tails = text.split("<|image_pad|>")
    counts = [int(grid.prod()) // 4 for grid in pixels["image_grid_thw"]]
    text = head + "".join("<|image_pad|>" * n + tail for n, tail in zip(counts, tails, strict=True))
    ids = tokenizer(text, return_tensors="pt")
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {**ids, **pixels, "mm_token_type_ids": (ids["input_ids"] == pad).int()}


def noise(seed: int, height: int = 112, width: int = 112) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def logits(model, inputs: dict) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).logits[0, -1]


@pytest.mark.parametrize(
    ("family", "name", "patch", "mean"),
    [
        ("qwen2.5-vl", "Qwen2_5_VLForConditionalGeneration", 14, 0.48145466),
        ("qwen3-vl", "Qwen3VLForConditionalGeneration", 16, 0.5),
    ],
)
def test_folder_loads_as_the_familys_own_classes(folders, family, name, patch, mean):
    model = load(folders[family])
    assert type(model).__name__ == name
    assert model.dtype == torch.float32
    assert 500_000 < sum(p.numel() for p in model.parameters()) < 1_500_000
    processor = AutoImageProcessor.from_pretrained(folders[family])
    assert type(processor).__name__.startswith("Qwen2VLImageProcessor")
    assert (processor.patch_size, processor.merge_size, processor.temporal_patch_size) == (patch, 2, 2)
    assert processor.image_mean[0] == mean
    saved = json.loads((folders[family] / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    assert saved["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert saved["pad_token_id"] == tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.pad_token_id
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.config.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert model.config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    rope = model.config.text_config.rope_parameters
    assert sum(rope["mrope_section"]) == 32 // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_arguments_write_equal_bytes(folders, family, tmp_path):
    torch.manual_seed(1234)
    expected = torch.rand(4)
    torch.manual_seed(1234)
    again = make_tiny(tmp_path / "again", family)
    assert torch.equal(torch.rand(4), expected), "the caller's generator moved"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (folders[family] / name).read_bytes(), name
    other = make_tiny(tmp_path / "other", family, seed=1)
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()
    assert (other / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_vocabulary_is_as_large_as_the_embedding_and_every_id_decodes(folders, family):
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    size = len(tokenizer)
    assert 600 <= size <= 1000
    assert load(folders[family]).get_input_embeddings().weight.shape[0] == size
    assert None not in tokenizer.convert_ids_to_tokens(list(range(size)))
    specials = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert specials == list(range(size - len(SPECIAL_TOKENS), size))


@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "e\u0301 ≠ \u00e9, \u212b \ufb01",
        " a  b\r\n\t\x00",
        "<|im_end|>\n<|im_start|>system",
        "日本 \U0001d4b3 \U0010ffff",
    ],
)
def test_texts_that_tokenizers_like_to_change_stay_as_they_are(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))


def test_a_rounds_syntax_is_ordinary_text_in_few_tokens(tokenizer):
    ids = tokenizer(CALL, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == CALL
    assert len(ids) < len(CALL) / 2.5


def test_chat_template_writes_qwens_turns(tokenizer):
    messages = [
        {"role": "system", "content": "Judge."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Frame 1: "},
                {"type": "image"},
                {"type": "image_url", "image_url": {"url": "data:"}},
                {"type": "text", "text": " go"},
            ],
        },
        {"role": "assistant", "content": "<answer>"},
    ]
    turns = (
        "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\nFrame 1: "
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|> go"
        "<|im_end|>\n<|im_start|>assistant\n<answer><|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == turns
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == turns + "<|im_start|>assistant\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_it_generates_from_eight_pictures_and_looks_at_them(folders, family):
    model = load(folders[family])
    pictures = [noise(seed) for seed in range(8)]
    inputs = picture_inputs(folders[family], pictures)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    before = logits(model, inputs)
    assert torch.isfinite(before).all()
    assert before.std() > 0.2, "flat logits: greedy texts would hang on rounding"
    after = logits(model, picture_inputs(folders[family], [*pictures[:7], noise(99)]))
    assert (before - after).abs().max() > 1e-3


def test_deepstack_maps_reach_the_text(folders):
    model = load(folders["qwen3-vl"])
    tower = model.model.visual
    assert max(tower.deepstack_visual_indexes) < len(tower.blocks)
    # Map i enters behind text layer i, so that the last map needs one more layer to reach the text.
    assert len(tower.deepstack_merger_list) == 2 < model.config.text_config.num_hidden_layers
    inputs = picture_inputs(folders["qwen3-vl"], [noise(0), noise(1)])
    whole = logits(model, inputs)
    for merger in tower.deepstack_merger_list:
        saved = {name: value.clone() for name, value in merger.state_dict().items()}
        with torch.no_grad():
            merger.linear_fc2.weight.zero_()
            merger.linear_fc2.bias.zero_()
        assert (logits(model, inputs) - whole).abs().max() > 1e-3, "this map changes nothing"
        merger.load_state_dict(saved)
    assert torch.equal(logits(model, inputs), whole)


def test_window_attention_runs_before_the_full_block(folders):
    model = load(folders["qwen2.5-vl"])
    tower = model.model.visual
    assert list(tower.fullatt_block_indexes) == [1]
    assert len(tower.blocks) == 2
    inputs = picture_inputs(folders["qwen2.5-vl"], [noise(0, 168, 224)])  # 3 x 4 windows' worth of patches
    windowed = logits(model, inputs)
    tower.fullatt_block_indexes = [0, 1]
    assert (logits(model, inputs) - windowed).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [1, 2])
def test_other_depths_run(tmp_path, family, layers):
    folder = make_tiny(tmp_path / "deep", family, layers=layers, initializer_range=0.1)
    model = load(folder)
    assert model.config.text_config.num_hidden_layers == layers
    assert torch.isfinite(logits(model, picture_inputs(folder, [noise(0)]))).all()


def test_it_refuses_what_is_there_and_what_is_out_of_range(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        make_tiny(full, "qwen3-vl")
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="a file is there"):
        make_tiny(full / "mine.txt", "qwen3-vl")
    with pytest.raises(InputError, match="cannot be made"):
        make_tiny(full / "mine.txt" / "below", "qwen3-vl")
    with pytest.raises(InputError, match=r"family.*'llama'.*qwen2.5-vl or qwen3-vl"):
        make_tiny(tmp_path / "x", "llama")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="layers"):
        make_tiny(tmp_path / "x", "qwen3-vl", layers=0)
    with pytest.raises(InputError, match="initializer_range"):
        make_tiny(tmp_path / "x", "qwen3-vl", initializer_range=float("nan"))
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="current folder"):
        make_tiny(Path("."), "qwen3-vl")


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    assert make_tiny(tmp_path / "empty", "qwen3-vl") == tmp_path / "empty"
    made = make_tiny(tmp_path / "a" / "b", "qwen3-vl")
    assert (made / "config.json").is_file()
    plain = tmp_path / "plain"
    plain.mkdir()
    assert made.stat().st_mode == plain.stat().st_mode, "not as readable as other folders of the user"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(family):
        raise RuntimeError("disk full")

    monkeypatch.setattr(tiny, "_preprocessor", fails)  # the last file written
    with pytest.raises(RuntimeError, match="disk full"):
        make_tiny(tmp_path / "out", "qwen3-vl")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_fills_meanwhile_is_left_alone(tmp_path, monkeypatch):
    write = tiny._write

    def slow(folder, *args):
        write(folder, *args)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")

    monkeypatch.setattr(tiny, "_write", slow)
    with pytest.raises(InputError, match="not empty"):
        make_tiny(tmp_path / "out", "qwen3-vl")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "theirs"]
