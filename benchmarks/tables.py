"""Tables in Markdown and numbers in them, as the README and the pages have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def number(value: float | None) -> str:
    """Three digits, without a leading zero."""
    if value is None:
        return "none"
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def interval(estimate: Mapping[str, float]) -> str:
    """A value with its 95 % interval."""
    return f"{number(estimate['value'])} [{number(estimate['low'])}, {number(estimate['high'])}]"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *lines))
