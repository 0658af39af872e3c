"""The endpoint engine against a real server: transformers' own, with a tiny checkpoint, in its own process.

What it answers is compared with the same model run here on the same processor's inputs.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from clips import make_clip
from PIL import Image
from served import LAUNCHER, Served, skip_without_a_server

from vrthinker import Judge, StopReason
from vrthinker.engine.base import (
    FinishReason,
    FrameSegment,
    Message,
    RoundLimits,
    RoundRequest,
    TextSegment,
    write_rounds,
)
from vrthinker.engine.endpoint.engine import EndpointEngine
from vrthinker.engine.hf.tiny import make_tiny
from vrthinker.visibility import ShownFrame

skip_without_a_server()

# A server that loads torch and transformers takes 10 CPU seconds to start.
pytestmark = [pytest.mark.multi_process, pytest.mark.slow]

SIZES = [(112, 112), (56, 140), (112, 84), (84, 84), (112, 112), (140, 56), (84, 112), (112, 112), (64, 96)]


def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_tiny", LAUNCHER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(
    scope="module",
    params=[pytest.param("qwen2.5-vl", marks=pytest.mark.guard), "qwen3-vl"],
)
def checkpoint(request, tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("served") / request.param, request.param, seed=5)


@pytest.fixture(scope="module")
def address(checkpoint, tmp_path_factory) -> Iterator[str]:
    """A running server."""
    with Served(checkpoint, tmp_path_factory.mktemp("log") / "serve.log") as server:
        yield server.address


@pytest.fixture
def engine(address, checkpoint) -> Iterator[EndpointEngine]:
    with EndpointEngine(address, str(checkpoint), timeout_seconds=60, max_retries=0) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(checkpoint):
    """A function from chat messages (pictures as arrays) to the greedy text of the model run here."""
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32").eval()
    family = {
        "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
        "qwen3_vl": transformers.Qwen3VLProcessor,
    }[model.config.model_type]
    processor = launcher().images_only(family).from_pretrained(checkpoint)

    def write(messages: list[dict], tokens: int) -> tuple[str, int, int]:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, length:]
        # The server cuts the turn's end off and leaves other special tokens in the text.
        text = processor.tokenizer.decode(ids).partition("<|im_end|>")[0]
        return text.strip(), length, len(ids)

    return write


def pixels(number: int) -> np.ndarray:
    height, width = SIZES[number - 1]
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def frame(outcome: int, number: int) -> FrameSegment:
    size = SIZES[number - 1]
    return FrameSegment(ShownFrame(outcome, number), ("a.mp4", number, *size), size, lambda: pixels(number))


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def sent(text: str) -> str:
    """A round's text as it goes back: special spellings (a random model writes them) taken apart."""
    return text.replace("<|", "<\u200b|")


def picture_part(number: int) -> dict:
    return {"type": "image", "image": Image.fromarray(pixels(number))}


def test_rounds_equal_the_model_run_here_also_after_expiry(engine, reference):
    system = "You judge two videos."
    task = [Message("system", (TextSegment(system),))]
    parts = [p for n in range(1, 9) for p in (TextSegment(f"Frame {n}: "), frame(0, n))]
    task.append(Message("user", (*parts, TextSegment("Which one is better?"))))
    session = engine.open(task)
    limits = RoundLimits(max_tokens=20)
    (first,) = write_rounds(engine, [RoundRequest(session, limits=limits)])

    shown = [p for n in range(1, 9) for p in (text_part(f"Frame {n}: "), picture_part(n))]
    conversation = [
        {"role": "system", "content": [text_part(system)]},
        {"role": "user", "content": [*shown, text_part("Which one is better?")]},
    ]
    wanted, prompt, written = reference(conversation, 20)
    assert wanted, "the random model ended its turn at once: nothing is compared"
    assert first.error is None
    assert first.text.strip() == wanted
    assert first.prompt_tokens == prompt
    assert first.finish_reason is (FinishReason.LENGTH if written == 20 else FinishReason.STOP)
    usage = engine.usage
    assert (usage.requests, usage.images, usage.failures) == (1, 8, 0)
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, written)

    # Round 2 sees a retrieved frame; in round 3 that has expired and its label is left.
    more = Message("user", (TextSegment("Frame 9: "), frame(1, 9)))
    (second,) = write_rounds(engine, [RoundRequest(session, (more,), limits=limits)])
    conversation += [
        {"role": "assistant", "content": [text_part(sent(first.text))]},
        {"role": "user", "content": [text_part("Frame 9: "), picture_part(9)]},
    ]
    wanted, prompt, _ = reference(conversation, 20)
    assert (second.text.strip(), second.prompt_tokens) == (wanted, prompt)

    last = Message("user", (TextSegment("Answer now."),))
    (third,) = write_rounds(engine, [RoundRequest(session, (last,), (ShownFrame(1, 9),), limits)])
    conversation[-1] = {"role": "user", "content": [text_part("Frame 9: ")]}
    conversation += [
        {"role": "assistant", "content": [text_part(sent(second.text))]},
        {"role": "user", "content": [text_part("Answer now.")]},
    ]
    wanted, prompt, _ = reference(conversation, 20)
    assert (third.text.strip(), third.prompt_tokens) == (wanted, prompt)
    assert engine.usage.images == 8 + 9 + 8


def test_many_sessions_share_the_server(engine, reference):
    sessions = [
        engine.open([Message("user", (TextSegment(f"Clip {n}: "), frame(0, n)))]) for n in range(1, 7)
    ]
    results = write_rounds(
        engine, [RoundRequest(session, limits=RoundLimits(max_tokens=6)) for session in sessions]
    )
    for number, result in enumerate(results, start=1):
        parts = [text_part(f"Clip {number}: "), picture_part(number)]
        wanted, prompt, _ = reference([{"role": "user", "content": parts}], 6)
        assert (result.text.strip(), result.prompt_tokens) == (wanted, prompt)
    assert engine.usage.requests == 6


def test_seed_and_temperature_reach_the_server(address, checkpoint):
    # This server samples only if the generation settings say so; temperature and seed come with each request.
    sampling = json.dumps({"do_sample": True, "eos_token_id": None, "pad_token_id": 0})
    texts = {}
    with EndpointEngine(
        address,
        str(checkpoint),
        timeout_seconds=60,
        max_retries=0,
        extra_body={"generation_config": sampling},
    ) as engine:
        for seed, temperature in ((1, 2.0), (1, 2.0), (2, 2.0), (1, 0.0), (2, 0.0)):
            session = engine.open([Message("user", (TextSegment("Say it."), frame(0, 1)))], seed=seed)
            limits = RoundLimits(max_tokens=16, temperature=temperature, top_p=0.95)
            (result,) = write_rounds(engine, [RoundRequest(session, limits=limits)])
            assert result.finish_reason is FinishReason.LENGTH, result.error
            assert texts.setdefault((seed, temperature), result.text) == result.text, (
                "equal seeds, other texts"
            )
    assert texts[1, 2.0] != texts[2, 2.0]
    assert texts[1, 0.0] == texts[2, 0.0]


def test_a_refusal_of_the_real_server_is_one_line(address):
    with EndpointEngine(address, "another/model", "sk-secret", max_retries=0) as engine:
        session = engine.open([Message("user", (TextSegment("hello"),))])
        (result,) = write_rounds(engine, [RoundRequest(session)])
    assert result.finish_reason is FinishReason.ERROR
    assert result.error is not None
    assert "HTTP 400" in result.error
    assert "Server is pinned to" in result.error


def test_a_judge_behind_the_endpoint_shows_its_frames_and_says_why_there_is_no_verdict(
    address, checkpoint, tmp_path
):
    first = make_clip(tmp_path / "a.mp4", 20, size=(64, 96))
    second = make_clip(tmp_path / "b.mp4", 12, size=(64, 96))
    options = {"max_pixels": 64 * 96, "max_round_tokens": 12, "engine_options": {"max_retries": 0}}
    with Judge.from_endpoint(address, str(checkpoint), **options) as judge:
        verdict = judge("a dog", first, second)
        assert judge.engine.usage.images == 8
    assert verdict.frames_seen == (1, 6, 11, 16, 21, 24, 27, 30)
    assert verdict.judgments is None
    assert verdict.stop_reason in (StopReason.TOKEN_LIMIT, StopReason.UNPARSEABLE)
    assert "round 1" in verdict.reason
    with Judge.from_endpoint("http://127.0.0.1:9", "x", engine_options={"max_retries": 0}) as nobody:
        verdict = nobody("a dog", first, second)
    assert verdict.stop_reason is StopReason.ENGINE_ERROR
    assert "127.0.0.1:9" in verdict.reason
