"""The rows of `vrthinker bench` as one picture, with a panel per case and a bar per competitor."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vrthinker.errors import InputError

FORMATS = (".png", ".svg", ".pdf")
_LOG_FROM = 30
"""Ratio of the slowest to the fastest competitor from which a panel has a logarithmic axis."""


def check_plot(path: Path) -> None:
    """Checks, before anything is measured, that `write_plot` can draw.

    Raises:
        InputError: matplotlib is missing, the file's ending names no format that is drawn, or its folder is
            missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--plot: got {path}, wanted a file that ends in " + ", ".join(FORMATS))
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: matplotlib is not installed: pip install 'vrthinker[train]'")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"--plot: got {path}, allowed: a file in a folder that exists")


def write_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the median milliseconds of every competitor, with whiskers from p20 to p80.

    Args:
        rows: The rows of `vrthinker.kernels.measure.measure`, at least one.
        path: The picture to write; its ending is one of `FORMATS`.
    """
    from matplotlib.figure import Figure

    heights = [1.1 + 0.32 * (len(row["milliseconds"]) - 1) for row in rows]
    figure = Figure(figsize=(9, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, row in zip(panels, rows, strict=True):
        _panel(axes, row)
    figure.supxlabel("milliseconds (bar: median, whisker: p20 to p80)", fontsize=10)
    figure.savefig(path, dpi=150)


def _panel(axes: Any, row: Mapping[str, Any]) -> None:
    from vrthinker.kernels.measure import COPY

    timings = dict(row["milliseconds"])
    bound = timings.pop(COPY)["p50"]
    names = list(timings)
    medians = [timings[name]["p50"] for name in names]
    below = [timings[name]["p50"] - timings[name]["p20"] for name in names]
    above = [timings[name]["p80"] - timings[name]["p50"] for name in names]
    colors = ["#b0b7c3" if name == "reference" else "#3b6fb6" for name in names]
    whiskers = {"ecolor": "#222222", "capsize": 3, "elinewidth": 1}
    axes.barh(names, medians, xerr=[below, above], color=colors, height=0.65, error_kw=whiskers)
    axes.axvline(bound, color="#c44e52", linestyle="--", linewidth=1.2, label="copy_ of the same bytes")
    everything = [*medians, bound]
    if max(everything) > _LOG_FROM * min(everything):
        axes.set_xscale("log")
        axes.set_xlim(min(everything) / 2, max(everything) * 3)
        axes.set_xlabel("logarithmic", loc="right", fontsize=8)
    else:
        axes.set_xlim(0, max(everything) * 1.2)
    for y, name in enumerate(names):
        label = f"{timings[name]['p50']:.3g} ms"
        axes.annotate(
            label, (timings[name]["p80"], y), xytext=(6, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    count = row["threads"]
    threads = f", {count} thread{'' if count == 1 else 's'}" if row["device"] == "cpu" else ""
    axes.set_title(f"{row['benchmark']}: {row['case']} ({row['device']}{threads})", loc="left", fontsize=10)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
