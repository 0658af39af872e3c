"""`vrthinker bench` checks that an op's versions agree, and times them side by side."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vrthinker.commands.options import announce, check_writable, option
from vrthinker.errors import InputError, unwritable

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class BenchCommand:
    """Time the versions of an op side by side, after checking that they agree.

    vrthinker bench patchify --plot patchify.png
    """

    op: Annotated[tyro.conf.Positional[str | None], option("[OP]")] = None
    """The op to measure. All of them by default."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The device of the tensors."""
    json: Annotated[tuple[Path, ...] | None, option("[FILE]")] = None
    """Print the rows as JSON lines instead of a table, or print a table and write the rows to this file."""
    plot: Annotated[Path | None, option("FILE")] = None
    """Draw the rows into a .png, .svg or .pdf file. This needs matplotlib (the train extra)."""
    out: Annotated[Path | None, option("FILE")] = None
    """Append the rows to this JSONL file, with machine, versions, commit and command."""
    rounds: Annotated[int, option("N")] = 25
    """The number of timings of each competitor. 25 by default."""
    seed: Annotated[int | None, option("N")] = None
    """The seed of the random data. Taken from the clock by default; the row contains it."""
    threads: Annotated[int | None, option("N")] = None
    """The number of CPU threads. torch's number by default."""

    def run(self) -> int:
        """Measures. If a result differs from the reference's, that is an error (exit 1)."""
        self._check()
        announce("loading torch, then measuring")
        rows = []
        for row in self._measure():
            rows.append(row)
            self._show(row)
            if self.out is not None:
                from vrthinker.records.provenance import append_row

                append_row(self.out, row)
        if self.json:
            from vrthinker.records.files import replace_file

            replace_file(self.json[0], "".join(map(_json_line, rows)).encode())
        if self.plot is not None:
            from vrthinker.report.bench_plot import write_plot

            try:
                write_plot(rows, self.plot)
            except OSError as error:
                raise unwritable(f"--plot: {self.plot}", error, "give another file") from None
        return 0

    def _check(self) -> None:
        """Refuses bad options before anything is measured."""
        from vrthinker.kernels import ENVIRONMENT_VARIABLE, benchmarked_ops, requested_version

        ops = benchmarked_ops()
        if self.op is not None and self.op not in ops:
            raise InputError(f"bench: got {self.op!r}, allowed: " + ", ".join(ops))
        if self.rounds < 5:
            raise InputError(f"--rounds: got {self.rounds}, allowed: 5 or more (percentiles need them)")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads: got {self.threads}, allowed: at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"--seed: got {self.seed}, allowed: 0 to 2**63 - 1")
        if self.json is not None and len(self.json) > 1:
            raise InputError(f"--json: got {len(self.json)} files, allowed: one, or none to print the rows")
        if requested_version() is not None:
            raise InputError(f"bench: {ENVIRONMENT_VARIABLE} is set; unset it to compare the versions")
        if self.plot is not None:
            from vrthinker.report.bench_plot import check_plot

            check_plot(self.plot)
        for name, path in (("--json", self.json[0] if self.json else None), ("--out", self.out)):
            if path is not None:
                check_writable(name, path)
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise InputError("--device: got cuda, but torch sees no CUDA device here")

    def _measure(self) -> Iterator[dict[str, Any]]:
        import time

        import torch

        from vrthinker.kernels import benchmarked_ops
        from vrthinker.kernels.measure import measure_op

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        seed = time.time_ns() % 2**31 if self.seed is None else self.seed
        for op in benchmarked_ops() if self.op is None else (self.op,):
            yield from measure_op(op, self.device, rounds=self.rounds, seed=seed)

    def _show(self, row: dict[str, Any]) -> None:
        from vrthinker.kernels.measure import format_row

        sys.stdout.write(_json_line(row) if self.json == () else format_row(row) + "\n")
        sys.stdout.flush()


def _json_line(row: dict[str, Any]) -> str:
    import json

    return json.dumps(row, allow_nan=False) + "\n"
