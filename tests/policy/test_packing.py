"""Packs: the packed forward against what the engine sampled from, and against per-round forwards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from products import covering
from sampled import EPISODES, Sampled, Stage, with_ids
from test_sequences import ROUND, script_text
from unrolled import RoundView, Token, round_views, tensors_of

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.context import Context
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import FrameFeatures, VisionLanguageModel
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.kernels.evict.op import evict_sequence
from vrthinker.kernels.evict.plan import plan_eviction
from vrthinker.kernels.grpo_loss.op import grpo_loss
from vrthinker.policy.batches import FrameLoader
from vrthinker.policy.packed_attention import Implementation, PackedAttention, dense_mask
from vrthinker.policy.packed_forward import packed_hidden, packed_logprobs
from vrthinker.policy.packing import Pack, pack_group
from vrthinker.policy.replay import replayed_messages, round_ids
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.visibility import MemoryMode, ShownFrame
from vrthinker.world.nano import nano_templates

KINDS = ("qwen2.5-vl", "qwen3-vl", "nano")
WINDOWS = (0, 1, 2, None)
LOGITS = 1e-5
"""Of the largest logit. Engine and pack sum in other orders (a cached prefix, token by token): some 1e-6."""
STEEP = 3e-5
"""The same for nano, which begins with heads of steep attention: they make more of a rounding."""
GRADIENTS = 1e-4
"""Of a parameter's gradient norm, in float32."""
COSINE = 0.99999
MakeCheckpoint = Callable[[str], Path]
MakeStage = Callable[[str], Stage]
MakeEpisodes = Callable[..., list[tuple[Trajectory, list[Sampled]]]]
Policies = Callable[[str], VisionLanguageModel]
Load = Callable[[Sequence[FrameKey]], list[np.ndarray]]


@pytest.fixture(scope="module")
def policies(checkpoint_of: MakeCheckpoint) -> Policies:
    """Trainable models, with their gradients emptied."""
    made: dict[str, VisionLanguageModel] = {}

    def policy(kind: str) -> VisionLanguageModel:
        if kind not in made:
            folder = checkpoint_of(kind)
            made[kind] = VisionLanguageModel(folder, device=torch.device("cpu"), dtype=torch.float32)
        made[kind].model.requires_grad_(True).train()
        made[kind].model.zero_grad(set_to_none=True)
        return made[kind]

    return policy


@pytest.fixture(scope="module")
def load() -> Load:
    return FrameLoader(open_reader(), FrameCache(64 << 20)).load


def markup_of(policy: VisionLanguageModel) -> Markup:
    return Markup(policy.tokenizer, policy.vocabulary_size)


def factor_of(policy: VisionLanguageModel) -> int:
    return policy.patch_size * policy.merge_size


def packs_of(
    policy: VisionLanguageModel, trajectories: Sequence[Trajectory], max_tokens: int | None = None
) -> list[Pack]:
    factor = factor_of(policy)
    return pack_group(trajectories, markup_of(policy), (factor, factor), max_tokens=max_tokens)


def logits_of(
    policy: VisionLanguageModel, pack: Pack, load: Load, attention: Implementation = "auto"
) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = policy.model.lm_head(packed_hidden(policy, pack, load, attention=attention))
    return logits


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


# What the engine sampled from


@pytest.mark.parametrize(("kind", "window", "memory"), covering(KINDS, WINDOWS, ["rerender", "evict"]))
def test_logits_of_every_sampled_token_are_those_of_the_engine(
    kind: str,
    window: int | None,
    memory: MemoryMode,
    policies: Policies,
    episodes_of: MakeEpisodes,
    load: Load,
) -> None:
    """A ragged group (1 to 6 rounds, other first frames, one written freely), step by step against one
    pack."""
    policy, episodes = policies(kind), episodes_of(kind, window, memory)
    (pack,) = packs_of(policy, [trajectory for trajectory, _ in episodes])
    logits = logits_of(policy, pack, load)
    assert pack.trajectories == tuple(range(len(episodes)))
    for (trajectory, sampled), own, rounds in zip(episodes, pack.sampled, pack.rounds_of, strict=True):
        ids = [token for record in trajectory.rounds for token in record.token_ids or ()]
        assert pack.labels[own].tolist() == ids
        counts = [len(record.token_ids or ()) for record in trajectory.rounds]
        assert np.bincount(rounds, minlength=len(counts)).tolist() == counts
        wanted = torch.cat([begun.logits for begun in sampled if begun.logits is not None])
        assert error_of(logits[torch.from_numpy(own)], wanted) < (STEEP if kind == "nano" else LOGITS)
    # Sharing pays: what the group's contexts have in common stands in the pack once.
    assert pack.n_tokens < pack.n_context_tokens


def test_what_expired_makes_a_difference(policies: Policies, episodes_of: MakeEpisodes, load: Load) -> None:
    """The bound above would notice: a pack that never expires anything is off by far more."""
    policy, episodes = policies("qwen2.5-vl"), episodes_of("qwen2.5-vl", 1, "evict")
    (pack,) = packs_of(policy, [trajectory for trajectory, _ in episodes])
    wanted = logits_of(policy, pack, load)
    blind = replace(pack, expires=np.full_like(pack.expires, 10**6))
    assert error_of(logits_of(policy, blind, load), wanted) > 100 * LOGITS


def test_deepstack_reaches_the_logits(policies: Policies, episodes_of: MakeEpisodes, load: Load) -> None:
    policy, episodes = policies("qwen3-vl"), episodes_of("qwen3-vl", 1, "evict")
    (pack,) = packs_of(policy, [trajectory for trajectory, _ in episodes])
    with torch.no_grad():
        features = policy.encode(load(pack.frames))
    assert all(len(one.deepstack) > 0 for one in features)
    flat = [FrameFeatures(f.embeds, tuple(torch.zeros_like(m) for m in f.deepstack)) for f in features]
    with torch.no_grad():
        found, without = (
            policy.model.lm_head(packed_hidden(policy, pack, load, features=given))
            for given in (features, flat)
        )
    assert torch.equal(found, logits_of(policy, pack, load))
    assert error_of(without, found) > 100 * LOGITS


@pytest.mark.parametrize("attention", ["dense", "flex"])
@pytest.mark.parametrize("memory", ["rerender", "evict"])
def test_implementations_of_attention_agree(
    attention: Implementation, memory: MemoryMode, policies: Policies, episodes_of: MakeEpisodes, load: Load
) -> None:
    policy, episodes = policies("nano"), episodes_of("nano", 1, memory)
    (pack,) = packs_of(policy, [trajectory for trajectory, _ in episodes])
    found = logits_of(policy, pack, load, attention)
    assert error_of(found, logits_of(policy, pack, load)) < LOGITS


@pytest.mark.parametrize("memory", ["rerender", "evict"])
def test_a_token_budget_changes_no_number(
    memory: MemoryMode, policies: Policies, episodes_of: MakeEpisodes, load: Load
) -> None:
    policy = policies("qwen2.5-vl")
    trajectories = [trajectory for trajectory, _ in episodes_of("qwen2.5-vl", 1, memory)]
    (whole,) = packs_of(policy, trajectories)
    parts = packs_of(policy, trajectories, whole.n_tokens // 2)
    assert len(parts) > 1
    banned = markup_of(policy).vocabulary(torch.device("cpu")).banned

    def logprobs(packs: Sequence[Pack]) -> dict[tuple[int, int], torch.Tensor]:
        found: dict[tuple[int, int], torch.Tensor] = {}
        for pack in packs:
            with torch.no_grad():
                given = packed_logprobs(policy, pack, load, temperature=0.7, banned=banned)
            for owner, rounds, values in zip(pack.trajectories, pack.rounds_of, given, strict=True):
                for number in set(rounds.tolist()):
                    assert (owner, number) not in found, "a round is in one pack"
                    found[owner, number] = values[torch.from_numpy(rounds == number)]
        return found

    wanted, split = logprobs([whole]), logprobs(parts)
    assert wanted.keys() == split.keys()
    for key, values in wanted.items():
        assert torch.allclose(split[key], values, atol=1e-5, rtol=0)


def test_logprobs_are_those_on_record(policies: Policies, episodes_of: MakeEpisodes, load: Load) -> None:
    """Temperature and banned tokens as in sampling: the engine's own logprobs, token by token."""
    policy = policies("qwen3-vl")
    trajectories = [trajectory for trajectory, _ in episodes_of("qwen3-vl", 2, "evict")]
    (pack,) = packs_of(policy, trajectories)
    banned = markup_of(policy).vocabulary(torch.device("cpu")).banned
    with torch.no_grad():
        found = packed_logprobs(policy, pack, load, temperature=1.0, banned=banned)
    free = len(EPISODES)  # the one that was written without forms: forms bring bans of their own
    (record,) = trajectories[free].rounds
    assert record.logprobs is not None
    assert torch.allclose(found[free], torch.tensor(record.logprobs), atol=1e-4, rtol=0)


def test_the_loss_mask_marks_what_was_sampled(policies: Policies, episodes_of: MakeEpisodes) -> None:
    policy = policies("nano")
    for memory in ("rerender", "evict"):
        trajectories = [trajectory for trajectory, _ in episodes_of("nano", 1, memory)]
        for trajectory in trajectories:
            (pack,) = packs_of(policy, [trajectory])
            learned = pack.token_ids[pack.loss_mask].tolist()
            written = [list(record.token_ids or ()) for record in trajectory.rounds]
            if memory == "evict":  # one path: all but the very last token, which predicts nothing
                assert learned == [token for ids in written for token in ids][:-1]
            assert len(pack.sampled[0]) == sum(map(len, written))


# Gradients


def round_logprobs(
    policy: VisionLanguageModel, view: RoundView, load: Load, banned: torch.Tensor
) -> torch.Tensor:
    """A forward of its own for one round: nothing shared, every frame encoded at every showing, a full
    mask."""
    ids, positions, mask = tensors_of(view)
    language = policy.model.model.language_model
    embeds = language.embed_tokens(ids)
    images = ids == policy.model.config.image_token_id
    extra: dict[str, Any] = {}
    if view.frames:
        encoded = [policy.encode(load([key]))[0] for key in view.frames]
        rows = torch.cat([features.embeds for features in encoded])
        embeds = embeds.masked_scatter(images[..., None], rows)
        if encoded[0].deepstack:
            layers = zip(*(features.deepstack for features in encoded), strict=True)
            extra = {
                "visual_pos_masks": images,
                "deepstack_visual_embeds": [torch.cat(layer) for layer in layers],
            }
    hidden = language(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False, **extra
    ).last_hidden_state
    places = torch.tensor(view.sampled)
    logits = policy.model.lm_head(hidden[0, places - 1]).masked_fill(banned, -torch.inf)
    return logits.log_softmax(-1)[torch.arange(len(places)), ids[0, places]]


def test_the_last_token_of_a_round_is_read_after_the_expiry(
    policies: Policies, episodes_of: MakeEpisodes, load: Load
) -> None:
    """A rule of the method: what was sampled last is read in the next round, without what expired.

    Read in its own round, as it would be by any other program, it makes another policy.
    """
    policy = policies("nano")
    markup, factor = markup_of(policy), factor_of(policy)
    banned = markup.vocabulary(torch.device("cpu")).banned
    off_by_rule, off_otherwise = 0.0, 0.0
    for trajectory, sampled in episodes_of("nano", 1, "evict"):
        views = round_views(trajectory, markup, factor)
        for view, begun in zip(views, sampled, strict=True):
            assert begun.logits is not None
            logprobs = begun.logits.masked_fill(banned, -torch.inf).log_softmax(-1)
            ids = torch.tensor([view.tokens[place].id for place in view.sampled])
            wanted = logprobs[torch.arange(len(ids)), ids]
            early = replace(view, mask=view.mask.copy())
            for place, token in enumerate(view.tokens):
                if token.sampled is not None and token.read > token.sampled:
                    early.mask[place] = view.mask[place - 1]
                    early.mask[place, place] = True
            with torch.no_grad():
                by_rule, otherwise = (round_logprobs(policy, v, load, banned) for v in (view, early))
            off_by_rule = max(off_by_rule, float((by_rule - wanted).abs().max()))
            off_otherwise = max(off_otherwise, float((otherwise - wanted).abs().max()))
    assert off_by_rule < STEEP  # 1.0014e-5 on one machine
    assert off_otherwise > 10 * off_by_rule
    assert off_otherwise > 3e-4


@pytest.mark.parametrize(
    ("kind", "memory", "checkpointing"), covering(KINDS, ["rerender", "evict"], [False, True])
)
def test_gradients_of_the_loss_are_those_of_per_round_forwards(
    kind: str,
    memory: MemoryMode,
    checkpointing: bool,
    policies: Policies,
    episodes_of: MakeEpisodes,
    load: Load,
) -> None:
    policy, window = policies(kind), 1
    markup, factor = markup_of(policy), factor_of(policy)
    banned = markup.vocabulary(torch.device("cpu")).banned
    trajectories = [trajectory for trajectory, _ in episodes_of(kind, window, memory)][1:4]
    counts = [sum(len(record.token_ids or ()) for record in t.rounds) for t in trajectories]
    offsets = torch.tensor([0, *np.cumsum(counts)])
    generator = torch.Generator().manual_seed(5)
    old = -3 + 0.1 * torch.randn(sum(counts), generator=generator)
    ref = -3 + 0.3 * torch.randn(sum(counts), generator=generator)
    advantages = torch.randn(len(counts), generator=generator)

    def loss_of(logprobs: torch.Tensor) -> torch.Tensor:
        # Ratios around 1, so that some tokens are clipped and others are not.
        centred = logprobs - logprobs.detach() + old + 0.2 * torch.sin(logprobs)
        mask = torch.ones(len(centred), dtype=torch.bool)
        return grpo_loss(centred, old, ref, advantages, mask, offsets, kl_weight=0.1).loss

    def gradients() -> dict[str, torch.Tensor]:
        parameters = policy.model.named_parameters()
        return {name: p.grad.clone() for name, p in parameters if p.grad is not None}

    views = [view for t in trajectories for view in round_views(t, markup, factor)]
    by_round = torch.cat([round_logprobs(policy, view, load, banned) for view in views])
    loss_of(by_round).backward()  # type: ignore[no-untyped-call]
    wanted = gradients()
    policy.model.zero_grad(set_to_none=True)

    if checkpointing:
        policy.model.gradient_checkpointing_enable()
    try:
        (pack,) = packs_of(policy, trajectories)
        packed = torch.cat(packed_logprobs(policy, pack, load, temperature=1.0, banned=banned))
        assert torch.allclose(packed, by_round, atol=1e-4, rtol=0)
        loss_of(packed).backward()  # type: ignore[no-untyped-call]
    finally:
        policy.model.gradient_checkpointing_disable()
    found = gradients()
    assert found.keys() == wanted.keys()
    assert any("visual" in name and gradient.norm() > 0 for name, gradient in found.items())
    for name, gradient in wanted.items():
        difference = (found[name] - gradient).norm()
        assert difference <= GRADIENTS * gradient.norm() + 1e-9, name
        if gradient.norm() > 1e-9:
            cosine = torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
            assert cosine >= COSINE, name


def test_gradients_reach_no_pixel_twice(policies: Policies, episodes_of: MakeEpisodes, load: Load) -> None:
    """Each distinct frame is encoded once per pack, however often it is shown."""
    policy = policies("nano")
    trajectories = [trajectory for trajectory, _ in episodes_of("nano", None, "evict")]
    (pack,) = packs_of(policy, trajectories)
    loaded: list[FrameKey] = []

    def counting(keys: Sequence[FrameKey]) -> list[np.ndarray]:
        loaded.extend(keys)
        return load(keys)

    logits_of(policy, pack, counting)
    assert len(loaded) == len(set(loaded)) == len(pack.frames) < len(pack.frame_order)


# Any script under any window


def identities(tokens: Sequence[Token], mask: np.ndarray) -> list[int]:
    """Numbers that are equal for tokens whose keys and values are equal: same token, same things seen."""
    found: list[int] = []
    for place, token in enumerate(tokens):
        seen = tuple(found[key] for key in np.flatnonzero(mask[place, :place]))
        found.append(hash((token.id, token.position, token.frame, seen)))
    return found


def pack_identities(pack: Pack) -> list[int]:
    """The same of a pack's tokens, by its dense mask."""
    mask = dense_mask(pack).numpy()
    frames: list[FrameKey | None] = [None] * pack.n_tokens
    starts = np.flatnonzero(pack.is_image & ~np.roll(pack.is_image, 1))
    for order, start in zip(pack.frame_order, starts, strict=True):
        end = start
        while end < pack.n_tokens and pack.is_image[end]:
            end += 1
        for place in range(start - 1, end + 1):
            frames[place] = pack.frames[order]
    found: list[int] = []
    for place in range(pack.n_tokens):
        seen = tuple(found[key] for key in np.flatnonzero(mask[place, :place]))
        position = tuple(pack.positions[:, place].tolist())
        found.append(hash((int(pack.token_ids[place]), position, frames[place], seen)))
    return found


@settings(suppress_health_check=list(HealthCheck))
@example(
    scripts=[[("look", [3, 15], "a")], [("look", [3, 15], "a"), ("look", [4], "b")]],
    window=1,
    memory="evict",
    words="",
    share=None,
)  # an episode that ends before a frame expires shares it with one that goes on
@given(
    scripts=st.lists(st.lists(ROUND, max_size=5), min_size=1, max_size=3),
    window=st.sampled_from([0, 1, 2, 3, None]),
    memory=st.sampled_from(["rerender", "evict"]),
    words=st.text(max_size=3),
    share=st.sampled_from([None, 0.4, 0.01]),
)
def test_any_record_is_packed_and_cached_as_it_reads(
    scripts: list[list[tuple[Any, list[int], str]]],
    window: int | None,
    memory: MemoryMode,
    words: str,
    share: float | None,
    checkpoint_of: MakeCheckpoint,
    stage_of: MakeStage,
    policies: Policies,
) -> None:
    """Record, cache, packer and mask against the slow reading of the same trajectories."""
    policy = policies("nano")
    markup, factor = markup_of(policy), factor_of(policy)
    how = EpisodeSettings(window=window, memory=memory, max_rounds=8)
    trajectories = []
    for rounds in scripts:
        script = [script_text(*round_) for round_ in rounds] + [script_text("answer", (), "done")]
        runner = EpisodeRunner(ScriptedEngine([script]), how, templates=nano_templates())
        trajectory = runner.run_one(EpisodeItem("script", words, stage_of("nano").open))
        trajectories.append(with_ids(trajectory, markup))
    wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}  # source's identity and label, by round
    contexts: set[tuple[int, int]] = set()  # identities of context tokens, and where they are read
    for owner, trajectory in enumerate(trajectories):
        numbers = [n for n, record in enumerate(trajectory.rounds) if round_ids(record, markup)]
        views = round_views(trajectory, markup, factor)
        of_views = [identities(view.tokens, view.mask) for view in views]
        for number, view, own in zip(numbers, views, of_views, strict=True):
            wanted[owner, number] = [(own[place - 1], view.tokens[place].id) for place in view.sampled]
            read = [token.read if memory == "evict" else 0 for token in view.tokens]
            contexts |= set(zip(own[:-1], read[:-1], strict=True))
        check_cache(
            trajectory, markup, factor, dict(zip(numbers, zip(views, of_views, strict=True), strict=True))
        )

    (whole,) = packs_of(policy, trajectories)
    assert whole.n_tokens == len(contexts), "every distinct context token once"
    budget = None if share is None else max(1, int(share * whole.n_tokens))
    packs = packs_of(policy, trajectories, budget)
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for pack in packs:
        own = pack_identities(pack)
        assert len(set(zip(own, pack.rounds.tolist(), strict=True))) == pack.n_tokens
        check_segments(pack)
        for owner, numbers, places in zip(pack.trajectories, pack.rounds_of, pack.sampled, strict=True):
            for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
                made_from = own[pack.sources[place]]
                found.setdefault((owner, number), []).append((made_from, int(pack.labels[place])))
    assert found == wanted


def check_segments(pack: Pack) -> None:
    """What the segments say equals the dense mask."""
    mask = np.zeros((pack.n_tokens, pack.n_tokens), dtype=bool)
    plan = PackedAttention(pack, torch.device("cpu"))
    for part in plan.parts:
        own = np.arange(part.start, part.end)
        mask[part.start : part.end, part.start : part.end] = own[:, None] >= own[None, :]
        for start, end in part.ranges:
            mask[part.start : part.end, start:end] = True
    wanted = dense_mask(pack).numpy()
    assert np.array_equal(mask, wanted)
    assert plan.n_scores == int(wanted.sum())


def check_cache(
    trajectory: Trajectory, markup: Markup, factor: int, views: Mapping[int, tuple[RoundView, list[int]]]
) -> None:
    """A row of the cache, emptied by the op as the engine's context says: what is left is what is visible."""
    memory = trajectory.settings.memory
    first, outcomes = replayed_messages(trajectory, (factor, factor))
    context = Context(markup, (factor, factor), memory)
    context.append_messages(first)
    row = torch.empty(1, 0, dtype=torch.int64)
    for number, record in enumerate(trajectory.rounds, start=1):
        if number > 1:
            last = round_ids(trajectory.rounds[number - 2], markup)
            context.cached = len(context) - 1 if last else len(context)
            row = row[:, : context.cached]
            leaving = context.expire(record.expired)
            plan = plan_eviction([[(rows.start, rows.end) for rows in leaving]], [row.shape[1]])
            (row,) = evict_sequence([row], plan)
            row = row[:, : context.cached]
            context.close_turn(last[-1] if last else None)
            context.append_messages(outcomes[number - 2])
        # "Prefill": identities of the tokens that the row does not hold.
        if number - 1 not in views:
            return
        view, all_own = views[number - 1]
        start = view.sampled[0]
        live = np.flatnonzero(view.mask[start - 1, :start])
        own = np.array(all_own)[live]
        assert context.token_ids().tolist() == [view.tokens[place].id for place in live]
        assert context.positions().T.tolist() == [list(view.tokens[place].position) for place in live]
        assert row[0].tolist() == own[: row.shape[1]].tolist(), "what stayed is what may be seen"
        ids = round_ids(record, markup)
        fed = np.array(all_own)[view.sampled[:-1]]
        row = torch.from_numpy(np.concatenate([own, fed]))[None]
        context.append_round(ids)


# Refusals, and the time it takes


def test_renumbered_episodes_are_refused(stage_of: MakeStage, policies: Policies) -> None:
    policy = policies("nano")
    runner = EpisodeRunner(
        ScriptedEngine([[script_text("answer", (), "done")]]), EpisodeSettings(memory="renumber")
    )
    scripted = runner.run_one(EpisodeItem("script", "a dog", stage_of("nano").open))
    trajectory = with_ids(scripted, markup_of(policy))
    with pytest.raises(InputError, match="memory: got 'renumber', allowed in training: rerender, evict"):
        packs_of(policy, [trajectory])


def test_records_that_do_not_add_up_are_one_line(stage_of: MakeStage, policies: Policies) -> None:
    policy = policies("nano")
    script = [
        script_text("look", [3, 15], "a"),
        script_text("look", [4], "b"),
        script_text("answer", (), "c"),
    ]
    runner = EpisodeRunner(ScriptedEngine([script]), EpisodeSettings(memory="evict"))
    scripted = runner.run_one(EpisodeItem("script", "a dog", stage_of("nano").open))
    trajectory = with_ids(scripted, markup_of(policy))
    gone = trajectory.rounds[2].model_copy(update={"expired": (ShownFrame(1, 9),)})
    with pytest.raises(InputError, match="'script', round 3: expired"):
        packs_of(policy, [trajectory.model_copy(update={"rounds": (*trajectory.rounds[:2], gone)})])
    stays = trajectory.rounds[2].model_copy(update={"expired": ()})
    with pytest.raises(InputError, match=r"'script', round 3: expired: got nothing, the window says 3 of"):
        packs_of(policy, [trajectory.model_copy(update={"rounds": (*trajectory.rounds[:2], stays)})])
    guided = trajectory.model_copy(
        update={"settings": trajectory.settings.model_copy(update={"guided": True})}
    )
    with pytest.raises(InputError, match="guided: got rounds under a grammar"):
        packs_of(policy, [guided])
    nucleus = trajectory.model_copy(
        update={"settings": trajectory.settings.model_copy(update={"top_p": 0.9})}
    )
    with pytest.raises(InputError, match=r"'script': top_p: got 0\.9, allowed in training: 1"):
        packs_of(policy, [nucleus])
    with pytest.raises(InputError, match="'script': token_ids: got rounds of text alone"):
        packs_of(policy, [trajectory, scripted])


@pytest.mark.parametrize("memory", ["rerender", "evict"])
def test_a_group_of_real_size_is_packed_without_a_loop_over_tokens(
    memory: MemoryMode, policies: Policies, clip_pair: tuple[Path, Path]
) -> None:
    """8 episodes of 3 rounds at the method's sizes, some 10,000 tokens a context (measured: 30 ms)."""
    policy = policies("qwen2.5-vl")
    markup, side = markup_of(policy), 616
    stage = Stage(clip_pair, ResizeSettings(min_pixels=side * side, max_pixels=side * side))
    how = EpisodeSettings(window=1, memory=memory, max_rounds=3)
    trajectories = []
    for seed in range(8):
        words = " ".join(f"{seed} {n}" for n in range(120))
        numbers = [[1 + (5 * seed + 3 * n + step) % 22 for n in range(8)] for step in (0, 1)]
        script = [script_text("look", own, words) for own in numbers] + [script_text("answer", (), words)]
        trajectory = EpisodeRunner(ScriptedEngine([script]), how).run_one(
            EpisodeItem("script", "a dog runs along the beach", stage.open)
        )
        trajectories.append(with_ids(trajectory, markup))
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        (pack,) = packs_of(policy, trajectories)
    finally:
        sys.setprofile(None)
    contexts = 16 if memory == "rerender" else 8  # what follows an expiry is a context of its own
    assert pack.n_context_tokens > contexts * 8_000
    assert calls < pack.n_context_tokens, calls
