"""Sessions whose expired frames leave the cache, against a cache that is kept the slow, obvious way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.test_hf_engine import Conversation, close_enough
from products import covering
from transformers import DynamicCache

from vrthinker.engine.base import (
    Choice,
    FrameSegment,
    Message,
    RoundLimits,
    RoundRequest,
    RoundResult,
    TextSegment,
    write_rounds,
)
from vrthinker.engine.endpoint.engine import EndpointEngine
from vrthinker.engine.hf import model as hf_model
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.hf.rows import SessionRows
from vrthinker.engine.hf.tiny import make_tiny
from vrthinker.errors import EngineError
from vrthinker.visibility import MemoryMode, ShownFrame
from vrthinker.world.nano import write_nano

KINDS = ("qwen2.5-vl", "qwen3-vl", "nano")


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / request.param
    if request.param == "nano":
        return write_nano(folder, seed=3)
    return make_tiny(folder, request.param, seed=3, layers=4)


@dataclass
class _Row:
    """One token in the oracle's cache."""

    position: int  # temporal, as it stands now
    showing: ShownFrame | None


class CacheOracle:
    """transformers' own cache, from which expired tokens are cut with an index, key by key.

    `renumber`: every key behind a frame that left is turned back by the positions that the frame took, in
        double
    precision, and what comes next counts on from there.
    """

    def __init__(self, engine: HFEngine, memory: MemoryMode) -> None:
        self.engine, self.memory = engine, memory
        self.language = engine.model.model.model.language_model
        self.factor = engine.model.patch_size * engine.model.merge_size
        self.cache = DynamicCache()
        self.rows: list[_Row] = []
        self.next_position = 0

    def expire(self, expired: Sequence[ShownFrame]) -> None:
        """Cuts expired frames out."""
        for shown in expired:
            own = [place for place, row in enumerate(self.rows) if row.showing == shown]
            kept = [place for place, row in enumerate(self.rows) if row.showing != shown]
            assert own
            behind = [new for new, place in enumerate(kept) if place > own[-1]]
            freed = self.positions_of(shown) if self.memory == "renumber" else 0
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
                if freed:
                    layer.keys[:, :, behind] = self.turned(layer.keys[:, :, behind], freed)
            self.rows = [self.rows[place] for place in kept]
            for place in behind if freed else ():
                self.rows[place].position -= freed
            self.next_position -= freed

    def positions_of(self, shown: ShownFrame) -> int:
        """How many positions a frame took: from its first marker's to its last one's."""
        own = [row.position for row in self.rows if row.showing == shown]
        return own[-1] - own[0] + 1

    def turned(self, keys: torch.Tensor, freed: int) -> torch.Tensor:
        """Keys at positions that are `freed` lower."""
        rotary = self.language.rotary_emb
        angles = torch.outer(torch.tensor([-float(freed)]).double(), rotary.inv_freq.double())[0]
        low, high = keys.double().chunk(2, dim=-1)
        turned = torch.cat(
            (low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), dim=-1
        )
        return turned.float()

    def feed(self, parts: Sequence[int | FrameSegment]) -> torch.Tensor:
        """Runs text tokens and frames; logits after each token."""
        markup, model = self.engine.markup, self.engine.model
        ids: list[int] = []
        columns: list[tuple[int, int, int]] = []
        frames = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                columns.append((self.next_position,) * 3)
                self.rows.append(_Row(self.next_position, None))
                self.next_position += 1
                continue
            frames.append(part.load())
            height, width = part.size[0] // self.factor, part.size[1] // self.factor
            begin = self.next_position
            inside = [(begin + 1, begin + 1 + y, begin + 1 + x) for y in range(height) for x in range(width)]
            end = begin + 1 + max(height, width)
            columns += [(begin,) * 3, *inside, (end,) * 3]
            ids += [markup.vision_start, *[markup.image_pad] * len(inside), markup.vision_end]
            self.rows += [_Row(column[0], part.shown) for column in [(begin,), *inside, (end,)]]
            self.next_position = end + 1
        tensor = torch.tensor([ids])
        with torch.inference_mode():
            embeds = self.language.embed_tokens(tensor)
            extra: dict[str, Any] = {}
            if frames:
                encoded = [model.encode([frame])[0] for frame in frames]
                images = tensor == markup.image_pad
                rows = torch.cat([one.embeds for one in encoded])
                embeds = embeds.masked_scatter(images[..., None], rows)
                if encoded[0].deepstack:
                    layers = zip(*(one.deepstack for one in encoded), strict=True)
                    extra = {
                        "visual_pos_masks": images,
                        "deepstack_visual_embeds": [torch.cat(layer) for layer in layers],
                    }
            hidden = self.language(
                inputs_embeds=embeds,
                position_ids=torch.tensor(columns).T[:, None],
                attention_mask=None,
                past_key_values=self.cache,
                use_cache=True,
                **extra,
            ).last_hidden_state
            logits: torch.Tensor = model.model.lm_head(hidden)[0]
        return logits


class Evicting(Conversation):
    """A conversation with its oracle beside it."""

    def __init__(self, engine: HFEngine, seed: int, window: int | None, memory: MemoryMode) -> None:
        super().__init__(engine, np.random.default_rng(seed), window, 2 + seed % 3, seed, memory)
        self.oracle = CacheOracle(engine, memory)
        self.fresh: list[int | FrameSegment] = []
        self.gone: tuple[ShownFrame, ...] = ()
        for message in self.messages:
            self.add(message)
        self.fresh += engine.markup.generation_prompt

    def add(self, message: Message) -> None:
        markup = self.engine.markup
        self.fresh += markup.turn_opening(message.role)
        for segment in message.segments:
            self.fresh += [segment] if isinstance(segment, FrameSegment) else markup.encode(segment.text)
        self.fresh += markup.turn_closing

    def request(self, limits: RoundLimits) -> RoundRequest:
        request = super().request(limits)
        self.gone = request.expired
        return request

    def check(self, result: RoundResult) -> None:
        """The round's logits, and that nothing but what is new was computed."""
        assert result.token_ids is not None, result.error
        assert result.logits is not None
        self.oracle.expire(self.gone)
        before = len(self.oracle.rows)
        prompt = self.oracle.feed(self.fresh)
        wanted = prompt[-1:]
        new = len(self.oracle.rows) - before
        assert result.prefilled_tokens == new
        assert result.prompt_tokens == before + new
        written = list(result.token_ids)
        if len(written) > 1:
            wanted = torch.cat([wanted, self.oracle.feed(written[:-1])])
        close_enough(result.logits, wanted)
        self.written(result.token_ids, n_frames=int(self.rng.integers(1, 4)))
        markup = self.engine.markup
        self.fresh = [written[-1]]
        self.fresh += markup.newline if written[-1] == markup.turn_end else markup.turn_closing
        for message in self.pending:
            self.add(message)
        self.fresh += markup.generation_prompt


@pytest.mark.versions
@pytest.mark.parametrize(("window", "memory"), covering([0, 1, 2, None], ["evict", "renumber"], strength=1))
def test_every_round_equals_a_cache_that_is_cut_by_hand(
    checkpoint: Path, window: int | None, memory: MemoryMode
) -> None:
    """Six rounds of three sessions of different length, in one batch."""
    engine = HFEngine(checkpoint, keep_logits=True, max_sessions=3, prefill_tokens=400)
    talks = [Evicting(engine, seed, window, memory) for seed in range(3)]
    for number in range(6):
        limits = [RoundLimits(max_tokens=2 + 3 * seed + number % 2, temperature=1.0) for seed in range(3)]
        requests = [talk.request(limit) for talk, limit in zip(talks, limits, strict=True)]
        for talk, result in zip(talks, write_rounds(engine, requests), strict=True):
            talk.check(result)
    expired = sum(len(talk.expired) for talk in talks)
    assert (expired > 0) == (window in (1, 2))


def test_modes_in_one_batch_do_not_mix(checkpoint: Path) -> None:
    engine = HFEngine(checkpoint, keep_logits=True, max_sessions=3)
    modes: tuple[MemoryMode, ...] = ("evict", "renumber")
    talks = [Evicting(engine, seed, 1, memory) for seed, memory in enumerate(modes)]
    other = Conversation(engine, np.random.default_rng(9), 1, 2, 9)
    for _ in range(4):
        limits = RoundLimits(max_tokens=4, temperature=1.0)
        results = write_rounds(engine, [talk.request(limits) for talk in (*talks, other)])
        for talk, result in zip(talks, results[:2], strict=True):
            talk.check(result)
        assert results[2].token_ids is not None
        close_enough(results[2].logits, other.oracle_logits(results[2].token_ids))
        other.written(results[2].token_ids, 2)


def test_nan_in_rows_that_leave_changes_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in an expired frame's rows is gone: before they are freed, and after."""

    def logits(*, poisoned: bool) -> list[torch.Tensor]:
        engine = HFEngine(checkpoint, keep_logits=True, max_sessions=2)
        talks = [Evicting(engine, seed, 1, "evict") for seed in range(2)]
        found = []
        evicted = 0
        real = SessionRows.evict

        def evict(rows: SessionRows, states: Any) -> None:
            nonlocal evicted
            if poisoned:
                for state in states:
                    for rows_to_free in state.freed:
                        evicted += rows_to_free.end - rows_to_free.start
                        for tensor in (*rows.cache.keys, *rows.cache.values):
                            tensor[state.row, :, rows_to_free.start : rows_to_free.end] = torch.nan
            real(rows, states)

        with monkeypatch.context() as patch:
            patch.setattr(SessionRows, "evict", evict)
            for _ in range(4):
                limits = RoundLimits(max_tokens=5, temperature=1.0)
                results = write_rounds(engine, [talk.request(limits) for talk in talks])
                for talk, result in zip(talks, results, strict=True):
                    assert result.token_ids is not None, result.error
                    assert result.logits is not None
                    found.append(result.logits)
                    talk.written(result.token_ids, 2)
        assert (evicted > 0) == poisoned
        return found

    for clean, dirty in zip(logits(poisoned=False), logits(poisoned=True), strict=True):
        assert torch.isfinite(clean).all()
        assert torch.equal(clean, dirty)


def test_nan_behind_what_is_left_is_overwritten_before_it_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(*, poisoned: bool) -> list[torch.Tensor]:
        engine = HFEngine(checkpoint, keep_logits=True, max_sessions=1)
        talk = Evicting(engine, 0, 1, "evict")
        real = SessionRows.evict

        def evict(rows: SessionRows, states: Any) -> None:
            before = {state.row: state.filled for state in states}
            real(rows, states)
            for state in states if poisoned else ():
                for tensor in (*rows.cache.keys, *rows.cache.values):
                    tensor[state.row, :, state.filled : before[state.row]] = torch.nan

        with monkeypatch.context() as patch:
            patch.setattr(SessionRows, "evict", evict)
            found = []
            for _ in range(4):
                (result,) = write_rounds(engine, [talk.request(RoundLimits(max_tokens=5, temperature=1.0))])
                assert result.token_ids is not None, result.error
                assert result.logits is not None
                found.append(result.logits)
                talk.written(result.token_ids, 3)
        return found

    for clean, dirty in zip(logits(poisoned=False), logits(poisoned=True), strict=True):
        assert torch.equal(clean, dirty)


def scripted_logits(checkpoint: Path, memory: MemoryMode, seed: int) -> list[torch.Tensor]:
    """Three rounds of fixed ids; `seed` is of the pixels of the frame that expires before the third."""
    engine = HFEngine(checkpoint, keep_logits=True, max_sessions=1)
    side = engine.model.patch_size * engine.model.merge_size

    def picture(outcome: int, number: int, of: int) -> FrameSegment:
        pixels = np.random.default_rng(of).integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)
        return FrameSegment(ShownFrame(outcome, number), ("clip", number), (side, 2 * side), lambda: pixels)

    def says(text: str) -> RoundLimits:
        return RoundLimits(50, temperature=1.0, form=(Choice((text,)),))

    first = Message("user", (TextSegment("A pair: "), picture(0, 1, 1)))
    session = engine.open([first], memory=memory)
    rounds: list[tuple[tuple[Message, ...], tuple[ShownFrame, ...], str]] = [
        ((), (), "the first, please"),
        ((Message("user", (TextSegment("Here: "), picture(1, 2, seed))),), (), "the second, please"),
        (
            (Message("user", (TextSegment("Here: "), picture(2, 3, 3))),),
            (ShownFrame(1, 2),),
            "that is all I want to know",
        ),
    ]
    found = []
    for new, expired, text in rounds:
        (result,) = write_rounds(engine, [RoundRequest(session, new, expired, says(text))])
        assert result.logits is not None, result.error
        found.append(result.logits)
    return found


@pytest.mark.parametrize("memory", ["rerender", "evict"])
def test_an_expired_frames_pixels(checkpoint: Path, memory: MemoryMode) -> None:
    """`rerender`: they are gone, to the bit. `evict`: tokens that were read beside them remember."""
    one, other = (scripted_logits(checkpoint, memory, seed) for seed in (5, 6))
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1]), "the frame was seen while it was live"
    if memory == "rerender":
        assert torch.equal(one[2], other[2])
    else:
        assert (one[2] - other[2]).abs().max() > 1e-4 * one[2].abs().max()


@pytest.mark.parametrize("memory", ["rerender", "evict", "renumber"])
def test_forks_write_what_separate_sessions_write(checkpoint: Path, memory: MemoryMode) -> None:
    def texts(*, forked: bool) -> list[list[tuple[int, ...] | None]]:
        engine = HFEngine(checkpoint, max_sessions=3)
        rng = np.random.default_rng(4)
        talk = Conversation(engine, rng, 1, 3, seed=0, memory=memory)
        if forked:
            sessions = [talk.session, *engine.fork(talk.session, [1, 2])]
            assert engine.features.misses == 3, "each frame was encoded once"
        else:
            sessions = [talk.session, *(engine.open(talk.messages, seed=s, memory=memory) for s in (1, 2))]
        found: list[list[tuple[int, ...] | None]] = [[] for _ in sessions]
        for _ in range(3):
            request = talk.request(RoundLimits(max_tokens=6, temperature=1.0))
            requests = [RoundRequest(s, request.new, request.expired, request.limits) for s in sessions]
            for own, result in zip(found, write_rounds(engine, requests), strict=True):
                own.append(result.token_ids)
            talk.written((1,), 2)
        return found

    assert texts(forked=True) == texts(forked=False)


def test_a_failed_round_ends_an_evicting_session(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache cannot be computed anew: what expired frames left behind in it is lost."""
    engine = HFEngine(checkpoint, keep_logits=True, max_sessions=2)
    talk = Evicting(engine, 0, 1, "evict")
    limits = RoundLimits(max_tokens=3, temperature=1.0)
    (result,) = write_rounds(engine, [talk.request(limits)])
    assert result.token_ids is not None
    talk.written(result.token_ids, 1)

    def broken(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(SessionRows, "prefill", broken)
        (failed,) = write_rounds(engine, [talk.request(limits)])
    assert failed.error == "out of memory"
    with pytest.raises(EngineError, match="a round failed, and its cache is lost"):
        engine.submit(RoundRequest(talk.session, talk.pending, (), limits))
    engine.close(talk.session)
    again = Evicting(engine, 1, 1, "evict")
    (result,) = write_rounds(engine, [again.request(limits)])
    again.check(result)


def test_an_eviction_that_fails_ends_only_the_sessions_that_evict(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = HFEngine(checkpoint, max_sessions=2)
    evicting = Evicting(engine, 0, 1, "evict")
    other = Conversation(engine, np.random.default_rng(9), None, 2, 9)
    limits = RoundLimits(max_tokens=3, temperature=1.0)
    for _ in range(2):
        results = write_rounds(engine, [evicting.request(limits), other.request(limits)])
        for talk, result in zip((evicting, other), results, strict=True):
            assert result.token_ids is not None, result.error
            talk.written(result.token_ids, 1)

    def broken(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("vrthinker.engine.hf.rows.evict_cache", broken)
    lost, kept = write_rounds(engine, [evicting.request(limits), other.request(limits)])
    assert lost.error == "no room"
    assert kept.error is None


def test_gaps_count_against_the_context_limit(checkpoint: Path) -> None:
    """Positions go on as if nothing had left, and the model knows only so many."""

    def last_error(memory: MemoryMode, limit: int | None) -> tuple[str | None, int, int]:
        engine = HFEngine(checkpoint, max_sessions=1)
        side = engine.model.patch_size * engine.model.merge_size

        def message(outcome: int) -> Message:
            # Wide frames take as many positions as tokens.
            size, pixels = (side, 8 * side), np.full((side, 8 * side, 3), outcome, np.uint8)
            return Message(
                "user",
                tuple(
                    FrameSegment(ShownFrame(outcome, n), ("clip", outcome * 9 + n), size, lambda: pixels)
                    for n in range(4)
                ),
            )

        session = engine.open([message(0)], memory=memory)
        form = (Choice(("more",)),)
        for number in range(7):
            if number == 6 and limit is not None:
                engine.max_context_tokens = limit
            gone = tuple(ShownFrame(number - 1, n) for n in range(4)) if number > 1 else ()
            new = (message(number),) if number else ()
            (result,) = write_rounds(engine, [RoundRequest(session, new, gone, RoundLimits(9, form=form))])
        context = engine._sessions[session].context
        return result.error, len(context), context.next_position

    error, tokens, positions = last_error("evict", None)
    assert error is None
    assert positions > tokens + 100
    limit = tokens + 50
    error, _, _ = last_error("evict", limit)
    assert error is not None
    assert error.startswith("context: ")
    assert last_error("renumber", limit)[0] is None
    assert last_error("rerender", limit)[0] is None


def test_what_is_not_reused_is_not_counted_as_reused(checkpoint: Path) -> None:
    engine = HFEngine(checkpoint, max_sessions=2)
    talk = Evicting(engine, 0, 1, "evict")
    for _ in range(3):
        (result,) = write_rounds(engine, [talk.request(RoundLimits(2, temperature=1.0))])
        assert result.token_ids is not None
        talk.written(result.token_ids, 2)
    assert engine.features.misses == 2 + 2 + 2
    assert engine.features.hit_rate == 0.0
    other = Evicting(engine, 0, 1, "evict")  # the same frames
    write_rounds(engine, [other.request(RoundLimits(2, temperature=1.0))])
    assert engine.features.hit_rate == 0.25


def test_layers_that_differ_in_rows_do_not_stop_an_eviction(checkpoint: Path) -> None:
    """Memory may run out half-way through growing the cache; what is stored is whole, and goes on."""
    engine = HFEngine(checkpoint, keep_logits=True, max_sessions=4)
    talk = Evicting(engine, 0, 1, "evict")
    for number in range(4):
        (result,) = write_rounds(engine, [talk.request(RoundLimits(3, temperature=1.0))])
        talk.check(result)
        if number == 1:
            cache = engine._rows.cache
            first = cache.keys[0]
            cache.keys[0] = torch.cat((first, torch.zeros_like(first)))


def test_nothing_expires_before_the_first_round(checkpoint: Path) -> None:
    engine = HFEngine(checkpoint, max_sessions=1)
    talk = Evicting(engine, 0, 1, "evict")
    shown = next(iter(talk.messages[1].frames)).shown
    with pytest.raises(EngineError, match="frames expire before its first round"):
        engine.submit(RoundRequest(talk.session, (), (shown,), RoundLimits(3)))
    (result,) = write_rounds(engine, [talk.request(RoundLimits(3, temperature=1.0))])
    assert result.error is None


def test_what_cannot_be_renumbered_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HFEngine(checkpoint, max_sessions=1)
    monkeypatch.setattr(hf_model.VisionLanguageModel, "renumber_obstacle", "its frequencies change")
    with pytest.raises(EngineError, match="memory: got 'renumber', allowed with this model: rerender, evict"):
        engine.open([Message("user", (TextSegment("hello"),))], memory="renumber")


def test_an_endpoint_has_no_cache_to_evict_from() -> None:
    engine = EndpointEngine("http://127.0.0.1:9", "m")
    try:
        with pytest.raises(EngineError, match="memory: got 'evict', allowed over an endpoint: rerender"):
            engine.open([Message("user", (TextSegment("hello"),))], memory="evict")
    finally:
        engine.shutdown()
