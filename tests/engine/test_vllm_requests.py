"""What is asked of vLLM and what is read from it: all that can be checked without an installed vLLM."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conversations import shows
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.commands.judges import JudgeSource
from vrthinker.engine.base import Message, TextSegment
from vrthinker.engine.endpoint.wire import BadReply
from vrthinker.engine.hf.checkpoint import load_config
from vrthinker.engine.hf.context import Context
from vrthinker.engine.hf.frontend import load_frontend
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.tiny import make_tiny
from vrthinker.engine.sessions import SessionTable
from vrthinker.engine.vllm.engine import VLLMEngine
from vrthinker.engine.vllm.generation import Generation, bans_of, round_seed, sampling_fields
from vrthinker.engine.vllm.library import installed_version
from vrthinker.engine.vllm.local import LocalTransport
from vrthinker.engine.vllm.pictures import Pictures
from vrthinker.engine.vllm.replies import read_tokens
from vrthinker.engine.vllm.served import generate_url
from vrthinker.engine.vllm.weights import WholeWeights
from vrthinker.errors import EngineError, InputError
from vrthinker.judge import Judge
from vrthinker.visibility import ShownFrame


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "q", "qwen2.5-vl", seed=3)


def test_everything_that_a_generation_config_could_change_is_said() -> None:
    generation = Generation("1", [1], (), 5, 0.7, 1.0, 11)
    fields = sampling_fields(generation, bans_of([3, 9]), 2)
    assert fields["logit_bias"] == {3: -1e9, 9: -1e9}
    assert (fields["temperature"], fields["max_tokens"], fields["seed"]) == (0.7, 5, 11)
    assert (fields["stop_token_ids"], fields["ignore_eos"], fields["logprobs"]) == ([2], True, 0)
    assert (fields["top_k"], fields["min_p"], fields["repetition_penalty"]) == (0, 0.0, 1.0)
    json.loads(json.dumps(fields), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    # In float32 a banned token has exactly no mass, so the others' log-probabilities are those without it.
    logits = torch.randn(10)
    biased = logits.clone()
    biased[[3, 9]] += torch.tensor([-1e9, -1e9])
    banned = logits.clone()
    banned[[3, 9]] = -torch.inf
    kept = [0, 1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(biased.log_softmax(-1)[kept], banned.log_softmax(-1)[kept])


def test_a_rounds_seed_follows_from_the_sessions_and_its_number() -> None:
    seeds = {round_seed(seed, number) for seed in range(-3, 30) for number in range(1, 30)}
    assert len(seeds) == 33 * 29
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert round_seed(7, 2) == round_seed(7, 2)


def test_pictures_stand_where_the_context_has_their_placeholders(folder: Path) -> None:
    frontend = load_frontend(folder, load_config(folder))
    markup = Markup(frontend.tokenizer, frontend.vocabulary_size)
    context = Context(markup, frontend.factor)
    context.append_messages([shows(1, [(56, 84), (28, 28)], 0, [1, 2, 3])])
    pictures = Pictures(frontend, torch.float32, 1 << 20)
    first = pictures.of(context)
    ids = context.token_ids()
    assert [picture.length for picture in first] == [1, 6, 1]
    for picture in first:
        span = ids[picture.offset : picture.offset + picture.length]
        assert (span == markup.image_pad).all()
        assert ids[picture.offset - 1] == markup.vision_start
        assert picture.patches.shape == (4 * picture.length, 3 * 2 * 14 * 14)
    assert int((ids == markup.image_pad).sum()) == 8
    context.expire([ShownFrame(0, 2)])
    later = pictures.of(context)
    # The same picture by the same name, somewhere else; and its patches were not made again.
    assert [picture.uuid for picture in later] == [first[0].uuid, first[2].uuid]
    assert later[1].offset != first[2].offset
    assert pictures.made == 3
    assert len({picture.uuid for picture in first}) == 3
    assert Pictures(frontend, torch.float32, 1).of(context)[0].uuid != later[0].uuid, "another engine's name"


def test_pictures_are_kept_under_a_limit(folder: Path) -> None:
    frontend = load_frontend(folder, load_config(folder))
    markup = Markup(frontend.tokenizer, frontend.vocabulary_size)
    context = Context(markup, frontend.factor)
    context.append_messages([shows(1, [(28, 28)], 0, [1, 2, 3])])
    one = 4 * 3 * 2 * 14 * 14 * 4
    pictures = Pictures(frontend, torch.float32, 2 * one)
    pictures.of(context)
    pictures.of(context)
    assert pictures.made == 6  # three in turn do not fit into two
    roomy = Pictures(frontend, torch.float32, 3 * one)
    roomy.of(context)
    roomy.of(context)
    assert (roomy.made, roomy.shown) == (3, 6)


def test_a_picture_of_another_size_than_its_placeholders_is_refused(folder: Path) -> None:
    frontend = load_frontend(folder, load_config(folder))
    markup = Markup(frontend.tokenizer, frontend.vocabulary_size)
    context = Context(markup, frontend.factor)
    message = shows(1, [(56, 56)], 0, [1])
    object.__setattr__(message.frames[0], "load", lambda: np.zeros((28, 28, 3), np.uint8))
    context.append_messages([message])
    with pytest.raises(EngineError, match="got a picture of 1 tokens for 4 placeholders"):
        Pictures(frontend, torch.float32, 1 << 20).of(context)


def test_weights_are_whole_and_tied_ones_are_given_once(folder: Path) -> None:
    from vrthinker.engine.hf.checkpoint import NANO_FOLDER

    for checkpoint, tied in ((folder, False), (NANO_FOLDER, True)):
        weights = WholeWeights(load_config(checkpoint))
        shapes = {name: tuple(tensor.shape) for name, tensor in weights._weights.items()}
        given = {name: torch.zeros(shape) for name, shape in shapes.items()}
        names = [name for name, _ in weights.checked(given)]
        assert len(names) == len(shapes) - tied
        embedding = "model.language_model.embed_tokens.weight"
        del given[embedding]
        if tied:  # by its other name
            assert embedding in dict(weights.checked(given))
        else:
            with pytest.raises(EngineError, match=f"missing {embedding}; give every weight"):
                weights.checked(given)


def reply(**changes: Any) -> bytes:
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "token_ids": [5, 6],
        "logprobs": {"content": [{"token_id": 5, "logprob": -0.5}, {"token_id": 6, "logprob": -1}]},
    }
    usage = {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 32}}
    return json.dumps({"choices": [{**choice, **changes}], "usage": usage}).encode()


def test_a_servers_reply_is_read() -> None:
    read = read_tokens(reply())
    assert (read.token_ids, read.logprobs) == ((5, 6), (-0.5, -1.0))
    assert (read.prompt_tokens, read.completion_tokens, read.cached_tokens) == (40, 2, 32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_ids": None}, "no token_ids"),
        ({"token_ids": [5, True]}, "no token_ids"),
        ({"token_ids": [5, -1]}, "no token_ids"),
        ({"logprobs": None}, "a logprob for each"),
        ({"logprobs": {"content": [{"logprob": -0.5}]}}, "a logprob for each"),
        ({"logprobs": {"content": [{"logprob": -0.5}, {"logprob": "x"}]}}, "a logprob for each"),
        ({"logprobs": {"content": [{"logprob": -0.5}, {"logprob": float("nan")}]}}, "a logprob for each"),
        ({"finish_reason": "abort"}, "ended for another reason: abort"),
    ],
)
def test_a_reply_that_lacks_something_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadReply, match=said):
        read_tokens(reply(**changes))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "token_ids", "logprobs", "content", "usage", "logprob", "finish_reason"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_no_reply_of_a_server_is_an_unforeseen_error(value: object) -> None:
    for body in (value, {"choices": [value]}, {"choices": [{"token_ids": [], "logprobs": value}]}):
        try:
            read_tokens(json.dumps(body).encode())
        except BadReply:
            continue


def test_the_address_of_a_server_may_end_with_v1() -> None:
    wanted = "http://127.0.0.1:8000/inference/v1/generate"
    for server in ("http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/"):
        assert generate_url(server) == wanted
    with pytest.raises(InputError, match="allowed: http"):
        generate_url("127.0.0.1:8000")


def test_engines_and_addresses_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError, match="--engine endpoint: wants --endpoint"):
        JudgeSource("m", engine="endpoint")
    with pytest.raises(InputError, match="--engine hf: goes without --endpoint"):
        JudgeSource("m", engine="hf", endpoint="http://127.0.0.1:1")
    with pytest.raises(InputError, match="--endpoint-extra: goes with --engine endpoint"):
        JudgeSource("m", engine="vllm", endpoint="http://127.0.0.1:1", endpoint_options={"extra_body": {}})


def test_settings_that_vllm_cannot_follow_are_refused_before_it_is_loaded(folder: Path) -> None:
    assert Judge.configuration_of("nano", engine="vllm").model == "vllm:nano"
    with pytest.raises(InputError, match=r"memory: got 'evict', allowed with vLLM: rerender.*--engine hf"):
        Judge.configuration_of("nano", engine="vllm", memory="evict")
    with pytest.raises(InputError, match=r"guided: got true, allowed with vLLM: false.*--engine hf"):
        Judge.configuration_of("nano", engine="vllm", guided=True)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_a_line_says_how_to_get_it() -> None:
    assert installed_version() is None
    with pytest.raises(
        InputError, match=r"engine: got vllm, but vLLM is not installed; make vllm-env .*--engine hf"
    ):
        Judge.from_pretrained("nano", engine="vllm")


def test_an_update_that_fails_half_way_ends_the_engine() -> None:
    """Some weights may be new and some old, and the caches of either."""

    def fail(pairs: object, policy_version: int) -> None:
        raise EngineError("vllm:q: no room")

    engine = VLLMEngine.__new__(VLLMEngine)
    engine._gone, engine._policy_version, engine._name = None, 3, "vllm:q"
    engine._sessions = SessionTable(2, name="vllm:q")
    engine._weights = SimpleNamespace(checked=lambda tensors: [])  # type: ignore[assignment]
    engine._transport = SimpleNamespace(update_weights=fail)  # type: ignore[assignment]
    with pytest.raises(EngineError, match="no room"):
        engine.update_weights({}, 4)
    assert engine.policy_version == 3
    with pytest.raises(EngineError, match=r"no room; .* two policies: make a new engine"):
        engine.open([Message("user", (TextSegment("hello"),))])


def test_vllm_that_sleeps_takes_no_request() -> None:
    transport = LocalTransport.__new__(LocalTransport)
    transport._asleep = True
    transport._frontend = SimpleNamespace(folder=Path("q"))  # type: ignore[assignment]
    with pytest.raises(EngineError, match=r"vllm:q: asleep, .*call update_weights first"):
        transport.submit(Generation("1", [1], (), 5, 0.7, 1.0, 11))


def test_a_text_only_context_has_no_pictures(folder: Path) -> None:
    frontend = load_frontend(folder, load_config(folder))
    context = Context(Markup(frontend.tokenizer, frontend.vocabulary_size), frontend.factor)
    context.append_messages([Message("user", (TextSegment("<|image_pad|> is only text"),))])
    assert Pictures(frontend, torch.float32, 1).of(context) == ()
