"""The Triton version of `grpo_loss`: equal to the reference under the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("grpo_loss_triton_worker.py")


@pytest.mark.multi_process
def test_interpreted_kernels_agree_with_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("TRITON", "VRTHINKER"))
    }
    environment["PYTHONPATH"] = str(WORKER.parents[1])
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, str(WORKER)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n")
