"""Traces as packs: the loss and gradient of one forward per context, in fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from clips import make_clip
from sampled import Sampled

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.settings import MemoryMode
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.policy.batches import FrameLoader, collate
from vrthinker.policy.forward import learned_hidden
from vrthinker.policy.losses import sft_loss_from_hidden
from vrthinker.policy.packed_forward import packed_logprobs
from vrthinker.policy.packing import pack_group, pack_paths
from vrthinker.policy.prefix_tree import Stretch
from vrthinker.policy.replay import Path as Context
from vrthinker.policy.sequences import learned_paths, training_sequences
from vrthinker.policy.trace_packs import LearnedTrace, PackedTraces, PackSource, packed_sft_loss
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader

GRADIENT = 2e-5
"""The largest difference of gradients in units of the largest gradient, in float32."""
MakeCheckpoint = Callable[[str], Path]


class MakeEpisodes(Protocol):
    def __call__(
        self, kind: str, window: int | None, memory: MemoryMode = "rerender"
    ) -> list[tuple[Trajectory, list[Sampled]]]: ...


def loader() -> FrameLoader:
    return FrameLoader(open_reader(), FrameCache(64 << 20))


def policy_of(folder: Path) -> VisionLanguageModel:
    policy = VisionLanguageModel(folder, device=torch.device("cpu"), dtype=torch.float32)
    policy.model.requires_grad_(True)
    return policy


def contexts(policy: VisionLanguageModel, trajectories: Sequence[Trajectory]) -> list[list[Context]]:
    markup = Markup(policy.tokenizer, policy.vocabulary_size)
    factor = policy.patch_size * policy.merge_size
    return [learned_paths(one, markup, (factor, factor)) for one in trajectories]


def gradients(policy: VisionLanguageModel) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return found


def learn(
    policy: VisionLanguageModel, own: Sequence[Sequence[Context]], load: Any, **options: Any
) -> tuple[float, int, dict[str, torch.Tensor]]:
    """The summed loss, the right predictions and the gradients of packs."""
    limit = options.pop("max_tokens", None)
    total, right = 0.0, 0
    for pack in pack_paths(own, max_tokens=limit):
        traces = PackedTraces(pack, tuple(load(pack.frames)))
        loss, correct = packed_sft_loss(policy, traces, **options)
        loss.backward()  # type: ignore[no-untyped-call]
        total, right = total + float(loss.detach()), right + int(correct)
    return total, right, gradients(policy)


def off_by(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert set(got) == set(wanted)
    largest = max(float(g.abs().max()) for g in wanted.values())
    return max(float((got[name] - wanted[name]).abs().max()) for name in wanted) / largest


@pytest.mark.parametrize("kind", ["nano", "qwen3-vl"])
@pytest.mark.parametrize("window", [1, None])
def test_a_pack_of_traces_learns_what_one_forward_per_context_learns(
    kind: str, window: int | None, checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    policy, load = policy_of(checkpoint_of(kind)), loader().load
    trajectories = [trajectory for trajectory, _ in episodes_of(kind, window)][:3]
    markup = Markup(policy.tokenizer, policy.vocabulary_size)
    factor = policy.patch_size * policy.merge_size
    wanted, right, rows = 0.0, 0, 0
    for trajectory in trajectories:
        for sequence in training_sequences(trajectory, markup, (factor, factor)):
            hidden, labels = learned_hidden(policy, collate([sequence], load))
            loss, correct = sft_loss_from_hidden(hidden, policy.model.lm_head.weight, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            wanted, right, rows = wanted + float(loss.detach()), right + int(correct), rows + len(sequence)
    by_context = gradients(policy)
    own = contexts(policy, trajectories)
    loss, correct, found = learn(policy, own, load)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert correct == right
    assert off_by(found, by_context) < GRADIENT
    (pack,) = pack_paths(own)
    assert pack.n_tokens < rows, "what contexts share is computed once"
    assert sum(map(len, pack.sampled)) == sum(path.n_learned for paths in own for path in paths)


def test_what_does_not_fit_is_learned_in_another_forward(
    checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    policy, load = policy_of(checkpoint_of("nano")), loader().load
    own = contexts(policy, [trajectory for trajectory, _ in episodes_of("nano", 1)][:3])
    loss, right, whole = learn(policy, own, load)
    longest = max(len(path.tokens) for paths in own for path in paths)
    assert len(pack_paths(own, max_tokens=longest)) > 2
    parts = learn(policy, own, load, max_tokens=longest)
    assert parts[0] == pytest.approx(loss, rel=1e-5)
    assert parts[1] == right
    assert off_by(parts[2], whole) < GRADIENT


def test_a_frozen_tower_gets_no_gradient_and_changes_no_other(
    checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    policy, load = policy_of(checkpoint_of("nano")), loader().load
    own = contexts(policy, [trajectory for trajectory, _ in episodes_of("nano", 1)][:2])
    _, _, whole = learn(policy, own, load)
    _, _, frozen = learn(policy, own, load, freeze_vision=True)
    visual = {name for name in whole if ".visual." in name}
    assert visual
    assert set(frozen) == set(whole) - visual
    assert off_by(frozen, {name: whole[name] for name in frozen}) < GRADIENT


def test_equal_traces_are_computed_once_and_learned_twice(
    checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    policy, load = policy_of(checkpoint_of("nano")), loader().load
    (own,) = contexts(policy, [episodes_of("nano", 1)[0][0]])
    once, twice = learn(policy, [own], load), learn(policy, [own, own], load)
    assert pack_paths([own])[0].n_tokens == pack_paths([own, own])[0].n_tokens
    assert twice[0] == pytest.approx(2 * once[0], rel=1e-6)
    assert off_by(twice[2], {name: 2 * g for name, g in once[2].items()}) < GRADIENT


def test_traces_under_evict_are_learned_where_they_were_sampled(
    checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    policy, load = policy_of(checkpoint_of("nano")), loader().load
    trajectories = [trajectory for trajectory, _ in episodes_of("nano", 1, "evict")][:3]
    loss, _, found = learn(policy, contexts(policy, trajectories), load)
    markup = Markup(policy.tokenizer, policy.vocabulary_size)
    factor = policy.patch_size * policy.merge_size
    (pack,) = pack_group(trajectories, markup, (factor, factor))
    logprobs = torch.cat(packed_logprobs(policy, pack, load, temperature=1.0, banned=None))
    (-logprobs.sum()).backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(-float(logprobs.sum().detach()), rel=1e-5)
    assert off_by(found, gradients(policy)) < GRADIENT


def test_the_first_tokens_of_a_round_may_be_left_out(
    checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    policy = policy_of(checkpoint_of("nano"))
    trajectories = [trajectory for trajectory, _ in episodes_of("nano", None)]
    (path,) = max(contexts(policy, trajectories), key=lambda paths: len(paths[0].learned))
    assert len(path.learned) > 1
    last = path.learned[-1]
    shorter = path.without([2] * (len(path.learned) - 1) + [last[2] - last[1]])
    assert [(n, a + 2, b) for n, a, b in path.learned[:-1]] == shorter.learned
    end = shorter.learned[-1][2]
    assert len(shorter.tokens) == end < len(path.tokens), "nothing is computed behind the last one"
    assert sum(map(len, shorter.stretches)) == end - 1
    assert np.array_equal(shorter.tokens, path.tokens[:end])
    whole = pack_paths([[path]])[0].positions
    assert np.array_equal(pack_paths([[shorter]])[0].positions, whole[:, : end - 1])
    assert path.without([b - a for _, a, b in path.learned]).learned == []


# Steps


def trace(number: int, frame: FrameKey | None) -> LearnedTrace:
    """A trace of one context of counted tokens, and a frame of four tokens."""
    text = np.arange(10, 16 + number)
    stretches = [Stretch(text, 0)]
    if frame is not None:
        stretches.append(Stretch(np.array([1, 2, 2, 2, 2, 3]), len(text), frame=frame, grid=(2, 2)))
    answer = np.arange(100 + number, 104 + number)
    stretches.append(Stretch(answer[:-1], stretches[-1].next_position))
    tokens = np.concatenate([*(s.ids for s in stretches), answer[-1:]])
    start = len(tokens) - len(answer)
    path = Context(0, stretches, [(0, start, len(tokens))], tokens, stretches[-1].next_position + 1)
    return LearnedTrace.of(f"t{number}", [path])


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[LearnedTrace]:
    clip = make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 24, size=(56, 56))
    return [trace(number, FrameKey(str(clip), number, 56, 56)) for number in range(20)]


def content(made: Sequence[PackedTraces]) -> list[tuple[list[int], bool]]:
    return [(one.pack.token_ids.tolist(), one.counts) for one in made]


def test_a_step_is_a_pure_function_of_its_number(traces: list[LearnedTrace]) -> None:
    def source(**changes: Any) -> PackSource:
        return PackSource(traces, loader(), **{"batch_size": 6, "micro_batch_size": 2, "seed": 5, **changes})

    straight = source()
    shown = [content(straight.batches(step)) for step in range(7)]
    assert content(source().batches(5)) == shown[5], "as in a run that is resumed there"
    assert len({str(step) for step in shown}) == 7
    assert [len(step) for step in shown] == [3] * 7
    assert straight.count == 20
    for step in range(3):
        made = straight.batches(step)
        assert straight.n_learned(step) == sum(one.n_learned for one in made) == 6 * 4
        assert all(len(one.frames) == len(one.pack.frames) == 2 for one in made)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_a_step_and_compute_equally_many_packs(
    traces: list[LearnedTrace], processes: int
) -> None:
    options: dict[str, Any] = {"batch_size": 5, "micro_batch_size": 1, "seed": 5}
    (alone,) = [PackSource(traces, loader(), **options)]
    together = [
        PackSource(traces, loader(), **options, rank=rank, processes=processes) for rank in range(processes)
    ]
    for step in range(3):
        made = [source.batches(step) for source in together]
        assert len({len(own) for own in made}) == 1
        counted = [ids for own in made for ids, counts in content(own) if counts]
        assert sorted(counted) == sorted(ids for ids, _ in content(alone.batches(step)))
        assert sum(one.n_learned for own in made for one in own) == alone.n_learned(step)


def test_a_pack_that_does_not_count_is_computed_and_learns_nothing(
    checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    policy, load = policy_of(checkpoint_of("nano")), loader().load
    (pack,) = pack_paths(contexts(policy, [episodes_of("nano", 1)[0][0]]))
    filler = PackedTraces(pack, tuple(load(pack.frames)), counts=False)
    loss, correct = packed_sft_loss(policy, filler)
    loss.backward()  # type: ignore[no-untyped-call]
    assert (float(loss.detach()), int(correct), filler.n_learned) == (0.0, 0, 0)
    assert all(not g.any() for g in gradients(policy).values())


def test_several_processes_refuse_a_round_that_sees_no_frame(traces: list[LearnedTrace]) -> None:
    blind = trace(30, None)
    options: dict[str, Any] = {"batch_size": 2, "micro_batch_size": 1, "seed": 5}
    PackSource([*traces, blind], loader(), **options).close()
    with pytest.raises(InputError, match=r"'t30': got a round that sees no frame"):
        PackSource([*traces, blind], loader(), **options, processes=2)


def test_a_trace_knows_its_sizes(traces: list[LearnedTrace]) -> None:
    (path,) = traces[3].paths
    longer = replace(path, stretches=[*path.stretches], trajectory=9)
    both = LearnedTrace.of("both", [path, longer])
    assert (both.n_tokens, both.n_learned) == (len(path.tokens) - 1, 8)
    assert both.longest == len(path.tokens)
