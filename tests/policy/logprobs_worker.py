"""`logprobs_from_hidden` by Liger-Kernel under Triton's interpreter, against the torch version; tiny sizes.

In a process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import sys

import torch

from vrthinker.policy.logprobs import logprobs_from_hidden

CASES = (
    # dtype, tokens, hidden, vocab, temperature, bans
    (torch.float32, 1, 8, 5, 1.0, False),
    (torch.float32, 23, 16, 67, 0.7, True),
    (torch.float32, 0, 16, 67, 1.0, True),
    (torch.bfloat16, 33, 16, 130, 1.0, True),
    (torch.bfloat16, 9, 32, 40, 1.3, False),
    (torch.float16, 12, 16, 70, 0.5, True),
)


def main(device: str) -> None:
    seed = torch.seed() % 2**31
    sys.stdout.write(f"seed {seed}\n")
    generator = torch.Generator().manual_seed(seed)
    for dtype, tokens, width, vocab, temperature, bans in CASES:
        hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
        weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(device, dtype)
        weight.requires_grad_()
        banned = None
        if bans:  # the first half and some more
            banned = torch.rand(vocab, generator=generator) < 0.2
            banned[: vocab // 2] = True
            banned[-1] = False
            banned = banned.to(device)
        labels = torch.randint(vocab // 2, vocab, (tokens,), generator=generator).to(device)
        upstream = torch.randn(tokens, generator=generator).to(device)
        results = {}
        for name in ("torch", "liger"):
            found = logprobs_from_hidden(
                hidden, weight, labels, temperature=temperature, banned=banned, implementation=name
            )
            assert found.dtype == torch.float32
            finite = torch.where(found.isfinite(), found, 0)
            results[name] = (found.detach(), *torch.autograd.grad(finite @ upstream, (hidden, weight)))
        # In float32 the same sums in another order. In half precision logits round to the dtype (and so do
        # the hidden states over the temperature): an error in the last place of numbers below 8.
        tolerance = 2e-6 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        assert torch.equal(results["liger"][0].isinf(), results["torch"][0].isinf())
        for one, other in zip(results["liger"], results["torch"], strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=2 * tolerance)
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main(sys.argv[1])
