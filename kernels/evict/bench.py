"""Microbenchmark of `evict`: round boundaries with the method's real sizes, against common ways in torch.

At p = 1, a round boundary has 4,600 tokens of first input, a round of 400, 8 retrieved frames of 492 tokens
with their labels between them, and a round of 400. The frames are removed. At p = 2, another retrieval and
another round come after them. In place, only the rows after the first hole have to move; out of place, all
remaining rows do. The competitors get the same spans, layer by layer. `torch.cat` of slices, `index_select`,
the reference, and `torch.compile` of it copy the whole cache. In place there are two that copy only the rows
after the first hole: run by run with `copy_`, or all at once with `index_select`. The faster of these two is
the fair opponent of the op in place.

Source: method section 2, typical sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vrthinker.kernels.evict.op import evict_cache, evict_paged, evict_sequence
from vrthinker.kernels.evict.paged import plan_paged_eviction
from vrthinker.kernels.evict.plan import EvictionPlan, plan_eviction
from vrthinker.kernels.evict.reference import evict_reference, rotation_table
from vrthinker.kernels.measure import Comparison, why_not_compiled

FIRST_INPUT, ROUND, FRAMES, FRAME, LABEL = 4600, 400, 8, 492, 8
FRAME_POSITIONS = 20
"""The number of positions that a frame of 16 x 20 patches takes (M-RoPE)."""


@dataclass(frozen=True)
class Shape:
    """The shape of a model's cache."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """The bytes of the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    def make(self, batch: int, tokens: int, device: str, seed: int) -> tuple[list[torch.Tensor], ...]:
        """Makes random keys and values, each as a list of layers."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (batch, self.kv_heads, tokens, self.head_dim)

        def layer() -> torch.Tensor:
            return torch.empty(shape, dtype=self.dtype, device=device).normal_(generator=generator)

        return tuple([layer() for _ in range(self.layers)] for _ in range(2))


QWEN_7B = Shape("Qwen2.5-VL-7B", 28, 4, 128, torch.bfloat16)
NANO = Shape("nano", 4, 2, 32, torch.float32)


def boundary(window: int) -> tuple[list[tuple[int, int]], int]:
    """The spans to remove and the sequence's length, at a round boundary under window memory p = `window`."""
    spans, at = [], FIRST_INPUT + ROUND
    for _ in range(FRAMES):
        at += LABEL
        spans.append((at, at + FRAME))
        at += FRAME
    at += ROUND
    at += (window - 1) * (FRAMES * (LABEL + FRAME) + ROUND)
    return spans, at


def comparisons(device: str, seed: int) -> Iterator[Callable[[], Comparison]]:
    """Yields a function per case (see `vrthinker.kernels.measure`), except those too large for memory."""
    batches = (1, 8, 64) if device == "cuda" else (1, 4)
    for batch in batches:
        for window in (1, 2):
            spans, length = boundary(window)
            # Memory is needed for the cache, a copy to check with, and a competitor's result.
            if 3 * batch * length * QWEN_7B.token_bytes > _free_bytes(device):
                continue
            name = f"{QWEN_7B.name}, boundary at p = {window}, batch {batch}"
            case = (QWEN_7B, [spans] * batch, length, device, seed)
            yield partial(_cache_case, f"{name}, in place", *case, in_place=True)
            if batch == 1 or device == "cuda":
                yield partial(_cache_case, f"{name}, out of place", *case, in_place=False)
    for survivors in (1000, 4000, 8000):
        name = f"{QWEN_7B.name}, {survivors} tokens behind a hole of 4000"
        case = (QWEN_7B, [[(0, 4000)]], 4000 + survivors, device, seed)
        yield partial(_cache_case, f"{name}, in place", *case, in_place=True)
        yield partial(_cache_case, f"{name}, out of place", *case, in_place=False)
    ragged = [[(40 + i % 5, 72 + i), (80 + i, 112 + i)] for i in range(64)]
    yield partial(
        _cache_case, "nano, 64 ragged sequences, in place", NANO, ragged, 400, device, seed, in_place=True
    )
    yield partial(_paged_case, device, seed)
    yield partial(_sequence_case, device, seed)


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _cache_case(
    name: str,
    shape: Shape,
    spans: Sequence[Sequence[tuple[int, int]]],
    length: int,
    device: str,
    seed: int,
    *,
    in_place: bool,
) -> Comparison:
    batch = len(spans)
    plan = plan_eviction(spans, [length] * batch, freed_positions=[[FRAME_POSITIONS] * len(s) for s in spans])
    keys, values = shape.make(batch, length, device, seed)
    inv_freq = 1e6 ** (-torch.arange(shape.head_dim // 2, dtype=torch.float64) / (shape.head_dim // 2))
    counts = [run.count for run in (plan.moved if in_place else plan.runs)]
    layers = [*keys, *values]
    competitors = _torch_versions(layers, plan, spans)
    if in_place:
        competitors |= _torch_in_place(layers, plan, spans)
    how = "in place" if in_place else "out of place"
    competitors[f"evict, {how}"] = lambda: evict_cache(keys, values, plan, in_place=in_place)
    competitors[f"evict, {how}, renumber"] = lambda: evict_cache(
        keys, values, plan, in_place=in_place, inv_freq=inv_freq
    )
    return Comparison(
        op="evict",
        case=name,
        bytes_moved=2 * sum(counts) * shape.token_bytes,
        competitors=competitors,
        check=lambda: _check(keys, values, plan, spans, competitors, inv_freq, in_place=in_place),
        facts={
            "dtype": str(shape.dtype).removeprefix("torch."),
            "batch": batch,
            "tokens_before": length,
            "tokens_after": plan.out_tokens,
            "tokens_moved": sum(counts),
            "survivors_behind_first_hole": sum(run.count for run in plan.moved),
            "without_torch_compile": why_not_compiled(device),
        },
    )


def _torch_versions(
    layers: Sequence[torch.Tensor], plan: EvictionPlan, spans: Sequence[Sequence[tuple[int, int]]]
) -> dict[str, Callable[[], object]]:
    """The common ways in torch, layer by layer, out of place."""
    runs = plan.table(in_place=False, renumber=False).tolist()

    def reference(layer: torch.Tensor) -> torch.Tensor:
        return evict_reference(layer, runs, batch_dim=0, token_dim=2, out_tokens=plan.out_tokens)

    versions: dict[str, Callable[[], object]] = {"reference": lambda: [reference(layer) for layer in layers]}
    if why_not_compiled(layers[0].device.type) is None:
        compiled = torch.compile(reference, dynamic=False)
        versions["torch.compile of the reference"] = lambda: [compiled(layer) for layer in layers]
    if len({tuple(sequence_spans) for sequence_spans in spans}) == 1:
        kept_runs = [run for run in plan.runs if run.sequence == 0]
        kept = torch.cat([torch.arange(r.source, r.source + r.count) for r in kept_runs]).to(layers[0].device)

        def cat(layer: torch.Tensor) -> torch.Tensor:
            return torch.cat([layer[:, :, r.source : r.source + r.count] for r in kept_runs], dim=2)

        versions["torch.cat of slices"] = lambda: [cat(layer) for layer in layers]
        versions["index_select"] = lambda: [layer.index_select(2, kept) for layer in layers]
    return versions


def _torch_in_place(
    layers: Sequence[torch.Tensor], plan: EvictionPlan, spans: Sequence[Sequence[tuple[int, int]]]
) -> dict[str, Callable[[], object]]:
    """Moves only what lies behind the first hole, as torch can, layer by layer and in place."""
    if len({tuple(sequence_spans) for sequence_spans in spans}) != 1:
        return {}
    runs = [run for run in plan.moved if run.sequence == 0]
    # `copy_` refuses ranges that overlap, so a run that is longer than its way is copied in parts.
    parts = [
        (run.source + done, run.target + done, min(run.source - run.target, run.count - done))
        for run in runs
        for done in range(0, run.count, run.source - run.target)
    ]
    tail = slice(runs[0].target, plan.out_tokens)
    kept = torch.cat([torch.arange(run.source, run.source + run.count) for run in runs]).to(layers[0].device)

    def copy_runs() -> Sequence[torch.Tensor]:
        for layer in layers:
            for source, target, count in parts:
                layer[:, :, target : target + count].copy_(layer[:, :, source : source + count])
        return layers

    def select_tail() -> Sequence[torch.Tensor]:
        for layer in layers:
            layer[:, :, tail] = layer.index_select(2, kept)
        return layers

    return {"copy_ of runs, in place": copy_runs, "index_select of the tail, in place": select_tail}


def _check(
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    plan: EvictionPlan,
    spans: Sequence[Sequence[tuple[int, int]]],
    competitors: dict[str, Callable[[], object]],
    inv_freq: torch.Tensor,
    *,
    in_place: bool,
) -> None:
    """Compares every version with the reference on these data, versions in place on a copy of them."""
    layers = [*keys, *values]
    runs = plan.table(in_place=False, renumber=False)

    def compare(name: str, found: Any) -> None:
        for place, layer in enumerate(layers):
            wanted = evict_reference(layer, runs, batch_dim=0, token_dim=2, out_tokens=plan.out_tokens)
            for sequence, length in enumerate(plan.new_lengths):
                if not torch.equal(found[place][sequence, :, :length], wanted[sequence, :, :length]):
                    raise RuntimeError(f"evict: {name} differs from the reference in layer {place}")

    copies = [layer.clone() for layer in layers] if in_place else layers
    new = evict_cache(copies[: len(keys)], copies[len(keys) :], plan, in_place=in_place)
    compare("evict", [*new[0], *new[1]])
    del new
    for name, run in competitors.items():
        if name.endswith(", in place") and not name.startswith("evict"):
            copies = [layer.clone() for layer in layers]
            compare(name, _torch_in_place(copies, plan, spans)[name]())
        elif not name.startswith(("evict", "reference")):
            compare(name, run())
    copies = [layer.clone() for layer in layers] if in_place else layers
    turned, _ = evict_cache(
        copies[: len(keys)], copies[len(keys) :], plan, in_place=in_place, inv_freq=inv_freq
    )
    runs, rotations = plan.table(in_place=False, renumber=True), rotation_table(plan.shifts, inv_freq)
    for place, layer in enumerate(keys):
        wanted = evict_reference(
            layer, runs, batch_dim=0, token_dim=2, out_tokens=plan.out_tokens, rotations=rotations
        )
        for sequence, length in enumerate(plan.new_lengths):
            if not torch.equal(turned[place][sequence, :, :length], wanted[sequence, :, :length]):
                raise RuntimeError(f"evict: renumbering differs from the reference in layer {place}")


def _paged_case(device: str, seed: int) -> Comparison:
    """The boundary at p = 2 in a paged cache, blocks of 16."""
    block_size = 16
    spans, length = boundary(2)
    plan = plan_eviction([spans], [length])
    n_blocks = -(-length // block_size)
    order = torch.randperm(n_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    paged = plan_paged_eviction(plan, [order], block_size)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (n_blocks, block_size, QWEN_7B.kv_heads, QWEN_7B.head_dim)
    tensors = [
        torch.empty(shape, dtype=QWEN_7B.dtype, device=device).normal_(generator=generator)
        for _ in range(2 * QWEN_7B.layers)
    ]
    keys, values = tensors[: QWEN_7B.layers], tensors[QWEN_7B.layers :]
    moved = int(paged.table(renumber=False)[:, 3].sum())
    old_table = torch.tensor(order, device=device)
    new_table = torch.tensor(paged.block_tables[0], device=device)
    kept = torch.cat([torch.arange(r.source, r.source + r.count) for r in plan.runs]).to(device)
    behind = kept[plan.runs[0].count :]
    places = torch.arange(plan.runs[0].count, plan.out_tokens, device=device)
    source = (old_table[behind // block_size], behind % block_size)
    target = (new_table[places // block_size], places % block_size)

    def indexed(blocks: Sequence[torch.Tensor]) -> None:
        for layer in blocks:
            layer[target] = layer[source]

    def check() -> None:
        found, wanted = [t.clone() for t in tensors], [t.clone() for t in tensors]
        evict_paged(found[: len(keys)], found[len(keys) :], paged)
        indexed(wanted)
        for a, b in zip(found, wanted, strict=True):
            table = list(paged.block_tables[0])
            rows = (x[table].flatten(0, 1)[: plan.out_tokens] for x in (a, b))
            if not torch.equal(*rows):
                raise RuntimeError("evict: paged differs from indexing")

    return Comparison(
        op="evict",
        case=f"{QWEN_7B.name}, paged in blocks of {block_size}, boundary at p = 2, batch 1",
        bytes_moved=2 * moved * QWEN_7B.token_bytes,
        competitors={
            "reference": lambda: indexed(tensors),
            "evict, paged": lambda: evict_paged(keys, values, paged),
        },
        check=check,
        facts={"tokens_moved": moved, "blocks_unlinked": len(paged.freed_blocks), "dtype": "bfloat16"},
    )


def _sequence_case(device: str, seed: int) -> Comparison:
    """Ids, positions, labels, mask and embeddings of 8 sequences at p = 2, out of place."""
    batch = 8
    spans, length = boundary(2)
    plan = plan_eviction([spans] * batch, [length] * batch)
    generator = torch.Generator(device).manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 150_000, shape, device=device, generator=generator)

    embeddings = torch.empty(batch, length, 3584, dtype=torch.bfloat16, device=device).normal_(
        generator=generator
    )
    tensors = [
        integers(batch, length),
        integers(3, batch, length),
        integers(batch, length),
        integers(batch, length) % 2 == 0,
        embeddings,
    ]
    batch_dims, token_dims = [0, 1, 0, 0, 0], [1, 2, 1, 1, 1]
    kept = torch.cat([torch.arange(r.source, r.source + r.count) for r in plan.runs if r.sequence == 0]).to(
        device
    )

    def ours() -> list[torch.Tensor]:
        return evict_sequence(tensors, plan, batch_dims=batch_dims, token_dims=token_dims)

    def select() -> list[torch.Tensor]:
        return [t.index_select(dim, kept) for t, dim in zip(tensors, token_dims, strict=True)]

    def check() -> None:
        if not all(torch.equal(a, b) for a, b in zip(ours(), select(), strict=True)):
            raise RuntimeError("evict: evict_sequence differs from index_select")

    facts: dict[str, Any] = {"batch": batch, "tokens_before": length, "tokens_after": plan.out_tokens}
    return Comparison(
        op="evict",
        case=f"ids, positions, labels, mask and embeddings of 3584, boundary at p = 2, batch {batch}",
        bytes_moved=2 * sum(t.nbytes for t in select()),
        competitors={"reference": select, "evict": ours},
        check=check,
        facts=facts,
    )
