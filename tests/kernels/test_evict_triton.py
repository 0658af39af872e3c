"""The Triton version of `evict` under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("evict_triton_worker.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (pip install triton)")
def test_triton_equals_the_reference_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "VRTHINKER_KERNELS": "triton"}
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "48 evictions are equal"
