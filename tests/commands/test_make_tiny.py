"""`vrthinker make-tiny`."""

from __future__ import annotations

from pathlib import Path

import heavy  # noqa: F401
import pytest
from cli_run import vrthinker
from full_disk import full_at

from vrthinker.engine.hf import tiny
from vrthinker.episode.settings import PROMPTS_FOLDER


def test_make_tiny_writes_a_judge_of_either_family(tmp_path: Path) -> None:
    for family in ("qwen2.5-vl", "qwen3-vl"):
        done = vrthinker("make-tiny", tmp_path / family, "--family", family)
        assert done.code == 0, done.err
        assert done.out.strip() == str(tmp_path / family)
        assert {"config.json", "model.safetensors", "tokenizer.json", "vrthinker.json"} <= {
            path.name for path in (tmp_path / family).iterdir()
        }


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with full_at(5000):
        done = vrthinker("make-tiny", tmp_path / "tiny")
    assert (done.code, done.out) == (1, "")
    assert "cannot be written (File too large); raise the limit of file sizes" in done.line


def test_prompts_that_cannot_be_written_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_the_way(out: Path, *_: object, **__: object) -> Path:
        (out / PROMPTS_FOLDER).touch()
        return out

    monkeypatch.setattr(tiny, "make_tiny", in_the_way)
    done = vrthinker("make-tiny", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.line == f"vrthinker: {tmp_path}: cannot be written (File exists); name another"


def test_a_number_of_layers_is_checked(tmp_path: Path) -> None:
    done = vrthinker("make-tiny", tmp_path / "deep", "--layers", 4)
    assert done.code == 0
    assert '"num_hidden_layers": 4' in (tmp_path / "deep" / "config.json").read_text("utf-8")
    refused = vrthinker("make-tiny", tmp_path / "none", "--layers", 0)
    assert (refused.code, refused.out) == (2, "")
    assert refused.line == "vrthinker: --layers: got 0, allowed: 1 to 64"
