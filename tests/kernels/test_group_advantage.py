"""`group_advantage`: the reference against a plain loop, every version against the reference, refusals."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from products import covering

from vrthinker import _core
from vrthinker.errors import InputError
from vrthinker.kernels.group_advantage import bench
from vrthinker.kernels.group_advantage.op import GroupAdvantages, group_advantage
from vrthinker.kernels.group_advantage.reference import METHODS, group_advantage_reference

NAN, INF = math.nan, math.inf


def offsets_of(sizes: list[int], first: int = 0) -> torch.Tensor:
    return torch.tensor([first, *sizes]).cumsum(0)


def random_call(sizes: list[int], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments with invalid episodes, flat groups and ragged tokens that reach neither end."""
    generator = torch.Generator().manual_seed(seed)
    episodes = sum(sizes)
    scale = 10.0 ** torch.randint(-3, 4, (1,), generator=generator).item()
    rewards = torch.randint(0, 6, (episodes,), generator=generator).to(dtype) * scale / 7
    valid = torch.rand(episodes, generator=generator) < 0.8
    rewards[~valid] = NAN
    lengths = torch.randint(0, 9, (episodes,), generator=generator).tolist()
    token_offsets = offsets_of(lengths, first=2)
    return {
        "rewards": rewards,
        "group_offsets": offsets_of(sizes),
        "valid": valid,
        "token_offsets": token_offsets,
        "n_tokens": int(token_offsets[-1]) + 3,
    }


def without(call: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in names}


def reference(call: dict[str, Any]) -> GroupAdvantages:
    return GroupAdvantages(*group_advantage_reference(**call))


def assert_agree(got: GroupAdvantages, call: dict[str, Any]) -> None:
    """Equal to the reference but for the rounding of the result; exactly 0 where that is promised.

    Sums in another order differ by a few units of double's last place of the largest reward; where a reward
    nearly equals its mean, that is all that there is of the difference.
    """
    wanted, rewards = reference(call), call["rewards"]
    assert got.advantages.dtype == rewards.dtype
    largest = rewards.nan_to_num(0.0).abs().max().item() if rewards.numel() else 0.0
    spacing = torch.finfo(rewards.dtype).eps
    torch.testing.assert_close(
        got.advantages.cpu(),
        wanted.advantages,
        rtol=spacing if rewards.dtype == torch.float32 else 64 * spacing,
        atol=64 * torch.finfo(torch.float64).eps * max(largest, 1.0),
    )
    assert torch.equal(got.zero_variance.cpu(), wanted.zero_variance)
    assert torch.equal(got.status.cpu(), wanted.status)
    silent = wanted.zero_variance.repeat_interleave(call["group_offsets"].diff())
    if "valid" in call:
        silent |= ~call["valid"]
    if "token_offsets" in call:
        tokens, n = call["token_offsets"], call["n_tokens"]
        ends = [torch.ones(int(count), dtype=torch.bool) for count in (tokens[0], n - tokens[-1])]
        silent = torch.cat([ends[0], silent.repeat_interleave(tokens.diff()), ends[1]])
    assert not got.advantages.cpu()[silent].any()


def looped(rewards: list[float], sizes: list[int], valid: list[bool], method: str, ddof: int) -> list[float]:
    """An oracle that shares nothing with the reference: the standard library, one group at a time."""
    kept = [r for r, ok in zip(rewards, valid, strict=True) if ok]
    centred = []
    for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
        counted = [rewards[i] for i in range(end - size, end) if valid[i]]
        centred += [reward - statistics.fmean(counted) for reward in counted]
    deviation = statistics.stdev if ddof == 1 else statistics.pstdev
    advantages: list[float] = []
    begin = 0
    for size in sizes:
        group = range(begin, begin + size)
        mine = [rewards[i] for i in group if valid[i]]
        begin += size
        for i in group:
            if not valid[i] or len(set(mine)) < 2:
                advantages.append(0.0)
            elif method == "rloo":
                others = [rewards[j] for j in group if valid[j] and j != i]
                advantages.append(rewards[i] - statistics.fmean(others))
            else:
                divisor = {
                    "grpo": deviation(mine) + 1e-6,
                    "dr_grpo": 1.0,
                    "batch_std": deviation(kept) + 1e-6,
                    "reinforce_plus_plus": math.sqrt(deviation(centred) ** 2 + 1e-8),
                }[method]
                advantages.append((rewards[i] - statistics.fmean(mine)) / divisor)
    return advantages


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ddof", [0, 1])
def test_reference_does_what_a_plain_loop_does(method: str, ddof: int) -> None:
    sizes = [8, 1, 0, 2, 17, 8, 3]
    call = random_call(sizes, seed=3, dtype=torch.float64)
    call["rewards"][-3:] = 0.25  # a flat group
    call["valid"][-3:] = True
    wanted = looped(call["rewards"].tolist(), sizes, call["valid"].tolist(), method, ddof)
    result = reference({**without(call, "token_offsets", "n_tokens"), "method": method, "ddof": ddof})
    torch.testing.assert_close(result.advantages, torch.tensor(wanted, dtype=torch.float64))
    assert result.zero_variance[[1, 2, 6]].all()
    assert not result.zero_variance[4]

    tokens = reference({**call, "method": method, "ddof": ddof}).advantages
    spread = torch.zeros(call["n_tokens"], dtype=torch.float64)
    for i, value in enumerate(wanted):
        spread[call["token_offsets"][i] : call["token_offsets"][i + 1]] = value
    torch.testing.assert_close(tokens, spread)


def test_grpo_by_hand() -> None:
    result = group_advantage(torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0]), torch.tensor([0, 3, 5]))
    exact = 1 / (1 + 1e-6)  # the sample standard deviation of 1, 2, 3 is 1
    assert torch.equal(result.advantages, torch.tensor([-exact, 0.0, exact, 0.0, 0.0]))
    assert result.zero_variance.tolist() == [False, True]
    assert result.status.tolist() == [0]


@pytest.mark.parametrize("version", ["cpu", "reference"])
def test_the_std_of_the_batch_is_that_of_rewards_or_of_centred_rewards(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """The numbers of TRL's `scale_rewards="batch"` and of verl's REINFORCE++ with a group baseline."""
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    rewards, offsets = torch.tensor([0.0, 1.0, 10.0, 11.0], dtype=torch.float64), torch.tensor([0, 2, 4])
    for method, eps, scale in (
        ("batch_std", 1e-4, math.sqrt(101 / 3) + 1e-4),
        ("reinforce_plus_plus", None, math.sqrt(1 / 3 + 1e-8)),
    ):
        found = group_advantage(rewards, offsets, method=method, eps=eps).advantages
        assert found.tolist() == pytest.approx([-0.5 / scale, 0.5 / scale] * 2, rel=1e-12)
    assert found.tolist() == pytest.approx([-0.866, 0.866] * 2, abs=1e-4)


@pytest.mark.parametrize("version", ["cpu", "reference"])
def test_a_flat_group_far_off_does_not_hide_what_the_others_differ_by(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """The mean of three rewards of 1e37 / 3 is off by more than 1."""
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    rewards = torch.tensor([0.0, 1.0, *[1e37 / 3] * 3], dtype=torch.float64)
    found = group_advantage(rewards, torch.tensor([0, 2, 5]), method="reinforce_plus_plus").advantages
    scale = math.sqrt(0.5 / 4 + 1e-8)
    assert found.tolist() == pytest.approx([-0.5 / scale, 0.5 / scale, 0, 0, 0], rel=1e-12)


@given(
    sizes=st.lists(st.integers(0, 9) | st.sampled_from([31, 32, 33, 255, 256, 257, 600]), max_size=7),
    method=st.sampled_from(METHODS),
    ddof=st.integers(0, 1),
    eps=st.sampled_from([1e-6, 1e-4, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    to_tokens=st.booleans(),
    all_valid=st.booleans(),
    step=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**16),
)
def test_cpp_agrees_with_the_reference(
    sizes: list[int],
    method: str,
    ddof: int,
    eps: float,
    dtype: torch.dtype,
    to_tokens: bool,
    all_valid: bool,
    step: int,
    seed: int,
) -> None:
    call = random_call(sizes, seed, dtype)
    if not to_tokens:
        call = without(call, "token_offsets", "n_tokens")
    if all_valid:
        call["rewards"] = call["rewards"].nan_to_num(0.5)
        call = without(call, "valid")
    for name, value in call.items():
        if isinstance(value, torch.Tensor):
            call[name] = value.repeat_interleave(step)[::step]
            assert call[name].stride() == (step,) or call[name].numel() < 2
    call |= {"method": method, "ddof": ddof, "eps": eps}
    assert_agree(group_advantage(**call), call)


def test_one_reward_for_all_by_a_zero_stride_is_flat() -> None:
    result = group_advantage(torch.tensor([0.1]).expand(8), torch.tensor([0, 8]))
    assert torch.equal(result.advantages, torch.zeros(8))
    assert result.zero_variance.tolist() == [True]


def test_threads_do_not_change_a_bit() -> None:
    """Sizes at which the C++ version starts further threads, for the groups and for the tokens."""
    sizes = [7, 9, 0, 12] * 10_000
    call = random_call(sizes, seed=5)
    call["token_offsets"] = call["token_offsets"] * 8
    call["n_tokens"] = int(call["token_offsets"][-1]) + 1000
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(group_advantage(**call))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(found, alone) for found, alone in zip(result, results[0], strict=True))
    assert_agree(results[0], call)


def test_large_rewards_stay_finite_and_rewards_that_differ_in_the_last_bit_count() -> None:
    ends = torch.tensor([1e38, -1e38, -1e38, -1e38], dtype=torch.float64)
    near = torch.tensor([1.0, 1.0 + 2**-52, 1.0, 1.0], dtype=torch.float64)
    tiny = torch.tensor([0.0, 5e-324, 0.0, 0.0], dtype=torch.float64)
    offsets = torch.tensor([0, 4, 8, 12])
    for method in METHODS:
        result = group_advantage(torch.cat([ends, near, tiny]), offsets, method=method, eps=1e-30)
        assert result.advantages.isfinite().all(), method
        assert result.zero_variance.tolist() == [False, False, False]
        small = group_advantage(ends.float(), offsets[:2], method=method)
        assert small.advantages.isfinite().all(), method
        assert small.advantages[0] > 0 > small.advantages[1]


@pytest.mark.parametrize("version", ["cpu", "reference"])
def test_empty_inputs(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    for method in METHODS:
        nothing = group_advantage(torch.empty(0), torch.tensor([0]), method=method)
        assert [tensor.shape[0] for tensor in nothing] == [0, 0, 1]
        groups = group_advantage(torch.empty(0), torch.tensor([0, 0, 0]), method=method)
        assert groups.zero_variance.tolist() == [True, True]
        padding = group_advantage(
            torch.empty(0), torch.tensor([0]), token_offsets=torch.tensor([2]), n_tokens=5, method=method
        )
        assert torch.equal(padding.advantages, torch.zeros(5))
        invalid = group_advantage(
            torch.tensor([NAN, INF]), torch.tensor([0, 2]), valid=torch.tensor([False, False]), method=method
        )
        assert torch.equal(invalid.advantages, torch.zeros(2))
        assert invalid.zero_variance.tolist() == [True]


REWARDS = torch.tensor([1.0, 2.0, 4.0])
OFFSETS = torch.tensor([0, 1, 3])
TOKENS = {"token_offsets": torch.tensor([0, 2, 4, 6]), "n_tokens": 6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gae"}, "method: got 'gae', wanted grpo, dr_grpo, rloo, batch_std, reinforce_plus_plus"),
        ({"ddof": 2}, "ddof: got 2, wanted 0 or 1"),
        ({"eps": 0.0}, "eps: got 0.0, wanted a finite number of at least 1e-30"),
        ({"eps": NAN}, "eps: got nan, wanted a finite"),
        ({"eps": INF}, "eps: got inf, wanted a finite"),
        ({"rewards": REWARDS.half()}, r"rewards: got dtype torch\.float16, wanted torch\.float32 or"),
        ({"rewards": REWARDS[None]}, r"rewards: got shape \[1, 3\], wanted \[episodes\]"),
        ({"rewards": REWARDS.to("meta")}, "rewards: got a tensor on meta, wanted cpu or cuda"),
        ({"group_offsets": OFFSETS.int()}, r"group_offsets: got dtype torch\.int32, wanted torch\.int64"),
        ({"group_offsets": OFFSETS[:1]}, r"group_offsets: got shape \[1\], wanted \[groups \+ 1\], with at"),
        ({"group_offsets": OFFSETS[None]}, r"group_offsets: got shape \[1, 3\], wanted \[groups"),
        ({"group_offsets": OFFSETS.to("meta")}, "group_offsets: got a tensor on meta, wanted the rewards' d"),
        ({"valid": torch.ones(3)}, r"valid: got dtype torch\.float32, wanted torch\.bool"),
        ({"valid": torch.ones(2, dtype=torch.bool)}, r"valid: got shape \[2\], wanted \[episodes\] = \[3\]"),
        ({"n_tokens": 6}, "n_tokens: got 6, wanted a number if token_offsets are given, None if not"),
        ({**TOKENS, "n_tokens": None}, "n_tokens: got None, wanted a number if token_offsets"),
        ({**TOKENS, "n_tokens": -1}, "n_tokens: got -1, wanted 0 or more"),
        (
            {**TOKENS, "token_offsets": TOKENS["token_offsets"].float()},
            r"token_offsets: got dtype torch\.float32, wanted torch\.int64",
        ),
        ({**TOKENS, "token_offsets": OFFSETS}, r"token_offsets: got shape \[3\], wanted \[episodes \+ 1\]"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match="^group_advantage: " + message):
        group_advantage(**{"rewards": REWARDS, "group_offsets": OFFSETS, **changes})


BAD_VALUES = [
    ({"rewards": torch.tensor([1.0, NAN, 2.0])}, r"rewards\[1\]: got nan, wanted a number within -1e38 to"),
    ({"rewards": torch.tensor([1.0, 2.0, -INF])}, r"rewards\[2\]: got -inf, wanted a number within"),
    (
        {"rewards": torch.tensor([0, 1e39, 0], dtype=torch.float64)},
        r"rewards\[1\]: got 1e\+39, wanted a number within",
    ),
    (
        {"rewards": torch.tensor([NAN, INF, 0]), "valid": torch.tensor([False, True, True])},
        r"rewards\[1\]: got inf, wanted a number within -1e38 to 1e38 in every valid episode \(mark",
    ),
    ({"group_offsets": torch.tensor([1, 2, 3])}, r"group_offsets\[0\]: got 1, wanted offsets that ascend f"),
    ({"group_offsets": torch.tensor([0, 2, 2])}, r"group_offsets\[2\]: got 2, wanted .* from 0 to 3, the e"),
    ({"group_offsets": torch.tensor([0, 4, 3])}, r"group_offsets\[1\]: got 4, wanted"),
    ({"group_offsets": torch.tensor([0, 2, 1, 3])}, r"group_offsets\[2\]: got 1, wanted"),
    ({"group_offsets": torch.tensor([-1, 1, 3])}, r"group_offsets\[0\]: got -1, wanted"),
    ({**TOKENS, "n_tokens": 5}, r"token_offsets\[3\]: got 6, wanted .* ascend within 0 to 5, n_tokens"),
    ({**TOKENS, "token_offsets": torch.tensor([0, 3, 2, 6])}, r"token_offsets\[2\]: got 2, wanted"),
    ({**TOKENS, "token_offsets": torch.tensor([-2, 3, 3, 6])}, r"token_offsets\[0\]: got -2, wanted"),
]


@pytest.mark.parametrize("version", ["cpu", "reference"])
@pytest.mark.parametrize(("changes", "message"), BAD_VALUES)
def test_on_a_cpu_bad_values_raise_at_once(
    monkeypatch: pytest.MonkeyPatch, version: str, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    with pytest.raises(InputError, match="^group_advantage: " + message):
        group_advantage(**{"rewards": REWARDS, "group_offsets": OFFSETS, **changes})


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES)
def test_the_binding_checks_before_it_writes(changes: dict[str, Any], message: str) -> None:
    call = {"rewards": REWARDS, "group_offsets": OFFSETS, "valid": None, "token_offsets": None, **changes}
    n = call.pop("n_tokens", 3)
    advantages = torch.full((n,), 7.0, dtype=call["rewards"].dtype)
    marks = torch.ones(len(call["group_offsets"]) - 1, dtype=torch.bool)
    options = {"method": "grpo", "ddof": 1, "eps": 1e-6, "num_threads": 1}
    with pytest.raises(ValueError, match="^group_advantage: " + message):
        _core.group_advantage_cpu(**call, advantages=advantages, zero_variance=marks, **options)
    assert (advantages == 7.0).all()
    assert marks.all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.zeros(3, dtype=torch.int64)}, "rewards: got dtype int64, wanted float32 or"),
        ({"rewards": torch.zeros(1, 3)}, r"rewards: got shape \[1, 3\], wanted .*\[episodes\]"),
        ({"rewards": [1.0]}, "rewards: got list, wanted a tensor that exports DLPack"),
        (
            {"group_offsets": torch.tensor([0])},
            r"group_offsets: got shape \[1\], wanted \[groups \+ 1\] with",
        ),
        ({"group_offsets": torch.empty(0, dtype=torch.int64)}, r"group_offsets: got shape \[0\], wanted"),
        ({"valid": torch.ones(3)}, "valid: got dtype float32, wanted bool"),
        ({"valid": torch.ones(4, dtype=torch.bool)}, r"valid: got shape \[4\], wanted"),
        ({"token_offsets": torch.zeros(3, dtype=torch.int64)}, r"token_offsets: got shape \[3\], wanted"),
        ({"advantages": torch.zeros(3).double()}, "advantages: got dtype float64, wanted float32"),
        ({"advantages": torch.zeros(4)}, r"advantages: got shape \[4\], wanted"),
        ({"advantages": torch.zeros(6)[::2]}, "advantages: got strides .*, wanted .*contiguous"),
        ({"zero_variance": torch.zeros(2)}, "zero_variance: got dtype float32, wanted bool"),
        ({"zero_variance": torch.zeros(3, dtype=torch.bool)}, r"zero_variance: got shape \[3\], wanted"),
        (
            {"method": "ppo"},
            "method: got 'ppo', wanted grpo, dr_grpo, rloo, batch_std or reinforce_plus_plus",
        ),
        ({"ddof": -1}, "ddof: got -1, wanted 0 or 1"),
        ({"eps": 1e-31}, "eps: got 1e-31, wanted a finite number of at least 1e-30"),
        ({"num_threads": 0}, "num_threads: got 0, wanted 1 or more"),
    ],
)
def test_the_binding_refuses_what_the_op_would(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "rewards": REWARDS,
        "group_offsets": OFFSETS,
        "valid": None,
        "token_offsets": None,
        "advantages": torch.zeros(3),
        "zero_variance": torch.zeros(2, dtype=torch.bool),
        "method": "grpo",
        "ddof": 1,
        "eps": 1e-6,
        "num_threads": 1,
    }
    _core.group_advantage_cpu(**call)
    with pytest.raises((ValueError, TypeError), match="^group_advantage: " + message):
        _core.group_advantage_cpu(**{**call, **changes})


def test_a_named_version_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for version in ("cuda", "triton"):
        monkeypatch.setenv("VRTHINKER_KERNELS", version)
        with pytest.raises(InputError, match=f"group_advantage: VRTHINKER_KERNELS={version}, but it cannot"):
            group_advantage(REWARDS, OFFSETS)


def test_the_named_version_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("the C++ version ran")

    monkeypatch.setattr(_core, "group_advantage_cpu", refuse)
    with pytest.raises(AssertionError, match="ran"):
        group_advantage(REWARDS, OFFSETS)
    monkeypatch.setenv("VRTHINKER_KERNELS", "reference")
    assert group_advantage(REWARDS, OFFSETS).zero_variance.tolist() == [True, False]


def test_advantages_carry_no_gradient() -> None:
    result = group_advantage(REWARDS.clone().requires_grad_(), OFFSETS)
    assert not result.advantages.requires_grad


@pytest.mark.parametrize(
    ("method", "dtype", "to_tokens", "all_valid"),
    covering(METHODS, [torch.float32, torch.float64], [False, True], [False, True]),
)
def test_opcheck(method: str, dtype: torch.dtype, to_tokens: bool, all_valid: bool) -> None:
    call = random_call([3, 0, 5], seed=1, dtype=dtype)
    tokens = (call["token_offsets"], call["n_tokens"]) if to_tokens else (None, 0)
    valid = None if all_valid else call["valid"]
    rewards = call["rewards"].nan_to_num(2.0) if all_valid else call["rewards"]
    torch.library.opcheck(
        torch.ops.vrthinker.group_advantage.default,
        (rewards, call["group_offsets"], valid, method, 1, 1e-6, *tokens),
    )


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    def loss(call: dict[str, Any], logprobs: torch.Tensor) -> torch.Tensor:
        result = group_advantage(**call, check=True)
        return (result.advantages * logprobs).sum() + result.zero_variance.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes in ([4, 2, 6], [3, 3, 3, 5]):
        call = random_call(sizes, seed=7)
        logprobs = torch.randn(call["n_tokens"], requires_grad=True)
        result = compiled(call, logprobs)
        assert torch.equal(result, loss(call, logprobs))
        (gradient,) = torch.autograd.grad(result, logprobs)
        assert torch.equal(gradient, group_advantage(**call).advantages)


def on_cuda(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def test_benchmark_cases_hold_what_they_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (
        bench.Case(64),
        bench.Case(90, ragged=True, mean_tokens=5),
        bench.Case(64, method="batch_std"),
    ):
        comparison = bench.comparison(case, "cpu", 3, compiled=False)
        comparison.check()
        assert {"reference", "vectorised torch", "group_advantage"} <= set(comparison.competitors)
        assert comparison.facts["episodes"] == case.episodes
        assert comparison.bytes_moved >= 8 * case.episodes
    monkeypatch.setattr(bench, "_vectorised", lambda data, method: data.rewards)
    with pytest.raises(RuntimeError, match="vectorised torch differs from the reference"):
        bench.comparison(bench.Case(64), "cpu", 3, compiled=False).check()


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_gpu_agrees_with_the_reference(
    monkeypatch: pytest.MonkeyPatch, version: str, dtype: torch.dtype, method: str
) -> None:
    for seed, sizes in enumerate(([8] * 70, [0, 1, 2, 33, 700, 0, 5], [], [300])):
        call = {**random_call(sizes, seed, dtype), "method": method}
        for arguments in (call, without(call, "token_offsets", "n_tokens")):
            monkeypatch.setenv("VRTHINKER_KERNELS", version)
            result = group_advantage(**on_cuda(arguments), check=True)
            assert_agree(result, arguments)
            if version == "cuda":
                monkeypatch.setenv("VRTHINKER_KERNELS", "cpu")
                assert torch.equal(result.advantages.cpu(), group_advantage(**arguments).advantages)


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["cuda", "triton", "reference"])
@pytest.mark.parametrize(("changes", "message"), BAD_VALUES)
def test_gpu_counts_bad_values(
    monkeypatch: pytest.MonkeyPatch, version: str, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    call = on_cuda({"rewards": REWARDS, "group_offsets": OFFSETS, **changes})
    result = group_advantage(**call)
    assert result.status.item() == reference(call).status.item() > 0
    assert result.advantages.isnan().any() or "token_offsets" in message
    with pytest.raises(InputError, match=r"group_advantage: got \d bad values, wanted rewards within"):
        group_advantage(**call, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["cuda", "triton"])
def test_gpu_does_not_wait_and_runs_on_the_current_stream(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    call = on_cuda(random_call([8] * 100, seed=2))
    group_advantage(**call)  # Triton compiles
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            call["rewards"] = call["rewards"] * 3
            result = group_advantage(**call)
            assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    assert_agree(result, cpu)


@pytest.mark.gpu
def test_gpu_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", "cuda")
    call = on_cuda(random_call([8] * 100, seed=2))
    group_advantage(**call)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        group_advantage(**call)
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) == 1, on_device
    assert "group_advantage_kernel" in on_device[0]
