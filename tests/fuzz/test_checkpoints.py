"""Damaged and hostile checkpoints: refused in one line, or judged with, within time and memory."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip
from forks import Outcomes
from fuzz_counts import record

from vrthinker.engine.hf.tiny import make_tiny

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 10**6, 2**31, 2**63, 10**300, 0.0, 1e-300, 1e300, float("nan")),
    *("", "x", "\0", "a" * 100_000, "../../etc/passwd", "https://localhost:9/x", "os:system", "<|im_end|>"),
    *([], [0], [[]], [1] * 10_000, {}, {"a": {}}, {"type": "Replace"}),
)
KEYS = (
    "auto_map",
    "model_type",
    "tokenizer_class",
    "architectures",
    "rope_parameters",
    "quantization_config",
)


def slots(value: object) -> list[tuple[Any, Any]]:
    """Every place of nested JSON that can be given another value, as (container, key)."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        inner = pending.pop()
        if isinstance(inner, dict | list):
            keys = list(inner) if isinstance(inner, dict) else list(range(min(len(inner), 8)))
            found += [(inner, key) for key in keys]
            pending += [inner[key] for key in keys]
    return found


def mutate(folder: Path, rng: random.Random) -> str:
    """Damages one file, and says how."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    path = folder / rng.choice(names)
    kind = rng.randrange(10)
    if path.suffix == ".safetensors" or kind < 2:
        data = bytearray(path.read_bytes())
        at = rng.randrange(min(len(data), 4096))
        if kind % 3 == 0:
            del data[at:]
        elif kind % 3 == 1:
            data[at : at + 8] = rng.randbytes(8)
        else:
            data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        return f"{path.name}: byte {at}"
    if kind == 2:
        path.unlink()
        return f"{path.name}: missing"
    if kind == 3:
        depth = rng.choice((60, 1000, 100_000))
        path.write_text('{"a":' * depth + "1" + "}" * depth)
        return f"{path.name}: nested"
    whole = json.loads(path.read_text("utf-8"))
    said = []
    for _ in range(rng.choice((1, 1, 1, 3))):
        places = slots(whole)
        container, key = rng.choice(places) if places else (whole, "a")
        value = rng.choice(VALUES)
        if kind == 4 and isinstance(whole, dict):
            container, key = whole, rng.choice(KEYS)
        if kind == 5 and isinstance(container, dict):
            container.pop(key, None)
        elif kind == 6 and isinstance(container, dict):
            container[f"{key}_"] = value
        else:
            container[key] = value
        said.append(f"{key}={str(value)[:40]!r}")
    path.write_text(json.dumps(whole))
    return f"{path.name}: {', '.join(said)}"


def check(fuzzed: Outcomes, tmp_path: Path, count: int, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    sound = [
        make_tiny(tmp_path / family, family, layers=1)  # type: ignore[arg-type]
        for family in ("qwen2.5-vl", "qwen3-vl")
    ]
    for folder in sound:
        (folder / "vrthinker.json").write_text('{"episode": {"window": 1}, "note": "a note"}')
    (sound[1] / "vrthinker.json").write_text('{"resize": {"patch_size": 16}}')
    clips = [str(make_clip(tmp_path / f"{name}.mp4", 4, size=(64, 64))) for name in ("a", "b")]
    kinds: Counter[str] = Counter()
    for number in range(count):
        folder = tmp_path / "model"
        shutil.copytree(sound[number % 2], folder)
        damage = mutate(folder, rng)
        arguments = {"folder": str(folder), "first": clips[0], "second": clips[1]}
        (outcome,) = fuzzed([{"job": "fuzz_worker:load_checkpoint", "arguments": arguments}])
        assert "result" in outcome, f"{damage}: {outcome}"
        assert outcome["result"]["events"] == [], f"{damage}: {outcome}"
        kinds[outcome["result"]["kind"]] += 1
        shutil.rmtree(folder)
    return kinds


def test_a_few_damaged_checkpoints(fuzzed: Outcomes, tmp_path: Path) -> None:
    assert sum(check(fuzzed, tmp_path, 4, seed=1).values()) == 4


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_three_hundred_damaged_checkpoints(fuzzed: Outcomes, tmp_path: Path) -> None:
    kinds = check(fuzzed, tmp_path, 300, seed=20261129)
    assert kinds["refused"] > 50
    assert sum(kinds.values()) - kinds["refused"] > 20, "harmless changes are no reason to refuse"
    record("checkpoints", dict(kinds))
