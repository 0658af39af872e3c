"""`grpo_loss`: every version against the reference and autograd through it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from grpo_cases import (
    WAYS,
    Batch,
    assert_equals_reference,
    assert_kl_is_right_near_zero,
    assert_what_is_not_finite_shows,
    random_batch,
    reference_of,
    run,
)
from hypothesis import given
from hypothesis import strategies as st
from products import covering

from vrthinker import _core
from vrthinker.errors import InputError
from vrthinker.kernels.grpo_loss import bench
from vrthinker.kernels.grpo_loss.op import grpo_loss
from vrthinker.kernels.grpo_loss.reference import METRICS, grpo_gradient_reference, grpo_loss_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED_LENGTHS = (0, 5, 700, 0, 0, 1, 1300, 30, 0)


def one_token(policy: float, old: float, ref: float | None, advantage: float, **options: Any) -> Batch:
    return Batch(
        torch.tensor([policy]),
        torch.tensor([old]),
        None if ref is None else torch.tensor([ref]),
        torch.tensor([advantage]),
        torch.tensor([True]),
        torch.tensor([0, 1]),
        options,
    )


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.one_of(st.integers(0, 6), st.integers(0, 700)), max_size=9),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    per_episode=st.booleans(),
    with_ref=st.booleans(),
    learned=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    stride=st.integers(1, 3),
    way=st.sampled_from(WAYS),
    clip=st.tuples(st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([0.0, 0.28, 5.0])),
    kl_weight=st.sampled_from([0.0, 0.01, 1.5]),
    version=st.sampled_from(["cpu", "reference"]),
)
def test_loss_gradient_and_metrics_equal_the_reference(
    seed: int,
    lengths: list[int],
    dtypes: tuple[torch.dtype, ...],
    per_episode: bool,
    with_ref: bool,
    learned: float,
    stride: int,
    way: dict[str, Any],
    clip: tuple[float, float],
    kl_weight: float,
    version: str,
) -> None:
    batch = random_batch(
        seed,
        lengths,
        dtypes=dtypes,
        per_episode=per_episode,
        with_ref=with_ref,
        learned=learned,
        stride=stride,
        clip_low=clip[0],
        clip_high=clip[1],
        kl_weight=kl_weight,
        **way,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VRTHINKER_KERNELS", version)
        assert_equals_reference(batch)


def test_the_reference_is_the_formula() -> None:
    """By hand, in plain Python: 3 episodes, the last without a learned token."""
    policy, old, ref = [-1.0, -0.5, -2.0, -1.2], [-1.1, -1.0, -1.5, -1.2], [-0.9, -0.8, -2.5, 0.0]
    advantages, mask, offsets = [0.7, -1.3, 5.0], [True, True, True, False], [0, 2, 3, 4]
    losses = []
    for i, advantage in enumerate([0.7, 0.7, -1.3]):
        ratio = math.exp(policy[i] - old[i])
        gain = min(ratio * advantage, min(max(ratio, 0.9), 1.3) * advantage)
        k3 = math.exp(ref[i] - policy[i]) - (ref[i] - policy[i]) - 1
        losses.append(-gain + 0.05 * k3)
    wanted = {
        "token_mean": sum(losses) / 3,
        "episode_mean": ((losses[0] + losses[1]) / 2 + losses[2]) / 2,
        "fixed_length": sum(losses) / (3 * 4),
    }
    for aggregation, loss in wanted.items():
        found, token_loss, metrics = grpo_loss_reference(
            *(torch.tensor(v) for v in (policy, old, ref, advantages)),
            torch.tensor(mask),
            torch.tensor(offsets),
            clip_low=0.1,
            clip_high=0.3,
            kl_weight=0.05,
            aggregation=aggregation,  # type: ignore[arg-type]
            fixed_length=4 if aggregation == "fixed_length" else None,
        )
        assert found.item() == pytest.approx(loss, rel=1e-6)
        assert token_loss.tolist() == pytest.approx([*losses, 0.0], rel=1e-5)
    # Ratios e^0.1, e^0.5 and e^-0.5: the second is clipped above, the third below.
    assert metrics.tolist()[:5] == pytest.approx(
        [(math.exp(0.1) + math.exp(0.5) + math.exp(-0.5)) / 3, math.exp(0.5), 1 / 3, 1 / 3, 2 / 3], rel=1e-6
    )


def test_the_closed_gradient_is_autograds() -> None:
    batch = random_batch(3, MIXED_LENGTHS, aggregation="token_mean", normalizer=1.0, kl_weight=0.3)
    closed = grpo_gradient_reference(*batch.arguments(), clip_low=0.2, clip_high=0.2, kl_weight=0.3)  # type: ignore[arg-type]
    torch.testing.assert_close(closed, reference_of(batch)[3], rtol=1e-6, atol=1e-7)


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    """Central differences in double precision; no token near a kink."""
    batch = random_batch(11, (6, 3), learned=1.0, kl_weight=0.4)
    _, gradient = run(batch)

    def loss(policy: list[float]) -> float:
        total = 0.0
        for episode, (begin, end) in enumerate([(0, 6), (6, 9)]):
            advantage = float(batch.advantages[episode])
            for i in range(begin, end):
                assert batch.ref is not None
                ratio, gap = math.exp(policy[i] - float(batch.old[i])), float(batch.ref[i]) - policy[i]
                gain = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
                total += (-gain + 0.4 * (math.exp(gap) - gap - 1)) / (end - begin) / 2
        return total

    values = batch.policy.tolist()
    for i in range(9):
        slopes = [loss([v + (h if j == i else 0) for j, v in enumerate(values)]) for h in (1e-6, -1e-6)]
        assert gradient[i].item() == pytest.approx((slopes[0] - slopes[1]) / 2e-6, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("version", ["cpu", "reference"])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("log_ratio", [0.0, math.log(2.0), -math.log(2.0)])
def test_ties_and_bounds_follow_autograd(
    monkeypatch: pytest.MonkeyPatch, version: str, advantage: float, log_ratio: float
) -> None:
    """At ratio 1 with no clip range, and at ratios 2 and 1/2 that are the bounds themselves."""
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    for clip_low, clip_high in ((0.0, 0.0), (0.5, 1.0)):
        options = {"clip_low": clip_low, "clip_high": clip_high, "kl_weight": 0.0}
        batch = one_token(log_ratio, 0.0, None, advantage, **options)
        assert run(batch)[1].item() == pytest.approx(reference_of(batch)[3].item(), rel=1e-6)


@pytest.mark.parametrize("version", ["cpu", "reference"])
def test_products_that_round_to_a_tie_get_half_the_gradient(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    above = 1.0 + 2.0**-23  # one step above the bound 1; times a subnormal advantage both are equal
    batch = one_token(2.0**-23, 0.0, None, 2.0**-140, clip_low=0.0, clip_high=0.0, kl_weight=0.0)
    assert torch.exp(batch.policy).item() == above
    wanted = reference_of(batch)[3].item()
    assert wanted == -(2.0**-141)
    assert run(batch)[1].item() == wanted


def test_a_clipped_token_whose_ratio_overflows_has_no_gradient() -> None:
    batch = one_token(200.0, 0.0, None, 2.0, clip_high=0.5)
    result, gradient = run(batch)
    assert result.loss.item() == -3.0
    assert gradient.item() == 0.0
    assert result.metrics["ratio/max"].item() == math.inf


def test_the_exponential_is_within_one_unit_in_the_last_place() -> None:
    """With advantage -1 and no upper clip in reach, a token's loss is its ratio."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    x = torch.cat(
        [
            torch.linspace(-110, 90, 200_001),
            torch.rand(200_000, generator=generator) * 2 - 1,
            torch.tensor([0.0, -0.0, 88.72283, 88.72284, -87.3, -103.9, -104.1, 1e30, -1e30, -3e38, 1e-30]),
        ]
    )
    batch = Batch(
        x,
        torch.zeros_like(x),
        None,
        torch.full_like(x, -1),
        torch.ones_like(x, dtype=torch.bool),
        torch.tensor([0, len(x)]),
    )
    batch.options = {"clip_low": 1.0, "clip_high": 3e38, "kl_weight": 0.0}
    found = run(batch)[0].token_loss
    exact = x.double().exp()
    rounded = exact.float()
    assert torch.equal(found.isinf(), rounded.isinf())
    unit = torch.nextafter(rounded, torch.tensor(torch.inf)).double() - rounded.double()
    off = ((found.double() - exact).abs() / unit)[rounded.isfinite()]
    assert off.max().item() < 1.0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [(), (0, 0, 0), (5, 9)])
def test_no_learned_tokens_give_a_loss_of_zero(way: dict[str, Any], lengths: tuple[int, ...]) -> None:
    batch = random_batch(0, lengths, learned=0.0, **way)
    result, gradient = run(batch)
    assert result.loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros(sum(lengths)))
    assert torch.equal(result.token_loss, torch.zeros(sum(lengths)))
    assert [value.item() for value in result.metrics.values()] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("version", ["cpu", "reference"])
def test_the_kl_is_right_near_the_reference_policy(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    assert_kl_is_right_near_zero()


@pytest.mark.parametrize("version", ["cpu", "reference"])
def test_what_is_not_finite_in_a_learned_token_makes_the_loss_nan(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    assert_what_is_not_finite_shows()


def test_an_infinite_ratio_is_not_clipped_away() -> None:
    """Clipped, the loss would be -1.2, with gradient 0."""
    result, gradient = run(one_token(-2.0, -math.inf, -2.0, 1.0))
    assert result.loss.isnan()
    assert gradient.isnan()


def test_normalizer_makes_parts_add_up() -> None:
    """Micro-batches with the whole batch's counts: losses and gradients are the whole batch's."""
    lengths = (30, 0, 41, 7)
    whole = random_batch(5, lengths)
    learned = [int(part.sum()) for part in whole.mask.split(lengths)]
    counts = {"token_mean": sum(learned), "episode_mean": sum(n > 0 for n in learned), "fixed_length": 4}
    for aggregation, count in counts.items():
        options = {"aggregation": aggregation, "fixed_length": 50 if aggregation == "fixed_length" else None}
        whole.options = options
        result, gradient = run(whole)
        losses, gradients = [], []
        for episodes in (slice(0, 3), slice(3, 4)):
            tokens = slice(int(whole.offsets[episodes.start]), int(whole.offsets[episodes.stop]))
            assert whole.ref is not None
            part = Batch(
                whole.policy[tokens],
                whole.old[tokens],
                whole.ref[tokens],
                whole.advantages[episodes],
                whole.mask[tokens],
                whole.offsets[episodes.start : episodes.stop + 1] - tokens.start,
                {**options, "normalizer": count},
            )
            one, slope = run(part)
            losses.append(one.loss.detach())
            gradients.append(slope)
        torch.testing.assert_close(sum(losses), result.loss.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_change_no_bit(threads: int) -> None:
    batch = random_batch(2, (70_000, 1, 130_000, 0, 20_017), learned=0.7)
    alone, gradient = run(batch, num_threads=1)
    together, same = run(batch, num_threads=threads)
    assert torch.equal(alone.loss, together.loss)
    assert torch.equal(alone.token_loss, together.token_loss)
    assert torch.equal(gradient, same)
    assert all(torch.equal(alone.metrics[name], together.metrics[name]) for name in METRICS)
    assert_equals_reference(batch, num_threads=threads)


def test_as_many_advantages_as_episodes_and_tokens_are_read_per_token() -> None:
    batch = random_batch(4, (0, 3, 0), learned=1.0)
    batch.advantages = torch.tensor([1.0, 2.0, 3.0])
    batch.options = {"kl_weight": 0.0, "clip_low": 1.0, "clip_high": 100.0}
    ratio = torch.exp(batch.policy - batch.old)
    torch.testing.assert_close(run(batch)[0].token_loss, -ratio * torch.tensor([1.0, 2.0, 3.0]))


def test_only_the_policy_gets_a_gradient_and_it_scales() -> None:
    policy, old, ref, advantages, mask, offsets = random_batch(6, (20, 11)).arguments()
    assert policy is not None
    assert old is not None
    for tensor in (policy, old):
        tensor.requires_grad_()
    result = grpo_loss(policy, old, ref, advantages, mask, offsets)  # type: ignore[arg-type]
    assert not result.token_loss.requires_grad
    assert not any(metric.requires_grad for metric in result.metrics.values())
    (once,) = torch.autograd.grad(result.loss, policy, retain_graph=True)
    (result.loss * -2.5).backward()
    torch.testing.assert_close(policy.grad, once * -2.5)
    assert old.grad is None


def good() -> dict[str, Any]:
    batch = random_batch(8, (4, 6))
    names = ("policy_logprobs", "old_logprobs", "ref_logprobs", "advantages", "loss_mask", "episode_offsets")
    return dict(zip(names, batch.arguments(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy_logprobs": torch.zeros(10).double()},
            "policy_logprobs: got dtype torch.float64, wanted float32",
        ),
        (
            {"old_logprobs": torch.zeros(10).long()},
            "old_logprobs: got dtype torch.int64, wanted float32, bfloat16",
        ),
        (
            {"ref_logprobs": torch.zeros(9)},
            r"ref_logprobs: got shape \[9\], wanted \[10\], as policy_logprobs",
        ),
        ({"old_logprobs": torch.zeros(2, 5)}, r"old_logprobs: got shape \[2, 5\], wanted one dimension"),
        ({"advantages": torch.zeros(2).half()}, "advantages: got dtype torch.float16, wanted torch.float32"),
        ({"advantages": torch.zeros(3)}, r"advantages: got shape \[3\], wanted \[10\] \(tokens\) or \[2\]"),
        ({"loss_mask": torch.ones(10)}, "loss_mask: got dtype torch.float32, wanted torch.bool"),
        ({"loss_mask": torch.ones(11).bool()}, r"loss_mask: got shape \[11\], wanted \[10\]"),
        ({"episode_offsets": torch.tensor([0, 10]).int()}, "episode_offsets: got dtype torch.int32, wanted"),
        ({"episode_offsets": torch.tensor([0])}, "episode_offsets: got 1 offsets for 10 tokens"),
        ({"episode_offsets": torch.empty(0).long()}, "episode_offsets: got 0 offsets for 10 tokens"),
        (
            {"episode_offsets": torch.tensor([1, 4, 10])},
            "episode_offsets: got offsets from 1 to 10, wanted 0 to 10",
        ),
        (
            {"episode_offsets": torch.tensor([0, 4, 11])},
            "episode_offsets: got offsets from 0 to 11, wanted 0 to",
        ),
        (
            {"episode_offsets": torch.tensor([0, 12, 10])},
            "episode_offsets: got 10 after 12, wanted ascending offsets",
        ),
        (
            {"policy_logprobs": torch.zeros(10, device="meta")},
            "policy_logprobs: got a tensor on meta, wanted cpu",
        ),
        (
            {"loss_mask": torch.ones(10, device="meta").bool()},
            "loss_mask: got a tensor on meta, wanted one on cpu",
        ),
        ({"clip_low": 1.5}, "clip_low: got 1.5, wanted 0 to 1"),
        ({"clip_low": math.nan}, "clip_low: got nan, wanted 0 to 1"),
        ({"clip_high": -0.1}, "clip_high: got -0.1, wanted a finite number of 0 or more"),
        ({"clip_high": math.inf}, "clip_high: got inf, wanted"),
        ({"kl_weight": -1.0}, "kl_weight: got -1.0, wanted a finite number of 0 or more"),
        (
            {"aggregation": "mean"},
            "aggregation: got 'mean', wanted one of token_mean, episode_mean, fixed_length",
        ),
        ({"aggregation": "fixed_length"}, "fixed_length: got None, wanted 1 or more tokens"),
        ({"aggregation": "fixed_length", "fixed_length": 0}, "fixed_length: got 0, wanted 1 or more tokens"),
        ({"fixed_length": 5}, "fixed_length: got 5, wanted None with aggregation 'episode_mean'"),
        ({"normalizer": 0.0}, "normalizer: got 0.0, wanted a finite number above 0, or None"),
        ({"normalizer": math.inf}, "normalizer: got inf, wanted"),
        ({"num_threads": 0}, "num_threads: got 0, wanted 1 to 1024"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_got_and_wanted(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match="grpo_loss: " + message):
        grpo_loss(**{**good(), **changes})


def binding_arguments() -> list[Any]:
    outputs = [torch.zeros(()), torch.zeros(10), torch.zeros(10), torch.zeros(()), torch.zeros(6)]
    return [*random_batch(8, (4, 6)).arguments(), *outputs, 0.8, 1.2, 0.01, "episode_mean", 0, 0.0, 1]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(10).long(), "policy_logprobs: got dtype int64, wanted float32, bfloat16 or float16"),
        (1, torch.zeros(11), r"old_logprobs: got shape \[11\], wanted \[10\]"),
        (3, torch.zeros(3), r"advantages: got shape \[3\], wanted \[10\] \(tokens\) or \[2\] \(episodes\)"),
        (4, torch.zeros(10).byte(), "loss_mask: got dtype uint8, wanted bool"),
        (5, torch.tensor([0, 11, 10]), "episode_offsets: got 10 after 11, wanted ascending offsets"),
        (5, torch.tensor([-1, 4, 10]), "episode_offsets: got a first offset of -1, wanted 0"),
        (
            5,
            torch.tensor([0, 4, 9]),
            "episode_offsets: got a last offset of 9, wanted 10, the number of tokens",
        ),
        (
            5,
            torch.tensor([], dtype=torch.int64),
            r"episode_offsets: got no offsets, wanted \[episodes \+ 1\]",
        ),
        (5, torch.tensor([0]), "episode_offsets: got no episodes for 10 tokens, wanted one or more"),
        (7, torch.zeros(9), r"token_loss: got shape \[9\], wanted \[10\]"),
        (8, torch.zeros(20)[::2], "gradient: got strides .* wanted a contiguous tensor"),
        (10, torch.zeros(6).double(), "metrics: got dtype float64, wanted float32"),
        (11, 1.3, "lowest_ratio and highest_ratio: got 1.3.* and 1.2.*, wanted 0 <= lowest_ratio"),
        (12, math.nan, "lowest_ratio and highest_ratio: got .* and nan"),
        (13, math.inf, "kl_weight: got inf, wanted a finite number"),
        (14, "mean", "aggregation: got 'mean', wanted token_mean, episode_mean or fixed_length"),
        (14, "fixed_length", "fixed_length: got 0, wanted 1 or more"),
        (16, -1.0, "normalizer: got -1.0.*, wanted a finite number above 0, or 0 for none"),
        (17, 0, "num_threads: got 0, wanted 1 or more"),
    ],
)
def test_the_binding_refuses_too_and_writes_nothing(place: int, value: Any, message: str) -> None:
    arguments = binding_arguments()
    arguments[place] = value
    with pytest.raises(ValueError, match="grpo_loss: " + message):
        _core.grpo_loss_cpu(*arguments)
    assert all(not tensor.any() for tensor in arguments[6:11])


def test_a_named_version_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", "cuda")
    with pytest.raises(InputError, match="grpo_loss: VRTHINKER_KERNELS=cuda, but it cannot run: "):
        grpo_loss(**good())
    monkeypatch.setenv("VRTHINKER_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="grpo_loss: VRTHINKER_KERNELS=triton, but it cannot run: "):
        grpo_loss(**good())


def test_the_named_version_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("the C++ version ran")

    monkeypatch.setattr(_core, "grpo_loss_cpu", refuse)
    with pytest.raises(AssertionError, match="ran"):
        grpo_loss(**good())
    monkeypatch.setenv("VRTHINKER_KERNELS", "reference")
    grpo_loss(**good())


@pytest.mark.parametrize(("dtype", "with_ref"), covering(DTYPES, [True, False], strength=1))
def test_opcheck(dtype: torch.dtype, with_ref: bool) -> None:
    policy, *others = random_batch(
        9, (7, 0, 12), dtypes=(dtype,) * 3, with_ref=with_ref, stride=2
    ).arguments()
    assert policy is not None
    numbers = (0.2, 0.3, 0.01, "episode_mean", 0, 0.0, 1)
    torch.library.opcheck(torch.ops.vrthinker.grpo_loss.default, (policy.requires_grad_(), *others, *numbers))


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_into_one_graph_with_its_gradient(dynamic: bool) -> None:
    def step(policy: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        result = grpo_loss(policy * 1.5, *others, kl_weight=0.1)
        return result.loss * 2, result.metrics["kl/ref"]

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((9, 4), (3, 8, 30)):
        policy, *others = random_batch(10, lengths).arguments()
        assert policy is not None
        policy.requires_grad_()
        wanted, kl = step(policy, *others)
        found, same_kl = compiled(policy, *others)
        assert torch.equal(found, wanted)
        assert torch.equal(kl, same_kl)
        (slope,) = torch.autograd.grad(wanted, policy)
        assert torch.equal(torch.autograd.grad(found, policy)[0], slope)


def test_benchmark_cases_compare_what_runs_here() -> None:
    cases = list(bench.comparisons("cpu", seed=torch.seed() % 2**31))
    assert len(cases) >= 2
    for make in cases:
        comparison = make()
        assert {"reference", "cpu"} <= set(comparison.competitors)
        assert comparison.bytes_moved > 0
    for with_kl in (True, False):
        small = bench.comparison("cpu", seed=1, episodes=3, mean_length=40, with_kl=with_kl, compiled=False)
        assert small.op == "grpo_loss"
        small.check()


def test_the_benchmark_stops_at_a_version_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> Any:
        return grpo_loss(*arguments, **{**options, "kl_weight": 0.02})

    monkeypatch.setattr(bench, "grpo_loss", wrong)
    small = bench.comparison("cpu", seed=1, episodes=3, mean_length=40, with_kl=True, compiled=False)
    with pytest.raises(RuntimeError, match="grpo_loss: cpu differs from the reference"):
        small.check()


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["cuda", "triton"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_versions_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, version: str, way: dict[str, Any], dtype: torch.dtype
) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    for seed, lengths in enumerate(((), (0, 0), (1,), MIXED_LENGTHS, (5000, 1, 60_000))):
        for with_ref, per_episode, stride in ((True, True, 1), (False, False, 3)):
            batch = random_batch(
                seed,
                lengths,
                dtypes=(dtype, torch.float32, torch.bfloat16),
                with_ref=with_ref,
                per_episode=per_episode,
                stride=stride,
                **way,
            )
            assert_equals_reference(batch, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["cuda", "triton"])
def test_gpu_versions_are_right_near_the_reference_policy_and_show_what_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    assert_kl_is_right_near_zero("cuda", rtol=1e-5)  # Triton's exponential is off by a few units
    assert_what_is_not_finite_shows("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["cuda", "triton"])
def test_gpu_versions_repeat_their_bits_on_any_stream_without_a_sync(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    batch = random_batch(12, (5000, 1, 60_000))
    first, gradient = run(batch, "cuda")
    arguments = batch.arguments("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            again = grpo_loss(*arguments)  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.token_loss, again.token_loss)
    assert torch.equal(gradient, run(batch, "cuda")[1])


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["cuda", "triton"])
@pytest.mark.parametrize("offsets", [[5, -9, 2**62], [0, 2**40, -(2**40)], [50, 20, 0], [-1, -1, -1]])
def test_gpu_versions_survive_wrong_offsets(
    monkeypatch: pytest.MonkeyPatch, version: str, offsets: list[int]
) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    batch = random_batch(13, (20, 30))
    batch.offsets = torch.tensor(offsets)
    _, gradient = run(batch, "cuda")
    torch.cuda.synchronize()
    assert gradient[~batch.mask].abs().max() == 0
