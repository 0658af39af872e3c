"""Arguments of every op by type: whatever is passed, at most an InputError is raised, which names the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from grpo_cases import random_batch

from vrthinker.errors import InputError
from vrthinker.kernels.decode_attention.op import decode_attention
from vrthinker.kernels.evict.op import evict_cache, evict_paged, evict_sequence
from vrthinker.kernels.evict.paged import plan_paged_eviction
from vrthinker.kernels.evict.plan import plan_eviction
from vrthinker.kernels.group_advantage.op import group_advantage
from vrthinker.kernels.grpo_loss.op import grpo_loss
from vrthinker.kernels.patchify.op import patchify

PLAN = plan_eviction([[(1, 3)]], [6])
PAGED = plan_paged_eviction(PLAN, [[0, 1, 2]], 2)
WRONG = (
    None,
    "text",
    b"bytes",
    1.5,
    -7,
    [None],
    ["a"],
    [["a"]],
    [[None]],
    [[(1, 2, 3)]],
    [[("a", 3)]],
    {},
    object(),
)


def cache() -> list[torch.Tensor]:
    return [torch.zeros(1, 2, 6, 4)]


def calls() -> list[tuple[str, Callable[..., object], dict[str, Any]]]:
    """The op's name, the function, and arguments that are right."""
    batch = random_batch(0, (4, 6))
    names = ("policy_logprobs", "old_logprobs", "ref_logprobs", "advantages", "loss_mask", "episode_offsets")
    loss = dict(zip(names, batch.arguments(), strict=True))
    loss |= {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "kl_weight": 0.1,
        "aggregation": "fixed_length",
        "fixed_length": 5,
    }
    loss |= {"normalizer": 2.0, "num_threads": 1}
    image = {"patch_size": 2, "merge_size": 1, "temporal_patch_size": 2, "out_dtype": torch.float32}
    image |= {"mean": [0.5] * 3, "std": [0.5] * 3, "num_threads": 1}
    rewards = {"rewards": torch.tensor([0.0, 1.0]), "group_offsets": torch.tensor([0, 2]), "method": "grpo"}
    rewards |= {"valid": torch.tensor([True, True]), "ddof": 1, "eps": 1e-6}
    rewards |= {"token_offsets": torch.tensor([0, 1, 2]), "n_tokens": 2}
    blocks = [torch.zeros(3, 2, 2, 4)]
    attended = {
        "query": torch.zeros(1, 2, 4),
        "keys": torch.zeros(1, 2, 6, 4),
        "values": torch.zeros(1, 2, 6, 4),
    }
    attended |= {"lengths": torch.tensor([3]), "scale": 0.5, "num_threads": 1}
    spans = {"spans": [[(1, 3)]], "lengths": [6], "freed_positions": [[2]]}
    tables = {"plan": PLAN, "block_tables": [[0, 1, 2]], "block_size": 2}
    whole = {"keys": cache(), "values": cache(), "plan": PLAN, "layout": "bhtd", "inv_freq": torch.ones(2)}
    sequence = {"tensors": [torch.zeros(1, 6)], "plan": PLAN, "batch_dims": [0], "token_dims": [1]}
    return [
        ("decode_attention", decode_attention, attended),
        ("evict", plan_eviction, spans),
        ("evict", plan_paged_eviction, tables),
        ("evict", evict_cache, whole),
        ("evict", evict_sequence, sequence),
        ("evict", evict_paged, {"keys": blocks, "values": blocks, "plan": PAGED}),
        ("group_advantage", group_advantage, rewards),
        ("grpo_loss", grpo_loss, loss),
        ("patchify", patchify, {"frames": torch.zeros(1, 4, 4, 3, dtype=torch.uint8), **image}),
    ]


def refusal(call: Callable[..., object], arguments: dict[str, Any]) -> str | None:
    """The InputError's text, or None if the call went through."""
    try:
        call(**arguments)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("op", "call", "arguments"), [pytest.param(*c, id=c[1].__name__) for c in calls()])
def test_no_argument_of_a_wrong_type_is_more_than_an_input_error(
    op: str, call: Callable[..., object], arguments: dict[str, Any]
) -> None:
    for name in arguments:
        refused = 0
        for wrong in WRONG:
            message = refusal(call, {**arguments, name: wrong})
            if message is not None:
                refused += 1
                assert message.startswith(f"{op}: "), (name, wrong, message)
                assert "\n" not in message
        assert refused >= len(WRONG) - 3, name  # what is optional may be None, and a number or a text may fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spans": [None]}, r"spans\[0\]: got None, wanted \(start, end\) pairs of whole numbers"),
        ({"spans": None}, "spans: got None, wanted a list of spans per sequence"),
        ({"spans": [[(0, 1.5)]]}, r"spans\[0\]: got \(0, 1.5\), wanted \(start, end\) pairs"),
        ({"spans": [[(0, 1, 2)]]}, r"spans\[0\]: got \(0, 1, 2\), wanted \(start, end\) pairs"),
        ({"lengths": ["6"]}, r"lengths: got \['6'\], wanted a length per sequence"),
        ({"freed_positions": [["2"]]}, r"freed_positions\[0\]: got \['2'\], wanted a whole number per span"),
    ],
)
def test_spans_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match="^evict: " + message):
        plan_eviction(**{"spans": [[(1, 3)]], "lengths": [6], **changes})


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    wanted = plan_eviction([[(1, 3)]], [6], freed_positions=[[1]])
    assert plan_eviction(np.array([[[1, 3]]]), np.array([6]), freed_positions=np.array([[1]])) == wanted
    assert (
        plan_eviction([torch.tensor([[1, 3]])], torch.tensor([6]), freed_positions=[torch.tensor([1])])
        == wanted
    )
    with pytest.raises(InputError, match=r"^evict: lengths: got array\(6\), wanted a length per sequence"):
        plan_eviction([[(1, 3)]], np.array(6))
    frames = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    options = {"patch_size": np.int64(2), "merge_size": 1, "temporal_patch_size": 2}
    patches = patchify(frames, mean=np.full(3, 0.5, np.float32), std=np.full(3, 0.5), **options)  # type: ignore[arg-type]
    assert torch.equal(patches, torch.full((4, 24), -1.0))
