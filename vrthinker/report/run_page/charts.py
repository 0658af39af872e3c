"""Curves as the page draws them: which metrics share a chart, and the paths of their lines.

Invariants: a value that is not finite, and a stretch of steps without values, is a gap in the line. A value
between two gaps is a dot. Long curves are thinned so that the highest and the lowest value of every stretch
stay.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

WIDTH, HEIGHT = 1000, 300
"""The size of the coordinate system that paths are drawn in. It is stretched to the page."""
_MOST_POINTS, _MOST_DOTS = 700, 30
_SMOOTHED_FROM, _NOISY = 60, 6.0
"""The number of values, and their variation, from which a curve has a running mean beside it."""
_LOG_FROM = 200.0
"""The ratio of the largest to the smallest value from which a chart of positive values is logarithmic."""
_GAP = 3.0
"""Points that are further apart than this, in units of the usual distance, are not joined."""

SECTIONS: tuple[tuple[str, str], ...] = (
    (r"eval/", "Held-out pairs"),
    (r"loss/|sft/|frames/", "Learning"),
    (r"reward/|advantage/", "Rewards"),
    (r"rollout/|sample/|episode/", "Rollouts"),
    (r"kl/|policy/|ratio/|clip/", "Policy"),
    (r"optim/", "Optimizer"),
    (r"perf/", "Speed"),
    (r"", "Other metrics"),
)
"""The beginning of a metric's name -> the page's section, in the order of the page."""

SHARED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("overall accuracy: of all pairs (tau), of pairs without ties (diff)", ("eval/oa_tau", "eval/oa_diff")),
    ("accuracy per dimension", ("eval/ta_accuracy", "eval/vq_accuracy", "eval/mq_accuracy")),
    ("share of verdicts, and of well-formed episodes", ("eval/verdicts_share", "eval/format_well_formed")),
)
"""Metrics that have a chart together, with its title."""
_TOGETHER = re.compile(r"(reward)/")
"""Metrics of this kind have one chart together, if there are not too many."""
_MOST_SERIES = 6

Points = list[tuple[int, float | None]]


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: The metric's name.
        points: (step, value) by step; None for a value that is not finite.
        path: The line as an SVG path.
        smooth: A running mean as an SVG path; empty if the curve is short.
        dots: Its points as lines of no length, if there are few.
        band: The area of the intervals as an SVG path; empty without intervals.
        last: The last value, as text.
        missing: The number of values that are not finite.
    """

    name: str
    points: Points
    path: str
    smooth: str
    dots: str
    band: str
    last: str
    missing: int


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in percent, and its label."""

    place: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: The title.
        series: The lines.
        y_ticks: The marks of the vertical axis, placed from the top.
        x_ticks: The marks of the horizontal axis.
        borders: The places in percent where a phase ends.
        logarithmic: Whether the vertical axis is logarithmic.
    """

    title: str
    series: tuple[Series, ...]
    y_ticks: tuple[Tick, ...]
    x_ticks: tuple[Tick, ...]
    borders: tuple[float, ...]
    logarithmic: bool


Intervals = Mapping[str, Mapping[int, tuple[float, float]]]


def sections(
    lines: Sequence[Mapping[str, Any]], *, ends: Sequence[int] = (), intervals: Intervals | None = None
) -> list[tuple[str, list[Chart]]]:
    """The charts of a metrics file, by the sections of the page.

    Args:
        lines: The lines of the file (`read_metrics`).
        ends: The steps after which a phase ends.
        intervals: Metric -> step -> the ends of its interval.
    """
    points: dict[str, Points] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "time_seconds"):
                finite = value is not None and abs(value) < 1e300
                points.setdefault(name, []).append((line["step"], float(value) if finite else None))
    last = max((line["step"] for line in lines), default=0)
    first = min((line["step"] for line in lines), default=0)
    groups = _groups(sorted(points))
    found: list[tuple[str, list[Chart]]] = []
    for pattern, section in SECTIONS:
        mine = [group for group in groups if re.match(pattern, group[1][0])]
        groups = [group for group in groups if group not in mine]
        charts = [
            _chart(title, {n: points[n] for n in names}, (first, last), ends, intervals or {})
            for title, names in mine
        ]
        if charts:
            found.append((section, charts))
    return found


def _groups(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(title, metrics) of every chart."""
    left = list(names)
    groups: list[tuple[str, list[str]]] = []
    for title, shared in SHARED:
        here = [name for name in shared if name in left]
        if here:
            groups.append((title if len(here) > 1 else here[0], here))
            left = [name for name in left if name not in here]
    kinds = {match.group(1) for name in left if (match := _TOGETHER.match(name))}
    for kind in sorted(kinds):
        here = [name for name in left if name.startswith(f"{kind}/")]
        if 1 < len(here) <= _MOST_SERIES:
            groups.append((f"{kind}: its terms", here))
            left = [name for name in left if name not in here]
    return [*groups, *((name, [name]) for name in left)]


def _chart(
    title: str,
    points: Mapping[str, Points],
    steps: tuple[int, int],
    ends: Sequence[int],
    intervals: Intervals,
) -> Chart:
    values = [value for line in points.values() for _, value in line if value is not None]
    for name in points:
        values += [end for pair in intervals.get(name, {}).values() for end in pair]
    logarithmic = len(values) > 2 and min(values) > 0 and max(values) > _LOG_FROM * min(values)
    low, high = _range(values, logarithmic)
    first, last = steps

    def x(step: float) -> float:
        return (step - first) / max(last - first, 1) * WIDTH

    def y(value: float) -> float:
        if logarithmic:
            return HEIGHT * (1 - (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low)))
        return HEIGHT * (1 - (value - low) / (high - low))

    series = []
    for name, line in points.items():
        thinned = _thinned(_with_gaps(line))
        known = [value for _, value in line if value is not None]
        is_noisy = len(known) >= _SMOOTHED_FROM and _variation(known) > _NOISY
        series.append(
            Series(
                name=name,
                points=thinned,
                path=_path([(x(s), None if v is None else y(v)) for s, v in thinned]),
                smooth=_smooth_path(line, x, y) if is_noisy else "",
                dots="".join(f"M{x(s):.1f} {y(v):.1f}h0" for s, v in line if v is not None)
                if len(line) <= _MOST_DOTS
                else "",
                band=_band(intervals.get(name, {}), x, y),
                last="none" if not known else spelled(known[-1]),
                missing=len(line) - len(known),
            )
        )
    return Chart(
        title=title,
        series=tuple(series),
        y_ticks=tuple(Tick(y(v) / HEIGHT * 100, spelled(v)) for v in _ticks(low, high, logarithmic)),
        x_ticks=tuple(Tick(x(s) / WIDTH * 100, f"{s:,.0f}") for s in _step_ticks(first, last)),
        borders=tuple(x(end) / WIDTH * 100 for end in ends if first < end < last),
        logarithmic=logarithmic,
    )


def spelled(value: float) -> str:
    """A value as a label."""
    if abs(value) >= 1e4 and abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def _range(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if logarithmic:
        return low / 1.2, high * 1.2
    if low >= 0 and high <= 1.0001 and high - low > 0.02:
        return 0.0 if low < 0.4 else low - 0.1 * (high - low), min(1.02, high + 0.1 * (high - low))
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    bottom, top = low - margin, high + margin
    if 0.9 < high <= 1.0001:  # a share
        top = min(top, 1.02)
    return (0.0 if bottom < 0 <= low else bottom), top


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    if logarithmic:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        step = max(1, math.ceil(len(powers) / 5))
        return [10.0**power for power in powers][::step]
    distance = _nice((high - low) / 5)
    lowest, highest = math.ceil(low / distance), math.floor(high / distance + 1e-9)
    return [round(number * distance, 12) for number in range(lowest, highest + 1)]


def _step_ticks(first: int, last: int) -> list[float]:
    step = max(1.0, _nice((last - first) / 5))
    step = step if step.is_integer() else math.ceil(step)
    ticks = [number * step for number in range(math.ceil(first / step), math.floor(last / step) + 1)]
    return ticks or [float(first)]


def _nice(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below a positive number."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)


def _variation(values: Sequence[float]) -> float:
    """The way that a curve goes up and down, in units of its range: 1 if it only rises or only falls."""
    extent = max(values) - min(values)
    return sum(abs(b - a) for a, b in itertools.pairwise(values)) / extent if extent else 0.0


def _with_gaps(line: Points) -> Points:
    """The points, with a missing one in every stretch of steps that has no values."""
    steps = [step for step, _ in line]
    usual = median([b - a for a, b in itertools.pairwise(steps)] or [1])
    found: Points = []
    for step, value in line:
        if found and step - found[-1][0] > _GAP * usual:
            found.append((step - 1, None))
        found.append((step, value))
    return found


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """A line with gaps. A point without neighbours is a line of no length, which is drawn as a dot."""
    parts: list[str] = []
    run: list[tuple[float, float]] = []

    def end() -> None:
        if run:
            moves = " ".join(f"{a:.1f} {b:.1f}" for a, b in run[1:])
            parts.append(f"M{run[0][0]:.1f} {run[0][1]:.1f}" + (f"L{moves}" if moves else "h0"))
            run.clear()

    for place, value in points:
        if value is None:
            end()
            continue
        run.append((place, value))
    end()
    return "".join(parts)


def _smooth_path(line: Points, x: Any, y: Any) -> str:
    """A running mean over a fortieth of the curve, which does not reach over gaps."""
    width = max(3, len(line) // 40)
    smooth: Points = []
    recent: list[float] = []
    for step, value in _with_gaps(line):
        if value is None:
            recent.clear()
            smooth.append((step, None))
            continue
        recent.append(value)
        del recent[:-width]
        smooth.append((step, sum(recent) / len(recent)))
    return _path([(x(s), None if v is None else y(v)) for s, v in _thinned(smooth)])


def _band(ends: Mapping[int, tuple[float, float]], x: Any, y: Any) -> str:
    if len(ends) < 2:
        return ""
    steps = sorted(ends)
    up = [f"{x(s):.1f} {y(ends[s][1]):.1f}" for s in steps]
    down = [f"{x(s):.1f} {y(ends[s][0]):.1f}" for s in reversed(steps)]
    return f"M{' L'.join([*up, *down])}Z"


def _thinned(line: Points) -> Points:
    """At most about `_MOST_POINTS` points: the ends, and of each stretch the extremes and a missing one."""
    if len(line) <= _MOST_POINTS:
        return line
    size = math.ceil(len(line) / (_MOST_POINTS / 3))
    kept = {0, len(line) - 1}
    for start in range(0, len(line), size):
        places = range(start, min(start + size, len(line)))
        known = [place for place in places if line[place][1] is not None]
        missing = [place for place in places if line[place][1] is None]
        kept.update(missing[:1])
        if known:
            kept.add(min(known, key=lambda place: line[place][1] or 0.0))
            kept.add(max(known, key=lambda place: line[place][1] or 0.0))
    return [line[place] for place in sorted(kept)]
