"""Eviction from a paged cache: blocks without tokens are unlinked on the host, and other rows are moved.

A sequence's tokens fill the blocks of its table in order. Blocks that lose all their tokens are removed from
the table. The remaining rows move together, so that attention kernels find full blocks again. If all holes
start and end on block boundaries, nothing is moved. Invariant: a block that other sequences use too is never
written. A plan that would do so is refused before anything is written (the caller may copy the block first).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vrthinker.errors import InputError
from vrthinker.kernels.arguments import items_of, require_whole, whole_numbers
from vrthinker.kernels.evict.plan import EvictionPlan, require_plan


@dataclass(frozen=True)
class PagedPlan:
    """The plan of an eviction from a paged cache.

    Attributes:
        plan: The plan of the tokens to remove.
        block_size: The number of tokens of a block.
        block_tables: The blocks of each sequence after the eviction.
        freed_blocks: The blocks that no sequence uses any more, ascending. The allocator may reuse them.
        working_tables: The tables while rows move, padded with 0, int64 `[batch, blocks]` on the CPU.
        slots: For each run of the plan, its source row in its working table.
        renumber: Whether the plan is for rotated keys. Only then was it checked that blocks that are written
            only because of the rotation belong to no other sequence.
    """

    plan: EvictionPlan
    block_size: int
    block_tables: tuple[tuple[int, ...], ...]
    freed_blocks: tuple[int, ...]
    working_tables: torch.Tensor
    slots: tuple[int, ...]
    renumber: bool = False

    def table(self, *, renumber: bool) -> torch.Tensor:
        """The runs that are moved or rotated, as the op takes them (see `EvictionPlan.table`).

        Raises:
            InputError: `renumber` is True, but the plan was made without.
        """
        if renumber and not self.renumber:
            raise InputError(
                "evict: plan: got a paged plan made without renumber, wanted one made with renumber=True to "
                "turn keys: blocks that sequences share might be written"
            )
        row_of = {shift: row for row, shift in enumerate(self.plan.shifts)} if renumber else {}
        rows = []
        for run, slot in zip(self.plan.runs, self.slots, strict=True):
            rotation = row_of.get(run.shift, -1)
            if slot != run.target or rotation >= 0:
                rows.append((run.sequence, slot, run.target, run.count, rotation))
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), 5)


def plan_paged_eviction(
    plan: EvictionPlan, block_tables: Sequence[Sequence[int]], block_size: int, *, renumber: bool = False
) -> PagedPlan:
    """Plans an eviction from a paged cache.

    Args:
        plan: The plan of the tokens to remove.
        block_tables: The blocks of each sequence, at least as many as its length needs. Further blocks stay
            at the end of the table.
        block_size: The number of tokens of a block.
        renumber: Whether keys will be rotated. In that case blocks after a hole are written even if their
            rows are not moved.

    Raises:
        InputError: A table is too short, a block is negative or twice in a table, or a block that would be
            written belongs to another sequence too.
    """
    require_plan(plan, EvictionPlan)
    require_whole("evict", "block_size", block_size)
    tables_wanted = "a list of blocks per sequence"
    block_tables = [
        whole_numbers("evict", f"block_tables[{sequence}]", table, "whole numbers, one per block")
        for sequence, table in enumerate(items_of("evict", "block_tables", block_tables, tables_wanted))
    ]
    if block_size < 1:
        raise InputError(f"evict: block_size: got {block_size}, wanted 1 or more")
    if len(block_tables) != plan.batch:
        raise InputError(f"evict: block_tables: got {len(block_tables)} sequences, wanted {plan.batch}")
    users: Counter[int] = Counter()
    for sequence, (table, length) in enumerate(zip(block_tables, plan.lengths, strict=True)):
        if len(table) < -(-length // block_size):
            raise InputError(
                f"evict: block_tables[{sequence}]: got {len(table)} blocks, wanted at least "
                f"{-(-length // block_size)} for {length} tokens"
            )
        if min(table, default=0) < 0 or len(set(table)) < len(table):
            raise InputError(
                f"evict: block_tables[{sequence}]: got {list(table)}, wanted different blocks, 0 or above"
            )
        users.update(table)
    tables, working, slots = [], [], []
    for sequence, table in enumerate(block_tables):
        new, kept, own_slots = _plan_sequence(plan, sequence, table, block_size, users, renumber=renumber)
        tables.append(new)
        working.append(kept)
        slots += own_slots
    still_used = {block for table in tables for block in table}
    width = max(map(len, working), default=0)
    return PagedPlan(
        plan=plan,
        block_size=block_size,
        block_tables=tuple(tables),
        freed_blocks=tuple(sorted(users.keys() - still_used)),
        working_tables=torch.tensor(
            [[*table, *[0] * (width - len(table))] for table in working], dtype=torch.int64, device="cpu"
        ).reshape(len(working), width),
        slots=tuple(slots),
        renumber=renumber,
    )


def _plan_sequence(
    plan: EvictionPlan,
    sequence: int,
    table: Sequence[int],
    block_size: int,
    users: Counter[int],
    *,
    renumber: bool,
) -> tuple[tuple[int, ...], list[int], list[int]]:
    """A sequence's final table, its working table, and the source rows of its runs in the working table."""
    runs = [run for run in plan.runs if run.sequence == sequence]
    kept_places = sorted(
        {
            place
            for run in runs
            for place in range(run.source // block_size, _last(run.source, run.count, block_size))
        }
    )
    rank = {place: number for number, place in enumerate(kept_places)}
    kept = [table[place] for place in kept_places]
    slots = [rank[run.source // block_size] * block_size + run.source % block_size for run in runs]
    for run, slot in zip(runs, slots, strict=True):
        if slot != run.target or (renumber and run.shift):
            for place in range(run.target // block_size, _last(run.target, run.count, block_size)):
                if users[kept[place]] > 1:
                    raise InputError(
                        f"evict: block_tables[{sequence}]: block {kept[place]} would be written and is "
                        "another sequence's too; give this sequence a copy of it first"
                    )
    used = -(-plan.lengths[sequence] // block_size)
    needed = -(-plan.new_lengths[sequence] // block_size)
    return (*kept[:needed], *table[used:]), kept, slots


def _last(first: int, count: int, block_size: int) -> int:
    """The index after the last block that contains any of the rows [first, first + count)."""
    return (first + count - 1) // block_size + 1
