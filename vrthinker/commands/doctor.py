"""`vrthinker doctor`: what this machine has and lacks, and how far a model's numbers drift."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vrthinker.commands.options import Flag, option
from vrthinker.errors import InputError


@dataclass(frozen=True)
class DoctorCommand:
    """Say what this machine has, and what is missing for what; or how far a model's numbers drift.

    vrthinker doctor
    vrthinker doctor --numerics nano
    """

    numerics: Annotated[str | None, option("M")] = None
    """Instead: judge some pairs with this model in every memory mode, and compare the log-probabilities that
    were sampled with those of training's packed forward."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """With --numerics: a pairs file. Pairs of the synthetic world by default."""
    limit: Annotated[int, option("N")] = 16
    """With --numerics: how many pairs. 16 by default."""
    device: Annotated[str | None, option("DEVICE")] = None
    """With --numerics: cpu, cuda, cuda:1. A GPU where there is one by default."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, option("DTYPE")] = None
    """With --numerics: float32 or bfloat16. bfloat16 on a GPU, float32 on a CPU by default."""
    json: Flag = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Examines the machine; 1 if judging cannot work here."""
        from vrthinker.doctor import report as doctor

        if self.numerics is None:
            options = {"--pairs": self.pairs, "--device": self.device, "--dtype": self.dtype}
            if unused := [name for name, value in options.items() if value is not None]:
                raise InputError(f"{unused[0]}: allowed only with --numerics MODEL")
            return doctor.main(as_json=self.json)
        if self.limit < 1:
            raise InputError(f"--limit: got {self.limit}, allowed: at least 1")
        report = doctor.numerics(self.numerics, self.pairs, self.limit, device=self.device, dtype=self.dtype)
        if self.json:
            sys.stdout.write(report.as_json() + "\n")
        else:
            doctor.print_numerics(report)
        return 0
