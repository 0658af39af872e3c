"""The vLLM engine against the transformers engine: the same rounds from the same contexts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conversations import play, shows

from vrthinker.engine.base import (
    Choice,
    FinishReason,
    Message,
    RoundLimits,
    RoundRequest,
    RoundResult,
    TextSegment,
    write_rounds,
)
from vrthinker.engine.hf.checkpoint import NANO_FOLDER
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.hf.tiny import make_tiny
from vrthinker.engine.vllm.engine import VLLMEngine
from vrthinker.engine.vllm.library import LocalOptions
from vrthinker.errors import EngineError

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4
"""Of log-probabilities in fp32: two implementations sum in different orders."""
HERE = LocalOptions(own_process=False, kv_cache_bytes=256 << 20, max_batch_tokens=2048)
KINDS = ("qwen2.5-vl", "qwen3-vl", "nano")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "nano":
        return NANO_FOLDER
    return make_tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param, seed=3)


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[tuple[VLLMEngine, HFEngine]]:
    with VLLMEngine(folder, dtype="float32", max_sessions=64, max_context_tokens=2048, local=HERE) as engine:
        reference = HFEngine(folder, device="cpu", dtype="float32", max_sessions=64, max_context_tokens=2048)
        yield engine, reference
        reference.shutdown()


def logprobs_of(rounds: Sequence[Sequence[RoundResult]]) -> torch.Tensor:
    return torch.tensor([value for results in rounds for one in results for value in one.logprobs or ()])


def texts_of(rounds: Sequence[Sequence[RoundResult]]) -> list[list[tuple[int, ...] | None]]:
    return [[one.token_ids for one in results] for results in rounds]


def test_greedy_rounds_are_those_of_transformers(engines: tuple[VLLMEngine, HFEngine]) -> None:
    engine, reference = engines
    factor = engine.frontend.factor[0]
    got = play(engine, factor=factor, conversations=8, group=4, max_tokens=12)
    wanted = play(reference, factor=factor, conversations=8, group=4, max_tokens=12)
    assert [len(results) for results in got] == [3] * 8
    assert texts_of(got) == texts_of(wanted)
    assert [[r.finish_reason for r in c] for c in got] == [[r.finish_reason for r in c] for c in wanted]
    assert [[r.prompt_tokens for r in c] for c in got] == [[r.prompt_tokens for r in c] for c in wanted]
    assert (logprobs_of(got) - logprobs_of(wanted)).abs().max() < TOLERANCE
    # X is found in the prefix cache: by the other members of its group, and in every later round.
    assert engine.usage.cached_tokens > 0.3 * engine.usage.prompt_tokens


def test_sixty_four_conversations_have_a_placeholder_for_every_token_of_every_frame(
    engines: tuple[VLLMEngine, HFEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = engines
    core = engine.transport.engine.engine_core.engine_core  # type: ignore[attr-defined]
    model = core.model_executor.driver_worker.worker.model_runner.model
    encoded: list[int] = []
    embed = model.embed_multimodal

    def counted(**inputs: object) -> object:
        outputs = embed(**inputs)
        encoded.extend(len(one) for one in outputs)
        return outputs

    monkeypatch.setattr(model, "embed_multimodal", counted)
    posted: list[tuple[int, int]] = []
    submit = engine.transport.submit

    def noted(generation):  # type: ignore[no-untyped-def]
        pads = generation.token_ids.count(engine.markup.image_pad)
        posted.append((pads, sum(picture.length for picture in generation.pictures)))
        for picture in generation.pictures:
            span = generation.token_ids[picture.offset - 1 : picture.offset + picture.length + 1]
            assert span[0] == engine.markup.vision_start
            assert span[-1] == engine.markup.vision_end
            assert set(span[1:-1]) == {engine.markup.image_pad}
        submit(generation)

    monkeypatch.setattr(engine.transport, "submit", noted)
    rounds = play(
        engine,
        factor=engine.frontend.factor[0],
        conversations=64,
        group=8,
        temperature=1.0,
        max_tokens=4,
        seed=5,
    )
    assert [len(results) for results in rounds] == [3] * 64
    assert all(one.error is None for results in rounds for one in results)
    assert len(posted) == 64 * 3
    assert all(pads == of_frames for pads, of_frames in posted)
    # Each distinct picture is encoded once, whoever shows it: 8 openings of 4 frames, and what was asked for.
    sizes = {area for area in (4, 6, 2)}
    assert set(encoded) <= sizes
    assert len(encoded) <= 8 * (4 + 30)
    assert len(encoded) < engine.pictures.shown / 4


def test_a_round_samples_the_same_alone_and_among_others(engines: tuple[VLLMEngine, HFEngine]) -> None:
    engine, _ = engines
    factor = engine.frontend.factor[0]
    together = play(engine, factor=factor, conversations=6, temperature=0.9, max_tokens=6)
    again = play(engine, factor=factor, conversations=2, temperature=0.9, max_tokens=6)
    assert texts_of(again) == texts_of(together)[:2]
    assert len({str(texts) for texts in texts_of(together)}) > 1


def test_sampled_tokens_have_the_logprobs_of_the_banned_and_tempered_distribution(
    engines: tuple[VLLMEngine, HFEngine],
) -> None:
    engine, reference = engines
    temperature = 0.7
    opening = [shows(7, [(engine.frontend.factor[0] * 2,) * 2], 0, [1, 2])]
    limits = RoundLimits(10, temperature=temperature)
    sessions = [engine.open(opening, seed=seed) for seed in range(4)]
    results = write_rounds(engine, [RoundRequest(session, limits=limits) for session in sessions])
    for session in sessions:
        engine.close(session)
    reference._keep_logits = True
    banned = reference.vocabulary.banned
    for result in results:
        ids = result.token_ids
        assert ids is not None
        assert not banned[list(ids)].any()
        # The transformers engine is made to write the same ids, and tells what it would have drawn from.
        text = result.text if ids[-1] == reference.markup.turn_end else None
        session = reference.open(opening)
        state = reference._sessions[session]
        state.context.append_round(ids[:-1])
        (forced,) = write_rounds(reference, [RoundRequest(session, limits=RoundLimits(1))])
        reference.close(session)
        logits = forced.logits[0].masked_fill(banned, -torch.inf)
        wanted = torch.log_softmax(logits / temperature, -1)[ids[-1]]
        assert result.logprobs is not None
        assert abs(result.logprobs[-1] - float(wanted)) < TOLERANCE, text
    reference._keep_logits = False


def test_new_weights_are_what_the_next_rounds_are_written_with(
    folder: Path, engines: tuple[VLLMEngine, HFEngine]
) -> None:
    engine, reference = engines
    factor = engine.frontend.factor[0]
    old = {name: tensor.clone() for name, tensor in reference.model.model.state_dict().items()}
    before = play(engine, factor=factor, conversations=3, rounds=2)
    generator = torch.Generator().manual_seed(1)
    # The vision tower moves too: a picture that was encoded before must not be found.
    new = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in old.items()
    }
    if folder.name == "nano":
        new["lm_head.weight"] = new["model.language_model.embed_tokens.weight"]
    try:
        for one in (engine, reference):
            one.update_weights(new, 1)
        got = play(engine, factor=factor, conversations=3, rounds=2)
        wanted = play(reference, factor=factor, conversations=3, rounds=2)
        assert texts_of(got) == texts_of(wanted)
        assert (logprobs_of(got) - logprobs_of(wanted)).abs().max() < TOLERANCE
        assert logprobs_of(got).shape != logprobs_of(before).shape or (
            (logprobs_of(got) - logprobs_of(before)).abs().max() > 100 * TOLERANCE
        )
        assert engine.policy_version == 1
    finally:
        for one in (engine, reference):
            one.update_weights(old, 0)
    assert texts_of(play(engine, factor=factor, conversations=3, rounds=2)) == texts_of(before)


def test_weights_are_replaced_as_a_whole_or_not_at_all(engines: tuple[VLLMEngine, HFEngine]) -> None:
    engine, reference = engines
    weights = dict(reference.model.model.state_dict())
    first = next(iter(weights))
    with pytest.raises(EngineError, match=r"missing .* give every weight"):
        engine.update_weights({first: weights[first]}, 1)
    with pytest.raises(EngineError, match=r"unknown tensor 'no.such'"):
        engine.update_weights({**weights, "no.such": weights[first]}, 1)
    with pytest.raises(EngineError, match="got shape"):
        engine.update_weights({**weights, first: weights[first][:1]}, 1)
    session = engine.open([Message("user", (TextSegment("hello"),))])
    with pytest.raises(EngineError, match="close them first"):
        engine.update_weights(weights, 1)
    engine.close(session)


def test_what_vllm_cannot_do_is_refused_with_what_to_do(engines: tuple[VLLMEngine, HFEngine]) -> None:
    engine, _ = engines
    opening = [Message("user", (TextSegment("hello"),))]
    for memory in ("evict", "renumber"):
        with pytest.raises(
            EngineError, match=f"memory: got '{memory}', allowed with vLLM: rerender.*--engine hf"
        ):
            engine.open(opening, memory=memory)  # type: ignore[arg-type]
    session = engine.open(opening)
    with pytest.raises(EngineError, match=r"guided rounds are not supported with vLLM.*--engine hf"):
        engine.submit(RoundRequest(session, limits=RoundLimits(4, form=(Choice(("yes",)),))))
    with pytest.raises(EngineError, match=r"temperature: got 0.005, allowed with vLLM: 0, or 0.01"):
        engine.submit(RoundRequest(session, limits=RoundLimits(4, temperature=0.005)))
    (result,) = write_rounds(
        engine, [RoundRequest(session, limits=RoundLimits(4, temperature=1.0, top_p=0.5))]
    )
    assert result.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert result.logprobs is None  # vLLM's are those after the cut
    engine.close(session)


def test_a_closed_session_is_forgotten_and_the_others_go_on(engines: tuple[VLLMEngine, HFEngine]) -> None:
    engine, _ = engines
    opening = [Message("user", (TextSegment("hello"),))]
    sessions = [engine.open(opening, seed=seed) for seed in range(3)]
    for session in sessions:
        engine.submit(RoundRequest(session, limits=RoundLimits(200, temperature=1.0)))
    engine.collect(0.0)
    engine.close(sessions[0])
    engine.close(sessions[0])
    left = {sessions[1].id, sessions[2].id}
    while left:
        found = engine.collect()
        assert found
        left -= {result.session.id for result in found}
    assert engine.collect() == []
    for session in sessions:
        engine.close(session)


def test_a_request_that_vllm_refuses_fails_alone(engines: tuple[VLLMEngine, HFEngine]) -> None:
    engine, _ = engines
    opening = [Message("user", (TextSegment("hello"),))]
    one, other = engine.open(opening), engine.open(opening)
    known = engine.max_context_tokens
    try:
        engine.max_context_tokens = 1 << 20  # vLLM's own limit is lower
        long = (Message("user", (TextSegment("word " * 4000),)),)
        results = write_rounds(
            engine,
            [RoundRequest(one, long, limits=RoundLimits(3)), RoundRequest(other, limits=RoundLimits(3))],
        )
    finally:
        engine.max_context_tokens = known
    assert results[0].finish_reason is FinishReason.ERROR
    assert "longer than the maximum model length" in (results[0].error or "")
    assert results[1].error is None
    engine.close(one)
    engine.close(other)


def test_a_frame_that_cannot_be_loaded_fails_its_round_alone(engines: tuple[VLLMEngine, HFEngine]) -> None:
    engine, _ = engines
    factor = engine.frontend.factor[0]
    good = shows(3, [(factor, factor)], 0, [1])
    bad = shows(4, [(factor, factor)], 0, [1])
    (frame,) = bad.frames

    def broken() -> object:
        raise OSError("the disk is gone")

    object.__setattr__(frame, "load", broken)
    one, other = engine.open([good]), engine.open([bad])
    results = write_rounds(engine, [RoundRequest(s, limits=RoundLimits(3)) for s in (one, other)])
    assert results[0].error is None
    assert results[1].finish_reason is FinishReason.ERROR
    assert "the disk is gone" in (results[1].error or "")
    # The same context again, now that the disk is back.
    object.__setattr__(frame, "load", good.frames[0].load)
    more = (Message("user", (TextSegment("go on"),)),)
    (again,) = write_rounds(engine, [RoundRequest(other, more, limits=RoundLimits(3))])
    assert again.error is None
    engine.close(one)
    engine.close(other)


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_killed_core_ends_every_round_with_its_reason(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "tiny", "qwen2.5-vl", seed=3)
    local = LocalOptions(own_process=True, kv_cache_bytes=256 << 20, max_batch_tokens=2048)
    with VLLMEngine(folder, dtype="float32", max_sessions=64, max_context_tokens=4096, local=local) as engine:
        rounds = play(engine, factor=28, conversations=4, rounds=2)
        assert all(one.error is None for results in rounds for one in results)
        sessions = [engine.open([shows(9, [(28, 28)], 0, [1])], seed=seed) for seed in range(64)]
        for session in sessions:
            engine.submit(RoundRequest(session, limits=RoundLimits(2000, temperature=1.0)))
        engine.collect(0.5)
        (pid,) = engine.transport.core_pids  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
        failed: list[RoundResult] = []
        while found := engine.collect():
            failed += [result for result in found if result.finish_reason is FinishReason.ERROR]
        assert len(failed) > 32
        assert all("its process was ended" in (result.error or "") for result in failed)
        with pytest.raises(EngineError, match="run again to judge what is missing"):
            engine.open([shows(9, [(28, 28)], 0, [1])])
