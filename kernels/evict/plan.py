"""The plan of an eviction, decided and checked on the host: which runs of tokens remain, and where they go.

A plan is made once per round boundary and used for every layer's keys and values, for token ids, embeddings,
positions, labels and masks. Invariant: all errors in spans are found here, before any tensor is written. A
plan has no tensor on a device, so making one never waits for a GPU.

Source: method section 3 (expiry removes whole frames; other tokens keep their order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from vrthinker.errors import InputError
from vrthinker.kernels.arguments import items_of, whole_numbers

Span = tuple[int, int]


@dataclass(frozen=True)
class Run:
    """Remaining tokens without a hole between them: `[source, source + count)` -> `[target, target + count)`.

    `shift` is the number by which their positions fall under renumbering: the sum of the positions that the
    spans before them free.
    """

    sequence: int
    source: int
    target: int
    count: int
    shift: int


@dataclass(frozen=True)
class EvictionPlan:
    """The tokens that remain in each sequence after an eviction.

    Attributes:
        lengths: The number of tokens of each sequence before.
        new_lengths: The number of tokens of each sequence after.
        runs: All remaining tokens, by sequence and in order. Runs before the first hole have source = target.
    """

    lengths: tuple[int, ...]
    new_lengths: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return len(self.lengths)

    @property
    def out_tokens(self) -> int:
        """The number of tokens of the longest sequence after the eviction."""
        return max(self.new_lengths, default=0)

    @property
    def moved(self) -> tuple[Run, ...]:
        """The runs after a hole, which have to be moved in place."""
        return tuple(run for run in self.runs if run.source != run.target)

    @cached_property
    def shifts(self) -> tuple[int, ...]:
        """The distinct shifts above 0, each of which has a row in the rotation table."""
        return tuple(sorted({run.shift for run in self.runs} - {0}))

    def table(self, *, in_place: bool, renumber: bool) -> torch.Tensor:
        """The runs as the op takes them.

        Args:
            in_place: Whether to omit runs that are neither moved nor rotated.
            renumber: Whether to fill the last column.

        Returns:
            For each run: sequence, source, target, count, and the row of its shift in `shifts` (-1: none),
            int64 `[runs, 5]` on the CPU.
        """
        row_of = {shift: row for row, shift in enumerate(self.shifts)} if renumber else {}
        rows = [
            (run.sequence, run.source, run.target, run.count, row_of.get(run.shift, -1))
            for run in (self.moved if in_place else self.runs)
        ]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), 5)

    def position_shifts(self, out_tokens: int | None = None) -> torch.Tensor:
        """The fall of each kept token's position under renumbering, int64 `[batch, out_tokens]`."""
        shifts = torch.zeros(
            self.batch,
            self.out_tokens if out_tokens is None else out_tokens,
            dtype=torch.int64,
            device="cpu",
        )
        for run in self.runs:
            shifts[run.sequence, run.target : run.target + run.count] = run.shift
        return shifts


def plan_eviction(
    spans: Sequence[Sequence[Span]],
    lengths: Sequence[int],
    *,
    freed_positions: Sequence[Sequence[int]] | None = None,
) -> EvictionPlan:
    """Plans an eviction.

    Args:
        spans: The ranges of tokens to remove in each sequence, as (start, end) with an exclusive end, in any
            order. Adjacent spans are allowed; empty spans do nothing.
        lengths: The number of tokens of each sequence.
        freed_positions: The number of positions that each span frees, for renumbering. A frame of 16 x 20
            patches has 320 tokens and 20 positions (M-RoPE): the temporal, height and width positions of all
            later tokens fall by 20. By default a span frees as many positions as it has tokens.

    Raises:
        InputError: A span is negative, overlaps another or lies outside its sequence, a length or a number
            of freed positions is negative, or the arguments do not have one entry per sequence and span.
    """
    spans = [
        _spans(f"spans[{sequence}]", own)
        for sequence, own in enumerate(items_of("evict", "spans", spans, "a list of spans per sequence"))
    ]
    lengths = whole_numbers("evict", "lengths", lengths, "a length per sequence")
    if freed_positions is not None:
        per_sequence = items_of("evict", "freed_positions", freed_positions, "a list of numbers per sequence")
        freed_positions = [
            whole_numbers("evict", f"freed_positions[{sequence}]", own, "a whole number per span")
            for sequence, own in enumerate(per_sequence)
        ]
    if len(spans) != len(lengths):
        raise InputError(f"evict: spans: got {len(spans)} sequences, wanted {len(lengths)}, one per length")
    numbers = [len(own) for own in spans]
    if freed_positions is not None and (got := [len(own) for own in freed_positions]) != numbers:
        raise InputError(
            f"evict: freed_positions: got {got} numbers per sequence, wanted {numbers}, one per span"
        )
    runs: list[Run] = []
    new_lengths: list[int] = []
    for sequence, (own, length) in enumerate(zip(spans, lengths, strict=True)):
        freed = [end - start for start, end in own] if freed_positions is None else freed_positions[sequence]
        target = _plan_sequence(sequence, _checked(sequence, own, freed, length), length, runs)
        new_lengths.append(target)
    return EvictionPlan(tuple(lengths), tuple(new_lengths), tuple(runs))


def require_plan(plan: object, kind: type) -> None:
    """Refuses what is no plan of a kind, `EvictionPlan` or `PagedPlan`."""
    if not isinstance(plan, kind):
        raise InputError(f"evict: plan: got {type(plan).__name__}, wanted {kind.__name__}")


def _spans(name: str, value: object) -> list[Span]:
    wanted = "(start, end) pairs of whole numbers"
    pairs = [whole_numbers("evict", name, pair, wanted) for pair in items_of("evict", name, value, wanted)]
    for pair in pairs:
        if len(pair) != 2:
            raise InputError(f"evict: {name}: got {tuple(pair)}, wanted {wanted}")
    return [(start, end) for start, end in pairs]


def _checked(
    sequence: int, spans: Sequence[Span], freed: Sequence[int], length: int
) -> list[tuple[int, int, int]]:
    """The non-empty spans in order, as (start, end, freed positions)."""
    if length < 0:
        raise InputError(f"evict: lengths[{sequence}]: got {length}, wanted 0 or more")
    checked: list[tuple[int, int, int]] = []
    for (start, end), positions in zip(spans, freed, strict=True):
        if not 0 <= start <= end <= length:
            raise InputError(
                f"evict: spans[{sequence}]: got [{start}, {end}), wanted a range within [0, {length})"
            )
        if positions < 0:
            raise InputError(f"evict: freed_positions[{sequence}]: got {positions}, wanted 0 or more")
        if start < end:
            checked.append((start, end, positions))
        elif positions:
            raise InputError(
                f"evict: freed_positions[{sequence}]: got {positions} for [{start}, {end}), wanted 0: it is "
                "empty"
            )
    checked.sort()
    for (start, end, _), (next_start, next_end, _) in pairwise(checked):
        if next_start < end:
            raise InputError(
                f"evict: spans[{sequence}]: got [{start}, {end}) and [{next_start}, {next_end}), wanted "
                "ranges that do not overlap"
            )
    return checked


def _plan_sequence(sequence: int, spans: list[tuple[int, int, int]], length: int, runs: list[Run]) -> int:
    """Appends the runs between spans, and returns the new length."""
    source = target = shift = 0
    for start, end, positions in [*spans, (length, length, 0)]:
        if start > source:
            runs.append(Run(sequence, source, target, start - source, shift))
            target += start - source
        source, shift = end, shift + positions
    return target
