"""The registration of `evict` with `torch.library`: dispatch to a version, fakes, the gradient.

`op.py` has checked the arguments. The registered ops are `vrthinker::evict` (with
`vrthinker::evict_backward`), `vrthinker::evict_` and `vrthinker::evict_paged_`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vrthinker.errors import InputError
from vrthinker.kernels import Version, choose_version, native_obstacles, triton_obstacle
from vrthinker.kernels.evict.reference import (
    evict_backward_reference,
    evict_paged_reference_,
    evict_reference,
    evict_reference_,
)


def _obstacles(device: torch.device, *, in_place: bool) -> dict[Version, str | None]:
    obstacles = native_obstacles(device)
    obstacles["triton"] = "it has no in-place version" if in_place else triton_obstacle(device)
    return obstacles


def _plain(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors as DLPack takes them: detached, and one-byte types as bytes (they are only moved)."""
    return [
        t.detach().view(torch.uint8) if t.dtype.itemsize == 1 and t.dtype != torch.uint8 else t.detach()
        for t in tensors
    ]


def _with_dense_heads(tensors: Sequence[torch.Tensor], n_rotated: int) -> list[torch.Tensor]:
    """Tensors whose rotated last dimension is contiguous, as the native versions require.

    To change tensors in place, `op.py` accepts no others.
    """
    return [
        t.contiguous() if place < n_rotated and t.shape[-1] > 1 and t.stride(-1) != 1 else t
        for place, t in enumerate(tensors)
    ]


def _run_native(
    version: Version,
    sources: list[torch.Tensor],
    targets: list[torch.Tensor],
    batch_dims: Sequence[int],
    token_dims: Sequence[int],
    runs: torch.Tensor,
    rotations: torch.Tensor | None,
    n_rotated: int,
    block_tables: torch.Tensor | None = None,
    block_size: int = 0,
    out_tokens: int = 0,
) -> None:
    import vrthinker._core as _core

    arguments: dict[str, Any] = {
        "sources": _plain(sources),
        "targets": _plain(targets),
        "batch_dims": list(batch_dims),
        "token_dims": list(token_dims),
        "runs": runs,
        "rotations": rotations,
        "n_rotated": n_rotated,
        "block_tables": block_tables,
        "block_size": block_size,
        "out_tokens": out_tokens,
    }
    if version == "cpu":
        try:
            _core.evict_cpu(**arguments, num_threads=torch.get_num_threads())
        except ValueError as error:  # only the binding notices, for instance, dimensions that it cannot walk
            raise InputError(str(error)) from None
        return
    device = sources[0].device
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    try:
        launches = [
            _core.evict_pack(**part, processors=processors) for part in _launches(arguments, n_rotated)
        ]
    except ValueError as error:
        raise InputError(str(error)) from None
    # The memory is pinned, so that the copy does not wait; torch keeps it until the copy is done. All copies
    # are made before the first launch writes anything.
    on_device = [
        torch.frombuffer(packed, dtype=torch.uint8).pin_memory().to(device, non_blocking=True)
        for packed in launches
    ]
    for packed, copy in zip(launches, on_device, strict=True):
        _core.evict_cuda(packed, copy, torch.cuda.current_stream(device).cuda_stream)


def _launches(arguments: dict[str, Any], n_rotated: int) -> list[dict[str, Any]]:
    """One launch or two: a launch moves vectors of one size, and rotated keys need whole elements."""
    sources: list[torch.Tensor] = arguments["sources"]
    if not n_rotated or all(t.element_size() >= sources[0].element_size() for t in sources[n_rotated:]):
        return [arguments]
    per_tensor = ("sources", "targets", "batch_dims", "token_dims")
    turned = {name: arguments[name][:n_rotated] for name in per_tensor}
    moved: dict[str, Any] = {name: arguments[name][n_rotated:] for name in per_tensor}
    # Without a rotation, a run that was only rotated does not change.
    moved["runs"] = _without_rotation(arguments["runs"], in_place=not arguments["targets"])
    return [{**arguments, **turned}, {**arguments, **moved, "rotations": None, "n_rotated": 0}]


def _without_rotation(runs: torch.Tensor, *, in_place: bool) -> torch.Tensor:
    kept = runs[runs[:, 1] != runs[:, 2]] if in_place else runs
    kept = kept.clone()
    kept[:, 4] = -1
    return kept


@torch.library.custom_op("vrthinker::evict", mutates_args=())
def _evict_op(
    tensors: Sequence[torch.Tensor],
    batch_dims: Sequence[int],
    token_dims: Sequence[int],
    runs: torch.Tensor,
    rotations: torch.Tensor | None,
    n_rotated: int,
    out_tokens: int,
) -> list[torch.Tensor]:
    version = choose_version("evict", _obstacles(tensors[0].device, in_place=False))
    if version == "reference":
        return [
            evict_reference(
                tensor,
                runs,
                batch_dim=batch_dims[place],
                token_dim=token_dims[place],
                out_tokens=out_tokens,
                rotations=rotations if place < n_rotated else None,
            )
            for place, tensor in enumerate(tensors)
        ]
    sources = _with_dense_heads(tensors, n_rotated)
    if version == "triton":
        from vrthinker.kernels.evict.triton import evict_triton

        targets = _empty_targets(tensors, token_dims, out_tokens)
        evict_triton(sources, targets, batch_dims, token_dims, runs, rotations, n_rotated)
        return targets
    targets = _empty_targets(tensors, token_dims, out_tokens)
    _run_native(
        version, sources, targets, batch_dims, token_dims, runs, rotations, n_rotated, out_tokens=out_tokens
    )
    return targets


def _empty_targets(
    tensors: Sequence[torch.Tensor], token_dims: Sequence[int], out_tokens: int
) -> list[torch.Tensor]:
    return [
        tensor.new_empty([*tensor.shape[:dim], out_tokens, *tensor.shape[dim + 1 :]])
        for tensor, dim in zip(tensors, token_dims, strict=True)
    ]


@_evict_op.register_fake
def _evict_fake(
    tensors: Sequence[torch.Tensor],
    batch_dims: Sequence[int],
    token_dims: Sequence[int],
    runs: torch.Tensor,
    rotations: torch.Tensor | None,
    n_rotated: int,
    out_tokens: int,
) -> list[torch.Tensor]:
    return _empty_targets(tensors, token_dims, out_tokens)


@torch.library.custom_op("vrthinker::evict_backward", mutates_args=())
def _evict_backward_op(
    gradients: Sequence[torch.Tensor],
    batch_dims: Sequence[int],
    token_dims: Sequence[int],
    runs: torch.Tensor,
    rotations: torch.Tensor | None,
    n_rotated: int,
    tokens: Sequence[int],
) -> list[torch.Tensor]:
    return [
        evict_backward_reference(
            gradient,
            runs,
            batch_dim=batch_dims[place],
            token_dim=token_dims[place],
            tokens=tokens[place],
            rotations=rotations if place < n_rotated else None,
        )
        for place, gradient in enumerate(gradients)
    ]


@_evict_backward_op.register_fake
def _evict_backward_fake(
    gradients: Sequence[torch.Tensor],
    batch_dims: Sequence[int],
    token_dims: Sequence[int],
    runs: torch.Tensor,
    rotations: torch.Tensor | None,
    n_rotated: int,
    tokens: Sequence[int],
) -> list[torch.Tensor]:
    return [
        gradient.new_empty([*gradient.shape[:dim], n, *gradient.shape[dim + 1 :]])
        for gradient, dim, n in zip(gradients, token_dims, tokens, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    tensors, ctx.batch_dims, ctx.token_dims, runs, rotations, ctx.n_rotated, _ = inputs
    ctx.save_for_backward(runs, rotations)
    ctx.tokens = [tensor.shape[dim] for tensor, dim in zip(tensors, ctx.token_dims, strict=True)]
    ctx.differentiable = [tensor.is_floating_point() for tensor in tensors]


def _backward(ctx: Any, gradients: list[torch.Tensor | None]) -> tuple[Any, ...]:
    runs, rotations = ctx.saved_tensors
    differentiated = [
        place for place, g in enumerate(gradients) if g is not None and ctx.differentiable[place]
    ]
    results: list[torch.Tensor | None] = [None] * len(gradients)
    if differentiated:
        computed = torch.ops.vrthinker.evict_backward(
            [gradients[place] for place in differentiated],
            [ctx.batch_dims[place] for place in differentiated],
            [ctx.token_dims[place] for place in differentiated],
            runs,
            rotations,
            sum(place < ctx.n_rotated for place in differentiated),
            [ctx.tokens[place] for place in differentiated],
        )
        for place, gradient in zip(differentiated, computed, strict=True):
            results[place] = gradient
    return results, None, None, None, None, None, None


_evict_op.register_autograd(_backward, setup_context=_setup_context)


# The in-place ops use a plain Library: `custom_op` adds a tenth of a millisecond to a call with 56 tensors, a
# tenth of what a small boundary takes. The bodies do what it would do besides: they count versions up.
_library: Any = torch.library.Library("vrthinker", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "evict_(Tensor(a!)[] tensors, int[] batch_dims, int[] token_dims, Tensor runs, Tensor? rotations, "
    "int n_rotated) -> ()",
    "evict_paged_(Tensor(a!)[] tensors, Tensor runs, Tensor block_tables, Tensor? rotations, int n_rotated) "
    "-> ()",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _evict_in_place_op(
    tensors: Sequence[torch.Tensor],
    batch_dims: Sequence[int],
    token_dims: Sequence[int],
    runs: torch.Tensor,
    rotations: torch.Tensor | None,
    n_rotated: int,
) -> None:
    torch.autograd.graph.increment_version(tensors)
    version = choose_version("evict", _obstacles(tensors[0].device, in_place=True))
    if version == "reference":
        for place, tensor in enumerate(tensors):
            evict_reference_(
                tensor,
                runs,
                batch_dim=batch_dims[place],
                token_dim=token_dims[place],
                rotations=rotations if place < n_rotated else None,
            )
        return
    _run_native(version, list(tensors), [], batch_dims, token_dims, runs, rotations, n_rotated)


def _evict_paged_op(
    tensors: Sequence[torch.Tensor],
    runs: torch.Tensor,
    block_tables: torch.Tensor,
    rotations: torch.Tensor | None,
    n_rotated: int,
) -> None:
    torch.autograd.graph.increment_version(tensors)
    version = choose_version("evict", _obstacles(tensors[0].device, in_place=True))
    if version == "reference":
        for place, tensor in enumerate(tensors):
            evict_paged_reference_(
                tensor, runs, block_tables, rotations=rotations if place < n_rotated else None
            )
        return
    given, n, block_size = list(tensors), len(tensors), tensors[0].shape[1]
    _run_native(version, given, [], [0] * n, [1] * n, runs, rotations, n_rotated, block_tables, block_size)


def _nothing_to_return(*_arguments: object) -> None:
    """The fake of an in-place op, which has no output."""


for _name_in_place, _body in (("evict_", _evict_in_place_op), ("evict_paged_", _evict_paged_op)):
    torch.library.register_fake(f"vrthinker::{_name_in_place}", _nothing_to_return, lib=_library)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name_in_place, _body, _key)
