"""Muon: against a singular value decomposition, against torch's own, and beside AdamW."""

from __future__ import annotations

import pytest
import torch
from training_worker import small_losses, small_model

from vrthinker.train.loop.muon import Muon, orthogonalize
from vrthinker.train.loop.optimizer import AdamWSettings, MuonSettings, make_optimizer

MUON = MuonSettings(weight_decay=0.1, momentum=0.9, matrix_rate=1.5)


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The same polynomial, of each singular value."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (1, 7), (7, 1)])
def test_orthogonalizing_moves_singular_values_alone(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    matrices = torch.randn(3, *shape, generator=generator) * torch.tensor([1e-2, 1.0, 1e4])[:, None, None]
    if min(shape) > 1:
        matrices[0, 0] = 0
    for found, matrix in zip(orthogonalize(matrices), matrices, strict=True):
        assert float((found.double() - by_singular_values(matrix)).abs().max()) < 1e-3
    values = torch.linalg.svdvals(orthogonalize(matrices)[1])
    assert 0.6 < float(values.median()) <= float(values.max()) < 1.3
    assert torch.equal(orthogonalize(torch.zeros(2, *shape)), torch.zeros(2, *shape))


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    """Torch iterates in bfloat16: three digits."""
    generator = torch.Generator().manual_seed(1)
    ours = torch.nn.Parameter(torch.randn(shape, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    group = {"params": [ours], "orthogonal": True, "momentum": 0.9, "lr_scale": 2.0, "weight_decay": 0.1}
    own = Muon([group], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    other = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    start = ours.detach().clone()
    for _ in range(6):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        own.step()
        other.step()
        moved = theirs.detach() - start
        assert float((ours - theirs).detach().norm()) < 0.02 * float(moved.norm())


def test_embeddings_head_norms_and_biases_move_by_adamw() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4)
            self.norm, self.conv = torch.nn.LayerNorm(4), torch.nn.Conv1d(4, 4, 2)
            self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
            self.head = torch.nn.Linear(4, 5, bias=False)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    model = Model()
    optimizer = make_optimizer(model, MUON)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {bool(g["orthogonal"]): g for g in optimizer.param_groups}
    assert [names[id(p)] for p in groups[True]["params"]] == ["mix.weight"]
    assert groups[True]["weight_decay"] == 0.1
    held = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
    assert held == {name for name, p in model.named_parameters() if p.requires_grad}
    model.head.weight = model.embed.weight  # tied
    (tied,) = (g for g in make_optimizer(model, MUON).param_groups if g["orthogonal"])
    assert [names[id(p)] for p in tied["params"]] == ["mix.weight"]


def test_what_adamw_moves_moves_as_without_muon() -> None:
    plain, mixed = small_model().train(), small_model().train()
    mixed.load_state_dict(plain.state_dict())
    optimizers = [
        make_optimizer(plain, AdamWSettings(weight_decay=0.1)),
        make_optimizer(mixed, MuonSettings(weight_decay=0.1)),
    ]
    for model, optimizer in zip((plain, mixed), optimizers, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        torch.manual_seed(0)
        next(small_losses(model)(6)).loss.backward()  # the first step in which everything gets a gradient
        optimizer.step()
    moved = {id(p) for group in optimizers[1].param_groups if group["orthogonal"] for p in group["params"]}
    assert moved
    for (name, one), other in zip(plain.named_parameters(), mixed.parameters(), strict=True):
        assert torch.equal(one, other) == (id(other) not in moved), name


def test_only_matrices_can_be_orthogonal_and_closures_are_refused() -> None:
    group = {"params": [torch.nn.Parameter(torch.ones(3))], "orthogonal": True}
    with pytest.raises(ValueError, match=r"got a parameter of shape \(3,\), allowed: matrices"):
        Muon([group], lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    optimizer = make_optimizer(small_model(), MUON)
    with pytest.raises(ValueError, match="closure: got one, allowed: None"):
        optimizer.step(lambda: 0.0)
