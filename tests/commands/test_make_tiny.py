"""`vrthinker make-tiny`."""

from __future__ import annotations

from pathlib import Path

import heavy  # noqa: F401
from cli_run import vrthinker


def test_make_tiny_writes_a_judge_of_either_family(tmp_path: Path) -> None:
    for family in ("qwen2.5-vl", "qwen3-vl"):
        done = vrthinker("make-tiny", tmp_path / family, "--family", family)
        assert done.code == 0, done.err
        assert done.out.strip() == str(tmp_path / family)
        assert {"config.json", "model.safetensors", "tokenizer.json", "vrthinker.json"} <= {
            path.name for path in (tmp_path / family).iterdir()
        }
