"""The nano judge before training: its files, its tokenizer, its prompts."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sampled import Stage
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vrthinker.engine.base import FrameSegment, Message, TextSegment
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.tiny import SPECIAL_TOKENS
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.prompts import PromptContext, PromptFrame
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings, load_judge_settings
from vrthinker.episode.trajectory import StopReason
from vrthinker.judge import Judge
from vrthinker.visibility import ShownFrame
from vrthinker.world.files import sample_world
from vrthinker.world.nano import SIDE, nano_settings, nano_templates, write_nano
from vrthinker.world.truth_reader import hinted_call, probes
from vrthinker.world.words import PHRASES, tool_call
from vrthinker.world.world import PRESETS, Difficulty, first_indices

MakeCheckpoint = Callable[[str], Path]
MakeStage = Callable[[str], Stage]
REAL_PAIRS = Path(__file__).parents[2].parent / "shared" / "data" / "videoalign" / "pairs.csv"


@pytest.fixture(scope="module")
def folder(checkpoint_of: MakeCheckpoint) -> Path:
    return checkpoint_of("nano")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def markup(tokenizer: Any) -> Markup:
    return Markup(tokenizer, len(tokenizer))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def tokens(markup: Markup, text: str) -> list[str]:
    return [markup.decode([token]) for token in markup.encode(text)]


# Files


def test_it_is_the_real_class_at_a_million_parameters(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 1_200_000 < sum(p.numel() for p in model.parameters()) < 1_250_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.get_input_embeddings().weight, "what is read can be written"
    # Both kinds of the tower's attention run: a block over windows, and the last one over the frame.
    assert (model.config.vision_config.depth, model.config.vision_config.fullatt_block_indexes) == (2, [1])


def test_equal_seeds_write_equal_files(folder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    again = files_of(write_nano(tmp_path / "again", seed=3))
    other = files_of(write_nano(tmp_path / "other", seed=4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert files_of(folder) == again
    assert [name for name in again if again[name] != other[name]] == ["model.safetensors"]
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in folder.rglob("*") if f.is_file()), "to be shared"


def test_settings_and_prompts_are_beside_the_weights(folder: Path) -> None:
    stored = load_judge_settings(folder)
    assert stored == nano_settings()
    for height, width in ((112, 112), (56, 56), (480, 480)):
        assert stored.resize.grid_size(height, width) == (SIDE, SIDE), "4 tokens a frame"
    for name, source in nano_templates().sources.items():
        assert (folder / "vrthinker_prompts" / f"{name}.jinja").read_text("utf-8") == source


def test_untrained_it_is_judged_to_write_no_verdict(folder: Path, clip_pair: tuple[Path, Path]) -> None:
    with Judge.from_pretrained(folder, device="cpu", max_round_tokens=30, temperature=1.0) as judge:
        verdict = judge("A red circle moves right.", *clip_pair)
    assert verdict.judgments is None
    assert verdict.stop_reason in (StopReason.TOKEN_LIMIT, StopReason.UNPARSEABLE)
    assert verdict.reason


# Weights


@torch.no_grad()
def test_it_begins_by_copying_what_stands_behind_an_earlier_mention(folder: Path, tokenizer: Any) -> None:
    """The heads that look back, the head that finds the place, and what they add to it."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    numbers = "".join(f"{n}, " for n in range(100, 500, 7))
    again = "TA 0 VQ 1 MQ 2 sum 3\ncheck 5 left 6</think>"
    ids = tokenizer(numbers + again + numbers).input_ids
    out = model.model.language_model(input_ids=torch.tensor([ids]), output_attentions=True)
    for head, distance in ((0, 1), (1, 2)):
        looked = out.attentions[0][0, head].diagonal(-distance)
        assert float(looked[4:].min()) > 0.8
    # What stands behind each number in the list, told from the same place in its second copy.
    length = len(tokenizer(numbers).input_ids)
    behind = torch.arange(2, length, 2)
    here = behind + len(ids) - length - 1
    assert float(out.attentions[1][0, 0, here, behind].mean()) > 0.5
    wanted = torch.tensor(ids)[behind]
    logits = model.lm_head(out.last_hidden_state[0, here])
    likelier = (logits > logits.gather(1, wanted[:, None])).float().mean(1)
    assert float(likelier.median()) < 0.35, "they are likelier than other tokens before anything is learned"


@torch.no_grad()
def test_layers_add_little_at_first(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    layers = model.model.language_model.layers
    for layer in layers:
        assert not layer.mlp.down_proj.weight.any()
    for layer in layers[2:]:
        assert torch.allclose(layer.self_attn.o_proj.weight, 0.1 * layer.self_attn.v_proj.weight.T)
        assert float(layer.self_attn.v_proj.weight.std()) == pytest.approx(0.06, rel=0.1)
    assert not torch.equal(layers[2].self_attn.v_proj.weight, layers[3].self_attn.v_proj.weight)


# Tokenizer


PIECES = st.sampled_from(
    [
        *PHRASES,
        *SPECIAL_TOKENS,
        "278",
        "27",
        "99",
        "10",
        "9",
        "100",
        "512",
        "513",
        "Ġ",
        "Ċ",
        "\r\n",
        "é",
        "😀",
    ]
)
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]))


@settings(suppress_health_check=list(HealthCheck))
@given(st.lists(PIECES | ANYTHING, max_size=8).map("".join))
@example("\0")
@example("�")
@example(" to  to and a and A a A")
@example("".join(map(chr, range(0x250))))
def test_any_text_encodes_and_decodes_to_itself(markup: Markup, text: str) -> None:
    ids = markup.encode(text)
    assert markup.decode([*ids, markup.turn_end]) == text
    special = {markup.turn_end, markup.turn_start, markup.image_pad, markup.vision_start, markup.vision_end}
    assert not special & set(ids), "special tokens in text are text"


def test_every_id_is_a_token_that_can_be_written(markup: Markup, tokenizer: Any) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    banned = markup.vocabulary(torch.device("cpu")).banned.nonzero().flatten().tolist()
    assert {tokenizer.convert_ids_to_tokens(i) for i in banned} == set(SPECIAL_TOKENS) - {"<|im_end|>"}


def test_numbers(markup: Markup) -> None:
    most = 2 * max(config.frames[1] for config in PRESETS.values())
    assert all(tokens(markup, str(n)) == [str(n)] for n in range(most + 1)), "every frame number of a preset"
    assert all(tokens(markup, str(n)) == list(str(n)) for n in (most + 1, 600, 999, 1234, 99999))
    assert tokens(markup, "12, 278; 99") == ["12", ", ", "278", "; ", "99"]
    assert tokens(markup, "2780, 27]") == ["2", "7", "8", "0", ", ", "27", "]"]
    assert tokens(markup, "v1 512:") == ["v1 ", "512", ":"]
    assert tokens(markup, "x27 a27b 2.75") == ["x", "2", "7", " ", "a", "2", "7", "b", " ", "2", ".", "75"]


def test_the_words_of_the_world_are_single_tokens(markup: Markup) -> None:
    for phrase in PHRASES:
        assert tokens(markup, phrase) == [phrase], phrase
    for difficulty in ("easy", "medium", "hard"):
        for truth in sample_world(PRESETS[difficulty], 40, seed=5):
            caption = tokens(markup, truth.caption)
            assert len(caption) <= 10, caption
            assert caption[-1] == "."


def test_real_captions_encode(markup: Markup) -> None:
    if not REAL_PAIRS.is_file():
        pytest.skip(f"no real captions: {REAL_PAIRS.name} is not there")
    with REAL_PAIRS.open(newline="", encoding="utf-8") as stream:
        texts = [field for row in csv.reader(stream) for field in row]
    assert any(len(text) > 40 for text in texts)
    for text in texts:
        assert markup.decode(markup.encode(text)) == text


def test_turns_are_those_of_the_chat_template(tokenizer: Any, markup: Markup) -> None:
    chat = [{"role": "system", "content": "video 1: 1 to 32"}, {"role": "user", "content": "A red circle"}]
    wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids: list[int] = []
    for turn in chat:
        ids += [*markup.turn_opening(turn["role"]), *markup.encode(turn["content"]), *markup.turn_closing]
    assert ids + markup.generation_prompt == list(wanted)


# Prompts


def texts_of(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        parts = [
            s.text if isinstance(s, TextSegment) else f"<{s.shown.frame_number}>" for s in message.segments
        ]
        yield f"{message.role}: {''.join(parts)}"


def look(*numbers: int) -> str:
    recommended = "<recommend answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</recommend answer>"
    return f"<snapshot>a</snapshot><think>b</think>{recommended}{tool_call(numbers)}"


def prompts(
    stage: Stage, script: Sequence[str], *, max_rounds: int, window: int | None = 1
) -> tuple[list[list[str]], list[str]]:
    """What each round was newly told, and the last round's whole context."""
    engine = ScriptedEngine([script])
    episode = EpisodeSettings(max_rounds=max_rounds, window=window, initial_frames=2)
    runner = EpisodeRunner(engine, episode, templates=nano_templates())
    trajectory = runner.run_one(EpisodeItem("p", "A {{ red }} circle.\n", stage.open))
    assert len(trajectory.rounds) == len(script)
    first = engine.seen[0].context.messages
    new = [list(texts_of(first)), *(list(texts_of(seen.request.new)) for seen in engine.seen[1:])]
    return new, list(texts_of(engine.seen[-1].context.messages))


ANSWER = "<snapshot>a</snapshot><think>b</think><answer>TA=1, VQ=0, MQ=2, OA=1</answer>"
FIRST = ["system: video 1: 1 to 12; video 2: 13 to 22"]
FIRST += ["user: A {{ red }} circle.\n\nv1 1:<1>3, 6, 8, 11\nv2 2:<13>15, 17, 19, 21"]
FIRST_AND_LAST = [FIRST[0], "user: A {{ red }} circle.\n\nv1 1:<1>\nv2 2:<13>\nanswer now"]


def test_prompts_of_frames_errors_and_the_last_round(stage_of: MakeStage) -> None:
    script = [look(2, 14), look(99), "<tool_call>x</tool_call>", ANSWER]
    new, last = prompts(stage_of("nano"), script, max_rounds=4)
    assert new[0] == FIRST
    assert new[1] == ["user: <tool_response>\nv1 1:<2>\nv2 2:<14>\n</tool_response>"]
    (error,) = new[2]
    assert re.fullmatch(
        r"user: <tool_response>\nnothing new: unknown frame 99: .* 1 to 22\.\n</tool_response>", error
    )
    (told,) = new[3]
    assert re.fullmatch(
        r"user: <tool_response>\nnothing new: .*not JSON.*\n</tool_response>\nanswer now", told
    )
    assert last[2] == "user: <tool_response>\nv1 1:\nv2 2:\n</tool_response>", "expired: labels stay"


def no_pixels() -> np.ndarray[Any, Any]:
    raise AssertionError("a prompt is made without pixels")


MENU = re.compile(r"v[12] (\d+):<\d+>([\d, ]*)")


@pytest.mark.parametrize("name", ["easy", "medium", "hard"])
def test_the_prompt_offers_behind_each_frame_what_looks_into_its_gap(name: Difficulty) -> None:
    """In every gap that a clip of a preset can have, the very frames that the oracle asks for."""
    config, templates = PRESETS[name], nano_templates()
    for n_frames in range(config.frames[0], config.frames[1] + 1):
        frames, wanted = [], []
        for video, offset in ((1, 1), (2, 301)):  # frame numbers of the second video begin anywhere
            for start, end in pairwise((*first_indices(n_frames), n_frames)):
                place, gap = len(frames) + 1, end - start - 1
                frames.append(PromptFrame(offset + start, video, start, start / 8, place, gap))
                wanted.append([offset + i for i in probes((start, end), config.span[0])])
        segments = {
            f.frame_number: FrameSegment(
                ShownFrame(0, f.frame_number), ("x", f.frame_index), (56, 56), no_pixels
            )
            for f in frames
        }
        context = PromptContext(600, 300, 8, 8, 1, (), ())
        _, task = templates.first_input(context, "A dog.", frames, segments, last_round=False)
        (told,) = texts_of([task])
        menu = {int(number): [int(n) for n in offered.split(",")] for number, offered in MENU.findall(told)}
        assert list(menu) == [frame.position for frame in frames] == list(range(1, 9))
        assert list(menu.values()) == wanted, n_frames


@pytest.mark.parametrize("name", ["easy", "medium", "hard"])
def test_it_has_rounds_enough_for_every_gap_that_a_preset_can_mark(name: Difficulty) -> None:
    config = PRESETS[name]
    most = len(config.hidden_events) - 1
    calls = 0
    for n_frames in range(config.frames[0], config.frames[1] + 1):
        gaps = list(pairwise((*first_indices(n_frames), n_frames)))
        pending = [sorted(gaps, key=lambda gap: gap[0] - gap[1])[:most]] * 2  # the longest ones
        pending = [sorted(marked) for marked in pending]
        needed = 0
        while any(pending):
            for clip, gap in hinted_call(pending, config.span[0]):
                pending[clip] = [other for other in pending[clip] if other != gap]
            needed += 1
        calls = max(calls, needed)
    assert calls <= nano_settings().episode.max_rounds - 1


def test_prompts_of_a_single_round_and_of_no_memory(stage_of: MakeStage) -> None:
    new, _ = prompts(stage_of("nano"), [ANSWER], max_rounds=1)
    assert new == [FIRST_AND_LAST], "nothing can be asked for, and nothing is offered"
    new, _ = prompts(stage_of("nano"), [look(2, 14), ANSWER], max_rounds=3, window=0)
    assert new[1] == ["user: <tool_response>\nv1 1:\nv2 2:\n</tool_response>"], "p = 0: labels only"
