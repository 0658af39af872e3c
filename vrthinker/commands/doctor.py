"""`vrthinker doctor` reports what this machine has and lacks, and measures a model's numbers and readers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vrthinker.commands.options import Flag, announce, check_device, option
from vrthinker.errors import InputError


@dataclass(frozen=True)
class DoctorCommand:
    """Report what this machine has and lacks, and what for; how far a model's numbers drift; or who decodes.

    vrthinker doctor

    vrthinker doctor --numerics nano

    vrthinker doctor --readers
    """

    numerics: Annotated[str | None, option("M")] = None
    """Instead, compare this model's log-probabilities in sampling and in training, in every memory mode."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """With --numerics: a pairs file. Pairs of the synthetic world by default."""
    limit: Annotated[int, option("N")] = 16
    """With --numerics: the number of pairs. 16 by default."""
    device: Annotated[str | None, option("DEVICE")] = None
    """With --numerics: cpu, cuda, cuda:1. By default a GPU if there is one."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, option("DTYPE")] = None
    """With --numerics: float32 or bfloat16. bfloat16 on a GPU, float32 on a CPU by default."""
    readers: Flag = False
    """Instead, measure NVIDIA DALI beside the CPU's reader, and keep the result for --reader auto."""
    json: Flag = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Examines the machine; returns 1 if judging cannot work here."""
        from vrthinker.doctor import report as doctor

        if self.readers:
            if self.numerics is not None:
                raise InputError("--readers: got --numerics too, allowed: one of them")
            return self._measure_readers()
        if self.numerics is None:
            options = {"--pairs": self.pairs, "--device": self.device, "--dtype": self.dtype}
            if unused := [name for name, value in options.items() if value is not None]:
                raise InputError(f"{unused[0]}: allowed only with --numerics MODEL")
            announce("examining this machine: importing its packages takes some seconds")
            return doctor.main(as_json=self.json)
        if self.limit < 1:
            raise InputError(f"--limit: got {self.limit}, allowed: at least 1")
        check_device(self.device)
        announce(f"loading {self.numerics}")
        report = doctor.numerics(self.numerics, self.pairs, self.limit, device=self.device, dtype=self.dtype)
        if self.json:
            sys.stdout.write(report.as_json() + "\n")
        else:
            doctor.print_numerics(report)
        return 0

    def _measure_readers(self) -> int:
        """Measures, keeps the result, and prints it."""
        from vrthinker.doctor.readers import kept, measure, render
        from vrthinker.video.reader_times import times_file

        with kept() as keep:
            times = measure(announce)
            if self.json:
                sys.stdout.write(times.model_dump_json(indent=2) + "\n")
            else:
                from rich.console import Console

                Console().print(render(times))
            keep(times)
        announce(f"kept in {times_file()}; --reader auto decides by it from now on")
        return 0
