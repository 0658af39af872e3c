"""The op `evict`, which removes tokens from KV caches and from the sequences beside them, in one call.

All layers' keys and values, and other tensors with a token dimension, are compacted together, with one launch
on a GPU. `plan.py` decides on the host which rows move where. `reference.py` is the specification of the
move.

- `gaps` (no `inv_freq`): rows are only moved. Later tokens keep their positions, and what they attended to.
- `renumber` (`inv_freq` given): the remaining keys are also rotated by their shift, so that positions are
  contiguous again. This is for inference only, and each rotation rounds once more (docs/kernels.md: drift).
- In place, only the rows after a sequence's first removed token are moved, and no buffer is needed whose size
  depends on the cache. Rows past a sequence's new length keep stale bytes. Out of place, they are 0.

`registered.py` registers the ops with torch and picks the version that runs. Invariant: every argument is
checked here, before anything is allocated or written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, overload

import torch

from vrthinker.errors import InputError
from vrthinker.kernels.arguments import items_of, whole_numbers
from vrthinker.kernels.evict import registered as _registered  # noqa: F401 - makes the ops known to torch
from vrthinker.kernels.evict.paged import PagedPlan
from vrthinker.kernels.evict.plan import EvictionPlan, require_plan
from vrthinker.kernels.evict.reference import rotation_table

Layout = Literal["bhtd", "bthd"]
"""`[batch, kv_heads, tokens, head_dim]` or `[batch, tokens, kv_heads, head_dim]`."""

_TOKEN_DIM = {"bhtd": -2, "bthd": -3}
_ROTATED = (torch.float32, torch.bfloat16, torch.float16)


@overload
def evict_cache(
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: EvictionPlan,
    *,
    layout: Layout = ...,
    in_place: bool = ...,
    inv_freq: torch.Tensor | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def evict_cache(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    plan: EvictionPlan,
    *,
    layout: Layout = ...,
    in_place: bool = ...,
    inv_freq: torch.Tensor | None = ...,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...
def evict_cache(
    keys: torch.Tensor | Sequence[torch.Tensor],
    values: torch.Tensor | Sequence[torch.Tensor],
    plan: EvictionPlan,
    *,
    layout: Layout = "bhtd",
    in_place: bool = True,
    inv_freq: torch.Tensor | None = None,
) -> tuple[torch.Tensor | list[torch.Tensor], torch.Tensor | list[torch.Tensor]]:
    """Evicts tokens from a KV cache, all layers in one call.

    Args:
        keys: The keys: one tensor per layer in `layout`, or one tensor `[layers, ...]` of all. Any strides;
            dtypes float32, bfloat16, float16 (any dtype without `inv_freq`). Tokens past a sequence's length
            are not read.
        values: The values, in the form of `keys`.
        plan: The plan, from `plan_eviction`. Its lengths are those of the cache.
        layout: The order of the dimensions.
        in_place: Whether to compact the given tensors. If False, new tensors of `plan.out_tokens` tokens are
            returned.
        inv_freq: The inverse frequencies, `[head_dim / 2]`, to renumber: keys are rotated by their shift.
            None keeps gaps.

    Returns:
        Keys and values in the form in which they were given: the same tensors, or new contiguous ones.

    Raises:
        InputError: An argument is not as described; nothing was written.

    Source: method section 3.
    """
    require_plan(plan, EvictionPlan)
    if not isinstance(layout, str) or layout not in _TOKEN_DIM:
        raise InputError(f"evict: layout: got {layout!r}, wanted bhtd or bthd")
    all_keys = _layers("keys", keys)
    all_values = _layers("values", values)
    tensors = [*all_keys, *all_values]
    name = partial(_name, len(all_keys))
    _require_tensors(tensors, name)
    ranks = [tensor.ndim for tensor in tensors]
    for place, rank in enumerate(ranks):
        if rank not in (4, 5):
            shape = list(tensors[place].shape)
            raise InputError(f"evict: {name(place)}: got shape {shape}, wanted {_wanted(layout)}")
    out = _evict(
        tensors,
        plan,
        batch_dims=[rank - 4 for rank in ranks],
        token_dims=[rank + _TOKEN_DIM[layout] for rank in ranks],
        in_place=in_place,
        inv_freq=inv_freq,
        n_rotated=len(all_keys),
        name=name,
    )
    new_keys, new_values = (
        (all_keys, all_values) if in_place else (out[: len(all_keys)], out[len(all_keys) :])
    )
    if isinstance(keys, torch.Tensor):
        return new_keys[0], new_values[0]
    return new_keys, new_values


def evict_sequence(
    tensors: Sequence[torch.Tensor],
    plan: EvictionPlan,
    *,
    batch_dims: Sequence[int] | None = None,
    token_dims: Sequence[int] | None = None,
    in_place: bool = False,
) -> list[torch.Tensor]:
    """Removes tokens from the sequences beside a cache: token ids, embeddings, position ids, labels, masks.

    Positions are only moved. If the cache was renumbered, subtract `plan.position_shifts()` from them.

    Args:
        tensors: The tensors, of any dtypes and strides, each with a batch and a token dimension.
        plan: The plan, from `plan_eviction`.
        batch_dims: The batch dimension of each tensor; 0 for all by default (position ids `[3, batch,
            tokens]` have 1).
        token_dims: The token dimension of each tensor; by default the dimension after the batch.
        in_place: Whether to compact the given tensors. If False, new tensors are returned, padded with 0.

    Returns:
        The given tensors, or new contiguous ones. Gradients flow through new ones.

    Raises:
        InputError: An argument is not as described; nothing was written.
    """
    require_plan(plan, EvictionPlan)
    tensors = items_of("evict", "tensors", tensors, "a list of tensors")
    per_tensor = "a whole number per tensor"
    if batch_dims is None:
        batch_dims = [0] * len(tensors)
    batch = whole_numbers("evict", "batch_dims", batch_dims, per_tensor)
    if token_dims is None:
        token_dims = [dim + 1 for dim in batch]
    token = whole_numbers("evict", "token_dims", token_dims, per_tensor)
    if not len(batch) == len(token) == len(tensors):
        raise InputError(
            f"evict: got {len(tensors)} tensors, {len(batch)} batch_dims and {len(token)} token_dims, wanted "
            "as many of each"
        )
    out = _evict(
        tensors, plan, batch_dims=batch, token_dims=token, in_place=in_place, name="tensors[{}]".format
    )
    return list(tensors) if in_place else out


def evict_paged(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    plan: PagedPlan,
    *,
    inv_freq: torch.Tensor | None = None,
) -> None:
    """Evicts tokens from a paged cache, in place, all layers in one call.

    Afterwards the sequences' tables are `plan.block_tables`, and `plan.freed_blocks` are free. Blocks that
    become completely free cost nothing, because they are only unlinked.

    Args:
        keys: The keys, one tensor `[blocks, block_size, kv_heads, head_dim]` per layer, any strides.
        values: The values, in the form of `keys`.
        plan: The plan, from `plan_paged_eviction` (with `renumber=True` if `inv_freq` is given).
        inv_freq: The inverse frequencies, `[head_dim / 2]`, to rotate keys by their shift. None keeps gaps.

    Raises:
        InputError: An argument is not as described; nothing was written.
    """
    require_plan(plan, PagedPlan)
    wanted = "a list of tensors, one per layer"
    keys, values = (items_of("evict", *given, wanted) for given in (("keys", keys), ("values", values)))
    tensors = [*keys, *values]
    name = partial(_name, len(keys))
    _require_tensors(tensors, name)
    n_blocks = int(plan.working_tables.max()) + 1 if plan.working_tables.numel() else 0
    for place, tensor in enumerate(tensors):
        if tensor.ndim != 4 or tensor.shape[1] != plan.block_size or tensor.shape[0] < n_blocks:
            raise InputError(
                f"evict: {name(place)}: got shape {list(tensor.shape)}, wanted [{n_blocks} blocks or more, "
                f"{plan.block_size}, kv_heads, head_dim]"
            )
        if tensor.shape[0] != tensors[0].shape[0]:
            raise InputError(
                f"evict: {name(place)}: got {tensor.shape[0]} blocks, wanted {tensors[0].shape[0]} as "
                f"{name(0)} has"
            )
    rotations = _rotations(tensors[: len(keys)], name, plan.plan, inv_freq, in_place=True)
    _check_tensors(tensors, name, in_place=True)
    runs = plan.table(renumber=inv_freq is not None)
    if runs.shape[0]:
        torch.ops.vrthinker.evict_paged_(
            tensors, runs, plan.working_tables, rotations, len(keys) if rotations is not None else 0
        )


def _evict(
    tensors: Sequence[torch.Tensor],
    plan: EvictionPlan,
    *,
    batch_dims: Sequence[int],
    token_dims: Sequence[int],
    in_place: bool,
    name: Callable[[int], str],
    inv_freq: torch.Tensor | None = None,
    n_rotated: int = 0,
) -> list[torch.Tensor]:
    longest = max(plan.lengths, default=0)
    wanted_batch = plan.batch
    _require_tensors(tensors, name)
    for place, tensor in enumerate(tensors):
        shape, batch_dim, token_dim = tensor.shape, batch_dims[place], token_dims[place]
        if not (0 <= batch_dim < len(shape) and 0 <= token_dim < len(shape)) or batch_dim == token_dim:
            raise InputError(
                f"evict: {name(place)}: got shape {list(shape)} with batch in dimension {batch_dim} and "
                f"tokens in {token_dim}, wanted two dimensions of it, counted from 0"
            )
        if shape[batch_dim] != wanted_batch or shape[token_dim] < longest:
            raise InputError(
                f"evict: {name(place)}: got {shape[batch_dim]} sequences of {shape[token_dim]} tokens (shape "
                f"{list(shape)}), wanted {wanted_batch} of at least {longest}, as the plan has"
            )
    rotations = _rotations(tensors[:n_rotated], name, plan, inv_freq, in_place=in_place)
    _check_tensors(tensors, name, in_place=in_place)
    n_rotated = n_rotated if rotations is not None else 0
    runs = plan.table(in_place=in_place, renumber=rotations is not None)
    if not in_place:
        if not tensors:
            return []
        out: list[torch.Tensor] = torch.ops.vrthinker.evict(
            list(tensors), batch_dims, token_dims, runs, rotations, n_rotated, plan.out_tokens
        )
        return out
    if runs.shape[0] and tensors:
        torch.ops.vrthinker.evict_(list(tensors), batch_dims, token_dims, runs, rotations, n_rotated)
    return []


# Checks


def _require_tensors(tensors: Sequence[object], name: Callable[[int], str]) -> None:
    for place, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"evict: {name(place)}: got {type(tensor).__name__}, wanted a torch tensor")


def _layers(name: str, cache: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if not isinstance(cache, torch.Tensor):
        return items_of("evict", name, cache, "a tensor [layers, batch, ...] or a list of tensors")
    if cache.ndim != 5:
        raise InputError(
            f"evict: {name}: got one tensor of shape {list(cache.shape)}, wanted [layers, batch, ...] or a "
            "list"
        )
    return [cache]


def _name(n_keys: int, place: int) -> str:
    return f"keys[{place}]" if place < n_keys else f"values[{place - n_keys}]"


def _wanted(layout: Layout) -> str:
    shape = "kv_heads, tokens" if layout == "bhtd" else "tokens, kv_heads"
    return f"[batch, {shape}, head_dim]"


def _rotations(
    keys: Sequence[torch.Tensor],
    name: Callable[[int], str],
    plan: EvictionPlan,
    inv_freq: torch.Tensor | None,
    *,
    in_place: bool,
) -> torch.Tensor | None:
    if inv_freq is None or not keys:
        return None
    if not isinstance(inv_freq, torch.Tensor):
        raise InputError(f"evict: inv_freq: got {type(inv_freq).__name__}, wanted a torch tensor")
    if inv_freq.ndim != 1 or not inv_freq.is_floating_point():
        raise InputError(
            f"evict: inv_freq: got {inv_freq.dtype} of shape {list(inv_freq.shape)}, wanted floats of shape "
            "[head_dim / 2]"
        )
    for place, key in enumerate(keys):
        if key.dtype not in _ROTATED or key.dtype != keys[0].dtype:
            allowed = "float32, bfloat16 or float16, the same for all, to renumber"
            raise InputError(f"evict: {name(place)}: got dtype {key.dtype}, wanted {allowed}")
        if key.shape[-1] != 2 * inv_freq.shape[0]:
            raise InputError(
                f"evict: {name(place)}: got head_dim {key.shape[-1]}, wanted {2 * inv_freq.shape[0]}, twice "
                "the frequencies"
            )
        if in_place and key.stride(-1) != 1 and key.shape[-1] > 1:
            raise InputError(
                f"evict: {name(place)}: got strides {key.stride()}, wanted a contiguous last dimension to "
                "renumber in place"
            )
    return rotation_table(plan.shifts, inv_freq) if plan.shifts else None


def _check_tensors(tensors: Sequence[torch.Tensor], name: Callable[[int], str], *, in_place: bool) -> None:
    if not tensors:
        return
    device = tensors[0].device
    for place, tensor in enumerate(tensors):
        if tensor.device != device or device.type not in ("cpu", "cuda"):
            raise InputError(
                f"evict: {name(place)}: got a tensor on {tensor.device}, wanted all on one cpu or cuda "
                f"device ({name(0)} is on {device})"
            )
    if not in_place or torch.compiler.is_compiling():
        return
    neighbours: dict[int, list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        if tensor.requires_grad:
            raise InputError(
                f"evict: {name(place)}: got a tensor that requires grad, wanted one to change in place"
            )
        if torch._debug_has_internal_overlap(tensor) == 1:
            raise InputError(
                f"evict: {name(place)}: got elements that share memory, wanted memory of its own to change "
                "in place"
            )
        if tensor.numel():
            neighbours[tensor.untyped_storage().data_ptr()].append(place)
    for places in neighbours.values():
        if (twins := _overlapping(tensors, places)) is not None:
            first, second = sorted(twins)
            raise InputError(
                f"evict: {name(second)}: got memory that {name(first)} has too, wanted memory of its own to "
                "change in place"
            )


def _overlapping(tensors: Sequence[torch.Tensor], places: Sequence[int]) -> tuple[int, int] | None:
    """Two tensors of one storage that share an element, if there are any.

    The rows of tensors may be interleaved in memory, as keys and values of one projection are. This is
    recognized if their strides are equal. Tensors of different strides in the same range of memory are
    assumed not to overlap.
    """
    bounds = []
    for place in places:
        tensor = tensors[place]
        start, size = tensor.data_ptr(), tensor.element_size()
        span = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        bounds.append((start, start + (span + 1) * size, place))
    bounds.sort()
    for number, (start, end, place) in enumerate(bounds):
        for other_start, _, other in bounds[number + 1 :]:
            if other_start >= end:
                break
            a, b = tensors[place], tensors[other]
            if other_start == start or (
                a.stride() == b.stride()
                and a.dtype == b.dtype
                and _meet(other_start - start, a.element_size(), a, b)
            ):
                return place, other
    return None


def _meet(distance: int, size: int, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of equal strides, whose starts are `distance` bytes apart, share an element."""
    if distance % size:
        return True
    dims = zip(a.stride(), a.shape, b.shape, strict=True)
    steps = sorted((dim for dim in dims if max(dim[1:]) > 1), reverse=True)

    def reach(left: int, dim: int) -> bool:
        if dim == len(steps):
            return left == 0
        stride, own, others = steps[dim]
        # Later strides are smaller. They can only make up for the rest of the two nearest numbers of steps.
        nearest = left // stride
        return any(
            -others < steps_taken < own and reach(left - steps_taken * stride, dim + 1)
            for steps_taken in (nearest, nearest + 1)
        )

    return reach(distance // size, 0)
