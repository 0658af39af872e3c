"""The Triton versions of the ops: equal to their references under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("triton_interpreted_worker.py")
OPS = ["evict", "group_advantage", "grpo_loss"]

pytestmark = [
    pytest.mark.multi_process,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton (pip install triton)"
    ),
]


def compare(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """What the worker says of each op."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("TRITON", "VRTHINKER"))
    }
    environment |= {
        "PYTHONPATH": str(WORKER.parents[1]),
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_INTERPRET": "1",
        "VRTHINKER_KERNELS": "triton",
    }
    done = subprocess.run(
        [sys.executable, str(WORKER), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {told["op"]: told for told in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All ops in one process."""
    return compare(tmp_path_factory.mktemp("triton"), *OPS)


@pytest.mark.parametrize(("op", "least"), [("evict", 19), ("group_advantage", 9), ("grpo_loss", 12)])
def test_interpreted_kernels_agree_with_the_reference(
    compared: dict[str, dict[str, Any]], op: str, least: int
) -> None:
    told = compared[op]
    assert told["traceback"] is None, f"seed {told['seed']}: {told['traceback']}"
    assert told["equal"] >= least


@pytest.mark.slow  # the interpreter is slow
@pytest.mark.parametrize(("op", "least"), [("evict", 58), ("group_advantage", 64), ("grpo_loss", 24)])
def test_interpreted_kernels_agree_with_the_reference_in_every_combination(
    tmp_path: Path, op: str, least: int
) -> None:
    told = compare(tmp_path, "--all", op)[op]
    assert told["traceback"] is None, f"seed {told['seed']}: {told['traceback']}"
    assert told["equal"] >= least
