"""`vrthinker doctor` reports what this machine has and lacks, and how far a model's numbers drift."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vrthinker.commands.options import Flag, announce, check_device, option
from vrthinker.errors import InputError


@dataclass(frozen=True)
class DoctorCommand:
    """Report what this machine has and lacks, and what for; or how far a model's numbers drift.

    vrthinker doctor

    vrthinker doctor --numerics nano
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
    json: Flag = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Examines the machine; returns 1 if judging cannot work here."""
        from vrthinker.doctor import report as doctor

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
