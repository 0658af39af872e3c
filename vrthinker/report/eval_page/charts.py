"""Bars with intervals, as the page draws them: places in percent, so that they stretch with the page.

Invariant: a value that is missing has no bar, and an interval is never drawn outside of the axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """One bar, from 0 to 1 of a share.

    Attributes:
        name: What it is about.
        value: The length in percent; None without a value.
        low: The lower end of the interval in percent; None without one.
        high: The upper end of the interval in percent.
        mark: A value to compare with, in percent; None for none.
        text: The number with its interval.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    mark: float | None
    text: str


def bar(name: str, estimate: Mapping[str, Any], mark: float | None = None) -> Bar:
    """The bar of a share with its interval.

    Args:
        name: What it is about.
        estimate: `value`, `low`, `high`, `n`.
        mark: A share to compare with.
    """
    value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
    return Bar(
        name=name,
        value=_percent(value),
        low=None if high is None else _percent(low),
        high=None if low is None else _percent(high),
        mark=_percent(mark),
        text=spelled(estimate),
    )


def spelled(estimate: Mapping[str, Any]) -> str:
    """A number with its interval and the number of items, as text."""
    value, low, high, n = (estimate.get(key) for key in ("value", "low", "high", "n"))
    if value is None:
        return "-"
    interval = "" if low is None or high is None else f" [{low:z.3f}, {high:z.3f}]"
    return f"{value:z.3f}{interval}" + (f", n = {n}" if n is not None else "")


def length_bars(bins: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The bars of accuracy by length, one for each range."""
    return [bar(f"{_short(one['from'])} to {_short(one['to'])}", one) for one in bins]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or float(value).is_integer() else f"{value:.1f}"


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * min(1.0, max(0.0, float(value)))
