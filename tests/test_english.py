"""The English of docstrings: an argument is explained by a noun phrase that names it.

"Seed of the sampling." says what an argument is. "Of the sampling.", "Whose." and "See there." make a reader
look for the noun elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_HANGING = re.compile(r"^\s+\w+: (See|As|Of|Likewise|Whose|And)\b")
_COMMANDS = re.compile(r'^\s+"""(See|As|Of|Likewise|Whose|And)\b')
"""The docstring under a field of a command is its help text."""


def hanging_lines(folders: tuple[str, ...] = ("vrthinker", "kernels")) -> list[str]:
    """The lines `file:line: text` that explain something by a genitive or a pointer."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (ROOT / "vrthinker" / "kernels") in path.parents:  # the link to kernels/
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if _HANGING.match(line) or _COMMANDS.match(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return found


def test_a_docstring_names_what_an_argument_is() -> None:
    assert hanging_lines() == []


def test_hanging_lines_are_found() -> None:
    assert _HANGING.match("        seed: Of the sampling.")
    assert _HANGING.match("    value: Likewise.")
    assert _COMMANDS.match('    """Of the weights."""')
    assert not _HANGING.match("        seed: The seed of the sampling.")
    assert not _HANGING.match("        order: Ascending.")
