"""The training forward against the engine's own logits, and its gradients against stock transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from products import covering
from sampled import RoundContext, Sampled, Stage, round_contexts
from transformers import AutoModelForImageTextToText

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.trajectory import Trajectory
from vrthinker.policy.batches import Batch, FrameLoader, collate
from vrthinker.policy.forward import learned_hidden
from vrthinker.policy.losses import sft_loss, sft_loss_from_hidden
from vrthinker.policy.sequences import TrainingSequence, training_sequences
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader

KINDS = ("qwen2.5-vl", "qwen3-vl", "nano")
WINDOWS = (0, 1, 2, None)
LOGITS = 1e-5
"""Of the largest logit. The engine sums in another order (a cached prefix, token by token): some 1e-6."""
GRADIENTS = 1e-4
"""Of a parameter's gradient norm, in float32: the same, summed over rounds and through two towers."""
COSINE = 0.99999
MakeCheckpoint = Callable[[str], Path]
MakeStage = Callable[[str], Stage]
MakeEpisodes = Callable[[str, int | None], list[tuple[Trajectory, list[Sampled]]]]


@pytest.fixture(scope="module")
def policies(checkpoint_of: MakeCheckpoint) -> Callable[[str], VisionLanguageModel]:
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
def load() -> Callable[[Sequence[FrameKey]], list[np.ndarray]]:
    return FrameLoader(open_reader(), FrameCache(64 << 20)).load


Load = Callable[[Sequence[FrameKey]], list[np.ndarray]]
Policies = Callable[[str], VisionLanguageModel]


def markup_of(policy: VisionLanguageModel) -> Markup:
    return Markup(policy.tokenizer, policy.vocabulary_size)


def factor_of(policy: VisionLanguageModel) -> int:
    return policy.patch_size * policy.merge_size


def sequences_of(policy: VisionLanguageModel, trajectory: Trajectory) -> list[TrainingSequence]:
    factor = factor_of(policy)
    return training_sequences(trajectory, markup_of(policy), (factor, factor))


def logits_of(policy: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    hidden, labels = learned_hidden(policy, batch)
    assert hidden.shape[0] == labels.shape[0] == batch.n_learned
    logits: torch.Tensor = policy.model.lm_head(hidden)
    return logits


def off_by(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def unmerged(sequences: Sequence[TrainingSequence]) -> list[TrainingSequence]:
    """A sequence of its own for every run of learned tokens, cut off behind it."""
    found = []
    for sequence in sequences:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sequence.loss_mask.astype(np.int8), [0]])))
        for start, end in edges.reshape(-1, 2).tolist():
            mask = np.zeros(end, dtype=bool)
            mask[start:] = True
            frames = tuple(frame for frame in sequence.frames if frame[0] < end)
            ids, positions = sequence.token_ids[:end], sequence.positions[:, :end]
            found.append(TrainingSequence(sequence.id, ids, positions, mask, frames))
    return found


# Logits


@pytest.mark.versions
@pytest.mark.parametrize(("kind", "window"), covering(KINDS, WINDOWS, strength=1))
def test_logits_are_those_that_the_engine_sampled_from(
    kind: str, window: int | None, policies: Policies, episodes_of: MakeEpisodes, load: Load
) -> None:
    policy = policies(kind)
    rounds, errors = 0, []
    with torch.no_grad():
        for trajectory, sampled in episodes_of(kind, window):
            wanted = torch.cat([round_.logits for round_ in sampled if round_.logits is not None])
            sequences = sequences_of(policy, trajectory)
            got = torch.cat([logits_of(policy, collate([s], load)) for s in sequences])
            assert got.shape == wanted.shape
            errors.append(off_by(got, wanted))
            rounds += len(sampled)
            # All of them as one padded batch.
            assert off_by(logits_of(policy, collate(sequences, load)), wanted) < LOGITS
    assert max(errors) < LOGITS, f"off by {max(errors):.2e} of the largest logit"
    assert rounds == 14


def test_a_padded_batch_of_all_episodes_equals_each_alone(
    policies: Policies, episodes_of: MakeEpisodes, load: Load
) -> None:
    for kind in KINDS:
        policy = policies(kind)
        sequences = [s for trajectory, _ in episodes_of(kind, 1) for s in sequences_of(policy, trajectory)]
        sequences = sequences[::-1]
        assert len({len(sequence) for sequence in sequences}) > 3
        with torch.no_grad():
            together = logits_of(policy, collate(sequences, load))
            alone = torch.cat([logits_of(policy, collate([s], load)) for s in sequences])
        assert off_by(together, alone) < LOGITS


def test_the_comparison_notices_a_wrong_frame_and_a_wrong_position(
    policies: Policies, episodes_of: MakeEpisodes, load: Load
) -> None:
    for kind in KINDS:
        policy = policies(kind)
        trajectory, sampled = episodes_of(kind, 1)[1]
        wanted = torch.cat([round_.logits for round_ in sampled if round_.logits is not None])
        (sequence,) = sequences_of(policy, trajectory)
        batch = collate([sequence], load)
        with torch.no_grad():
            swapped = vars(batch) | {"frame_order": (1, 0, *batch.frame_order[2:])}
            assert off_by(logits_of(policy, Batch(**swapped)), wanted) > 10 * LOGITS
            moved = batch.positions.clone()
            moved[:, :, sequence.frames[0][0]] += 1
            assert (
                off_by(logits_of(policy, Batch(**vars(batch) | {"positions": moved})), wanted) > 10 * LOGITS
            )


def test_deepstack_maps_take_part(policies: Policies, episodes_of: MakeEpisodes, load: Load) -> None:
    policy = policies("qwen3-vl")
    (sequence,) = sequences_of(policy, episodes_of("qwen3-vl", 1)[0][0])
    batch = collate([sequence], load)
    encoded = policy.encode(batch.frames)
    assert [len(features.deepstack) for features in encoded] == [2] * len(batch.frames)
    (plain,) = policies("nano").encode([batch.frames[0][:56, :56]])
    assert not plain.deepstack
    with torch.no_grad():
        before = logits_of(policy, batch)
        merger = policy.model.model.visual.deepstack_merger_list[1].linear_fc2
        kept = merger.weight.clone()
        merger.weight.zero_()
        after = logits_of(policy, batch)
        merger.weight.copy_(kept)
    assert off_by(after, before) > 100 * LOGITS


def test_encoded_frames_are_the_engines(policies: Policies) -> None:
    """Sizes may differ, and come in any order."""
    rng = np.random.default_rng(5)
    for kind in KINDS:
        policy = policies(kind)
        side = factor_of(policy)
        sizes = [(2, 2), (1, 3), (2, 2), (5, 4), (1, 3), (1, 1)]
        frames = [rng.integers(0, 256, (h * side, w * side, 3), dtype=np.uint8) for h, w in sizes]
        with torch.no_grad():
            got = policy.encode(frames)
        for mine, frame in zip(got, frames, strict=True):
            (wanted,) = policy.encode([frame])
            assert off_by(mine.embeds, wanted.embeds) < LOGITS
            assert len(mine.deepstack) == len(wanted.deepstack)
            for a, b in zip(mine.deepstack, wanted.deepstack, strict=True):
                assert off_by(a, b) < LOGITS


# Gradients


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
    }


def compare_gradients(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    largest = max(float(g.norm()) for g in wanted.values())
    for name in wanted:
        a, b = got[name].flatten().double(), wanted[name].flatten().double()
        if float(b.norm()) < 1e-7 * largest:  # a key's bias: softmax takes it away, what is left is rounding
            assert float(a.norm()) < 1e-6 * largest, name
            continue
        assert float((a - b).norm() / b.norm()) <= GRADIENTS, name
        assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) >= COSINE, name
    vision = [name for name in wanted if "visual" in name and float(wanted[name].norm()) > 1e-4 * largest]
    assert len(vision) > 10, "the vision tower gets a gradient"


def learn(
    policy: VisionLanguageModel, batches: Sequence[Batch], total: int, *, freeze_vision: bool = False
) -> float:
    """Backward passes of micro-batches; their summed loss."""
    policy.model.zero_grad(set_to_none=True)
    found = 0.0
    for batch in batches:
        hidden, labels = learned_hidden(policy, batch, freeze_vision=freeze_vision)
        loss, _ = sft_loss_from_hidden(hidden, policy.model.lm_head.weight, labels)
        (loss / total).backward()  # type: ignore[no-untyped-call]
        found += float(loss.detach()) / total
    return found


def stock_loss(model: Any, folder: Path, round_: RoundContext, load: Load) -> torch.Tensor:
    """A round's summed loss by the stock model: its own processor, its own positions, nothing padded."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    images = [frame.transpose(2, 0, 1) for frame in load(round_.frames)]
    pixels = processor(
        images=images, do_resize=False, return_tensors="pt", input_data_format="channels_first"
    )
    ids = torch.tensor([round_.prompt + round_.written])
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=pixels["pixel_values"],
        image_grid_thw=pixels["image_grid_thw"],
        use_cache=False,
    )
    start = len(round_.prompt)
    return sft_loss(output.logits[0, start - 1 : -1], ids[0, start:])


@pytest.mark.versions
@pytest.mark.parametrize(("kind", "window"), covering(KINDS, WINDOWS, strength=1))
def test_gradients_are_those_of_stock_forwards_of_each_rounds_context(
    kind: str, window: int | None, policies: Policies, episodes_of: MakeEpisodes, load: Load
) -> None:
    policy = policies(kind)
    stock: Any = AutoModelForImageTextToText.from_pretrained(policy.folder, dtype=torch.float32)
    assert stock.model.visual.config._attn_implementation == "sdpa", "nothing of ours in it"
    trajectories = [trajectory for trajectory, _ in episodes_of(kind, window)[1:4]]
    rounds = [r for t in trajectories for r in round_contexts(t, markup_of(policy), factor_of(policy))]
    total = sum(len(round_.written) for round_ in rounds)
    loss = 0.0
    for round_ in rounds:
        part = stock_loss(stock, policy.folder, round_, load) / total
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
    wanted = gradients(stock)
    sequences = [s for t in trajectories for s in sequences_of(policy, t)]
    batch = collate(sequences, load)
    assert batch.n_learned == total
    assert learn(policy, [batch], total) == pytest.approx(loss, rel=1e-5)
    compare_gradients(gradients(policy.model), wanted)


def test_rounds_that_share_a_sequence_learn_what_each_would_alone(
    policies: Policies, episodes_of: MakeEpisodes, load: Load
) -> None:
    for kind in ("qwen3-vl", "nano"):
        policy = policies(kind)
        trajectory, sampled = episodes_of(kind, None)[3]
        merged = sequences_of(policy, trajectory)
        apart = unmerged(merged)
        assert (len(merged), len(apart)) == (1, len(sampled)) == (1, 6)
        total = sum(len(round_.logits) for round_ in sampled if round_.logits is not None)
        loss = learn(policy, [collate([sequence], load) for sequence in apart], total)
        wanted = gradients(policy.model)
        assert learn(policy, [collate(merged, load)], total) == pytest.approx(loss, rel=1e-5)
        compare_gradients(gradients(policy.model), wanted)


@pytest.mark.parametrize(("kind", "size"), covering(KINDS, (1, 3), strength=1))
def test_micro_batches_add_up_to_the_gradient_of_the_batch(
    kind: str, size: int, policies: Policies, episodes_of: MakeEpisodes, load: Load
) -> None:
    policy = policies(kind)
    sequences = [s for trajectory, _ in episodes_of(kind, 1) for s in sequences_of(policy, trajectory)]
    total = sum(int(sequence.loss_mask.sum()) for sequence in sequences)
    loss = learn(policy, [collate(sequences, load)], total)
    wanted = gradients(policy.model)
    parts = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    in_parts = learn(policy, [collate(part, load) for part in parts], total)
    assert in_parts == pytest.approx(loss, rel=1e-5)
    compare_gradients(gradients(policy.model), wanted)


@pytest.mark.parametrize("how", ["weights", "forward"])
def test_a_frozen_tower_gets_no_gradient_and_changes_no_other(
    how: str, policies: Policies, episodes_of: MakeEpisodes, load: Load
) -> None:
    """Frozen for good, by its weights, or in this forward only."""
    policy = policies("qwen3-vl")
    sequences = sequences_of(policy, episodes_of("qwen3-vl", 1)[1][0])
    batch = collate(sequences, load)
    loss = learn(policy, [batch], batch.n_learned)
    wanted = gradients(policy.model)
    policy.model.model.visual.requires_grad_(how == "forward")
    assert learn(policy, [batch], batch.n_learned, freeze_vision=how == "forward") == loss
    tower = {name for name, _ in policy.model.named_parameters() if "visual" in name}
    for name, parameter in policy.model.named_parameters():
        if name in tower:
            assert parameter.grad is None, name
        else:
            assert torch.allclose(parameter.grad, wanted[name], rtol=1e-5, atol=1e-8), name
    assert 10 < len(tower) < len(wanted)
    with torch.no_grad():
        hidden, _ = learned_hidden(policy, batch)
        assert not hidden.requires_grad, "a frozen forward turns no gradients on or off for others"
    hidden, _ = learned_hidden(policy, batch, freeze_vision=True)
    assert hidden.requires_grad
    assert torch.is_grad_enabled()


def test_a_batch_without_frames(policies: Policies) -> None:
    policy = policies("nano")
    ids = np.asarray(markup_of(policy).encode("video 1: 4 red noise"), np.int64)
    mask = np.ones(len(ids), dtype=bool)
    positions = np.arange(len(ids))[None].repeat(3, 0)
    batch = collate([TrainingSequence("text", ids, positions, mask, ())], lambda keys: [])
    assert batch.n_learned == len(ids) - 1, "nothing predicts the first token"
    with torch.no_grad():
        wanted = policy.model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, :-1]
        assert off_by(logits_of(policy, batch), wanted) < LOGITS
