"""The plan of the rooms in docs/architecture.md is true: who imports whom; and no imports go in a circle.

Every import counts, also those inside functions and those for type checkers only.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLAN = ROOT / "docs" / "architecture.md"
GROUND = {"bounded_files", "errors", "limits", "progress", "visibility", "_version"}
"""Every room may import these."""

pytestmark = pytest.mark.skipif(not PLAN.exists(), reason="needs the source tree")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; kernels by the name that they are installed under."""
    found = {}
    for folder, package in (("vrthinker", "vrthinker"), ("kernels", "vrthinker.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder)
            if folder == "kernels" or inside.parts[0] != "kernels":
                parts = [part for part in inside.with_suffix("").parts if part != "__init__"]
                found[".".join([package, *parts])] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's own modules that a module imports."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                target = full if full in known else str(node.module)
                if target in known and target != name:
                    yield target
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known and alias.name != name)


@functools.cache
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports_of(name, path, known)) for name, path in known.items()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def planned() -> dict[str, set[str]]:
    """The table of docs/architecture.md, top to bottom: a room, and the rooms that it imports from."""
    text = PLAN.read_text("utf-8").partition("## Who imports whom")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \| (.*?) \|$", text, re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", imports)) for room, imports in rows}


def test_the_table_in_the_docs_is_what_the_code_imports() -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for module, imports in graph().items():
        seen[room_of(module)] |= {room_of(other) for other in imports} - {room_of(module)} - GROUND
    table = planned()
    rooms = set(seen) - GROUND - {"__main__"}
    assert set(table) == rooms, "docs/architecture.md, Who imports whom: a row for each room"
    for room in sorted(rooms):
        assert table[room] == seen[room], f"docs/architecture.md, Who imports whom: the row of {room}"
    assert not set().union(*(seen[room] for room in GROUND)) - GROUND, "the ground floor imports from above"


def test_a_room_imports_from_rooms_below_it_only() -> None:
    order = list(planned())
    for room, imports in planned().items():
        above = [other for other in imports if order.index(other) < order.index(room)]
        assert not above, f"{room} imports from above: {above}"


def test_no_imports_go_in_a_circle() -> None:
    imports = graph()
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " imports ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in sorted(imports[module]):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(imports):
        visit(module, ())


def test_train_holds_stages_and_the_loop_only() -> None:
    names = {path.name for path in (ROOT / "vrthinker" / "train").iterdir()} - {"__pycache__"}
    stages = {"cold_start.py", "rejection.py", "grpo.py"}
    traces = {"trace_sources.py", "traces.py", "world_traces.py", "teacher.py"}
    episodes = {"items.py", "trials.py", "replies.py", "rollouts.py"}
    grpo = {"grpo_settings.py", "grpo_batch.py", "grpo_logprobs.py"}
    shared = {"settings.py", "sft.py", "phases.py", "frame_phase.py", "held_out.py", "model.py"}
    assert names == {"__init__.py", *stages, *traces, *episodes, *grpo, *shared, "recipes", "loop", "plan"}


@pytest.mark.parametrize("above", ["train", "reward", "judge", "judge_file", "evals", "commands", "world"])
def test_the_policy_knows_nothing_of(above: str) -> None:
    for module, imports in graph().items():
        if room_of(module) == "policy":
            assert above not in {room_of(other) for other in imports}, module
